"""`pointewa.load`: what it predicts is what the evaluation of the run predicts."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import pointewa
from pointewa import datasets
from pointewa.datasets.layouts import shapes
from pointewa.errors import CheckpointError, ConfigError
from pointewa.models import Architecture, PointTransformerClassifier
from pointewa.ops import canonical_order, group, unit_sphere
from pointewa.runs.description import LoadedModel
from pointewa.runs.weights import save_model
from pointewa.tasks.base import Batch
from pointewa.tasks.classification import evaluate
from pointewa.tools import cli, predict

NAMES = ("ball", "box", "[cone]", "ring")
SMALL = Architecture(24, 2, 2, 8, 8, patch_width=8, patch_out=24)


def classifier(normalize="unit_sphere", architecture=SMALL):
    """With weights large enough that clouds are told apart, and batch norms that have seen some."""
    model = PointTransformerClassifier(architecture, len(NAMES))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        for _ in range(5):
            model.train()(torch.randn(16, 64, 3))
    return LoadedModel(model.eval(), NAMES, 64, "shapes", normalize)


@pytest.fixture
def saved(tmp_path):
    loaded = classifier()
    save_model(tmp_path / "model.safetensors", loaded)
    return tmp_path, loaded


def test_one_cloud_and_many(saved):
    folder, loaded = saved
    model = pointewa.load(folder, "cpu")
    assert (model.class_names, model.num_points) == (NAMES, 64)
    rng = np.random.default_rng(0)
    clouds = rng.normal(size=(70, 100, 3)) * rng.uniform(0, 5, (70, 1, 3)) + 3  # more than a batch of 64
    names, probabilities = model.predict(clouds)
    assert probabilities.shape == (70, 4)
    assert probabilities.std(0).max() > 0.01
    np.testing.assert_allclose(probabilities.sum(1), 1, atol=1e-6)
    name, alone = model.predict(clouds[3])
    assert name == names[3] == NAMES[alone.argmax()]
    np.testing.assert_allclose(alone, probabilities[3], atol=1e-6)
    by_hand = loaded.model(unit_sphere(torch.from_numpy(clouds[3]).float())[None]).softmax(1)  # which samples by itself
    assert by_hand.argmax(1).item() == alone.argmax()


@pytest.mark.parametrize("normalize", ["unit_sphere", "none"])
def test_it_is_what_the_evaluation_computes(normalize, monkeypatch):
    monkeypatch.setattr(shapes, "PER_CLASS", {"train": 2, "test": 2})
    # fpsample starts at a point of its own choice, which gives another farthest-point sample.
    monkeypatch.setattr("pointewa.datasets.order.method", lambda: "torch")
    source = datasets.open_source("shapes", "", "test")
    raw = torch.from_numpy(np.stack([cloud.points * 3 + 1 for cloud in source.clouds(200)]))
    raw = group(raw, canonical_order(raw)).numpy()  # the evaluation starts at the first point
    changed = replace(source, clouds=lambda count: iter(map(datasets.source.Cloud, raw)), normalize=normalize != "none")
    prepared = torch.from_numpy(np.stack([c.points for c in datasets.prepare.prepare(changed, 64, "")]))
    loaded = classifier(normalize)
    expected = evaluate(loaded.model, [Batch(prepared, torch.zeros(len(raw), dtype=torch.int64))]).logits
    found = torch.stack([pointewa.Predictor(loaded).logits(cloud[::-1].copy()) for cloud in raw])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    if normalize != "none":
        again = pointewa.Predictor(loaded).logits(prepared, normalized=True)
        torch.testing.assert_close(again, expected, rtol=0, atol=1e-5)


def test_a_lower_precision_is_asked_for_said_and_near(saved, capsys, tmp_path, monkeypatch):
    folder, _ = saved
    clouds = np.random.default_rng(0).normal(size=(40, 100, 3))
    exact, lowered = pointewa.load(folder, "cpu"), pointewa.load(folder, "cpu", precision="bfloat16")
    assert (exact.precision, lowered.precision) == ("float32", "bfloat16")
    assert torch.equal(exact.logits(clouds), pointewa.load(folder, "cpu", precision="float32").logits(clouds))
    error = (lowered.logits(clouds) - exact.logits(clouds)).abs().max()
    assert 1e-5 < error < 0.1 * exact.logits(clouds).std()
    # What is saved and described are the weights of the file.
    lowered.save_pretrained(tmp_path / "again")
    again = pointewa.Predictor.from_pretrained(tmp_path / "again", "cpu")
    assert torch.equal(again.logits(clouds), exact.logits(clouds))
    assert lowered.loaded.description() == exact.loaded.description()
    for fast, chosen in ((True, "bfloat16"), (False, "float32")):  # auto is what the hardware can
        monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda f=fast: f)
        monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: False)
        assert pointewa.load(folder, "cpu", precision="auto").precision == chosen
    with pytest.raises(ConfigError, match="precision: expected one of auto, bfloat16, float32, found 'half'"):
        pointewa.load(folder, "cpu", precision="half")
    np.save(tmp_path / "cloud.npy", clouds[0])
    words = [str(folder), str(tmp_path / "cloud.npy"), "--device", "cpu", "--json"]
    for precision in ("float32", "bfloat16"):
        predict.main([*words, "--precision", precision])
        said = capsys.readouterr()
        assert json.loads(said.out)["precision"] == precision
        assert ("computed in bfloat16" in said.err) == (precision == "bfloat16")


def test_any_number_and_kind_of_points():
    model = pointewa.Predictor(classifier())
    points = np.random.default_rng(0).integers(-50, 50, (40, 3))
    reference = model.logits(points.astype(np.float32))
    read_only = points.astype(">f8")
    read_only.flags.writeable = False
    for other in (points, read_only, torch.from_numpy(points), torch.from_numpy(points)[None], points.tolist()):
        assert torch.equal(model.logits(other).squeeze(0), reference)
    few = model.logits(points[:10])
    twice = model.logits(np.concatenate([points[:10], points[:10]]))
    torch.testing.assert_close(few, twice, rtol=0, atol=1e-5)  # repeating points changes nothing
    assert model.logits(points[:2]).isfinite().all()


def shuffled(points, seed):
    return points[torch.randperm(len(points), generator=torch.Generator().manual_seed(seed))]


@pytest.mark.parametrize("normalize", ["unit_sphere", "none"])
@pytest.mark.parametrize("kind", ["continuous", "on a grid", "duplicates", "few"])
def test_the_order_of_the_points_does_not_matter(normalize, kind):
    model, points = pointewa.Predictor(classifier(normalize)), torch.randn(500, 3) * torch.tensor([1, 0.5, 2])
    if kind == "on a grid":  # many points as far from the centroid, and from each other, as others
        points = (2 * points).round()
    elif kind == "duplicates":
        points = torch.cat([points[:150], points[:100], points[:1].expand(20, -1)])
    elif kind == "few":
        points = points[:7]
    expected = model.logits(points)
    for seed in range(5):
        assert torch.equal(model.logits(shuffled(points, seed)), expected)
    batch = torch.stack([shuffled(points, seed) for seed in range(4)])
    assert all(torch.equal(one, model.logits(batch)[0]) for one in model.logits(batch))
    name, probabilities = model.predict(points)
    assert model.predict(points.flip(0))[0] == name
    assert (model.predict(points.flip(0))[1] == probabilities).all()


@pytest.mark.parametrize("normalize", ["unit_sphere", "none"])
def test_clouds_far_from_the_origin(normalize):
    """In map coordinates they are centred in float64; where float32 has already taken their shape, that is said."""
    model, utm = pointewa.Predictor(classifier(normalize)), torch.tensor([500_000, 5_400_000, 300.0]).double()
    points = torch.randn(200, 3, dtype=torch.float64) * torch.tensor([1, 0.5, 2]).double()
    if normalize == "none":
        with pytest.raises(ValueError, match=r"its y has \d distinct values .* rounded to float32"):
            model.logits(points + utm)
        return
    expected = model.logits(points)
    for far in (points + utm, (points + utm).numpy(), (points + utm).tolist(), ((points + utm)[None]).flip(1)):
        torch.testing.assert_close(model.logits(far).squeeze(0), expected, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match=r"^its y has \d distinct values for 200 points: it was rounded to float32"):
        model.predict((points + utm).float())
    with pytest.raises(ValueError, match=r"^cloud 1: its y has"):
        model.predict(torch.stack([points, (points + utm).float().double()]).numpy())


def test_prepared_clouds_keep_their_first_point():
    loaded = classifier()
    points = unit_sphere(torch.randn(3, 64, 3))
    model = pointewa.Predictor(loaded)
    with torch.no_grad():
        assert torch.equal(model.logits(points, normalized=True), loaded.model(points))
    assert not torch.equal(model.logits(points.flip(1), normalized=True), model.logits(points, normalized=True))


@pytest.mark.parametrize(
    ("points", "message"),
    [
        (np.zeros((5, 2)), r"expected points \[P, 3\] or \[B, P, 3\] with B, P > 0, found \[5, 2\]"),
        (np.zeros(3), r"found \[3\]"),
        (np.zeros((0, 3)), r"found \[0, 3\]"),
        (np.zeros((0, 5, 3)), r"found \[0, 5, 3\]"),
        (np.array([[0, 0, np.nan]]), "non-finite or beyond 1e"),
        (np.array([[0, 0, 1e300]]), "non-finite or beyond 1e"),
        (np.array([[0, 0, 1e19]]), "non-finite or beyond 1e"),
        (np.ones((5, 3)), "all of its 5 points are in one place"),
        (np.full((2, 5, 3), 1e6), "cloud 0: all of its 5 points are in one place"),
        (np.array([[1, 2, 3]]), "all of its 1 points are in one place"),
    ],
)
def test_what_no_model_can_take(points, message):
    with pytest.raises(ValueError, match=message):
        pointewa.Predictor(classifier()).predict(points)


def test_what_cannot_be_loaded(saved):
    with pytest.raises(CheckpointError, match=r"pointewa\.runs\.weights\.load_foreign"):
        pointewa.load("ckpt-best.pth")
    with pytest.raises(ConfigError, match="tpu"):
        pointewa.load(saved[0], "tpu")
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        pointewa.lode  # noqa: B018
    assert {"load", "Predictor"} <= set(dir(pointewa))


def test_the_scheme_alone_imports_nothing_of_this():
    code = "import sys, pointewa.ewa; print([name for name in sys.modules if name.startswith('pointewa.')])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                         cwd=Path(__file__).parents[2]).stdout  # fmt: skip
    assert "trainer" not in out
    assert "models" not in out


def fails(arguments, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.run(lambda: predict.main(arguments))
    assert exit_.value.code == 2
    return capsys.readouterr()


def test_files(saved, tmp_path, capsys):
    folder, loaded = saved
    rng = np.random.default_rng(0)
    points = rng.normal(size=(300, 3)).astype(np.float32)
    np.save(tmp_path / "a.npy", points)
    np.savetxt(tmp_path / "b.txt", points[:, [0, 2, 1]] * [1, -1, 1])  # the same with z up
    (tmp_path / "c.off").write_text("OFF\n3 1 0\n0 0 0\n1 0 0\n0 1 0\n3 0 1 2\n")
    files = [str(tmp_path / name) for name in ("a.npy", "b.txt", "c.off")]
    predict.main([str(folder), *files, "--json"])
    result = json.loads(capsys.readouterr().out)
    a, _, c = result["predictions"]
    assert result["failed"] == []
    name, probabilities = pointewa.Predictor(loaded).predict(points)
    assert a["class"] == name
    assert list(a["probabilities"].values()) == pytest.approx(sorted(probabilities.tolist(), reverse=True))
    assert (a["points"], c["points"]) == (300, 10_000)
    predict.main([str(folder), files[1], "--up", "z", "--json"])
    turned = json.loads(capsys.readouterr().out)["predictions"][0]
    assert turned["probabilities"] == pytest.approx(a["probabilities"], abs=1e-4)
    predict.main([str(folder), *files])
    out = capsys.readouterr().out
    assert f"{100 * max(probabilities):.1f} %" in out
    assert out.count(" %") == 9


def test_a_file_in_map_coordinates(saved, tmp_path, capsys):
    folder, _ = saved
    points = np.random.default_rng(0).normal(size=(300, 3))
    np.savetxt(tmp_path / "near.txt", points)
    np.savetxt(tmp_path / "on a map.txt", points + np.array([500_000, 5_400_000, 300]))
    predict.main([str(folder), str(tmp_path / "near.txt"), str(tmp_path / "on a map.txt"), "--json"])
    near, far = json.loads(capsys.readouterr().out)["predictions"]
    assert far["class"] == near["class"]
    assert far["probabilities"] == pytest.approx(near["probabilities"], abs=1e-5)


def test_files_that_cannot_be_read(saved, tmp_path, capsys):
    folder, _ = saved
    np.save(tmp_path / "a.npy", np.eye(4, 3))
    np.save(tmp_path / "far.npy", np.full((4, 3), 1e30))
    (tmp_path / "b.txt").write_text("nothing")
    files = [str(tmp_path / name) for name in ("a.npy", "far.npy", "b.txt", "none.ply")]
    captured = fails([str(folder), *files, "--json"], capsys)
    result = json.loads(captured.out)
    assert [len(result["predictions"]), len(result["failed"])] == [1, 3]
    lines = captured.err.splitlines()
    assert lines[-1] == "error: 3 of 4 files could not be classified"
    for line, path in zip(lines[:-1], files[1:], strict=True):
        assert line.startswith(path)
    captured = fails([str(tmp_path / "nowhere"), files[0]], capsys)
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1


def test_an_unfinished_run_is_folded_on_the_way(trainer_in, tmp_path):
    trainer = trainer_in(tmp_path, "train.epochs=1", "run.name=a")
    trainer.fit()
    points = trainer.data.test.clouds.points[:4, :128]
    with torch.no_grad():
        expected = trainer.model.eval()(points)
    found = pointewa.load(tmp_path / "a" / "last.ckpt", "cpu").logits(points, normalized=True)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
