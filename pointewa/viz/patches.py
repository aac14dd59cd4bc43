"""How a cloud is cut into patches."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pointewa.models.patch_embed import make_patches
from pointewa.viz.panels import FAINT, INK, Panel, palette, rgb

_APART = 0.55  # how far the patches are moved outwards, as a fraction of their distance from the middle


@dataclass(frozen=True)
class CutCloud:
    """The patches of one cloud of P points, on the CPU.

    Args:
        centers: ``[G, 3]``.
        members: which points each patch holds, int64 ``[G, K]``.
        owner: for each point the patch that holds it and has the nearest centre, int64 ``[P]``; -1 if no patch does.
    """

    centers: Tensor
    members: Tensor
    owner: Tensor


def cut(points: Tensor, num_groups: int, group_size: int) -> CutCloud:
    """The patches that the models make of one cloud ``[P, 3]`` (`pointewa.models.patch_embed.make_patches`).

    Raises:
        ValueError: a wrong shape, non-finite values, fewer points than groups.
    """
    if not 1 <= num_groups <= len(points):
        raise ValueError(f"num_groups must be 1 to {len(points)}, the points of the cloud, got {num_groups}")
    points = points.detach().float().cpu()
    patches, centers, members = (one[0] for one in make_patches(points[None], num_groups, group_size))
    distance = torch.full((num_groups, len(points)), torch.inf)
    distance.scatter_(1, members, patches.norm(dim=-1))
    nearest, owner = distance.min(0)
    return CutCloud(centers, members, torch.where(nearest.isinf(), -1, owner))


def patch_panels(points: Tensor, patches: CutCloud, name: str) -> list[Panel]:
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
