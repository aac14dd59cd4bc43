"""Point-BERT's tokenizer: a discrete VAE that gives each patch of a cloud one code of a codebook."""

import math
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pointewa.models.edge_conv import EdgeConv
from pointewa.models.layers import at_least_float32, pointwise
from pointewa.models.masked_autoencoder import Reconstruction
from pointewa.models.patch_embed import PatchEncoder, make_patches
from pointewa.ops import chamfer_l1, knn

_NORM_GROUPS = 4
_NEIGHBORS = 4  # of a patch, itself included
_FINE = 4  # fine points around each coarse point, on a grid of 2 x 2
_GRID = 0.05  # half the side of that grid
_WIDEST, _MOST_POINTS = 2**14, 2**20  # a file may say anything; the weights do not depend on the number of patches
_MOST = {"codebook_size": 2**18, "num_groups": _MOST_POINTS, "group_size": _MOST_POINTS}


@dataclass(frozen=True)
class TokenizerSizes:
    """What defines a tokenizer; by default the published one, of 27,620,891 parameters.

    Args:
        num_groups: patches per cloud.
        group_size: points per patch, a multiple of 4.
        patch_width: width of the mini-PointNet's first layer.
        patch_out: width of its output.
        codebook_size: number of codes, a multiple of 4.
        codebook_width: width of a code.
        graph_width: width at the start of both graph networks, even; their layers have 2, 4, 4 and 8 times that.
        feature_width: width of what the decoder starts from, a multiple of 4.
        folding_width: width of the decoder's layers for single points; those for whole patches have twice that.

    Raises:
        ValueError: a field out of range.
    """

    num_groups: int = 64
    group_size: int = 32
    patch_width: int = 128
    patch_out: int = 256
    codebook_size: int = 8192
    codebook_width: int = 256
    graph_width: int = 128
    feature_width: int = 256
    folding_width: int = 512

    def __post_init__(self) -> None:
        factors = {"group_size": _FINE, "codebook_size": _NORM_GROUPS, "feature_width": _NORM_GROUPS, "graph_width": 2}
        for name in (one.name for one in fields(self)):
            value, factor = getattr(self, name), factors.get(name, 1)
            if not 1 <= value <= _MOST.get(name, _WIDEST):
                raise ValueError(f"{name} must be 1 to {_MOST.get(name, _WIDEST)}, got {value}")
            if value % factor:
                raise ValueError(f"{name} must be a multiple of {factor}, got {value}")
        if self.num_groups * self.group_size > _MOST_POINTS:
            raise ValueError(f"num_groups x group_size must be at most {_MOST_POINTS}, got {self.num_groups} x "
                             f"{self.group_size}")  # fmt: skip


_SMALL = {"patch_width": 64, "codebook_width": 128, "graph_width": 48, "feature_width": 128, "folding_width": 128}
# By the names of the point transformers' presets, whose patches they cut and, of "point_bert", "tiny" and "small",
# whose patch encoder they have.
TOKENIZERS = {
    "tiny": TokenizerSizes(num_groups=32, group_size=16, patch_out=192, codebook_size=256, **_SMALL),
    "small": TokenizerSizes(num_groups=64, group_size=16, patch_out=256, codebook_size=1024, **_SMALL),
    "point_mae": TokenizerSizes(),
    "point_bert": TokenizerSizes(),
}


class Autoencoding(NamedTuple):
    """What the tokenizer makes of clouds.

    Args:
        patches: ``[B, G, K, 3]``, relative to their centres.
        centers: ``[B, G, 3]``.
        logits: of the codes, ``[B, G, N]``.
        coarse: ``[B, G, K / 4, 3]``, relative to the centres.
        fine: ``[B, G, K, 3]``, relative to the centres.
    """

    patches: Tensor
    centers: Tensor
    logits: Tensor
    coarse: Tensor
    fine: Tensor


class Losses(NamedTuple):
    """The terms of the loss, each the mean over a batch ``[]``.

    Args:
        total: ``coarse + fine + kl_weight * divergence``.
        coarse: CD-L1 between the coarse points and the patch.
        fine: CD-L1 between the fine points and the patch.
        divergence: see `divergence_from_uniform`.
    """

    total: Tensor
    coarse: Tensor
    fine: Tensor
    divergence: Tensor


class DiscreteVAE(nn.Module):
    """Point-BERT's dVAE (Yu et al., CVPR 2022), with the parameter names of its checkpoints.

    In training each patch takes a mixture of codes, by a Gumbel softmax (Jang et al., ICLR 2017) that becomes harder
    as ``temperature`` falls. In evaluation it takes the code of the largest logit. The published code draws noise in
    its validation too, so that the same model has another loss each time; its targets for pre-training are the codes
    of the largest logits, as here.

    Args:
        sizes: see `TOKENIZERS`.

    Attributes:
        temperature: of the Gumbel softmax in training.
        kl_weight: of the divergence in the loss.
    """

    def __init__(self, sizes: TokenizerSizes) -> None:
        super().__init__()
        self.sizes = sizes
        # Plain numbers, for the task to set on its schedule: checkpoints of the published code have no such buffers.
        self.temperature, self.kl_weight = 1.0, 0.0
        self.encoder = PatchEncoder(sizes.patch_width, sizes.patch_out)
        self.dgcnn_1 = _GraphNetwork(sizes.patch_out, sizes.graph_width, sizes.codebook_size)
        self.codebook = nn.Parameter(torch.randn(sizes.codebook_size, sizes.codebook_width))
        self.dgcnn_2 = _GraphNetwork(sizes.codebook_width, sizes.graph_width, sizes.feature_width)
        self.decoder = _FoldingDecoder(sizes.feature_width, sizes.folding_width, sizes.group_size)

    @property
    def num_groups(self) -> int:
        """Patches per cloud."""
        return self.sizes.num_groups

    @property
    def group_size(self) -> int:
        """Points per patch."""
        return self.sizes.group_size

    @property
    def codebook_size(self) -> int:
        """Number of codes."""
        return self.sizes.codebook_size

    def forward(self, points: Tensor) -> Losses:
        """The losses of clouds ``[B, P, 3]``, at least in float32; in evaluation mode without noise.

        Raises:
            ValueError: a wrong shape or an empty cloud; in evaluation mode also non-finite values.
        """
        found = self.autoencode(points)
        coarse, fine = reconstruction_losses(found)
        terms = coarse.mean(), fine.mean(), divergence_from_uniform(found.logits).mean()
        return Losses(terms[0] + terms[1] + self.kl_weight * terms[2], *terms)

    def autoencode(self, points: Tensor) -> Autoencoding:
        """Clouds ``[B, P, 3]``, cut, encoded and decoded.

        Raises:
            ValueError: as `forward`.
        """
        cut = make_patches(points, self.num_groups, self.group_size, check_finite=not self.training)
        graph = _graph(cut.centers)
        logits = self.dgcnn_1(self.encoder(cut.patches), graph)
        coarse, fine = self.decoder(self.dgcnn_2(self._codes(logits), graph))
        return Autoencoding(cut.patches, cut.centers, logits, coarse, fine)

    def features(self, points: Tensor) -> Tensor:
        """``[B, P, 3] -> [B, 2 * codebook_width]``: maximum and mean of a cloud's codes, each that of a patch.

        Raises:
            ValueError: as `forward`.
        """
        cut = make_patches(points, self.num_groups, self.group_size, check_finite=not self.training)
        codes = F.embedding(self.tokens(cut.patches, cut.centers), self.codebook)
        return torch.cat([codes.amax(1), codes.mean(1)], dim=-1)

    def logits(self, patches: Tensor, centers: Tensor) -> Tensor:
        """Patches ``[B, G, K, 3]`` relative to their centres ``[B, G, 3]`` -> logits of the codes ``[B, G, N]``."""
        return self.dgcnn_1(self.encoder(patches), _graph(centers))

    def tokens(self, patches: Tensor, centers: Tensor) -> Tensor:
        """Patches ``[B, G, K, 3]`` relative to their centres ``[B, G, 3]`` -> codes int64 ``[B, G]``, without noise."""
        return self.logits(patches, centers).argmax(-1)

    def decode(self, tokens: Tensor, centers: Tensor) -> Tensor:
        """Codes int64 ``[B, G]`` of patches with centres ``[B, G, 3]`` -> their points ``[B, G, K, 3]``, relative to
        the centres."""
        return self.decoder(self.dgcnn_2(F.embedding(tokens, self.codebook), _graph(centers)))[1]

    @torch.no_grad()
    def reconstruct(self, points: Tensor) -> Reconstruction:
        """Clouds ``[B, P, 3]`` by their codes, for pictures. Call ``eval()`` first, as for any prediction.

        All patches are predicted, none is visible.

        Raises:
            ValueError: as `forward`.
        """
        found = self.autoencode(points)
        centers = found.centers.unsqueeze(2)
        true = found.patches + centers
        return Reconstruction(true[:, :0], found.fine + centers, true)

    def _codes(self, logits: Tensor) -> Tensor:
        """Logits ``[B, G, N]`` -> a mixture of codes for each patch in training, in evaluation one: ``[B, G, C]``."""
        if not self.training:
            return F.embedding(logits.argmax(-1), self.codebook)
        # bfloat16 is too coarse for a softmax over thousands of codes.
        shares = F.gumbel_softmax(at_least_float32(logits), self.temperature, dim=-1)
        return shares @ self.codebook


def reconstruction_losses(found: Autoencoding) -> tuple[Tensor, Tensor]:
    """CD-L1 (`pointewa.ops.chamfer_l1`) of the coarse and of the fine points, each a mean over patches, ``[B]``."""
    batch, groups = found.centers.shape[:2]
    patches = found.patches.flatten(0, 1)
    coarse, fine = (
        chamfer_l1(points.flatten(0, 1), patches).view(batch, groups).mean(1) for points in (found.coarse, found.fine)
    )
    return coarse, fine


def divergence_from_uniform(logits: Tensor) -> Tensor:
    """``KL(uniform || p)`` for the mean p over a cloud's patches of the softmax: ``[B, G, N] -> [B]``.

    It is 0 if a cloud's patches together use all N codes alike.
    """
    groups, codes = logits.shape[1:]
    # In logarithms: the mean of a code that all patches exclude underflows, and its logarithm would be infinite.
    mean = at_least_float32(logits).log_softmax(-1).logsumexp(1) - math.log(groups)
    return -math.log(codes) - mean.mean(1)


def _graph(centers: Tensor) -> Tensor:
    """The nearest patches of each patch, by their centres ``[B, G, 3]``: int64 ``[B, G, 4]``."""
    return knn(centers, centers, _NEIGHBORS, check_finite=False)


class _GraphNetwork(nn.Module):
    """Four edge convolutions on the graph of a cloud's patches, and a layer on the outputs of all four.

    The graph is that of the patches' centres throughout, where DGCNN finds neighbours anew by features.
    """

    def __init__(self, channels: int, width: int, out: int) -> None:
        super().__init__()
        self.input_trans = nn.Conv1d(channels, width, 1)
        self.layer1 = EdgeConv(width, 2 * width)
        self.layer2 = EdgeConv(2 * width, 4 * width)
        self.layer3 = EdgeConv(4 * width, 4 * width)
        self.layer4 = EdgeConv(4 * width, 8 * width)
        self.layer5 = nn.Sequential(
            nn.Conv1d(18 * width, out, 1, bias=False), nn.GroupNorm(_NORM_GROUPS, out), nn.LeakyReLU(0.2)
        )

    def forward(self, x: Tensor, graph: Tensor) -> Tensor:
        """``[B, G, channels]`` and the neighbours int64 ``[B, G, k]`` -> ``[B, G, out]``."""
        x, levels = pointwise(self.input_trans, x), []
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = layer(x, x, graph)
            levels.append(x)
        conv, norm, act = self.layer5
        return act(norm(pointwise(conv, torch.cat(levels, -1)).mT)).mT


class _FoldingDecoder(nn.Module):
    """Coarse points of a patch from its feature, and around each of them four fine ones, folded from a small grid.

    The first layer for single points is linear, so it acts on feature, grid and coarse point separately: on each of
    them once, whereas their concatenation repeats the feature for every point.
    """

    def __init__(self, channels: int, width: int, group_size: int) -> None:
        super().__init__()
        self.coarse = group_size // _FINE
        self.mlp = nn.Sequential(
            nn.Linear(channels, 2 * width),
            nn.ReLU(inplace=True),
            nn.Linear(2 * width, 2 * width),
            nn.ReLU(inplace=True),
            nn.Linear(2 * width, 3 * self.coarse),
        )
        self.final_conv = nn.Sequential(
            nn.Conv1d(channels + 2 + 3, width, 1),
            nn.BatchNorm1d(width),
            nn.ReLU(inplace=True),
            nn.Conv1d(width, width, 1),
            nn.BatchNorm1d(width),
            nn.ReLU(inplace=True),
            nn.Conv1d(width, 3, 1),
        )

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """``[B, G, C]`` -> coarse points ``[B, G, M, 3]`` and fine points ``[B, G, 4 M, 3]``."""
        coarse = self.mlp(features).unflatten(-1, (self.coarse, 3))
        first, norm1, act1, second, norm2, act2, last = self.final_conv
        of_feature, of_grid, of_coarse = first.weight.squeeze(-1).split([features.shape[-1], 2, 3], dim=1)
        steps = torch.arange(_FINE, device=coarse.device, dtype=coarse.dtype)
        grid = _GRID * (2 * torch.stack([steps % 2, steps // 2], 1) - 1)  # (4, 2)
        x = F.linear(features, of_feature, first.bias)[:, :, None, None]  # (B, G, 1, 1, width)
        x = x + F.linear(coarse, of_coarse).unsqueeze(3) + F.linear(grid, of_grid)
        x = pointwise(second, act1(norm1(x.flatten(0, 3))))  # (B G 4 M, width)
        x = pointwise(last, act2(norm2(x))).view(*coarse.shape[:3], _FINE, 3)
        return coarse, (x + coarse.unsqueeze(3)).flatten(2, 3)
