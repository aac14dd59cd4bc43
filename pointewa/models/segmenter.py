"""The part segmentation of Point-BERT and Point-MAE."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pointewa.models.backbone import PointTransformer
from pointewa.models.decoders import DECODERS, OPERATORS, Operators
from pointewa.models.parts import EVERY, Parts
from pointewa.models.patch_embed import make_patches
from pointewa.models.presets import Architecture


class PointTransformerSegmenter(PointTransformer):
    """The trunk with a decoder, from whole clouds and their categories to logits of all parts for every point.

    Parameters are named as in Point-MAE's and Point-BERT's code. As there, the decoder sees the tokens of three blocks
    evenly spaced up to the last, block ceil(k * depth / 3) of ``depth`` for k = 1, 2, 3, counted from 1; each goes
    through the same final norm. The published code applies a log-softmax to the logits.

    Args:
        architecture: see `pointewa.models.PRESETS`; its ``head`` is not used. The published segmenters have 128 groups.
        parts: the parts of all categories.
        num_classes: number of categories.
        decoder: "point_mae" (27,063,730 parameters on the preset of that name with 16 categories and 50 parts),
            "point_bert" (27,085,874), or "light"; see `pointewa.models.decoders`.

    Raises:
        ValueError: an unknown decoder, parts of categories that are not there, a category without parts, a width that
            the decoder cannot take.
    """

    def __init__(self, architecture: Architecture, parts: Parts, num_classes: int, decoder: str = "point_mae") -> None:
        if decoder not in DECODERS:
            raise ValueError(f"decoder must be one of {', '.join(DECODERS)}, got {decoder!r}")
        if max(parts.classes) >= num_classes:
            raise ValueError(f"parts: expected categories below {num_classes}, found {max(parts.classes)}")
        if EVERY not in parts.classes and (none := set(range(num_classes)) - set(parts.classes)):
            raise ValueError(f"parts: expected some of every category, found none of {min(none)}")
        super().__init__(architecture, DECODERS[decoder].class_token)
        self.parts, self.num_classes, self.decoder = parts, num_classes, decoder
        layers = DECODERS[decoder].layers(architecture, num_classes, len(parts))
        for name, layer in layers.items():
            self.add_module(name, layer)
        self._head = tuple(layers)
        self._taken = [-(-k * architecture.depth // 3) - 1 for k in (1, 2, 3)]  # 3, 7, 11 of 12
        self.initialize()

    @property
    def head(self) -> nn.ModuleList:
        """The decoder's layers, which a pre-training does not have."""
        return nn.ModuleList(self.get_submodule(name) for name in self._head)

    def forward(self, points: Tensor, labels: Tensor) -> Tensor:
        """``points [B, P, 3]``, categories int64 ``labels [B]`` -> logits ``[B, P, num_parts]``.

        Raises:
            ValueError: a wrong shape, an empty cloud, labels that are not whole numbers; in evaluation mode also
                non-finite values and labels out of range (in training the loader has checked them, and a check here
                would make the GPU wait).
        """
        if labels.shape != points.shape[:1] or labels.dtype != torch.int64:
            raise ValueError(
                f"labels must be int64 of shape [B] for points [B, P, 3], got {labels.dtype} {list(labels.shape)} for "
                f"{list(points.shape)}"
            )
        if not self.training and len(labels) and not 0 <= labels.amin() <= labels.amax() < self.num_classes:
            raise ValueError(
                f"labels must be from 0 to {self.num_classes - 1}, got {labels.amin():d} to {labels.amax():d}"
            )
        arch = self.architecture
        cut = make_patches(points, arch.num_groups, arch.group_size, check_finite=not self.training)
        category = F.one_hot(labels, self.num_classes).to(points.dtype)
        return self.decode(points, cut.patches, cut.centers, category)

    def decode(
        self, points: Tensor, patches: Tensor, centers: Tensor, category: Tensor, ops: Operators = OPERATORS
    ) -> Tensor:
        """`forward` of points ``[B, P, 3]`` that are cut into patches ``[B, G, K, 3]``, relative to their centres
        ``[B, G, 3]``, and of one-hot categories ``[B, num_classes]``."""
        levels = self.levels(self.embed(patches), centers, self._taken)
        if self.cls_token is not None:
            levels = [tokens[:, 1:] for tokens in levels]
        return DECODERS[self.decoder].decode(self, points, centers, levels, category, ops)
