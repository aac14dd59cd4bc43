"""The command lines as a user meets them: results, and for each mistake one message, exit code 2, nothing written."""

import json
import os
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import IMAGES, SCALARS, EventAccumulator

from pointewa.config import load_config
from pointewa.datasets import splits
from pointewa.datasets.layouts import shapes
from pointewa.datasets.splits import training_data
from pointewa.runs.weights import load_model
from pointewa.tools import cli, evaluate, fold, train
from pointewa.train.distributed import ALONE

ROOT = Path(__file__).parents[2]
FAST = [
    "model.width=24", "model.depth=2", "model.heads=2", "model.num_groups=8", "model.group_size=8",
    "data.num_points=64", "train.epochs=1", "train.batch_size=64", "train.device=cpu",
    "run.report=false",
]  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """An EWA run and a dense one."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shapes, "PER_CLASS", {"train": 8, "test": 4})
        for name in ("ewa", "dense"):
            train.main([*FAST, f"run.dir={folder}", f"run.name={name}", f"ewa.enabled={name == 'ewa'}", "--json"])
    return folder


def test_train_prints_a_table(tmp_path, capsys):
    train.main(["--config", str(ROOT / "configs/shapes.yaml"), *FAST, f"run.dir={tmp_path}", "run.name=a"])
    out = capsys.readouterr().out
    for part in ("epoch 1/1", "left", "overall accuracy", "mean-class accuracy", "largest difference of logits",
                 "parameters", "seconds of training", f"run folder: {tmp_path}/a"):  # fmt: skip
        assert part in out


def test_train_json_is_the_summary_and_nothing_else(tmp_path, capsys):
    train.main([*FAST, f"run.dir={tmp_path}", "run.name=a", "--json"])
    assert json.loads(capsys.readouterr().out) == json.loads((tmp_path / "a/summary.json").read_text())


@pytest.mark.parametrize("name", ["ewa", "dense"])
def test_evaluate_repeats_the_run_s_result(runs, capsys, name):
    evaluate.main([str(runs / name), "--json"])
    result = json.loads(capsys.readouterr().out)
    summary = json.loads((runs / name / "summary.json").read_text())
    assert result["oa"] == pytest.approx(summary["test"]["oa"], abs=1e-3)
    assert result["objects"] == 4 * len(shapes.CLASSES)
    assert list(result["per_class"]) == list(shapes.CLASSES)
    evaluate.main([str(runs / name)])
    assert f"{result['oa']:.2f} %" in capsys.readouterr().out


def test_evaluate_takes_classifiers_of_other_codebases(runs, tmp_path, capsys):
    state = load_model(runs / "ewa").model.state_dict()
    path = tmp_path / "ckpt-best.pth"
    torch.save({"base_model": {f"module.{key}": value for key, value in state.items()}, "epoch": 3}, path)
    evaluate.main([str(path), *FAST, "--json"])
    foreign = json.loads(capsys.readouterr().out)
    evaluate.main([str(runs / "ewa"), "--json"])
    assert foreign == json.loads(capsys.readouterr().out)
    assert "another architecture" in fails(evaluate.main, [str(path), *FAST, "model.depth=3"], capsys)
    del state["cls_head_finetune.8.weight"], state["cls_head_finetune.8.bias"]
    torch.save(state, path)
    assert "no classifier of 17 classes" in fails(evaluate.main, [str(path), *FAST], capsys)


def test_fold_gives_the_model_that_training_folded(runs, tmp_path, capsys):
    out = tmp_path / "dense.safetensors"
    fold.main([str(runs / "ewa"), str(out)])
    assert out.read_bytes() == (runs / "ewa/model.safetensors").read_bytes()
    assert out.with_suffix(".json").read_text() == (runs / "ewa/model.json").read_text()
    capsys.readouterr()
    fold.main([str(runs / "ewa"), str(out), "--json"])
    assert json.loads(capsys.readouterr().out) == {"out": str(out), "experts": 4, "step": 2}


def test_fold_for_inference_makes_the_batch_norms_part_of_other_layers(runs, tmp_path):
    out = tmp_path / "fused.safetensors"
    fold.main([str(runs / "ewa"), str(out), "--fuse-batch-norm"])
    fused, plain = load_model(out).model, load_model(runs / "ewa").model
    assert sum("running_mean" in name for name in plain.state_dict()) == 4
    assert not any("running_mean" in name for name in fused.state_dict())
    points = torch.randn(3, 64, 3)
    torch.testing.assert_close(fused(points), plain(points), rtol=0, atol=1e-5)


def test_pretraining_leaves_a_page_and_goes_into_a_classifier(tmp_path, capsys):
    small = ["data.name=shapes", "data.num_points=64", "model.width=24", "model.depth=2", "model.heads=2",
             "model.num_groups=8", "model.group_size=8", "train.epochs=1", "train.device=cpu", f"run.dir={tmp_path}",
             "data.train_fraction=0.1", "ewa.enabled=false"]  # fmt: skip
    train.main(["--config", "configs/task/masked_autoencoding.yaml", *small, "train.batch_size=16", "run.name=p"])
    assert "Chamfer distance of masked patches" in capsys.readouterr().out
    assert "<h2>Reconstructions</h2>" in (tmp_path / "p" / "report.html").read_text()
    board = EventAccumulator(str(tmp_path / "p"), {IMAGES: 0, SCALARS: 0}).Reload()
    assert board.Tags()["images"] == ["reconstruction"]
    assert "result/loss" in board.Tags()["scalars"]
    train.main(["--config", "configs/task/masked_autoencoding.yaml", *small, "train.batch_size=16", "run.name=p"])
    assert "finished already" in capsys.readouterr().out
    train.main([*small, "train.batch_size=16", f"train.init_from={tmp_path / 'p'}", "run.name=c", "run.report=false"])
    assert "freshly initialised: cls_token" in capsys.readouterr().out


def test_a_fraction_of_the_training_split_is_the_same_objects_for_every_seed():
    def objects(*overrides):
        config = load_config(overrides=["data.name=shapes", "data.num_points=64", "train.batch_size=16", *overrides])
        data = training_data(config, ALONE)
        held_out = data.val.clouds.object_names if data.val else ()
        return data.train.clouds.object_names, held_out, data.train.clouds.labels.bincount()

    everything, _, counts = objects()
    part, held_out, part_counts = objects("data.train_fraction=0.25", "data.val_fraction=0.5")
    assert objects("data.train_fraction=0.25", "data.val_fraction=0.5", "train.seed=1")[0] == part
    assert not set(part) & set(held_out)
    assert set(part) | set(held_out) < set(everything)
    assert (part_counts - counts / 4).abs().max() <= 1


def fails(main, argv, capsys):
    """The message of a command that the user got wrong."""
    with pytest.raises(SystemExit) as exit_:
        cli.run(lambda: main(argv))
    assert exit_.value.code == 2
    captured = capsys.readouterr()
    messages = [line for line in captured.err.splitlines() if not line.startswith("note: ")]
    assert messages[0].startswith("error: ")
    assert "Traceback" not in captured.err
    assert captured.out == ""
    return captured.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train.epoch=3"], "unknown key train.epoch: did you mean train.epochs?"),
        (["ewa.share_rate=0.9"], "share_rate must be between 0 and (N-1)/N = 0.75"),
        (["moe.num_experts=1"], "num_experts must be at least 2"),
        (["data.name=modelnet40", "data.root=nowhere"], "ModelNet40 was not found"),
        (
            ["data.name=modelnet10"],
            "data.name: expected one of folder, images, labeled_psb, modelnet40, scanobjectnn",
        ),
        (["data.num_points=2000"], "data.num_points asks for 2000"),
        (["train.batch_size=1000"], "train.batch_size: expected 1 to 136"),
        (["train.device=tpu"], "train.device: 'tpu' cannot be used here"),
        (["train.init_from=nowhere.pth"], "nowhere.pth: no such checkpoint"),
        (
            ["--config", "nowhere.yaml"],
            "nowhere.yaml: no such file: expected one of folder, images, labeled_psb, modelnet40",
        ),
        (["train.save_every=often"], "train.save_every: expected iterations (100) or minutes (15min), found 'often'"),
        (["train.batch_size=9", "train.accumulate=2"], "train.accumulate: expected a divisor of train.batch_size 9"),
    ],
)
def test_training_that_cannot_be(tmp_path, capsys, arguments, message):
    assert message in fails(train.main, [*FAST, f"run.dir={tmp_path}", *arguments], capsys)
    assert not list(tmp_path.iterdir())


def write_modelnet(path, change=None):
    with h5py.File(path, "w") as h5:
        h5.attrs["shape_names"] = ["a", "b"]
        for split in ("train", "test"):
            group = h5.create_group(split)
            group["data"] = np.random.default_rng(0).normal(size=(64, 64, 3)).astype(np.float32)
            group["label"] = (np.arange(64) % 2).astype(np.uint8)
            group["name"] = [f"{split}{i}" for i in range(64)]
        if change:
            change(h5)


def label_out_of_range(h5):
    h5["train/label"][3] = 2


def point_not_finite(h5):
    h5["test/data"][5, 1, 0] = np.inf


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (label_out_of_range, "object 3 (train3) has label 2, expected 0 to 1"),
        (point_not_finite, "object 5 (test5) has coordinates that are not finite"),
        ("truncate", "damaged or incomplete"),
    ],
)
def test_damaged_data(tmp_path, capsys, change, message):
    path = tmp_path / "modelnet40.h5"
    write_modelnet(path, change if callable(change) else None)
    if change == "truncate":
        path.write_bytes(path.read_bytes()[:5000])
    arguments = [*FAST, "data.name=modelnet40", f"data.root={path}", f"run.dir={tmp_path / 'runs'}"]
    error = fails(train.main, arguments, capsys)
    assert message in error
    assert str(path) in error
    assert not (tmp_path / "runs").exists()


def test_a_dense_run_is_not_folded(runs, tmp_path, capsys):
    out = tmp_path / "a.safetensors"
    assert "nothing to fold: the run was dense" in fails(fold.main, [str(runs / "dense"), str(out)], capsys)
    assert "ending in .safetensors" in fails(fold.main, [str(runs / "ewa"), str(tmp_path / "a.pth")], capsys)
    assert "expected a run folder with last.ckpt, found no such file" in fails(
        fold.main, [str(tmp_path), str(out)], capsys
    )
    assert not list(tmp_path.iterdir())


def test_models_that_do_not_fit(runs, tmp_path, capsys):
    write_modelnet(tmp_path / "modelnet40.h5")
    config = ["data.name=modelnet40", f"data.root={tmp_path}"]
    assert "the model knows 17 classes" in fails(evaluate.main, [str(runs / "ewa"), *config], capsys)
    deeper = [*FAST, f"train.init_from={runs / 'ewa'}", "model.depth=3", f"run.dir={tmp_path / 'runs'}"]
    assert "another architecture" in fails(train.main, deeper, capsys)
    assert not (tmp_path / "runs").exists()


def test_a_full_disk_at_checkpoint_time(tmp_path, capsys, monkeypatch):
    def full(state, path):
        path.write_bytes(b"half")
        raise RuntimeError("[enforce fail] PytorchStreamWriter failed writing file data/3: file write failed")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(SystemExit) as exit_:
        cli.run(lambda: train.main([*FAST, f"run.dir={tmp_path}", "run.name=a"]))
    assert exit_.value.code == 2
    assert "cannot write the checkpoint" in capsys.readouterr().err
    left = {path.name for path in (tmp_path / "a").iterdir() if not path.name.startswith("events")}
    assert left == {"config.yaml", "metrics.jsonl"}


def test_an_interruption_outside_of_the_training(capsys):
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as exit_:
        cli.run(interrupted)
    assert exit_.value.code == 130
    assert "stopped by SIGINT: if it was training, resume with the same command" in capsys.readouterr().err


def test_as_a_process(tmp_path):
    """Through the interpreter, as the Makefile calls it: one mistake, and --help."""

    def call(*arguments):
        command = [sys.executable, "-m", "tools.train", *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ, check=False)

    result = call("data.name=modelnet40", f"data.root={tmp_path}")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: ModelNet40 was not found.")
    assert "python -m tools.train --config configs/shapes.yaml" in call("--help").stdout


def test_from_a_folder_of_meshes_to_a_folded_classifier(tmp_path, capsys):
    trimesh = pytest.importorskip("trimesh")
    rng = np.random.default_rng(0)
    for name, make in (
        ("ball", lambda: trimesh.creation.icosphere(2)),
        ("box", lambda: trimesh.creation.box((1, 1, 6))),
    ):
        (tmp_path / "mine" / name).mkdir(parents=True)
        for number in range(20):
            mesh = make()
            mesh.apply_scale(rng.uniform(0.8, 1.25, 3))
            mesh.export(tmp_path / "mine" / name / f"{number}.{('off', 'obj', 'stl', 'ply', 'glb')[number % 5]}")
    arguments = [*FAST, "data.name=folder", f"data.root={tmp_path / 'mine'}", f"run.dir={tmp_path / 'runs'}"]
    train.main([*arguments, "run.name=a", "train.epochs=150", "train.batch_size=16", "train.lr=3e-3", "--json"])
    summary = json.loads(capsys.readouterr().out)
    assert summary["test"]["oa"] > 80  # chance is 50
    assert summary["largest_logit_difference"] < 1e-5
    loaded = load_model(tmp_path / "runs" / "a")
    assert (loaded.class_names, loaded.dataset, loaded.normalize) == (("ball", "box"), "folder", "unit_sphere")


@pytest.mark.slow
def test_real_modelnet40_from_training_to_evaluation(real_data, tmp_path, capsys, monkeypatch):
    """The main job on a few real clouds of every class: train with EWA, fold, evaluate the dense model."""
    original = splits.load

    def few(name, root, split, num_points, **options):
        clouds = original(name, root, split, num_points, **options)
        count = 20 if split == "train" else 4
        by_class = [(clouds.labels == label).nonzero().squeeze(1)[:count] for label in range(40)]
        return clouds.take(torch.cat(by_class))

    monkeypatch.setattr(splits, "load", few)
    overrides = [*FAST, "data.name=modelnet40", f"data.root={real_data}", f"run.dir={tmp_path}", "run.name=a"]
    train.main([*overrides, "train.epochs=12", "train.batch_size=32", "train.lr=3e-3", "--json"])
    summary = json.loads(capsys.readouterr().out)
    assert summary["largest_logit_difference"] < 1e-5
    assert summary["test"]["oa"] > 10  # chance is 2.5
    evaluate.main([str(tmp_path / "a"), f"data.root={real_data}", "--json"])
    result = json.loads(capsys.readouterr().out)
    assert (result["objects"], len(result["per_class"])) == (160, 40)
    assert result["oa"] == pytest.approx(summary["test"]["oa"], abs=1e-3)


def test_processes_that_cannot_be(capsys):
    assert fails(train.main, ["--nproc", "0"], capsys) == "error: --nproc: expected at least 1, found 0\n"
    message = "error: --nproc: expected a whole number, at least 1, found 'x'\n"
    assert fails(train.main, ["--nproc", "x"], capsys) == message


@pytest.mark.slow
def test_several_processes_report_the_users_mistake_once():
    for keys, lines in {"train.epoch=3": 1, "data.name=folder data.root=nowhere": 1}.items():
        command = [sys.executable, "-m", "tools.train", "--nproc", "2", *keys.split()]
        done = subprocess.run(
            command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
        )
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith("error: ")
        assert done.stderr.count("\n") == lines, done.stderr
