"""`pointewa.load` of a part segmentation: the parts of all points, and files of them."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

import pointewa
from pointewa import datasets
from pointewa.datasets.files import read_labelled
from pointewa.errors import CheckpointError
from pointewa.inference.all_points import on_all_points
from pointewa.inference.predict import PartPredictor
from pointewa.models import Architecture, Parts, PointTransformerSegmenter
from pointewa.ops import canonical_order, farthest_point_sample, unit_sphere
from pointewa.runs.description import LoadedModel
from pointewa.runs.weights import load_model, save_model
from pointewa.tasks.base import Batch
from pointewa.tasks.part_segmentation import segment
from pointewa.tools import predict
from tests.tools.test_messages import fails

NAMES = ("chair", "mug")
PARTS = Parts(("seat", "leg", "body", "handle", "any"), (0, 0, 1, 1, -1))
SMALL = Architecture(24, 3, 2, 8, 8, patch_width=8, patch_out=24)


@pytest.fixture
def saved(tmp_path):
    """With weights large enough that points are told apart."""
    model = PointTransformerSegmenter(SMALL, PARTS, 2, "light")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        for _ in range(5):
            model.train()(torch.randn(16, 64, 3), torch.arange(16) % 2)
        model.convs1.weight[:, 24:] = 0  # what is the same for all points of a cloud
        model.convs3.bias.sub_(model.eval()(torch.randn(16, 64, 3), torch.arange(16) % 2).mean((0, 1)))
    loaded = LoadedModel(model.eval(), NAMES, 64, "mine", "unit_sphere", "part_segmentation", "z")
    save_model(tmp_path / "model.safetensors", loaded)
    return tmp_path, loaded


def test_in_bfloat16_nearly_all_points_are_of_the_same_part(saved):
    exact, lowered = (pointewa.load(saved[0], "cpu", precision=one) for one in ("float32", "bfloat16"))
    points = np.random.default_rng(0).normal(size=(500, 3))
    assert isinstance(lowered, PartPredictor)
    expected, found = (model.predict(points, "chair", up="y")[1] for model in (exact, lowered))
    assert len(set(expected.tolist())) > 1
    assert (expected == found).mean() > 0.97
    assert not torch.equal(exact.logits(points, "chair", up="y"), lowered.logits(points, "chair", up="y"))


def by_hand(loaded, points, label):
    """Of the points, z up, in the order in which they come."""
    turned = torch.from_numpy(points[:, [0, 2, 1]] * [1, 1, -1])
    order = canonical_order(turned[None])[0]
    whole = unit_sphere(turned[order]).float()
    sample = whole[farthest_point_sample(whole[None], 64)[0]]
    with torch.no_grad():
        logits = loaded.model(sample[None], torch.tensor([label]))[0]
    found = torch.empty(len(points), 5)
    found[order] = on_all_points(logits, sample, whole)
    found[:, ~PARTS.mask(2)[label]] = -torch.inf
    return found.argmax(1)


@pytest.mark.parametrize("size", [300, 64, 20])
def test_every_point_has_a_part_of_its_category(saved, size):
    folder, loaded = saved
    model = pointewa.load(folder, "cpu")
    assert isinstance(model, PartPredictor)
    assert model.parts == PARTS
    points = np.random.default_rng(0).normal(size=(size, 3)) * [1, 2, 3] + 100
    for label, name in enumerate(NAMES):
        names, labels = model.predict(points, name)
        assert torch.equal(torch.from_numpy(labels), by_hand(loaded, points, label))
        assert names.tolist() == [PARTS.names[one] for one in labels]
        assert PARTS.mask(2)[label][labels].all()
        assert len(set(labels.tolist())) > 1
        again = np.random.default_rng(1).permutation(size)
        assert (model.predict(points[again], name)[1] == labels[again]).all()


def test_prepared_clouds_give_what_the_evaluation_gives():
    clouds = datasets.load("shapes", "", "test", 64, parts=True)
    clouds = clouds.take(range(20))
    model = PointTransformerSegmenter(SMALL, clouds.parts, len(clouds.class_names), "light").eval()
    loaded = LoadedModel(model, clouds.class_names, 64, "shapes", "unit_sphere", "part_segmentation")
    expected = segment(model, [Batch(clouds.points[:, :64], clouds.labels, clouds.point_labels[:, :64])]).predicted
    predictor = pointewa.Predictor(loaded)
    for index, label in enumerate(clouds.labels.tolist()):
        found = predictor.predict(clouds.points[index, :64], clouds.class_names[label], normalized=True)[1]
        assert (found == expected[index].numpy()).mean() > 0.98  # a tie may fall otherwise


@pytest.mark.parametrize(
    ("points", "category", "message"),
    [
        (np.eye(3), "", "category: expected one of chair, mug, found ''"),
        (np.eye(3), "table", "category: expected one of chair, mug, found 'table'"),
        (np.zeros((2, 5, 3)), "mug", "cloud 0: all of its 5 points"),
        (np.random.default_rng(0).normal(size=(2, 5, 3)), "mug", r"expected one cloud \[P, 3\], found \[2, 5, 3\]"),
        (np.full((5, 3), np.nan), "mug", "non-finite"),
    ],
)
def test_what_cannot_be_segmented_is_refused(saved, points, category, message):
    with pytest.raises(ValueError, match=message):
        pointewa.load(saved[0], "cpu").predict(points, category)


def test_a_segmenter_comes_back_from_a_folder_and_is_no_classifier(saved, tmp_path):
    folder, loaded = saved
    model = pointewa.load(folder, "cpu")
    model.save_pretrained(tmp_path / "for_the_hub")
    points = np.random.default_rng(0).normal(size=(90, 3))
    again = pointewa.Predictor.from_pretrained(tmp_path / "for_the_hub", "cpu")
    assert (again.predict(points, "mug")[1] == model.predict(points, "mug")[1]).all()
    with pytest.raises(CheckpointError, match="expected a classifier, found a segmenter"):
        load_model(folder)
    with pytest.raises(ValueError, match="expected unit_sphere or none for a segmenter"):
        pointewa.Predictor(replace(loaded, normalize="unit_sphere_of_sample"))


def test_files_are_written_beside_the_inputs_and_can_be_read_as_labelled_clouds(saved, tmp_path, capsys):
    folder, _ = saved
    points = np.random.default_rng(0).normal(size=(150, 3)) + 1e6
    np.save(tmp_path / "a.npy", points)
    np.savetxt(tmp_path / "b.xyz", points[:40])
    predict.main([str(folder), str(tmp_path / "a.npy"), str(tmp_path / "b.xyz"), "--class", "mug", "--json"])
    found = json.loads(capsys.readouterr().out)
    labels = pointewa.load(folder, "cpu").predict(points, "mug")[1]
    one = found["predictions"][0]
    assert (one["points"], one["class"], one["out"]) == (150, "mug", str(tmp_path / "a-parts.ply"))
    assert one["parts"] == {PARTS.names[i]: int((labels == i).sum()) for i in np.unique(labels)}
    cloud, column = read_labelled(tmp_path / "a-parts.ply")
    assert column == "label"
    assert (cloud.points == points).all()
    assert (cloud.point_labels == labels).all()
    text = (tmp_path / "a-parts.ply").read_bytes()
    assert all(f"comment label {i} {PARTS.names[i]}\n".encode() in text for i in np.unique(labels))
    assert (np.load(tmp_path / "a.npy") == points).all()
    predict.main([str(folder), str(tmp_path / "b.xyz"), "--class", "chair", "--out", str(tmp_path / "new")])
    assert (tmp_path / "new/b-parts.ply").is_file()
    assert f"wrote {tmp_path}/new/b-parts.ply\n" in capsys.readouterr().out


def test_what_the_command_refuses(saved, tmp_path, capsys):
    folder, _ = saved
    points = np.random.default_rng(0).normal(size=(50, 3))
    for name in ("a.npy", "x/a.npy"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        np.save(tmp_path / name, points)
    before = sorted(tmp_path.rglob("*"))
    one = [folder, tmp_path / "a.npy"]
    assert "expected one of chair, mug, found nothing" in fails(capsys, predict.main, *one)
    assert "expected one of chair, mug, found 'car'" in fails(capsys, predict.main, *one, "--class", "car")
    both = [*one, tmp_path / "x/a.npy", "--class", "mug", "--out", tmp_path / "new"]
    assert "the parts of both would be written to" in fails(capsys, predict.main, *both)
    assert sorted(tmp_path.rglob("*")) == before
    predict.main([*map(str, one), "--class", "mug"])
    capsys.readouterr()
    over = [folder, tmp_path / "a.npy", tmp_path / "a-parts.ply", "--class", "mug"]
    assert "would be written over it" in fails(capsys, predict.main, *over)
