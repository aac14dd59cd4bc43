"""The classifier of Point-BERT and Point-MAE."""

import torch
from torch import Tensor, nn

from pointewa.models.backbone import PointTransformer
from pointewa.models.patch_embed import make_patches
from pointewa.models.presets import Architecture


class PointTransformerClassifier(PointTransformer):
    """The trunk with a class token and a head, from whole clouds to logits.

    Parameters are named as in Point-MAE's code, so its checkpoints load as they are.

    Args:
        architecture: see `pointewa.models.PRESETS`.
        num_classes: size of the output.
    """

    def __init__(self, architecture: Architecture, num_classes: int) -> None:
        super().__init__(architecture, class_token=True)
        self.num_classes = num_classes
        self.cls_head_finetune = _head(architecture, num_classes)
        self.initialize()

    def forward(self, points: Tensor) -> Tensor:
        """``points [B, P, 3] -> logits [B, C]``.

        Raises:
            ValueError: a wrong shape or an empty cloud; in evaluation mode also non-finite values (in training the
                loader has checked them, and a check here would make the GPU wait).
        """
        return self.cls_head_finetune(self.features(points))

    def features(self, points: Tensor) -> Tensor:
        """``points [B, P, 3] -> features [B, 2 * width]``: the class token, and the maximum over the patch tokens."""
        arch = self.architecture
        cut = make_patches(points, arch.num_groups, arch.group_size, check_finite=not self.training)
        return self.encode(cut.patches, cut.centers)

    def encode(self, patches: Tensor, centers: Tensor) -> Tensor:
        """`features` of patches ``[B, G, K, 3]``, relative to their centres ``[B, G, 3]``."""
        return self.pooled(self.embed(patches), centers)

    def pooled(self, tokens: Tensor, centers: Tensor) -> Tensor:
        """`features` of the tokens of patches ``[B, G, C]`` and their centres ``[B, G, 3]``."""
        x = self.transform(tokens, centers)  # (B, 1 + G, C)
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
