"""Every command in the README and the docs runs: as it is written, on small sets and with small models."""

import importlib
import os
import re
import shlex
import shutil
import subprocess
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import h5py
import numpy as np
import pytest
import torch
import trimesh
from PIL import Image
from pointewa.datasets.layouts.modelnet40 import OFFICIAL
from safetensors.torch import save_file
from torch.nn.functional import gelu, linear

from pointewa import datasets, tasks
from pointewa.__main__ import COMMANDS
from pointewa.datasets import few_shot, registry
from pointewa.datasets.layouts import images, shapes
from pointewa.errors import DataError, UserError
from pointewa.models import PRESETS, TOKENIZERS
from pointewa.models import registry as models_registry
from pointewa.models.foreign.published import PUBLISHED
from pointewa.models.foreign.torch_pointcloud import to_theirs
from pointewa.runs.weights import load_model
from pointewa.tools import train
from tests.datasets.conftest import write_scanobjectnn
from tests.datasets.test_labeled_psb import arrays as labeled_objects
from tests.datasets.test_sydney import write_npz

theirs = pytest.importorskip("torch_pointcloud.models")
ROOT = Path(__file__).parents[1]
FILES = ["README.md", "CONTRIBUTING.md", *sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("docs/*.md"))]
HUB = ("point-mae-base.modelnet40.yatian-pang", "point-mae-base.pretrain.yatian-pang")
START = r"(?:make|pointewa|python|torchrun|\.venv/bin/\w+) "
# What is said to the tools besides, so that nothing takes long. The last value of an argument counts.
SHORTER = {
    "train": [
        "train.epochs=1",
        "train.warmup_epochs=0",
        "train.warmup_fraction=null",
        "train.device=cpu",
        "train.batch_size=32",
        "run.report=false",
        "run.dir=new",
    ],
    "study": ["--budget", "0"],  # it starts no training
    "few_shot": ["--settings", "2w1s", "--budget", "0"],
    "step_profile": ["--preset", "tiny", "--batch-size", "2"],
    "bench": ["--preset", "tiny", "--batch-size", "2", "--budget", "0", "--device", "cpu", "--only", "memory"],
}
# Run elsewhere: by whoever reads this, and by tests of their own; what only shows something
ELSEWHERE = ("pytest", "ruff", "timeit", "tensorboard.main", "examples.", "benchmarks.soak", "benchmarks.bench_data",
             "benchmarks.compression")  # fmt: skip
# What cannot end well on a small set
ENDS = {"verify": "expected 100", "--report-only": "nothing to report"}


def commands():
    """Of each file its commands: in blocks, and in single backquotes."""
    seen = set()
    for file in FILES:
        text = re.sub(r" *\\\n *", " ", (ROOT / file).read_text())
        for block, inline in re.findall(rf"^({START}.*)$|`({START}[^`]+)`", text, re.MULTILINE):
            command = (block or inline).partition(" #")[0].strip()
            if "..." not in command and command not in seen:
                seen.add(command)
                yield pytest.param(command, id=f"{file}: {command}")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder that looks like this repository to a command."""
    home = tmp_path_factory.mktemp("home")
    for name in ("Makefile", "configs", "requirements.txt", "pyproject.toml", "tools", "benchmarks"):
        (home / name).symlink_to(ROOT / name)
    (home / ".venv").mkdir()
    (home / ".venv/.done").touch()
    return home


@pytest.fixture(scope="module")
def home(place):
    """The folder with data, runs, and the files that the docs name."""
    home = place
    (home / "data").mkdir()
    rng, per_class = np.random.default_rng(0), {"train": 2, "test": 1}
    small = {}
    with h5py.File(home / "data/modelnet40_1024.h5", "w") as h5:
        h5.attrs["shape_names"] = list(OFFICIAL)
        for split, count in per_class.items():
            labels, group = np.repeat(np.arange(40), count), h5.create_group(split)
            extent = 10 ** rng.uniform(-1, 1, (len(labels), 1, 3))  # so different that none is taken for another
            group["data"] = (extent * rng.normal(size=(len(labels), 1024, 3))).astype(np.float32)
            group["label"] = labels.astype(np.uint8)
            group["name"] = [f"{list(OFFICIAL)[label]}_{split}{i}" for i, label in enumerate(labels)]
            scans = np.arange(15).repeat(3)
            points = rng.normal(size=(len(scans), 2048, 3)).astype(np.float32)
            small[split] = type("Part", (), {"points": points, "labels": scans})
    write_scanobjectnn(home / "data", small, "pb_t50_rs")
    write_npz(home / "data")
    np.savez(home / "data/labeled_psb.npz", **labeled_objects(25, 2048))
    for split, count in (("train", 40), ("val", 5), ("test", 5)):
        with h5py.File(home / f"data/ply_data_{split}0.h5", "w") as h5:
            h5["data"] = rng.normal(size=(count, 2048, 3)).astype(np.float32)
            h5["label"], h5["pid"] = np.full((count, 1), 4, np.uint8), rng.integers(12, 16, (count, 2048))
    for name in ("ball", "box"):
        (home / "my_meshes" / name).mkdir(parents=True)
        for number in range(20):
            mesh = trimesh.creation.box(rng.uniform(0.5, 1, 3)) if name == "box" else trimesh.creation.icosphere(2)
            mesh.export(home / "my_meshes" / name / f"{number}.off")
    mesh.export(home / "chair.ply")
    for table in ROOT.glob("results/*/results.csv"):
        (home / "results" / table.parent.name).mkdir(parents=True)
        shutil.copy(table, home / "results" / table.parent.name)
    (home / "my_clouds").mkdir()
    for number in range(50):
        np.save(home / "my_clouds" / f"{number}.npy", rng.normal(size=(1024, 3)))
    for number in range(80):
        path = home / "my_images" / ("train", "test")[number % 2] / f"class_{number // 40}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch)
        patch.chdir(home)
        recipe = ["train.epochs=1", "train.device=cpu", "run.report=false", "--json"]
        masked = ["--config", "configs/modelnet40.yaml", "--config", "configs/task/masked_autoencoding.yaml"]
        modeling = ["--config", "configs/modelnet40.yaml", "--config", "configs/task/point_bert.yaml"]
        modeling += ["task.tokenizer=runs/tokenizer", "task.queue_size=64"]
        for name, more in (
            ("x", ["--config", "configs/modelnet40.yaml"]),
            ("shapes-tiny-ewa-seed0", ["--config", "configs/shapes.yaml"]),
            ("parts", ["--config", "configs/shapes.yaml", "--config", "configs/task/part_segmentation.yaml"]),
            ("pretrained", masked),
            ("tokenizer", ["--config", "configs/modelnet40.yaml", "--config", "configs/task/tokenizer.yaml"]),
            ("modeled", modeling),
        ):
            train.main([*more, *recipe, f"run.name={name}", f"train.batch_size={64 if name == 'pretrained' else 32}"])
        for name, run in (("pretrained",) * 2, ("tokenizer",) * 2, ("point_bert", "modeled")):  # as the studies do
            Path(f"runs/{name}-modelnet40-tiny").symlink_to(run)
        for name in ("a", "b"):  # as compare names them
            shutil.copytree("runs/x", f"runs/{name}")
        model = load_model("runs/x").model
        torch.save({"base_model": model.state_dict()}, "ckpt.pth")
        for url in (theirs.model_info(name)["weights"]["url"] for name in HUB):  # a cache of published models
            (path := theirs._registry.cache_path(url)).parent.mkdir(parents=True)
            save_file(
                {key: v.contiguous() for key, v in to_theirs(model.state_dict(), model.architecture).items()}, path
            )
    return home


def shrink(patch):
    """All presets are alike, and small; few procedural objects."""
    for name, arch in PRESETS.items():
        small = replace(arch, width=24, depth=2, heads=2, num_groups=8, group_size=8, patch_width=16, patch_out=24)
        patch.setitem(PRESETS, name, replace(small, head="point_mae"))
        sizes = replace(TOKENIZERS[name], num_groups=8, group_size=8, patch_width=16, patch_out=24, graph_width=4)
        patch.setitem(TOKENIZERS, name, replace(sizes, codebook_size=16))
    patch.setattr(few_shot, "QUERIES", 1)
    patch.setattr(shapes, "PER_CLASS", {"train": 4, "test": 2})
    patch.setattr(images, "COUNT", {"train": 64, "test": 16})
    patch.setattr(theirs._registry, "MODELS_DIR", "cache")  # in the current folder
    for name in HUB:
        patch.setitem(PUBLISHED, name, replace(PUBLISHED[name], architecture=PRESETS["point_mae"]))


def lines(command, home):
    """What a command comes to: make's own lines, as lists of words."""
    if command.startswith("pointewa"):
        _, name, *arguments = shlex.split(command)
        return [["python", "-m", f"tools.{COMMANDS[name][0]}", *arguments]]
    if not command.startswith("make"):
        return [shlex.split(command)]
    command = ["make", "-n", *shlex.split(command)[1:]]
    environment = {"PATH": os.environ["PATH"]}  # nothing of a make that runs this test
    done = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    text = re.sub(r" *\\\n *", " ", done.stdout)
    return [shlex.split(line.partition(" || ")[0]) for line in text.splitlines() if line.strip()]


@pytest.mark.parametrize("command", commands())
def test_it_names_what_is_there(command, place):
    """A target of make, a module, and configurations."""
    for words in lines(command, place):
        if "-m" in words and (name := words[words.index("-m") + 1]).split(".")[0] in (
            "tools",
            "benchmarks",
            "examples",
        ):
            assert (ROOT / f"{name.replace('.', '/')}.py").exists()
        for word in words:
            assert not word.startswith("configs/") or (ROOT / word).exists()


@pytest.mark.slow
@pytest.mark.parametrize("command", commands())
def test_it_runs(command, home, monkeypatch, capsys, tmp_path):
    shrink(monkeypatch)
    monkeypatch.chdir(home)
    for words in lines(command, home):
        line = " ".join(words)
        if any(part in line for part in ELSEWHERE):
            continue
        at = words.index("-m")
        tool, arguments = words[at + 1], [word.replace("/your/data", "data") for word in words[at + 2 :]]
        assert tool.startswith(("tools.", "benchmarks.")), line
        # The clouds here have no more points, and compiling takes minutes.
        arguments = [
            word.replace("8192", "1024").replace("shot=10", "shot=2").replace("w10s", "w2s")
            for word in arguments
            if word != "--compile"
        ]
        shorter = [] if "--report-only" in arguments else SHORTER.get(tool.partition(".")[2], [])
        more = [word.replace("run.dir=new", f"run.dir={tmp_path}") for word in shorter]
        with end(arguments, capsys):
            importlib.import_module(tool).main([*arguments, *more])


@contextmanager
def end(arguments, capsys):
    """Of a tool: well, or as `ENDS` says."""
    message = next((message for word, message in ENDS.items() if word in arguments), None)
    try:
        yield
        assert not message
    except (SystemExit, UserError) as error:
        output = f"{error} {' '.join(capsys.readouterr())}"
        assert message in output if message else error.args in ((), (0,)), output


@pytest.fixture
def registries(monkeypatch):
    """What the blocks register is gone after the test."""
    monkeypatch.setattr(tasks, "_REGISTERED", dict(tasks._REGISTERED))
    monkeypatch.setattr(models_registry, "KINDS", dict(models_registry.KINDS))


def blocks(file):
    """The Python blocks of a page, each executed, as modules."""
    for number, code in enumerate(
        re.findall(r"^```python\n(.*?)^```", (ROOT / file).read_text(), re.MULTILINE | re.DOTALL)
    ):
        module = ModuleType(f"block{number}")
        exec(compile(code, f"{file}, block {number}", "exec"), module.__dict__)
        yield module


def test_the_example_of_a_data_set_is_one(tmp_path, monkeypatch):
    module = next(blocks("CONTRIBUTING.md"))
    monkeypatch.setitem(registry.NAMES, "scans", module)
    points, labels = np.random.default_rng(0).normal(size=(6, 200, 3)), np.array([0, 1, 0, 1, 1, 0])
    np.savez(tmp_path / "train.npz", points=points, labels=labels)
    clouds = datasets.load("scans", str(tmp_path), "train", 128)
    assert clouds.labels.tolist() == labels.tolist()
    assert clouds.class_names == ("pipe", "valve")
    assert clouds.points[:, :128].norm(dim=-1).amax(1) == pytest.approx([1] * 6, abs=1e-5)
    with pytest.raises(DataError, match=r"test\.npz: no such file"):
        datasets.load("scans", str(tmp_path), "test", 128)


def test_the_example_of_an_arm_is_one(registries):
    *_, module = blocks("CONTRIBUTING.md")
    ffn = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.GELU(), torch.nn.Linear(8, 6)).double()
    moe, x = module.EveryExpertMoE(ffn, 3), torch.randn(2, 5, 6, dtype=torch.float64)
    first, _, second = moe.experts
    each = [linear(gelu(linear(x, first.weight[i], first.bias[i])), second.weight[i], second.bias[i]) for i in range(3)]
    torch.testing.assert_close(moe(x), sum(each) / 3, rtol=0, atol=1e-12)
    torch.testing.assert_close(moe.eval()(x), moe.fuse()(x), rtol=0, atol=1e-12)
