"""The data sets by name."""

from datasets import modelnet40, shapes
from datasets.base import PointClouds
from pointewa.errors import DataError

NAMES = {"modelnet40": modelnet40.load, "shapes": shapes.load}


def load(name: str, root: str, split: str, num_points: int = 1) -> PointClouds:
    """Load a split of a data set; the first time also prepare and cache it.

    Args:
        name: one of `NAMES`.
        root: folder or file with the data (not used by "shapes").
        split: "train" or "test".
        num_points: how many points an object will be asked for; refused at once if it has fewer.

    Raises:
        DataError: an unknown name, no data found, a layout that is not accepted, damaged files, too few points.
    """
    if name not in NAMES:
        raise DataError(f"data.name: expected one of {', '.join(sorted(NAMES))}, found {name!r}")
    if split not in ("train", "test"):
        raise DataError(f'split: expected "train" or "test", found {split!r}')
    clouds = NAMES[name](root, split)
    if clouds.points.shape[1] < num_points:
        raise DataError(
            f"{clouds.source}: an object has {clouds.points.shape[1]} points, data.num_points asks for {num_points}: "
            "lower it, or use a source with more points"
        )
    return clouds
