"""The axis that points up: whatever training turned is turned for a prediction too, without being told."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import pointewa
from pointewa import datasets
from pointewa.datasets import registry
from pointewa.datasets.layouts import folder as folder_layout
from pointewa.datasets.layouts import modelnet40, shapes
from pointewa.datasets.subjects import Subjects
from pointewa.errors import CheckpointError, DataError
from pointewa.inference.export import export
from pointewa.ops import canonical_order, group, up_word
from pointewa.runs.weights import load_model, save_model
from pointewa.tools import fold, predict, prepare_data, train

SMALL = ["model.width=24", "model.depth=2", "model.heads=2", "model.num_groups=8", "model.group_size=8",
         "data.num_points=64", "train.device=cpu", "run.report=false", "train.epochs=2", "train.batch_size=4",
         "train.lr=3e-3"]  # fmt: skip
TO_FILE = {"y": [0, 1, 2], "z": [0, 2, 1]}  # where x, y, z of the file come from


def write(root, up, objects=5):
    """Two classes of clouds with y up, written with ``up`` up; returns the files."""
    rng = np.random.default_rng(0)
    for name in ("cup", "table"):
        (root / name).mkdir(parents=True)
        for number in range(objects):
            points = torch.from_numpy(3 * shapes.sample(name, rng, 100).astype(np.float32) + 1)
            if up == "z":  # the turn that takes y to z
                points = torch.stack([points[:, 0], -points[:, 2], points[:, 1]], 1)
            if up == "-z":
                points = torch.stack([points[:, 0], points[:, 2], -points[:, 1]], 1)
            points = group(points[None], canonical_order(points[None]))[0]  # the evaluation starts at the first point
            np.save(root / name / f"{number}.npy", points.numpy())
    return sorted(root.glob("*/*.npy"))


@pytest.fixture(autouse=True)
def from_the_first_point(monkeypatch):
    """fpsample starts at a point of its own choice, which gives another farthest-point sample."""
    monkeypatch.setattr("pointewa.datasets.order.method", lambda: "torch")


@pytest.fixture
def as_they_come(monkeypatch):
    """A data set like folder that is not normalised."""

    def source(*arguments):
        return replace(folder_layout.source(*arguments), normalize=False)

    monkeypatch.setitem(registry.NAMES, "as_they_come", SimpleNamespace(source=source))


def trained(tmp_path, root, variant, dataset="folder"):
    arguments = [*SMALL, f"data.name={dataset}", f"data.root={root}", f"run.dir={tmp_path}", "run.name=a"]
    train.main([*arguments, f"data.variant={variant}", "--json"])
    return tmp_path / "a"


def compared(run, root, overrides=(), **options):
    """Logits of predictions of the test split's files, and those of the evaluation."""
    subjects, model = Subjects(run, overrides=overrides), pointewa.load(run, "cpu")
    found = [model.logits(np.load(root / name), **options) for name in subjects.clouds.object_names]
    return torch.stack(found), subjects.evaluator.plain().logits


@pytest.mark.parametrize(("up", "dataset"), [("y", "folder"), ("z", "folder"), ("-z", "folder"), ("z", "as_they_come")])
def test_a_prediction_turns_what_training_turned(tmp_path, as_they_come, capsys, up, dataset):
    files = write(tmp_path / "mine", up)
    run = trained(tmp_path, tmp_path / "mine", up_word(up), dataset)
    loaded = load_model(run)
    assert (loaded.up, loaded.normalize) == (up, "unit_sphere" if dataset == "folder" else "none")
    found, expected = compared(run, tmp_path / "mine")
    assert len(expected) == 2
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    wrong, _ = compared(run, tmp_path / "mine", up="z" if up == "y" else "y")
    assert (wrong - expected).abs().max() > 1e-3
    capsys.readouterr()
    predict.main([str(run), str(files[0]), "--json"])
    captured = capsys.readouterr()
    predict.main([str(run), str(files[0]), "--up", up, "--json"])
    assert capsys.readouterr().out == captured.out
    logits = pointewa.load(run, "cpu").logits(np.load(files[0]), up=up)
    (answer,) = json.loads(captured.out)["predictions"]
    assert max(answer["probabilities"].values()) == pytest.approx(logits.softmax(-1).max().item(), abs=1e-6)
    assert (f"turned from {up} up to y up" in captured.err) == (up != "y")


@pytest.mark.parametrize("up", ["y", "z"])
def test_a_set_with_another_axis(tmp_path, up):
    """The evaluation goes by the other set's axis, and a prediction by what it is told."""
    other = "y" if up == "z" else "z"
    write(tmp_path / "mine", up)
    run = trained(tmp_path, tmp_path / "mine", f"{up}_up")
    write(tmp_path / "others", other)
    own, overrides = Subjects(run).evaluator.plain().logits, [f"data.root={tmp_path / 'others'}"]
    found, expected = compared(run, tmp_path / "others", [*overrides, f"data.variant={other}_up"], up=other)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(expected, own, rtol=0, atol=1e-4)  # the same objects
    assert (Subjects(run, overrides=overrides).evaluator.plain().logits - own).abs().max() > 1e-3


def test_streamed_and_packed_clouds_know_the_axis_of_their_files(tmp_path, capsys):
    files = write(tmp_path / "mine", "z")
    for stream in (True, False):
        for _ in range(2):  # the second time from the cache
            clouds = datasets.load("folder", str(tmp_path / "mine"), "test", 64, variant="z_up", stream=stream)
            assert (clouds.up, clouds.take([0]).up) == ("z", "z")
    packed = tmp_path / "mine.h5"
    prepare_data.main(["pack", "data.name=folder", f"data.root={tmp_path / 'mine'}", "data.variant=z_up",
                       "--points", "100", "--out", str(packed)])  # fmt: skip
    for variant in (None, "z_up"):
        clouds = datasets.load("folder", str(packed), "test", 64, variant=variant)
        assert clouds.up == "z"
        assert clouds.points[0, :, 1].std() != pytest.approx(clouds.points[0, :, 2].std(), abs=1e-3)
    with pytest.raises(DataError, match=r"data.variant: .*mine.h5 was packed as z_up, found y_up"):
        datasets.load("folder", str(packed), "test", 64, variant="y_up")
    run = trained(tmp_path, packed, "null")
    model = pointewa.load(run, "cpu")
    assert model.up == "z"
    assert model.logits(np.load(files[0])).isfinite().all()


def test_meshes_of_modelnet40_are_z_up(tmp_path, monkeypatch):
    for name in ("cup/train/cup_0001", "cup/test/cup_0080"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / f"{name}.off").write_text("OFF\n3 1 0\n0 0 0\n1 0 0\n0 1 3\n3 0 1 2\n")
    monkeypatch.setattr(modelnet40, "check_split", lambda source, split: [])
    assert datasets.open_source("modelnet40", str(tmp_path), "test").up == "z"


def test_prepared_clouds_are_turned_already(tmp_path):
    write(tmp_path / "mine", "z")
    run = trained(tmp_path, tmp_path / "mine", "z_up")
    clouds, model = Subjects(run).clouds, pointewa.load(run, "cpu")
    found = model.logits(clouds.points[:, :64], normalized=True)
    torch.testing.assert_close(found, Subjects(run).evaluator.plain().logits, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="up must be one of x, y, z, -x, -y, -z, got 'down'"):
        model.logits(clouds.points, up="down")


@pytest.mark.parametrize(
    ("dataset", "variant", "up"),
    [("folder", "z_up", "z"), ("folder", "null", "y"), ("modelnet40", "off", "z"), ("modelnet40", "packed", "y"),
     ("modelnet40", "null", None), ("shapes", None, "y"), ("folder", None, None), ("folder", "damaged: [", None)],
)  # fmt: skip
def test_descriptions_that_do_not_say_it(tmp_path, trainer_in, recwarn, dataset, variant, up):
    """Of older versions: what training assumed, from the configuration beside it, and a warning where that is open."""
    trainer = trainer_in(tmp_path, "run.name=a", "ewa.enabled=false")
    path = tmp_path / "model.safetensors"
    save_model(path, replace(trainer.loaded(trainer.model), dataset=dataset))
    description = json.loads(path.with_suffix(".json").read_text())
    assert description.pop("up") == "y"
    path.with_suffix(".json").write_text(json.dumps(description))
    if variant:
        (tmp_path / "config.yaml").write_text(f"data: {{name: {dataset}, variant: {variant}}}")
    assert load_model(path).up == up
    recwarn.clear()
    assert pointewa.load(path, "cpu").up == (up or "y")
    messages = [str(one.message) for one in recwarn]
    assert len(messages) == (up is None)
    assert all("which axis points up" in one and "y is assumed" in one for one in messages)


def test_an_axis_that_is_none_is_refused(tmp_path, trainer_in):
    trainer = trainer_in(tmp_path, "run.name=a", "ewa.enabled=false")
    save_model(tmp_path / "model.safetensors", trainer.loaded(trainer.model))
    description = json.loads((tmp_path / "model.json").read_text())
    for wrong in ("down", ["z"], 2):
        (tmp_path / "model.json").write_text(json.dumps(description | {"up": wrong}))
        with pytest.raises(CheckpointError, match="description of the model is not valid"):
            load_model(tmp_path / "model.safetensors")


def test_what_is_written_for_others_says_it(tmp_path):
    write(tmp_path / "mine", "z")
    run = trained(tmp_path, tmp_path / "mine", "z_up")
    assert json.loads((run / "model.json").read_text())["up"] == "z"
    written = export(load_model(run), tmp_path / "model.pt", "torchscript")
    extra = {"description.json": ""}
    torch.jit.load(str(tmp_path / "model.pt"), _extra_files=extra)
    assert json.loads(extra["description.json"])["up"] == "z"
    assert any("(x, y, z) -> (x, z, -y)" in note for note in written.notes)
    fold.main([str(run), str(tmp_path / "dense.safetensors")])
    assert load_model(tmp_path / "dense.safetensors").up == "z"
