"""Which classes two data sets share, so that a model of one can be evaluated on the other."""

from collections.abc import Sequence
from typing import NamedTuple

from pointewa.errors import DataError

# The classes of ScanObjectNN that ModelNet40 has, and their names there. Uy et al. (2019) also count ModelNet40's bench
# as a chair; to a person it is not one, so it is left out here.
MODELNET40_AS_SCANOBJECTNN = {
    "bed": ("bed",),
    "cabinet": ("dresser", "wardrobe", "night_stand"),
    "chair": ("chair", "stool"),
    "desk": ("desk",),
    "display": ("monitor",),
    "door": ("door",),
    "shelf": ("bookshelf",),
    "sink": ("sink",),
    "sofa": ("sofa",),
    "table": ("table",),
    "toilet": ("toilet",),
}
# Those of Sydney Urban Objects. Its other vehicles (4wd, ute, van, ...) are not called cars there, and ModelNet40's
# plants, which stand in pots, are not its trees.
MODELNET40_AS_SYDNEY = {"car": ("car",), "pedestrian": ("person",)}


class SharedClass(NamedTuple):
    """A class that both sets have: its numbers among the model's classes, and among the set's."""

    name: str
    model: tuple[int, ...]
    data: tuple[int, ...]


def shared_classes(
    trained_on: str, model_names: Sequence[str], data: str, data_names: Sequence[str]
) -> list[SharedClass]:
    """The classes on which a model can be evaluated on another data set.

    Args:
        trained_on: name of the model's data set.
        model_names: its classes.
        data: name of the data set to evaluate on.
        data_names: its classes.

    Returns:
        For ModelNet40 and the sets of the tables above these, either way; for any others the classes of equal names.

    Raises:
        DataError: fewer than two classes are shared.
    """
    tables = {}
    for other, table in (("scanobjectnn", MODELNET40_AS_SCANOBJECTNN), ("sydney", MODELNET40_AS_SYDNEY)):
        tables["modelnet40", other] = [(name, many, (name,)) for name, many in table.items()]
        tables[other, "modelnet40"] = [(name, (name,), many) for name, many in table.items()]
    same = [(name, (name,), (name,)) for name in model_names if name in data_names]
    shared = []
    for name, mine, theirs in tables.get((trained_on, data), same):
        numbers = [tuple(names.index(one) for one in wanted if one in names)
                   for names, wanted in ((model_names, mine), (data_names, theirs))]  # fmt: skip
        if all(numbers):
            shared.append(SharedClass(name, *numbers))
    if len(shared) < 2:
        raise DataError(
            f"the model knows {len(model_names)} classes ({', '.join(model_names[:3])}, ...), the data set "
            f"{len(data_names)} ({', '.join(data_names[:3])}, ...), and they share {len(shared)}: choose the data set "
            "of the training (DATASET), or give the classes the same names"
        )
    return shared
