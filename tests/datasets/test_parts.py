"""The parts of categories, and clouds whose points are labelled by them."""

import h5py
import numpy as np
import pytest
import torch

from pointewa.datasets import packed, prepare
from pointewa.datasets.base import PointClouds
from pointewa.datasets.source import Cloud, Source
from pointewa.errors import DataError
from pointewa.models.parts import EVERY, Parts

PARTS = Parts(("seat", "leg", "top", "anything"), (0, 0, 1, EVERY))


def test_a_category_has_its_own_parts_and_those_of_every_category():
    assert PARTS.mask(2).tolist() == [[True, True, False, True], [False, False, True, True]]
    with pytest.raises(ValueError, match="below 1, found 1"):
        PARTS.mask(1)


@pytest.mark.parametrize(("names", "classes"), [((), ()), (("a",), (0, 1)), (("a",), (-2,))])
def test_parts_without_names_or_categories_are_refused(names, classes):
    with pytest.raises(ValueError, match="parts: expected"):
        Parts(names, classes)


def clouds(labels: torch.Tensor) -> PointClouds:
    points = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
    return PointClouds(
        points, torch.tensor([0, 1]), ("chair", "table"), ("a", "b"), "x.h5", point_labels=labels, parts=PARTS
    )


def test_a_point_with_a_part_of_another_category_is_refused():
    fine = torch.tensor([[0, 1, 1, 3, 0], [2, 2, 3, 3, 2]])
    assert clouds(fine).take([1]).parts == PARTS
    for bad in (2, -1, 4):
        with pytest.raises(
            DataError, match=rf"object 0 \(a\): point 3 has label {bad}, expected a part of chair \(0, 1, 3\)"
        ):
            clouds(fine.index_put((torch.tensor(0), torch.tensor(3)), torch.tensor(bad)))


@pytest.fixture
def source(tmp_path) -> Source:
    (tmp_path / "made.txt").write_text("")
    rng = np.random.default_rng(0)
    made = [Cloud(rng.normal(size=(9, 3)), np.full(9, label)) for label in (1, 2)]
    return Source("made", tmp_path / "made.txt", (tmp_path / "made.txt",), ("chair", "table"), ("a", "b"),
                  np.array([0, 1]), 9, lambda count: iter(made), point_labels=True, parts=PARTS)  # fmt: skip


@pytest.mark.parametrize("stream", [False, True])
def test_parts_are_cached_and_packed_with_the_clouds(source, tmp_path, monkeypatch, stream):
    monkeypatch.setenv("POINTEWA_CACHE", str(tmp_path / "cache"))
    loaded = [prepare.load("made", "train", source, 8, torch.device("cpu"), stream) for _ in range(2)]
    assert [one.parts for one in loaded] == [PARTS, PARTS]
    packed.write(tmp_path / "p.h5", {"train": (source, 8, prepare.prepare(source, 8, ""))})
    assert packed.source(tmp_path / "p.h5", "train").parts == PARTS
    with h5py.File(tmp_path / "p.h5", "r+") as h5:
        h5.attrs["part_classes"] = [0, 0, 7, -1]
    with pytest.raises(DataError, match=r"p\.h5: attributes part_names, part_classes: .*below 2, found 7"):
        packed.open_split(tmp_path / "p.h5", "train")


@pytest.mark.parametrize("stream", [False, True])
def test_a_fold_has_no_parts_since_they_count_by_the_classes_of_the_whole_set(source, stream):
    whole = prepare.load("made", "train", source, 8, torch.device("cpu"), stream)
    fold = whole.take([1]).relabelled(torch.tensor([0]), ("table",))
    assert (fold.parts, fold.class_names, fold.labels.tolist()) == (None, ("table",), [0])
    ((points, point_labels),) = fold.batches([torch.tensor([0])], 8)
    assert point_labels is None
    assert torch.equal(points, next(whole.batches([torch.tensor([1])], 8)).points)
