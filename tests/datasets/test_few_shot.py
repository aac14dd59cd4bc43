"""Few-shot folds: drawn ones, published ones, and what is refused."""

import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from pointewa.datasets.layouts.modelnet40 import OFFICIAL

from pointewa import datasets
from pointewa.config import load_config
from pointewa.datasets import packed
from pointewa.datasets.few_shot import QUERIES, Fold, drawn
from pointewa.datasets.layouts import images, shapes
from pointewa.datasets.registry import open_source
from pointewa.datasets.splits import fold_entry, load_split, training_data
from pointewa.datasets.subjects import Subjects
from pointewa.errors import ConfigError, DataError
from pointewa.ops import unit_sphere
from pointewa.tools import train
from tests.conftest import TINY

FOLD = Fold(5, 10, 3)
KEYS = ["data.way=5", "data.shot=10", "data.fold=3"]


def load(split, fold=FOLD, **options):
    return datasets.load("shapes", "", split, 128, fold=fold, **options)


@pytest.mark.parametrize("stream", [False, True])
def test_a_drawn_fold_has_so_many_objects_of_so_many_classes(stream):
    support, queries = load("train", stream=stream), load("test", stream=stream)
    for clouds, count, split in ((support, 10, "train"), (queries, QUERIES, "test")):
        assert clouds.labels.tolist() == [label for label in range(5) for _ in range(count)]
        assert len(set(clouds.object_names)) == len(clouds) == 5 * count
        for name, label in zip(clouds.object_names, clouds.labels.tolist(), strict=True):
            assert name.startswith(f"{clouds.class_names[label]}_{split}_")  # of its own class and split
    assert support.class_names == queries.class_names
    assert len(set(support.class_names)) == 5
    ((points, _),) = queries.batches([torch.arange(100)], 128)
    whole = datasets.load("shapes", "", "test", 128)
    for row in (0, 57, 99):  # the points are those of the object that is named
        assert torch.equal(points[row], whole.points[whole.object_names.index(queries.object_names[row]), :128])


def test_drawn_folds_are_fixed_and_differ_by_number_way_and_shot():
    assert load("train").class_names == ("house", "rocket", "tree", "vase", "table")  # of any version
    folds = [load("train", Fold(5, 10, number)) for number in range(10)]
    assert len({clouds.class_names for clouds in folds}) == 10
    again = load("train", Fold(5, 10, 7))
    assert again.object_names == folds[7].object_names
    assert torch.equal(again.points, folds[7].points)
    assert load("train", Fold(5, 20, 3)).class_names != load("train").class_names  # settings are independent draws
    with_seed = load_split(load_config(overrides=[*TINY, *KEYS, "train.seed=9"]), "train")
    assert with_seed.object_names == load("train").object_names


def test_a_drawn_fold_does_not_depend_on_the_order_of_the_files():
    source = open_source("shapes", "", "train")
    order = np.random.default_rng(0).permutation(len(source))
    shuffled = replace(source, labels=source.labels[order], object_names=tuple(source.object_names[i] for i in order))
    one, other = drawn(source, "train", FOLD), drawn(shuffled, "train", FOLD)
    assert one.rows != other.rows
    assert one.class_names == other.class_names
    assert [source.object_names[i] for i in one.rows] == [shuffled.object_names[i] for i in other.rows]


def test_only_the_objects_of_the_fold_are_read(monkeypatch):
    load("train")  # prepared
    asked = []
    read = packed.Split.read
    monkeypatch.setattr(packed.Split, "read", lambda self, rows, count: asked.append(rows) or read(self, rows, count))
    load("train")
    assert [len(rows) for rows in asked] == [50]


def test_images_have_folds_too(monkeypatch):
    monkeypatch.setattr(images, "COUNT", {"train": 200, "test": 300})
    found = datasets.load("images", "gratings", "train", img_size=8, fold=Fold(3, 4, 0))
    whole = datasets.load("images", "gratings", "train", img_size=8)
    assert found.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    for pixels, label, name in zip(found.pixels, found.labels.tolist(), found.object_names, strict=True):
        place = whole.object_names.index(name)
        assert whole.class_names[whole.labels[place]] == found.class_names[label]
        assert torch.equal(pixels, whole.pixels[place])


def test_a_set_with_too_few_classes_or_objects_is_refused(monkeypatch):
    with pytest.raises(ConfigError, match=r"data\.way: expected at most 17, the classes of shapes, found 18"):
        load("train", Fold(18, 1, 0))
    monkeypatch.setattr(shapes, "PER_CLASS", {"train": 4, "test": 19})
    expected = (
        "shapes: expected at least 5 objects of every class in the train split, for 5 shots, found fewer of 17 "
        "classes: airplane has 4, barbell has 4, bench has 4, bottle has 4, chair has 4 and 12 more: lower data.shot"
    )
    with pytest.raises(DataError, match=expected):
        load("train", Fold(2, 5, 0))
    with pytest.raises(DataError, match=r"20 objects of every class in the test split, for 20 queries, found .*has 19"):
        load("test", Fold(2, 4, 0))


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        (["data.way=5"], "data.shot: expected a number beside data.way, found none: few-shot needs data.way, "),
        (["data.shot=5", "data.fold=0"], "data.way: expected a number beside data.shot and data.fold, found none"),
        ([*KEYS, "data.way=1"], "data.way: expected at least 2, found 1"),
        ([*KEYS, "data.shot=0"], "data.shot: expected at least 1, found 0"),
        ([*KEYS, "data.fold=-1"], "data.fold: expected at least 0, found -1"),
        ([*KEYS, "data.way=many"], "data.way: Value 'many'"),
        ([*KEYS, "data.val_fraction=0.1"], "data.val_fraction: a fold .data.way. is trained on its whole support set"),
        ([*KEYS, "data.train_fraction=0.5"], "data.train_fraction: a fold .data.way. is trained on its whole"),
    ],
)
def test_keys_that_do_not_go_together_are_refused(keys, expected):
    with pytest.raises(ConfigError, match=expected):
        load_config(overrides=keys)


def test_only_classification_has_folds():
    config = load_config(overrides=[*TINY, *KEYS, "train.task=masked_autoencoding", "ewa.enabled=false"])
    with pytest.raises(ConfigError, match=r"data\.fold: few-shot folds are of classification, found train\.task=mask"):
        training_data(config)


# Published folds


def write_fold(path, way=5, shot=10, points=160, seed=0):
    """A fold as its authors wrote it: items of points and normals, label, number of the class."""
    rng = np.random.default_rng(seed)
    classes = rng.permutation(40)[:way]
    content = {
        split: [
            (rng.normal(3, 2, (points, 6)).astype(np.float32), label, int(classes[label]))
            for label in range(way)
            for _ in range(count)
        ]
        for split, count in (("train", shot), ("test", 20))
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(content))
    return content


@pytest.fixture
def published(tmp_path):
    """The fold 3 of 5-way 10-shot in its folder, and its content."""
    path = tmp_path / "ModelNetFewshot/5way_10shot/3.pkl"
    return path, write_fold(path)


def config_of(root, *keys):
    return load_config(overrides=[*TINY, "data.name=modelnet40", f"data.root={root}", *KEYS, *keys])


@pytest.mark.parametrize("place", ["ModelNetFewshot/5way_10shot", "ModelNet/ModelNetFewshot/5way10shot"])
def test_published_folds_are_used_where_they_are(tmp_path, place):
    content = write_fold(tmp_path / place / "3.pkl")
    config = config_of(tmp_path)
    assert fold_entry(config) == {"way": 5, "shot": 10, "fold": 3, "drawn": False}
    numbers = {label: number for _, label, number in content["train"]}
    for split in ("train", "test"):
        clouds = load_split(config, split)
        assert clouds.class_names == tuple(list(OFFICIAL)[numbers[label]] for label in range(5))
        assert clouds.labels.tolist() == [label for _, label, _ in content[split]]
        assert clouds.normalized
        for row in (0, 17, len(clouds) - 1):
            cloud = unit_sphere(
                torch.from_numpy(content[split][row][0][:, :3])
            )  # of all its points, before any drawing
            distances = torch.cdist(clouds.points[row].double(), cloud.double()).min(1).values
            assert distances.max() < 1e-6
            assert len(clouds.points[row].unique(dim=0)) == clouds.num_points >= 128


def test_published_folds_of_real_size_are_normalised_on_all_points(tmp_path):
    content = write_fold(tmp_path / "ModelNetFewshot/2way_1shot/0.pkl", 2, 1, 8192)
    fold = Fold(2, 1, 0)
    clouds = datasets.load("modelnet40", str(tmp_path), "train", 1024, fold=fold)
    assert clouds.points.shape == (2, 1200, 3)
    points = content["train"][0][0][:, :3].astype(np.float64)
    points -= points.mean(0)
    points /= np.linalg.norm(points, axis=1).max()
    nearest = torch.cdist(clouds.points[0].double(), torch.from_numpy(points)).min(1).values
    assert nearest.max() < 1e-5


def test_other_settings_and_a_named_layout_are_drawn(published, tmp_path):
    for keys in (["data.way=6"], ["data.variant=packed"]):
        assert fold_entry(config_of(tmp_path, *keys))["drawn"]
        with pytest.raises(DataError, match="ModelNet40 was not found"):
            load_split(config_of(tmp_path, *keys), "train")


def test_a_published_fold_that_is_missing_is_not_drawn(published, tmp_path):
    with pytest.raises(DataError, match=r"5way_10shot/4\.pkl: no such file, though .*5way_10shot has published folds"):
        load_split(config_of(tmp_path, "data.fold=4"), "train")


def test_too_few_points_for_the_training_are_refused(published, tmp_path):
    with pytest.raises(DataError, match=r"3\.pkl: an object has 160 points, data.num_points asks for 200: lower it"):
        load_split(config_of(tmp_path, "data.num_points=200"), "train")


def damage(content, kind):
    (points, label, number), *rest = content["train"]
    if kind == "list":
        return content["train"]
    if kind == "objects":
        return content | {"train": rest}
    if kind == "label":
        return content | {"train": [(points, 5, number), *rest]}
    if kind == "float":
        return content | {"train": [(points, 0.5, number), *rest]}
    if kind == "class":
        return content | {"train": [(points, label, 40), *rest]}
    if kind == "other class":
        return content | {"train": [(points, label, (number + 1) % 40), *rest]}
    if kind == "counts":
        return content | {"train": [content["train"][-1], *rest]}
    if kind == "same":
        return {split: [(one, label, 7) for one, label, _ in items] for split, items in content.items()}
    if kind == "flat":
        return content | {"train": [(points[:, :2], label, number), *rest]}
    if kind == "sizes":
        return content | {"train": [(points[:100], label, number), *rest]}
    if kind == "pair":
        return content | {"train": [(points, label), *rest]}
    return content | {"train": [(np.full_like(points, np.nan), label, number), *rest]}


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("list", "expected the lists train and test, found list"),
        ("objects", "train: expected 50 objects for 5-way 10-shot, fold 3, found 49"),
        ("label", "train, object 0: expected a label below 5 and a class below 40, found 5 and "),
        ("float", "train, object 0: its label or class is no whole number"),
        ("class", "train, object 0: expected a label below 5 and a class below 40, found 0 and 40"),
        ("other class", "train, object 1: label 0 is of class "),
        ("counts", r"train: expected as many objects of every class, found \[9, 10, 10, 10, 11\]"),
        ("same", "two labels are of the same class"),
        ("flat", r"train, object 0: expected real points \[P, 3 or more\], found float32 \[160, 2\]"),
        ("sizes", "clouds of the shapes "),
        ("pair", "train, object 0: expected points, label and class, found tuple"),
        ("nan", "object 0 .5way_10shot/3/train/0. has coordinates that are not finite"),
    ],
)
def test_a_pickle_that_is_no_fold_is_refused(published, tmp_path, kind, expected):
    path, content = published
    path.write_bytes(pickle.dumps(damage(content, kind)))
    with pytest.raises(DataError, match=f"3.pkl.*{expected}") as error:
        load_split(config_of(tmp_path), "train")
    assert "\n" not in str(error.value)


# Runs


def test_a_run_is_evaluated_on_its_own_fold(tmp_path):
    keys = [*TINY, "data.way=3", "data.shot=5", "data.fold=1", "train.batch_size=8", f"run.dir={tmp_path}"]
    train.main([*keys, "run.report=false", "--json"])
    run = tmp_path / "shapes-tiny-3w5s-fold1-ewa-seed0"
    subjects = Subjects(run)
    assert len(subjects.clouds) == 60
    assert subjects.what == (
        "shapes, queries of 3-way 5-shot, fold 1, drawn by this library's seed: not comparable with published folds"
    )
    assert subjects.classifier.model.num_classes == len(subjects.clouds.class_names) == 3
    with pytest.raises(ConfigError, match=r"data\.fold: 3-way 5-shot, fold 2, as it is found now, is of .* and the mo"):
        _ = Subjects(run, overrides=["data.way=3", "data.shot=5", "data.fold=2"]).evaluation
    other = Subjects(run, overrides=["data.name=modelnet40", "data.root=nowhere"])
    assert other.config.data.way is None  # another set is not a fold
