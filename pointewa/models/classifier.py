"""The classifier of Point-BERT and Point-MAE."""

import torch
from torch import Tensor, nn

from pointewa.models.layers import Encoder, init_weights
from pointewa.models.patch_embed import PatchEncoder, make_patches
from pointewa.models.presets import Architecture


class PointTransformerClassifier(nn.Module):
    """A plain ViT on point patches. Parameters are named as in Point-MAE's code, so its checkpoints load as they are.

    Args:
        architecture: see `pointewa.models.PRESETS`.
        num_classes: size of the output.
    """

    def __init__(self, architecture: Architecture, num_classes: int) -> None:
        super().__init__()
        arch = self.architecture = architecture
        self.num_classes = num_classes
        self.encoder = PatchEncoder(arch.patch_width, arch.patch_out)
        self.reduce_dim = nn.Identity() if arch.patch_out == arch.width else nn.Linear(arch.patch_out, arch.width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, arch.width))
        self.cls_pos = nn.Parameter(torch.zeros(1, 1, arch.width))
        self.pos_embed = nn.Sequential(nn.Linear(3, 128), nn.GELU(), nn.Linear(128, arch.width))
        self.blocks = Encoder(arch.width, arch.depth, arch.heads, arch.mlp_ratio, arch.drop_path)
        self.norm = nn.LayerNorm(arch.width)
        self.cls_head_finetune = _head(arch, num_classes)
        self.apply(init_weights)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.cls_pos, std=0.02)

    def forward(self, points: Tensor) -> Tensor:
        """``points [B, P, 3] -> logits [B, C]``.

        Raises:
            ValueError: a wrong shape or an empty cloud; in evaluation mode also values that are not finite (in
                training the loader has seen to that, and looking would make the GPU wait).
        """
        return self.cls_head_finetune(self.features(points))

    def features(self, points: Tensor) -> Tensor:
        """``points [B, P, 3] -> features [B, 2 * width]``: the class token, and the maximum over the patch tokens."""
        arch = self.architecture
        return self.encode(*make_patches(points, arch.num_groups, arch.group_size, check_finite=not self.training))

    def encode(self, patches: Tensor, centers: Tensor) -> Tensor:
        """`features` of clouds cut already: patches ``[B, G, K, 3]`` relative to their centres ``[B, G, 3]``."""
        return self.pooled(self.reduce_dim(self.encoder(patches)), centers)

    def pooled(self, tokens: Tensor, centers: Tensor) -> Tensor:
        """`features` of the tokens of patches ``[B, G, C]`` and their centres ``[B, G, 3]``."""
        batch = tokens.shape[0]
        x = torch.cat([self.cls_token.expand(batch, -1, -1), tokens], dim=1)
        position = torch.cat([self.cls_pos.expand(batch, -1, -1), self.pos_embed(centers)], dim=1)
        x = self.norm(self.blocks(x, position))  # (B, 1 + G, C)
        return torch.cat([x[:, 0], x[:, 1:].amax(1)], dim=-1)


def _head(arch: Architecture, num_classes: int) -> nn.Sequential:
    features, hidden = 2 * arch.width, 256
    if arch.head == "linear":
        return nn.Sequential(nn.Linear(features, num_classes))
    if arch.head == "point_bert":
        return nn.Sequential(
            nn.Linear(features, hidden), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Linear(hidden, num_classes)
        )
    return nn.Sequential(
        nn.Linear(features, hidden),
        nn.BatchNorm1d(hidden),
        nn.ReLU(inplace=True),
        nn.Dropout(0.5),
        nn.Linear(hidden, hidden),
        nn.BatchNorm1d(hidden),
        nn.ReLU(inplace=True),
        nn.Dropout(0.5),
        nn.Linear(hidden, num_classes),
    )
