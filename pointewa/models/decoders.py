"""Decoders of part segmentation: from the tokens of three blocks to the parts of all points.

A decoder's layers become a segmenter's own, since the published parameters have no common prefix.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pointewa.models.edge_conv import EdgeConv
from pointewa.models.layers import pointwise
from pointewa.models.presets import Architecture
from pointewa.ops import farthest_point_sample, group, interpolate, knn


@dataclass(frozen=True)
class Decoder:
    """The parts of a segmenter that come after the blocks.

    Args:
        class_token: whether the trunk has a class token.
        layers: from the architecture, the number of categories and that of parts to the layers, by their names.
        decode: from those layers, the points ``[B, P, 3]``, the centres ``[B, G, 3]``, the normed tokens of three
            blocks ``[B, G, C]``, the one-hot categories ``[B, num_classes]`` and operators to logits
            ``[B, P, num_parts]``.
    """

    class_token: bool
    layers: Callable[[Architecture, int, int], dict[str, nn.Module]]
    decode: Callable[[nn.Module, Tensor, Tensor, list[Tensor], Tensor, "Operators"], Tensor]


class Operators(NamedTuple):
    """The operators on points that decoders are made of, so that an export can have others of the same results.

    Args:
        interpolate: from points, centres and the centres' features, as `pointewa.ops.interpolate`.
        neighbors: from points, those that can be neighbours, and a number, as `pointewa.ops.knn`.
        sample: from points and a number to farthest points ``[B, K, 3]``.
    """

    interpolate: Callable[[Tensor, Tensor, Tensor], Tensor]
    neighbors: Callable[[Tensor, Tensor, int], Tensor]
    sample: Callable[[Tensor, int], Tensor]


class Propagation(nn.Module):
    """PointNet++'s feature propagation: interpolated features behind a point's own, and two layers on them.

    The first layer acts on the centres' features before they are interpolated: both are linear, and there are fewer
    centres than points.
    """

    def __init__(self, own: int, features: int, hidden: int, out: int) -> None:
        super().__init__()
        self.mlp_convs = nn.ModuleList([nn.Conv1d(own + features, hidden, 1), nn.Conv1d(hidden, out, 1)])
        self.mlp_bns = nn.ModuleList([nn.BatchNorm1d(hidden), nn.BatchNorm1d(out)])

    def forward(self, points: Tensor, centers: Tensor, own: Tensor, features: Tensor, ops: Operators) -> Tensor:
        """Points ``[B, P, 3]``, centres ``[B, G, 3]`` and features of both ``[B, P or G, .]`` to ``[B, P, out]``."""
        first, second = self.mlp_convs
        of_own, of_centers = _split(first, own.shape[-1])
        x = ops.interpolate(points, centers, F.linear(features, of_centers)) + F.linear(own, of_own, first.bias)
        x = _norm_relu(self.mlp_bns[0], x)
        return _norm_relu(self.mlp_bns[1], pointwise(second, x))


class GraphPropagation(nn.Module):
    """Point-BERT's refinement of a level: an edge convolution from the coarser level, then one within its own."""

    def __init__(self, width: int, hidden: int = 512, num_neighbors: int = 4) -> None:
        if width % 4:
            raise ValueError(f"width must be a multiple of 4 for the decoder's edge convolutions, got {width}")
        super().__init__()
        self.num_neighbors = num_neighbors
        self.layer1, self.layer2 = EdgeConv(width, hidden), EdgeConv(hidden, width)

    def forward(
        self, points: Tensor, features: Tensor, coarse: Tensor, coarse_features: Tensor, ops: Operators
    ) -> Tensor:
        """Points ``[B, Q, 3]``, coarser ones ``[B, N, 3]`` and features of both ``[B, Q or N, C]`` to ``[B, Q, C]``."""
        x = self.layer1(features, coarse_features, ops.neighbors(points, coarse, self.num_neighbors))
        return self.layer2(x, x, ops.neighbors(points, points, self.num_neighbors))


def _global_decoder(joined: bool, hidden: Callable[[int], tuple[int, int]], widths: tuple[int, int]) -> Decoder:
    """Every point sees the interpolated tokens, their maximum and mean over the cloud, and the category.

    Args:
        joined: whether the three blocks' tokens are concatenated; else their mean is taken.
        hidden: from the width of the tokens to those of the propagation's two layers.
        widths: of the last two hidden layers.
    """

    def layers(arch: Architecture, num_classes: int, num_parts: int) -> dict[str, nn.Module]:
        features = arch.width * (3 if joined else 1)
        first, local = hidden(arch.width)
        return {
            "label_conv": nn.Sequential(
                nn.Conv1d(num_classes, 64, 1, bias=False), nn.BatchNorm1d(64), nn.LeakyReLU(negative_slope=0.2)
            ),
            "propagation_0": Propagation(3, features, first, local),
            "convs1": nn.Conv1d(local + 2 * features + 64, widths[0], 1),
            "bns1": nn.BatchNorm1d(widths[0]),
            "dp1": nn.Dropout(0.5),
            "convs2": nn.Conv1d(widths[0], widths[1], 1),
            "bns2": nn.BatchNorm1d(widths[1]),
            "convs3": nn.Conv1d(widths[1], num_parts, 1),
        }

    def decode(
        of: nn.Module, points: Tensor, centers: Tensor, levels: list[Tensor], category: Tensor, ops: Operators
    ) -> Tensor:
        conv, norm, act = of.label_conv
        label = act(norm(pointwise(conv, category)))  # (B, 64)
        tokens = torch.cat(levels, -1) if joined else torch.stack(levels).mean(0)
        overall = torch.cat([tokens.amax(1), tokens.mean(1), label.to(tokens.dtype)], -1)
        local = of.propagation_0(points, centers, points, tokens, ops)
        # What is the same for all points of a cloud is multiplied once.
        of_point, of_cloud = _split(of.convs1, local.shape[-1])
        x = F.linear(local, of_point) + F.linear(overall, of_cloud, of.convs1.bias).unsqueeze(1)
        x = of.dp1(_norm_relu(of.bns1, x))
        x = _norm_relu(of.bns2, pointwise(of.convs2, x))
        return _logits(of.convs3, x)

    return Decoder(False, layers, decode)


_FINE, _MIDDLE = 512, 256  # points of Point-BERT's levels between the cloud and its patches


def _bert_layers(arch: Architecture, num_classes: int, num_parts: int) -> dict[str, nn.Module]:
    hidden, width = 4 * arch.width, arch.width
    return {
        "propagation_2": Propagation(3, width, hidden, width),
        "propagation_1": Propagation(3, width, hidden, width),
        "propagation_0": Propagation(3 + num_classes, width, hidden, width),
        "dgcnn_pro_1": GraphPropagation(width),
        "dgcnn_pro_2": GraphPropagation(width),
        "conv1": nn.Conv1d(width, 128, 1),
        "bn1": nn.BatchNorm1d(128),
        "drop1": nn.Dropout(0.5),
        "conv2": nn.Conv1d(128, num_parts, 1),
    }


def _bert_decode(
    of: nn.Module, points: Tensor, centers: Tensor, levels: list[Tensor], category: Tensor, ops: Operators
) -> Tensor:
    size = points.shape[1]
    fine = ops.sample(points, min(_FINE, size))
    middle = fine[:, :_MIDDLE]  # farthest point samples are nested
    of_middle = of.propagation_2(middle, centers, middle, levels[1], ops)
    of_fine = of.propagation_1(fine, centers, fine, levels[0], ops)
    of_middle = of.dgcnn_pro_2(middle, of_middle, centers, levels[2], ops)
    of_fine = of.dgcnn_pro_1(fine, of_fine, middle, of_middle, ops)
    own = torch.cat([category.to(points.dtype).unsqueeze(1).expand(-1, size, -1), points], -1)
    x = of.propagation_0(points, fine, own, of_fine, ops)
    return _logits(of.conv2, of.drop1(_norm_relu(of.bn1, pointwise(of.conv1, x))))


DECODERS = {
    # Pang et al., ECCV 2022
    "point_mae": _global_decoder(joined=True, hidden=lambda width: (4 * width, 1024), widths=(512, 256)),
    # Yu et al., CVPR 2022
    "point_bert": Decoder(True, _bert_layers, _bert_decode),
    # In the spirit of point2vec's (Abou Zeid et al., GCPR 2023): the mean of the blocks, and narrow layers.
    "light": _global_decoder(joined=False, hidden=lambda width: (width, width), widths=(256, 128)),
}
PRESET_DECODERS = {"tiny": "light", "small": "light", "point_mae": "point_mae", "point_bert": "point_bert"}

# The operators are loops and foreign kernels: a graph break is all a compiler could do.
OPERATORS = Operators(
    torch.compiler.disable(lambda *args: interpolate(*args, check_finite=False)),
    torch.compiler.disable(lambda *args: knn(*args, check_finite=False)),
    torch.compiler.disable(
        lambda points, count: group(points, farthest_point_sample(points, count, check_finite=False))
    ),
)


def _split(conv: nn.Conv1d, first: int) -> tuple[Tensor, Tensor]:
    """The weights of a 1x1 convolution that act on its first channels and on the others."""
    weight = conv.weight.squeeze(-1)
    return weight[:, :first], weight[:, first:]


def _logits(conv: nn.Conv1d, x: Tensor) -> Tensor:
    """`pointwise`; inference in bfloat16 leaves it to float32, where the logits of two parts are hardly ever equal."""
    if torch.is_grad_enabled() or not torch.is_autocast_enabled(x.device.type):
        return pointwise(conv, x)
    with torch.autocast(x.device.type, enabled=False):
        return pointwise(conv, x.float())


def _norm_relu(norm: nn.Module, x: Tensor) -> Tensor:
    """A batch norm over all points of all clouds ``[B, P, C]``, and a ReLU."""
    return F.relu(norm(x.flatten(0, 1)), inplace=True).unflatten(0, x.shape[:2])
