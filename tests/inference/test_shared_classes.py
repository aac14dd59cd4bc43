"""Which classes two data sets share."""

import pytest
from pointewa.datasets.layouts.modelnet40 import OFFICIAL
from pointewa.datasets.layouts.scanobjectnn import CLASSES

from pointewa.datasets.layouts import sydney
from pointewa.errors import DataError
from pointewa.inference.shared_classes import shared_classes

MODELNET40 = tuple(OFFICIAL)


def test_modelnet40_and_scanobjectnn_share_eleven_classes():
    shared = shared_classes("modelnet40", MODELNET40, "scanobjectnn", CLASSES)
    named = {one.name: ([MODELNET40[i] for i in one.model], [CLASSES[i] for i in one.data]) for one in shared}
    assert len(named) == 11
    assert named["cabinet"] == (["dresser", "wardrobe", "night_stand"], ["cabinet"])
    assert named["chair"] == (["chair", "stool"], ["chair"])  # no bench
    assert named["display"] == (["monitor"], ["display"])
    assert named["shelf"] == (["bookshelf"], ["shelf"])
    assert not {"bag", "bin", "box", "pillow"} & set(named)
    back = shared_classes("scanobjectnn", CLASSES, "modelnet40", MODELNET40)
    assert [(one.name, one.data, one.model) for one in back] == [(one.name, one.model, one.data) for one in shared]


def test_modelnet40_and_sydney_share_cars_and_people():
    shared = shared_classes("modelnet40", MODELNET40, "sydney", sydney.CLASSES)
    named = [(one.name, [MODELNET40[i] for i in one.model], [sydney.CLASSES[i] for i in one.data]) for one in shared]
    assert named == [("car", ["car"], ["car"]), ("pedestrian", ["person"], ["pedestrian"])]
    with pytest.raises(DataError, match=r"the model knows 15 classes .* the data set 14 .* and they share 0"):
        shared_classes("scanobjectnn", CLASSES, "sydney", sydney.CLASSES)


def test_other_sets_share_what_is_named_alike():
    shared = shared_classes("modelnet40", MODELNET40, "folder", ("vase", "mine", "cup"))
    assert [(one.name, one.model, one.data) for one in shared] == [("cup", (10,), (2,)), ("vase", (37,), (0,))]
    with pytest.raises(DataError, match="they share 1"):
        shared_classes("modelnet40", MODELNET40, "folder", ("vase", "mine"))
