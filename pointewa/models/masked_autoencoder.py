"""Point-MAE's pre-training: predict the points of masked patches from the visible patches of a cloud."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pointewa.models.backbone import PointTransformer, position_embedding
from pointewa.models.layers import Encoder, init_weights, pointwise
from pointewa.models.patch_embed import make_patches
from pointewa.models.presets import Architecture
from pointewa.ops import chamfer_distance, group


@dataclass(frozen=True)
class Reconstruction:
    """The visible, predicted and true points of clouds, by patch, in the coordinates of the clouds.

    Args:
        visible: points of the visible patches ``[B, V, K, 3]``.
        predicted: points predicted for the masked patches ``[B, M, K, 3]``.
        true: the points of the masked patches ``[B, M, K, 3]``, in the same order.
    """

    visible: Tensor
    predicted: Tensor
    true: Tensor


class MaskedAutoencoder(nn.Module):
    """Point-MAE's model for pre-training (Pang et al., ECCV 2022), with the parameter names of its checkpoints.

    Its trained encoder loads into the classifier (`pointewa.models.load_weights`). It differs from the published code
    in two ways. The mini-PointNet sees the visible patches only, whereas theirs sees all and drops the rest: that is
    less work, and the batch norms leak nothing about the masked patches. And all layers start from `init_weights`,
    whereas their decoder starts from other distributions.

    Args:
        architecture: of the encoder; its ``head`` is not used. The decoder has the same width and heads, and stochastic
            depth that rises to the same rate.
        mask_ratio: fraction of the patches that is masked; the number of patches is rounded down, and is the same for
            every cloud.
        decoder_depth: number of blocks of the decoder.

    Raises:
        ValueError: no patch would be masked, or none visible; a decoder without blocks.
    """

    def __init__(self, architecture: Architecture, mask_ratio: float = 0.6, decoder_depth: int = 4) -> None:
        super().__init__()
        arch = self.architecture = architecture
        self.mask_ratio = mask_ratio
        self.num_masked = int(mask_ratio * arch.num_groups) if 0 < mask_ratio < 1 else 0
        self.num_visible = arch.num_groups - self.num_masked
        if not self.num_masked:
            raise ValueError(
                f"mask_ratio must leave both masked and visible patches, got {mask_ratio} of {arch.num_groups} patches"
            )
        if decoder_depth < 1:
            raise ValueError(f"decoder_depth must be at least 1, got {decoder_depth}")
        self.MAE_encoder = PointTransformer(arch)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, arch.width))
        self.decoder_pos_embed = position_embedding(arch.width)
        self.MAE_decoder = _Decoder(arch.width, decoder_depth, arch.heads, arch.mlp_ratio, arch.drop_path)
        self.increase_dim = nn.Sequential(nn.Conv1d(arch.width, 3 * arch.group_size, 1))
        self.apply(init_weights)
        nn.init.trunc_normal_(self.mask_token, std=0.02)

    @property
    def blocks(self) -> Encoder:
        """The encoder's blocks, under the name that they have in the classifier."""
        return self.MAE_encoder.blocks

    def forward(self, points: Tensor) -> Tensor:
        """``points [B, P, 3] -> loss []``: the squared Chamfer distance on the masked patches, at least in float32.

        Which patches are masked is drawn anew at each call, also in evaluation mode.

        Raises:
            ValueError: a wrong shape or an empty cloud; in evaluation mode also non-finite values.
        """
        _, predicted, true, _ = self._predict(points, None)
        return chamfer_distance(predicted.flatten(0, 1), true.flatten(0, 1))

    def features(self, points: Tensor) -> Tensor:
        """``points [B, P, 3] -> features [B, 2 * width]``: maximum and mean over all patches' tokens, unmasked."""
        arch = self.architecture
        cut = make_patches(points, arch.num_groups, arch.group_size, check_finite=not self.training)
        x = self.MAE_encoder(cut.patches, cut.centers)
        return torch.cat([x.amax(1), x.mean(1)], dim=-1)

    @torch.no_grad()
    def reconstruct(self, points: Tensor, order: Tensor | None = None) -> Reconstruction:
        """Mask clouds and predict the masked patches, for pictures. Call ``eval()`` first, as for any prediction.

        Args:
            points: ``[B, P, 3]``.
            order: int64 ``[B, G]``, each row a permutation of the patches, of which the last ``num_masked`` are
                masked; drawn by `random_order` if None.

        Raises:
            ValueError: as `forward`.
        """
        visible, predicted, true, centers = self._predict(points, order)
        seen, masked = centers.unsqueeze(2).tensor_split([self.num_visible], dim=1)
        return Reconstruction(visible + seen, predicted + masked, true + masked)

    def _predict(self, points: Tensor, order: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Visible, predicted and true patches relative to their centres, and the centres, visible ones first."""
        arch, batch = self.architecture, len(points)
        cut = make_patches(points, arch.num_groups, arch.group_size, check_finite=not self.training)
        if order is None:
            order = random_order(batch, arch.num_groups, points.device)
        patches, centers = group(cut.patches, order), group(cut.centers, order)
        visible, true = patches.tensor_split([self.num_visible], dim=1)
        x = self.MAE_encoder(visible, centers[:, : self.num_visible])
        x = torch.cat([x, self.mask_token.expand(batch, self.num_masked, -1)], dim=1)  # (B, G, C)
        self.MAE_decoder.activation_checkpointing = self.blocks.activation_checkpointing
        x = self.MAE_decoder(x, self.decoder_pos_embed(centers), self.num_masked)
        predicted = pointwise(self.increase_dim[0], x).unflatten(-1, (arch.group_size, 3))  # (B, M, K, 3)
        return visible, predicted, true, centers


def random_order(batch: int, num_groups: int, device: torch.device | str) -> Tensor:
    """A random permutation of the patches for each cloud, int64 ``[batch, num_groups]``, all equally likely.

    Drawn for all clouds at once from torch's default generator of the device, without waiting for the device.
    """
    return torch.rand(batch, num_groups, device=device).argsort(1)


class _Decoder(Encoder):
    """Blocks, and a norm on the last tokens, which are those of the masked patches."""

    def __init__(self, width: int, depth: int, heads: int, mlp_ratio: float, drop_path: float) -> None:
        super().__init__(width, depth, heads, mlp_ratio, drop_path)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, position: Tensor, num_last: int) -> Tensor:
        """``[B, G, C], [B, G, C] -> [B, num_last, C]``."""
        return self.norm(super().forward(x, position)[:, -num_last:])
