"""The Labeled PSB: its folds, and what is refused. Small archives are made here; the real one where it is at hand."""

import numpy as np
import pytest
import torch

from pointewa import datasets
from pointewa.datasets import packed
from pointewa.datasets.layouts import labeled_psb
from pointewa.datasets.prepare import prepare
from pointewa.errors import DataError


def arrays(objects=10, num_points=40):
    rng = np.random.default_rng(0)
    label = np.repeat([0, 1], objects).astype(np.int8)
    part = np.where(label[:, None] == 0, rng.integers(0, 3, (2 * objects, num_points)), 3)
    return {
        "xyz": rng.normal(size=(2 * objects, num_points, 3)).astype(np.float32),
        "normal": np.zeros((2 * objects, num_points, 3), np.float16),
        "part": part.astype(np.int16),
        "label": label,
        "classes": np.array(["Ant", "Cup"]),
        "part_name": np.array(["head", "leg", "torso", "body"]),
        "part_class": np.array(["Ant", "Ant", "Ant", "Cup"]),
        "name": np.array([f"{'Ant' if one == 0 else 'Cup'}/{i + 81}" for i, one in enumerate(label)]),
    }


def write(root, **changed):
    found = {name: value for name, value in (arrays() | changed).items() if value is not None}
    np.savez(root / "labeled_psb_40.npz", **found)
    return found


@pytest.mark.parametrize("fold", range(5))
def test_every_fifth_object_is_tested_on(tmp_path, fold):
    made = write(tmp_path)
    splits = {split: datasets.open_source("labeled_psb", str(tmp_path), split, variant=f"fold{fold}")
              for split in ("train", "test")}  # fmt: skip
    chosen = [index for index in range(20) if index % 5 == fold]  # the objects of a category follow each other
    for split, mine in (("test", chosen), ("train", [index for index in range(20) if index not in chosen])):
        source = splits[split]
        assert list(source.object_names) == made["name"][mine].tolist()
        assert source.labels.tolist() == made["label"][mine].tolist()
        for index, cloud in zip(mine, source.clouds(1), strict=True):
            assert np.array_equal(cloud.points, made["xyz"][index])
            assert np.array_equal(cloud.point_labels, made["part"][index])
    assert source.parts.names == ("head", "leg", "torso", "body")
    assert source.parts.classes == (0, 0, 0, 1)


def test_a_fold_depends_on_the_numbers_of_the_objects_only(tmp_path):
    made, order = arrays(), np.random.default_rng(1).permutation(20)
    names = {}
    for part, rows in (("a", np.arange(20)), ("b", order)):
        (tmp_path / part).mkdir()
        write(tmp_path / part, **{name: made[name][rows] for name in ("xyz", "normal", "part", "label", "name")})
        names[part] = set(datasets.open_source("labeled_psb", str(tmp_path / part), "test").object_names)
    assert names["a"] == names["b"]


def test_the_default_fold_is_said(tmp_path, capsys):
    write(tmp_path)
    datasets.open_source("labeled_psb", str(tmp_path), "test", variant="fold0")
    assert capsys.readouterr().err == ""
    datasets.open_source("labeled_psb", str(tmp_path), "test")
    assert "tested on is fold0" in capsys.readouterr().err
    with pytest.raises(DataError, match="expected one of fold0, fold1, fold2, fold3, fold4 for labeled_psb, found 'x'"):
        datasets.open_source("labeled_psb", str(tmp_path), "test", variant="x")
    with pytest.raises(DataError, match=r"an object has 40 points, data.num_points asks for 41"):
        datasets.open_source("labeled_psb", str(tmp_path), "test", 41)
    with pytest.raises(DataError, match="Benchmark was not found"):
        datasets.open_source("labeled_psb", str(tmp_path / "nowhere"), "test")


REFUSED = {
    "part": ({"part": None}, "part is missing"),
    "shape": ({"part": arrays()["part"][:, :-1]}, "to fit together"),
    "rows": ({"label": arrays()["label"][:-1]}, "to fit together"),
    "columns": ({"xyz": arrays()["xyz"][..., :2]}, "to fit together"),
    "kind": ({"part": arrays()["part"] + 0.5}, "expected numbers, found float32, float64, int8"),
    "text": ({"part_name": np.arange(4)}, "expected names as text"),
    "class": ({"part_class": np.array(["Ant", "Ant", "Ant", "Dog"])}, "found 'Dog'"),
    "twice": ({"classes": np.array(["Ant", "Ant"])}, "classes: expected each once"),
    "name": ({"name": np.array(["Ant"] * 20)}, "expected <category>/<number>, found 'Ant'"),
    "objects": ({"part_name": np.array([None] * 4)}, "labeled_psb_40.npz"),  # pickled
    "other category": ({"part": arrays()["part"] * 0 + 2}, "Cup/91: point 0 has part 2"),
    "negative": ({"part": arrays()["part"] - 1}, "has part -1"),
    "label": ({"label": arrays()["label"] + 1}, "Ant/81: point 0 has part"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_broken_is_refused_by_name(tmp_path, case):
    changed, message = REFUSED[case]
    write(tmp_path, **changed)
    with pytest.raises(DataError, match=message) as caught:
        datasets.load("labeled_psb", str(tmp_path), "test", 32)
    assert "labeled_psb_40.npz" in str(caught.value)


@pytest.mark.parametrize("stream", [False, True])
def test_a_packed_file_keeps_parts(tmp_path, stream):
    write(tmp_path)
    source = datasets.open_source("labeled_psb", str(tmp_path), "test")
    expected = datasets.load("labeled_psb", str(tmp_path), "test", 32)
    for count in (16, 40):  # the first by name has too few points
        packed.write(tmp_path / f"labeled_psb_fold0_{count}.h5", {"test": (source, count, prepare(source, count, ""))})
    for root in (tmp_path, tmp_path / "labeled_psb_fold0_40.h5"):
        loaded = datasets.load("labeled_psb", str(root), "test", 32, stream=stream)
        assert loaded.source.endswith("labeled_psb_fold0_40.h5")
        assert loaded.parts == source.parts
        ((points, labels),) = loaded.batches([torch.arange(len(loaded))], 32)
        assert torch.equal(points, expected.points[:, :32])
        assert torch.equal(labels, expected.point_labels[:, :32])


def test_the_real_benchmark(real_data):
    tested = []
    for fold in range(5):
        train, test = (datasets.open_source("labeled_psb", str(real_data), split, 4096, f"fold{fold}")
                       for split in ("train", "test"))  # fmt: skip
        assert labeled_psb.check_split(train, "train") == labeled_psb.check_split(test, "test") == []
        assert np.bincount(test.labels).tolist() == [4] * 19
        assert not set(train.object_names) & set(test.object_names)
        tested += test.object_names
    assert len(set(tested)) == len(tested) == 380
    assert len(test.parts) == 94
    assert test.parts.names[:5] == ("body", "engine", "rudder", "stabilizer", "wing")
    heights = []  # y is up: the tops of vases above their bases
    names = test.parts.names
    for label, cloud in zip(train.labels, train.clouds(1), strict=True):
        if train.class_names[label] == "Vase":
            top, base = (cloud.points[cloud.point_labels == names.index(one, 89), 1] for one in ("top", "base"))
            heights += [top.mean() - base.mean()] if len(top) and len(base) else []
    assert np.mean(np.array(heights) > 0) > 0.75


def test_a_packed_file_of_another_fold_is_refused(tmp_path):
    write(tmp_path)
    source = datasets.open_source("labeled_psb", str(tmp_path), "test", variant="fold3")
    packed.write(tmp_path / "x.h5", {"test": (source, 40, prepare(source, 40, ""))})
    assert len(datasets.open_source("labeled_psb", str(tmp_path / "x.h5"), "test", variant="fold3")) == 4
    for variant in (None, "fold1"):
        with pytest.raises(
            DataError, match=r"data.variant: expected the fold that .*x.h5 was packed of, found fold[01]"
        ):
            datasets.open_source("labeled_psb", str(tmp_path / "x.h5"), "test", variant=variant)
