"""The dense models in operators that other runtimes know: what `pointewa.inference.export` writes.

They cut clouds into patches by themselves instead of calling `pointewa.models.patch_embed.make_patches`: the kernels,
the chunks and the writing in place of `pointewa.ops` cannot be exported, and a loop over the patches would be unrolled.
"""

import torch
from torch import Tensor, nn

from pointewa.models.decoders import Operators
from pointewa.ops.interpolate import EPSILON


class Portable(nn.Module):
    """A dense model whose sampling and neighbours are plain tensor operations on a fixed number of points.

    They pick what `pointewa.ops` picks, by the same float32 arithmetic: the first of the farthest points, and no point
    twice until every point has been picked. Sampling is still a loop in the exported graph, whose size therefore does
    not depend on the number of patches.

    Args:
        model: dense; not copied.
        num_points: P, the number of points of the clouds that it will be given.
        scripted: make the loop TorchScript's; otherwise the `scan` of `torch.export` and ONNX.
    """

    def __init__(self, model: nn.Module, num_points: int, scripted: bool = False) -> None:
        super().__init__()
        self.model, self.num_points = model, num_points
        self._sample = torch.jit.script(_sample_by_loop) if scripted else _sample_by_scan

    def _cut(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Patches ``[B, G, K, 3]``, relative to their centres ``[B, G, 3]``."""
        arch = self.model.architecture
        picks = self._sample(points, min(arch.num_groups, self.num_points))
        centers = _gather(points, _repeated(picks, arch.num_groups))  # (B, G, 3)
        index = _repeated(_neighbors(centers, points, min(arch.group_size, self.num_points)), arch.group_size)
        patches = _gather(points, index.flatten(1)).unflatten(1, (arch.num_groups, -1))  # (B, G, K, 3)
        return patches - centers.unsqueeze(2), centers


class PortableClassifier(Portable):
    """A classifier."""

    def forward(self, points: Tensor) -> Tensor:
        """``points float32 [B, P, 3] -> logits [B, C]``."""
        return self.model.cls_head_finetune(self.model.encode(*self._cut(points)))


class PortableSegmenter(Portable):
    """A segmenter. A category that the model does not know is refused by the program that runs it: it is an index."""

    def __init__(self, model: nn.Module, num_points: int, scripted: bool = False) -> None:
        super().__init__(model, num_points, scripted)
        # A buffer, which follows the program to another device.
        self.register_buffer("_categories", torch.eye(model.num_classes), persistent=False)

    def forward(self, points: Tensor, labels: Tensor) -> Tensor:
        """``points float32 [B, P, 3], labels int64 [B] -> logits [B, P, M]``."""
        known = labels.where(labels >= 0, torch.full_like(labels, self.model.num_classes))  # -1 would be the last one
        category = self._categories[known].to(points.dtype)
        operators = Operators(
            _interpolated, _neighbors, lambda points, count: _gather(points, self._sample(points, count))
        )
        return self.model.decode(points, *self._cut(points), category, operators)


def _interpolated(points: Tensor, centers: Tensor, features: Tensor) -> Tensor:
    """`pointewa.ops.interpolate`."""
    index = _neighbors(points, centers, min(3, centers.shape[1]))  # (B, P, k)
    near = _gather(centers, index.flatten(1)).unflatten(1, index.shape[1:])
    # Multiplied by EPSILON, which the ratios do not show: the ONNX optimizer takes x + 1e-8 for x.
    weights = 1 / (_square_norm(points.unsqueeze(2) - near) * (1 / EPSILON) + 1)
    weights = (weights / weights.sum(-1, keepdim=True)).unsqueeze(-1)
    picked = features.gather(1, index.flatten(1).unsqueeze(2).expand(-1, -1, features.shape[2]))
    return (picked.unflatten(1, index.shape[1:]) * weights).sum(2)


def _gather(points: Tensor, index: Tensor) -> Tensor:
    return points.gather(1, index.unsqueeze(2).expand(-1, -1, 3))


def _repeated(index: Tensor, count: int) -> Tensor:
    """``count`` indices, starting over if there are fewer."""
    copies = -(-count // index.shape[-1])
    return torch.cat([index] * copies, -1)[..., :count] if copies > 1 else index


def _square_norm(vectors: Tensor) -> Tensor:
    x, y, z = vectors.unbind(-1)
    return x * x + y * y + z * z  # in this order: the last digit may decide which point is picked


def _neighbors(centers: Tensor, points: Tensor, count: int) -> Tensor:
    # The root, by which `pointewa.ops.knn` orders: roots may be equal although the squares differ in the last digit.
    distance = _square_norm(centers.unsqueeze(2) - points.unsqueeze(1)).sqrt()  # (B, G, P)
    return distance.topk(count, largest=False).indices


def _pick(nearest: Tensor, last: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
    """One step of farthest point sampling.

    Args:
        nearest: squared distance of each point to the nearest pick before the last one, -1 for a pick. ``[B, P]``
        last: the last pick. int64 ``[B, 1]``
        points: ``[B, P, 3]``.

    Returns:
        ``nearest`` with the last pick, and the next one.
    """
    center = points.gather(1, last.unsqueeze(2).expand(-1, -1, 3))
    nearest = torch.minimum(nearest, _square_norm(points - center)).scatter(1, last, -1.0)
    return nearest, nearest.argmax(1, keepdim=True)  # the first of equals


def _sample_by_scan(points: Tensor, count: int) -> Tensor:
    from torch._higher_order_ops import scan

    def step(carried: tuple[Tensor, Tensor], _: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
        nearest, last = _pick(*carried, points)
        return (nearest, last), last.clone()  # the carried tensor itself may not be an output

    nearest, last = torch.full_like(points[..., 0], torch.inf), torch.zeros_like(points[:, :1, 0], dtype=torch.int64)
    if count == 1:
        return last
    _, picks = scan(step, (nearest, last), torch.zeros(count - 1))  # (K - 1, B, 1)
    return torch.cat([last, picks.squeeze(2).T], 1)


def _sample_by_loop(points: Tensor, count: int) -> Tensor:
    last = torch.zeros_like(points[:, :1, 0], dtype=torch.int64)
    nearest, picks = torch.full_like(points[..., 0], torch.inf), [last]
    for _ in range(count - 1):
        nearest, last = _pick(nearest, last, points)
        picks.append(last)
    return torch.cat(picks, 1)
