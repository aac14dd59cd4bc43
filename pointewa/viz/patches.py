"""How a cloud is cut into patches."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pointewa.ops import farthest_point_sample, group, knn
from pointewa.viz.panels import FAINT, INK, Panel, palette, rgb

_APART = 0.55  # how far the patches are moved away from the middle, in distances from it


@dataclass(frozen=True)
class Patches:
    """Of one cloud of P points, on the CPU.

    Args:
        centers: ``[G, 3]``.
        members: which points are in each patch, int64 ``[G, K]``.
        owner: of the patches that a point is in the one whose centre is nearest, int64 ``[P]``; -1 where it is in none.
    """

    centers: Tensor
    members: Tensor
    owner: Tensor


def cut(points: Tensor, num_groups: int, group_size: int) -> Patches:
    """The patches of one cloud ``[P, 3]``, as the models make them (`pointewa.models.patch_embed.make_patches`).

    Raises:
        ValueError: a wrong shape, values that are not finite, fewer points than groups.
    """
    if not 1 <= num_groups <= len(points):
        raise ValueError(f"num_groups must be 1 to {len(points)}, the points of the cloud, got {num_groups}")
    points = points.detach().float().cpu()
    centers = group(points[None], farthest_point_sample(points[None], num_groups))
    members = knn(centers, points[None], group_size)[0]
    distance = torch.full((num_groups, len(points)), torch.inf)
    offsets = points[members] - centers[0].unsqueeze(1)
    distance.scatter_(1, members, offsets.norm(dim=-1))
    nearest, owner = distance.min(0)
    return Patches(centers[0], members, torch.where(nearest.isinf(), -1, owner))


def patch_panels(points: Tensor, patches: Patches, name: str) -> list[Panel]:
    """Three panels: the centres on the cloud ``[P, 3]``, the coloured patches, and the patches pulled apart."""
    cloud = points.detach().float().cpu().numpy()
    num_groups, group_size = patches.members.shape
    colours = np.array([rgb(colour) for colour in palette(num_groups)])
    owner = patches.owner.numpy()
    centers = patches.centers.numpy()
    covered = 100 * float((owner >= 0).mean())
    dots = np.concatenate([cloud, centers])
    sizes = np.concatenate([np.full(len(cloud), 0.7), np.full(num_groups, 1.9)]).astype(np.float32)
    faint = np.tile(rgb(FAINT), (len(cloud), 1))
    middle = (cloud.min(0) + cloud.max(0)) / 2
    members = cloud[patches.members.numpy()] + _APART * (centers - middle)[:, None]
    return [
        Panel(dots, np.concatenate([faint, np.tile(rgb(INK), (num_groups, 1))]),
              f"{name}\n{num_groups} centres, farthest points first", sizes, cloud),
        Panel(cloud, np.where(owner[:, None] >= 0, colours[owner], rgb(FAINT)),
              f"patches of {group_size} nearest points\n{covered:.0f} % of the points are in one"),
        Panel(members.reshape(-1, 3), colours.repeat(group_size, 0), "the same, pulled apart\nneighbours share points"),
    ]  # fmt: skip
