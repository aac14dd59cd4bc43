"""What the tools say where a name or a number is not what they need, and where a run's data set has moved."""

import json
import shutil

import numpy as np
import pytest

from benchmarks import bench, soak
from pointewa.clone import CONFIGS
from pointewa.datasets import NAMES
from pointewa.datasets.layouts import shapes
from pointewa.errors import counted
from pointewa.runs.weights import load_model
from pointewa.tools import cli, evaluate, export, fold, predict, prepare_data, report, study, svm, train, visualize

FAST = ["model.width=24", "model.depth=2", "model.heads=2", "model.num_groups=8", "model.group_size=8",
        "data.num_points=64", "train.epochs=1", "train.batch_size=8", "train.device=cpu"]  # fmt: skip


def fails(capsys, main, *arguments):
    """The one line of a command that the user got wrong."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        cli.run(lambda: main([str(one) for one in arguments]))
    assert exit_.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = [line for line in captured.err.splitlines() if not line.startswith("note: ")]
    assert line.startswith("error: ")
    return line.removeprefix("error: ")


def figures(capsys, main, *arguments):
    capsys.readouterr()
    main([*map(str, arguments), "--json"])
    return json.loads(capsys.readouterr().out)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a run on files with z up, and with the files."""
    root, rng = tmp_path_factory.mktemp("made"), np.random.default_rng(0)
    for name in ("cup", "table"):
        (root / "mine" / name).mkdir(parents=True)
        for number in range(20):
            np.save(root / "mine" / name / f"{number}.npy", shapes.sample(name, rng, 80)[:, [0, 2, 1]] * [1, -1, 1])
    train.main([*FAST, "data.name=folder", f"data.root={root / 'mine'}", "data.variant=z_up", "data.val_fraction=0.2",
                f"run.dir={root}", "run.name=run", "--json"])  # fmt: skip
    return root


ON_DATA = [  # what looks at the data set of a run
    (evaluate.main, []), (svm.main, []), (report.main, ["--out", "{out}/page.html"]),
    (visualize.main, ["embedding", "--method", "pca", "--out", "{out}/a.png", "--run"]),
]  # fmt: skip


@pytest.mark.parametrize(("main", "options"), ON_DATA)
def test_the_data_set_of_a_run_is_found_by_what_the_run_says(made, tmp_path, capsys, monkeypatch, main, options):
    """Root, layout and parts; moved, it is named; gone, that is one line."""
    monkeypatch.chdir(tmp_path)
    arguments = [option.format(out=tmp_path) for option in options] + [made / "run"]
    expected = figures(capsys, main, *arguments)
    moved = tmp_path / "moved"
    shutil.copytree(made / "mine", moved)
    (made / "mine").rename(made / "away")
    try:
        said = fails(capsys, main, *arguments)
        assert str(made / "mine") in said
        assert "found nothing: point DATA_ROOT at it" in said
        for more in ([], ["--config", "configs/folder.yaml"]):
            assert figures(capsys, main, *arguments, *more, f"data.root={moved}") == expected
    finally:
        (made / "away").rename(made / "mine")


def test_what_needs_no_data_set_does_without(made, tmp_path, capsys):
    """And the axis that was up is the run's."""
    file = shutil.copy(made / "mine" / "cup" / "0.npy", tmp_path / "0.npy")
    expected = figures(capsys, predict.main, made / "run", file)["predictions"][0]
    (made / "mine").rename(made / "away")
    try:
        assert figures(capsys, predict.main, made / "run", file)["predictions"][0] == expected
        assert load_model(made / "run").up == "z"
        for main, *arguments in ((export.main, tmp_path / "m.pt", "--format", "torchscript"),
                                 (fold.main, tmp_path / "m.safetensors")):  # fmt: skip
            main([str(made / "run"), *map(str, arguments)])
            assert arguments[0].exists()
    finally:
        (made / "away").rename(made / "mine")


def test_a_configuration_that_cannot_be_read_is_not_passed_over(made, tmp_path, capsys):
    run = shutil.copytree(made / "run", tmp_path / "run")
    (run / "config.yaml").write_text("data: {rot: x}")
    evaluate.main([str(run), f"data.root={made / 'mine'}", "data.variant=z_up", "--json"])
    said = capsys.readouterr().err
    assert "note: " in said
    assert "unknown key data.rot: did you mean data.root?: data.root and the like are not taken from the run" in said


MODELS = [  # of each tool, with what stands for the model
    (evaluate.main, ["{}"]), (svm.main, ["{}"]), (predict.main, ["{}", "a.npy"]), (fold.main, ["{}", "o.safetensors"]),
    (export.main, ["{}", "o.onnx", "--format", "onnx"]), (visualize.main, ["errors", "--run", "{}"]),
]  # fmt: skip


@pytest.mark.parametrize(("main", "arguments"), MODELS)
def test_what_is_no_model_is_called_what_it_is(made, tmp_path, capsys, monkeypatch, main, arguments):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m.onnx").write_bytes(b"\x08\x0a")
    (tmp_path / "README.md").write_text("# A run\n")
    for name, kind in (("m.pt", "torchscript"), ("m.pt2", "torch_export")):
        if not (made / name).exists():
            export.main([str(made / "run"), str(made / name), "--format", kind])
        shutil.copy(made / name, name)
    expected = "expected a run folder, its last.ckpt, a .safetensors file, or a .pth of Point-MAE or Point-BERT, found"
    for name, found in {
        "m.onnx": "an ONNX program, which other runtimes run: name the run that it was exported from",
        "m.pt2": "a torch.export program, which other runtimes run: name the run that it was exported from",
        "m.pt": "a TorchScript program, which other runtimes run: name the run that it was exported from",
        "README.md": "a text file",
        str(made / "run" / "config.yaml"): "a text file",
        str(made / "mine" / "cup" / "0.npy"): "a cloud or a mesh",
    }.items():
        said = fails(capsys, main, *(one.format(name) for one in arguments))
        if main is predict.main and name == "m.pt":  # nor would another codebase's be taken
            assert said.startswith("m.pt: expected a run folder or .safetensors")
        else:
            assert said == f"{name}: {expected} {found}"
    (tmp_path / "empty").mkdir()
    said = fails(capsys, main, *(one.format("empty") for one in arguments))
    assert said.startswith("empty: expected a run folder with ")
    assert said.endswith("last.ckpt, found no such file" if main is fold.main else "last.ckpt, found neither")
    said = fails(capsys, main, *(one.format(made) for one in arguments))
    assert said.endswith(f"last.ckpt, found a folder of runs: name one, such as {made / 'run'}")
    assert not {path.name for path in tmp_path.iterdir()} & {"o.safetensors", "o.onnx", "errors.png"}


def test_a_file_of_weights_does_not_say_its_data_set(made, tmp_path, capsys):
    export.main([str(made / "run"), str(tmp_path / "m.pth"), "--format", "point_mae"])
    assert "no classifier of 17 classes" in fails(capsys, evaluate.main, tmp_path / "m.pth", *FAST)
    with pytest.raises(SystemExit):
        cli.run(lambda: evaluate.main([str(tmp_path / "m.pth"), *FAST]))
    assert "m.pth does not say of which data set it is: shapes is assumed" in capsys.readouterr().err
    own = ["data.name=folder", f"data.root={made / 'mine'}", "data.variant=z_up"]
    evaluate.main([str(tmp_path / "m.pth"), *FAST, *own, "--json"])
    captured = capsys.readouterr()
    assert "is assumed" not in captured.err
    assert json.loads(captured.out)["per_class"] == figures(capsys, evaluate.main, made / "run")["per_class"]


@pytest.mark.parametrize(
    ("main", "arguments"),
    [(train.main, []), (evaluate.main, ["runs/x"]), (prepare_data.main, ["inspect"]), (visualize.main, ["cloud"]),
     (svm.main, ["runs/x"])],
)  # fmt: skip
def test_a_data_set_that_does_not_exist_lists_those_that_do(made, capsys, main, arguments):
    arguments = [str(made / "run") if one == "runs/x" else one for one in arguments]
    recipes = ", ".join(sorted(path.stem for path in CONFIGS.glob("*.yaml")))
    assert "shapenet55, shapenetpart, shapes" in recipes
    said = fails(capsys, main, *arguments, "--config", "configs/shapez.yaml")
    assert said == f"configs/shapez.yaml: no such file: expected one of {recipes}, found 'shapez'"
    said = fails(capsys, main, *arguments, "data.name=shapez", "run.dir=nowhere")
    assert said == f"data.name: expected one of {', '.join(sorted(NAMES))}, found 'shapez'"


NUMBERS = [  # options, what they take at least, whether they are whole
    (evaluate.main, ["x"], "--votes", "at least 1", True), (svm.main, ["x"], "--c", "more than 0", False),
    (report.main, ["x"], "--count", "at least 1", True), (visualize.main, ["cloud"], "--count", "at least 1", True),
    (visualize.main, ["cloud"], "--columns", "at least 1", True),
    (visualize.main, ["patches"], "--num-groups", "at least 1", True),
    (visualize.main, ["patches"], "--group-size", "at least 1", True),
    (study.main, ["x"], "--jobs", "at least 1", True), (study.main, ["x"], "--budget", "at least 0", False),
    (prepare_data.main, ["pack"], "--points", "at least 1", True),
    (prepare_data.main, ["inspect"], "--seconds", "at least 0", False), (train.main, [], "--nproc", "at least 1", True),
    (bench.main, [], "--batch-size", "at least 2", True), (bench.main, [], "--budget", "at least 0", False),
    (soak.main, [], "--kills", "at least 1", True),
]  # fmt: skip


@pytest.mark.parametrize(("main", "arguments", "option", "expected", "whole"), NUMBERS)
def test_numbers_that_an_option_cannot_take(capsys, main, arguments, option, expected, whole):
    low = {"at least 2": "1", "at least 1": "0", "at least 0": "-1", "more than 0": "0"}[expected]
    for wrong in (low, "-7", *(() if whole else ("nan", "inf", "1e999"))):
        assert fails(capsys, main, *arguments, option, wrong) == f"{option}: expected {expected}, found {wrong}"
    noun = "a whole number" if whole else "a number"
    for wrong in ("x", "", *(("1.5", "nan", "inf") if whole else ())):
        assert (
            fails(capsys, main, *arguments, option, wrong) == f"{option}: expected {noun}, {expected}, found {wrong!r}"
        )


@pytest.mark.parametrize(
    ("main", "arguments", "said"),
    [
        (visualize.main, ["cloud", "--num-groups", "3"], "--num-groups: cloud does not use it: leave it out"),
        (visualize.main, ["experts", "--run", "x", "--object", "chair"], "--object: experts does not use it"),
        (visualize.main, ["embedding", "--run", "x", "--columns", "3"], "--columns: embedding does not use it"),
        (visualize.main, ["errors", "--run", "x", "--method", "pca"], "--method: errors does not use it"),
        (prepare_data.main, ["inspect", "--points", "3"], "--points: inspect does not use it: leave it out"),
        (prepare_data.main, ["verify", "--seconds", "0"], "--seconds: verify does not use it: leave it out"),
        (prepare_data.main, ["download", "--int16"], "--int16: download does not use it: leave it out"),
        (prepare_data.main, ["--out", "a.h5"], "--out: data without WHAT does not use it: leave it out"),
        (study.main, ["x", "--report-only", "--jobs", "2"], "--jobs: --report-only does not use it: leave it out"),
        (study.main, ["x", "--report-only", "--budget", "0"], "--budget: --report-only does not use it"),
        (study.main, ["x", "--report-only", "--only", "ewa"], "--only: the report has all runs: leave it out"),
    ],
)
def test_an_option_without_effect_is_refused(capsys, main, arguments, said):
    assert fails(capsys, main, *arguments).startswith(said)


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "101"])
def test_ffns_of_no_width(capsys, tmp_path, value):
    said = fails(capsys, train.main, *FAST, f"run.dir={tmp_path}", f"model.mlp_ratio={value}")
    assert said.startswith("model.mlp_ratio must be above 0 and at most 100, got ")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("key", ["model.patch_out", "moe.top_k", "moe.num_experts"])
def test_numbers_of_the_model_that_none_can_have(capsys, tmp_path, key):
    for value in (0, -1):
        said = fails(capsys, train.main, *FAST, f"run.dir={tmp_path}", f"{key}={value}")
        assert said.startswith(key)
        assert "at least 1" in said


def test_data_without_a_word_of_what_to_do_explains_itself(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(prepare_data, "download", lambda *arguments: pytest.fail("nothing is fetched"))
    prepare_data.main(["--config", "configs/modelnet40.yaml", "data.root=nowhere"])
    out = capsys.readouterr().out
    for part in ("WHAT=inspect ", "WHAT=verify ", "WHAT=pack ", "WHAT=download ", "DATASET=folder ", "DATASET=shapes ",
                 "make data WHAT=inspect DATASET=modelnet40 DATA_ROOT=/your/data"):  # fmt: skip
        assert part in out
    assert list(figures(capsys, prepare_data.main, "data.name=shapes")["what"]) == list(prepare_data.ACTIONS)
    assert not list(tmp_path.iterdir())
    assert fails(capsys, prepare_data.main, "fetch") == (
        "WHAT: expected one of inspect, verify, pack, download, found 'fetch'"
    )


def test_one_thing_is_not_several(capsys, tmp_path):
    assert [counted(count, "epoch") for count in (0, 1, 2)] == ["0 epochs", "1 epoch", "2 epochs"]
    assert [counted(count, "patch", "es") for count in (1, 2)] == ["1 patch", "2 patches"]
    rng = np.random.default_rng(0)
    for name in ("cup", "table"):
        (tmp_path / "mine" / name).mkdir(parents=True)
        for number in range(2):
            np.save(tmp_path / "mine" / name / f"{number}.npy", shapes.sample(name, rng, 80))
    own = [*FAST, "data.name=folder", f"data.root={tmp_path / 'mine'}", f"run.dir={tmp_path}", "run.report=false"]
    train.main([*own, "run.name=a", "train.batch_size=2"])
    out = capsys.readouterr().out
    assert "1 epoch of 1 step will take about" in out
    assert "test split, after the only epoch" in " ".join(out.split())
    prepare_data.main(["verify", *own[len(FAST) : len(FAST) + 2]])
    assert "train: 2 objects, folder" in capsys.readouterr().out
    evaluate.main([str(tmp_path / "a"), "--votes", "1"])
    out = capsys.readouterr().out
    assert "1 vote " in out
    assert "1 votes" not in out
