"""What a prediction depends on: gradient x input of each point, and the effect of leaving out each patch."""

from dataclasses import dataclass

import torch
from torch import Tensor

from pointewa.models import PointTransformerClassifier
from pointewa.models.patch_embed import Patches, make_patches
from pointewa.viz.panels import AGAINST, FOR, NEUTRAL, Panel, by_sign, plain_panel

SALIENCY_LEGEND = ((FOR, "speaks for the predicted class"), (NEUTRAL, "no influence"), (AGAINST, "speaks against it"))


@dataclass(frozen=True)
class Saliency:
    """Of one cloud of P points in G patches, on the CPU.

    Args:
        probabilities: ``[C]``.
        predicted: the class with the largest one.
        gradient: gradient x input ``[P]``; see `gradient_x_input`.
        drops: by how much the predicted class's probability falls without each patch, ``[G]``.
        of_points: mean of the drops of the patches that a point belongs to, ``[P]``; NaN if it belongs to none.
    """

    probabilities: Tensor
    predicted: int
    gradient: Tensor
    drops: Tensor
    of_points: Tensor


def gradient_x_input(model: PointTransformerClassifier, points: Tensor) -> Tensor:
    """The gradient of the predicted class's logit times the coordinates, summed over x, y and z.

    The centres and the points of each patch are held fixed: sampling and neighbours have no gradient.

    Args:
        model: in evaluation mode.
        points: ``[B, P, 3]``.

    Returns:
        ``[B, P]``, positive where moving the point away from the origin raises the logit.

    Raises:
        ValueError: a wrong shape, or non-finite values.
    """
    with torch.enable_grad():
        points = points.detach().clone().requires_grad_()
        (gradient,) = torch.autograd.grad(model(points).amax(1).sum(), points)
    return (gradient * points.detach()).sum(-1)


@torch.no_grad()
def without_each_patch(model: PointTransformerClassifier, cut: Patches, batch_size: int = 64) -> Tensor:
    """Logits ``[G, C]`` for one cloud when patch g, its token and its position, is left out.

    Args:
        model: in evaluation mode.
        cut: the patches of the cloud, as a batch of 1 (`make_patches`).
        batch_size: patches left out at a time, each in a copy of the cloud of its own.

    Raises:
        ValueError: a single patch.
    """
    num_groups = cut.centers.shape[1]
    if num_groups < 2:
        raise ValueError("cannot leave out the only patch: the model needs at least 2")
    tokens, centers = model.embed(cut.patches)[0], cut.centers[0]  # (G, C): a patch's token depends on no other patch
    numbers = torch.arange(num_groups, device=centers.device)
    kept = numbers.expand(num_groups, -1)[numbers[:, None] != numbers].view(num_groups, -1)  # (G, G - 1)
    parts = [model.pooled(tokens[rows], centers[rows]) for rows in kept.split(batch_size)]
    return torch.cat([model.cls_head_finetune(part) for part in parts])


def saliency(model: PointTransformerClassifier, points: Tensor) -> Saliency:
    """Both measures for one cloud ``[P, 3]`` on the model's device; the model is left in evaluation mode.

    Raises:
        ValueError: see `gradient_x_input` and `without_each_patch`.
    """
    model.eval()
    arch = model.architecture
    cut = make_patches(points[None], arch.num_groups, arch.group_size)
    with torch.no_grad():
        probabilities = model.cls_head_finetune(model.encode(cut.patches, cut.centers))[0].softmax(0)
    predicted = int(probabilities.argmax())
    drops = probabilities[predicted] - without_each_patch(model, cut).softmax(1)[:, predicted]
    members, of_member = cut.members.flatten(), drops.repeat_interleave(arch.group_size)  # (G K)
    zeros = torch.zeros(len(points), dtype=drops.dtype, device=points.device)
    sums = zeros.index_add(0, members, of_member)
    counts = zeros.index_add(0, members, torch.ones_like(of_member))
    found = (probabilities, gradient_x_input(model, points[None])[0], drops, sums / counts)  # 0 / 0 is NaN
    probabilities, gradient, drops, of_points = (one.detach().cpu() for one in found)
    return Saliency(probabilities, predicted, gradient, drops, of_points)


def saliency_panels(points: Tensor, found: Saliency, name: str, said: str) -> list[Panel]:
    """Three panels: the cloud ``[P, 3]``, gradient x input, leave-one-patch-out.

    Args:
        points: what `saliency` was given.
        found: its result.
        name: of the object.
        said: name of the predicted class.
    """
    confidence = 100 * found.probabilities[found.predicted].item()
    largest = 100 * found.drops.max().item()
    cloud = plain_panel(points, f"{name}\npredicted: {said}, {confidence:.1f} %")
    return [
        cloud,
        Panel(cloud.points, by_sign(found.gradient.double().numpy()), f"gradient x input\nof the logit of {said}"),
        Panel(cloud.points, by_sign(found.of_points.double().numpy()),
              f"leave one patch out\nlargest drop: {largest:.1f} percentage points"),
    ]  # fmt: skip
