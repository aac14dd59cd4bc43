"""Files made to run code are refused wherever a file is taken."""

import io
import os
import pickle
import re
import subprocess
import tarfile
from contextlib import suppress

import numpy as np
import pytest
import torch
from rich.console import Console
from torch._utils import _rebuild_device_tensor_from_cpu_tensor
from torch.jit.unsupported_tensor_ops import execWrapper

from pointewa.config import load_config
from pointewa.datasets.layouts import shapes
from pointewa.errors import CheckpointError, UserError
from pointewa.models import PointTransformerClassifier
from pointewa.runs.folder import find_run
from pointewa.runs.log import Logbook
from pointewa.runs.summary import read_summary
from pointewa.runs.weights import init_from, load_foreign, load_model, read_weights, restore
from pointewa.safe.torch_files import read_state
from pointewa.tools import cli, evaluate, fold, train
from pointewa.train.trainer import Trainer
from tests.runs.mutations import bounded, doubling


class Bomb:
    """Pickled, it calls a function when it is read."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call

    def __call__(self):
        """So that what it makes can be called by another bomb."""


def bombs(marker):
    """Objects that make the file ``marker`` when they are read without care."""
    code, inner = f"open({str(marker)!r}, 'w').close()", marker.with_name("inner.pkl")
    inner.write_bytes(pickle.dumps(Bomb(exec, code)))
    return {
        "open": Bomb(open, str(marker), "w"),
        "system": Bomb(os.system, f"touch {marker}"),
        "call": Bomb(subprocess.check_call, ["touch", str(marker)]),
        "exec": Bomb(exec, code),
        "eval": Bomb(eval, code),
        "getattr": Bomb(Bomb(getattr, Bomb(__import__, "os"), "system"), f"touch {marker}"),
        "pickle.loads": Bomb(pickle.loads, inner.read_bytes()),
        "numpy.load": Bomb(np.load, str(inner), None, True),
        "numpy exec": Bomb(np.testing._private.utils.runstring, code, {}),
        "torch.load": Bomb(torch.load, str(inner), "cpu", Bomb(__import__, "pickle")),
        "torch exec": Bomb(execWrapper, code, {}, {}),
        "from type": Bomb(torch._tensor._rebuild_from_type_v2, exec, torch.Tensor, (code,), {}),
    }


def in_tar(bomb):
    """The format of torch 0.1."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name in ("sys_info", "storages", "tensors", "pickle"):
            content = pickle.dumps(bomb, protocol=2)
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return file.getvalue()


def saved(value, **options):
    file = io.BytesIO()
    torch.save(value, file, **options)
    return file.getvalue()


FORMS = {
    "zip": saved,
    "zip, one of the weights": lambda bomb: saved(
        {"base_model": {"norm.weight": bomb}, "model": {"norm.weight": bomb}}
    ),
    "zip, protocol 4": lambda bomb: saved({"model": bomb}, pickle_protocol=4),
    "before torch 1.6": lambda bomb: saved({"model": bomb}, _use_new_zipfile_serialization=False),
    "before torch 0.2": in_tar,
    "pickle 0": lambda bomb: pickle.dumps(bomb, protocol=0),
    "pickle 2": lambda bomb: pickle.dumps({"model": bomb}, protocol=2),
    "pickle 4": lambda bomb: pickle.dumps(bomb, protocol=4),
}


def test_the_bombs_are_bombs(tmp_path):
    marker = tmp_path / "executed"
    for name, bomb in bombs(marker).items():
        with suppress(Exception):  # after the fact
            pickle.loads(pickle.dumps(bomb))
        assert marker.exists(), name
        marker.unlink()
    for name, form in FORMS.items():
        (tmp_path / "bomb").write_bytes(form(Bomb(open, str(marker), "w")))
        with suppress(Exception):  # the one unguarded read, of a file made here: else the refusals below prove nothing
            torch.load(tmp_path / "bomb", weights_only=False)
        assert marker.exists(), name
        marker.unlink()


PLACES = {
    "last.ckpt": [
        lambda run, path: restore(path), lambda run, path: restore(path.parent), lambda run, path: load_model(path),
        lambda run, path: Trainer(run.config, run.data, path.parent, Console(quiet=True)),
        lambda run, path: read_weights(path),
    ],
    "previous.ckpt": [
        lambda run, path: restore(path), lambda run, path: restore(path.parent), lambda run, path: read_weights(path),
        lambda run, path: Trainer(run.config, run.data, path.parent, Console(quiet=True)),
    ],
    "model.safetensors": [lambda run, path: load_model(path.parent), lambda run, path: read_weights(path)],
    "model.json": [lambda run, path: load_model(path.parent)],
    "config.yaml": [lambda run, path: find_run(run.config), lambda run, path: load_config([path])],
    "summary.json": [lambda run, path: read_summary(path.parent)],
    **{
        f"weights.{suffix}": [
            lambda run, path: read_weights(path), lambda run, path: load_model(path),
            lambda run, path: start(run, path), lambda run, path: load_foreign(path, run.model.architecture, 5),
        ]
        for suffix in ("pth", "pt", "ckpt", "safetensors", "bin")
    },
}  # fmt: skip


def start(run, path):
    init_from(PointTransformerClassifier(run.model.architecture, 5), str(path))


def some(cases, fast):
    """All cases; those that are not ``fast`` are for `make test-all`."""
    return [pytest.param(case, marks=[] if case in fast else pytest.mark.hostile) for case in cases]


@pytest.mark.parametrize("place", some(PLACES, ("last.ckpt", "model.json", "weights.pth")))
def test_no_file_runs_code(run, folder, tmp_path, place):
    marker = tmp_path / "executed"
    if place == "previous.ckpt":
        (folder / "last.ckpt").unlink()
    else:
        (folder / "previous.ckpt").unlink()
    for name, bomb in bombs(marker).items():
        for form, write in FORMS.items():
            (folder / place).write_bytes(write(bomb))
            for use in PLACES[place]:
                with pytest.raises(UserError, match=re.escape(str(folder))):
                    use(run[0], folder / place)
                assert not marker.exists(), f"{name}, {form}"


def test_a_log_runs_no_code(folder, tmp_path):
    marker = tmp_path / "executed"
    for bomb in bombs(marker).values():
        for write in FORMS.values():
            (folder / "metrics.jsonl").write_bytes(write(bomb))
            Logbook(folder, 1, 10).close()
            assert (folder / "metrics.jsonl").read_text() == ""
            assert not marker.exists()
    (folder / "metrics.jsonl").write_text("".join(f'{{"epoch": {epoch}}}\n' for epoch in (0, 10**400, "1e400", "NaN")))
    Logbook(folder, 1, 10).close()
    assert (folder / "metrics.jsonl").read_text() == '{"epoch": 0}\n'


YAML_BOMBS = (
    "!!python/object/apply:os.system ['touch {0}']", "!!python/object/new:os.system ['touch {0}']",
    "!!python/object/apply:builtins.exec ['open(\"{0}\", \"w\")']",
    "!!python/object/apply:subprocess.call [[touch, {0}]]", "!!python/object/new:type {{args: [z, !!python/tuple [], "
    "{{extend: !!python/name:exec }}], listitems: \"open('{0}', 'w')\"}}",
    "!!python/object/apply:open ['{0}', w]", "${{oc.env:{0}}}", "${{oc.decode:'open(\"{0}\", \"w\")'}}", "$(touch {0})",
)  # fmt: skip


@pytest.mark.parametrize("text", YAML_BOMBS)
def test_no_configuration_runs_code(run, folder, tmp_path, text):
    marker = tmp_path / "executed"
    for wrapped in ("{}", "train: {}", "train:\n  lr: {}", "ewa:\n  layers: {}", "{}: 1"):
        (folder / "config.yaml").write_text(wrapped.format(text.format(marker)))
        for use in (lambda: find_run(run[0].config), lambda: load_config([folder / "config.yaml"])):
            try:
                use()
            except UserError as error:
                assert str(folder) in str(error)
            assert not marker.exists()


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """A function that calls a tool and asserts that it ends with one error and that no bomb went off."""
    monkeypatch.setattr(shapes, "PER_CLASS", {"train": 8, "test": 4})

    def call(main, *arguments):
        with pytest.raises(SystemExit) as exit_:
            cli.run(lambda: main([str(argument) for argument in arguments]))
        captured = capsys.readouterr()
        assert (exit_.value.code, captured.out) == (2, ""), captured.err
        assert len([line for line in captured.err.splitlines() if line.startswith("error: ")]) == 1
        assert "Traceback" not in captured.err
        assert not (tmp_path / "executed").exists()

    return call


@pytest.mark.parametrize("form", some(FORMS, ("zip", "pickle 2")))
def test_no_tool_runs_code(run, folder, tmp_path, refused, form):
    content = FORMS[form](Bomb(open, str(tmp_path / "executed"), "w"))
    sizes = ("data.num_points=64", "train.device=cpu", "model.width=8", "model.depth=2", "model.heads=2")
    fresh = (*sizes, f"run.dir={tmp_path / 'runs'}")
    for name in ("w.pth", "w.pt", "w.ckpt", "w.safetensors"):
        path = tmp_path / name
        path.write_bytes(content)
        refused(evaluate.main, path, *sizes)
        refused(fold.main, path, tmp_path / "out.safetensors")
        refused(train.main, *fresh, f"train.init_from={path}")
    (tmp_path / "c.yaml").write_bytes(content)
    refused(train.main, "--config", tmp_path / "c.yaml", *fresh)
    refused(evaluate.main, folder, "--config", tmp_path / "c.yaml")
    for name in ("last.ckpt", "previous.ckpt", "model.safetensors", "model.json"):
        (folder / name).write_bytes(content)
    refused(evaluate.main, folder, *sizes)
    refused(fold.main, folder, tmp_path / "out.safetensors")
    refused(train.main, *fresh, f"train.init_from={folder}")
    for name in ("summary.json", "config.yaml"):
        (folder / name).write_bytes(content)
        refused(train.main, f"run.dir={folder.parent}", "run.name=a", "data.name=shapes")
    assert not (tmp_path / "runs").exists()
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize(
    "bomb",
    [
        Bomb(bytearray, 10**9),
        Bomb(_rebuild_device_tensor_from_cpu_tensor, torch.zeros(1).expand(10**9), torch.half, "cpu", False),
        Bomb(torch.storage.UntypedStorage, 10**9),
    ],
    ids=["bytearray", "conversion", "storage"],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_small_files_that_would_take_much_memory(tmp_path, bomb, zipped):
    """All three are on torch's own list of what is safe to call."""
    (tmp_path / "a.pth").write_bytes(saved({"model": bomb}, _use_new_zipfile_serialization=zipped))
    assert (tmp_path / "a.pth").stat().st_size < 5000
    asks = r"a\.pth: not a checkpoint of tensors and plain values.*it asks for"
    with pytest.raises(CheckpointError, match=asks), bounded():
        read_state(tmp_path / "a.pth")


def expanded():
    """A tensor that takes an eternity and all memory to iterate over or to copy."""
    return torch.zeros(1).expand(10**8)


def shared(state):
    state["model"]["blocks.blocks.0.norm1.weight"] = state["model"]["blocks.blocks.1.norm1.weight"]


def random_state(name, place, value):
    def change(state):
        values = list(state["random_states"][0][name])
        values[place] = value
        state["random_states"][0][name] = tuple(values)

    return change


CRAFTED = {
    "class names": lambda state: state["description"].update(class_names=expanded()),
    "a class name": lambda state: state["description"].update(class_names=[doubling()] * 5),
    "head": lambda state: state["description"]["architecture"].update(head=doubling()),
    "groups": lambda state: state["description"]["architecture"].update(num_groups=10**12),
    "points": lambda state: state["description"].update(num_points=0),
    "layers": lambda state: state["ewa"].update(layers=expanded()),
    "experts": lambda state: state["ewa"].update(num_experts=10**12),
    "memory in two places": shared,
    "weights": lambda state: state.update(model=dict.fromkeys(state["model"], expanded())),
    "step": lambda state: state.update(step=doubling()),
    "skipped": lambda state: state.update(skipped=doubling()),
    "averagings": lambda state: state["averaging"].update(steps=21),
    "totals": lambda state: state.update(totals=expanded()),
    "moments": lambda state: next(iter(state["optimizer"].values())).update(exp_avg=expanded()),
    "random states": lambda state: state.update(random_states=expanded()),
    "random state": lambda state: state["random_states"][0].update(python=expanded(), numpy=expanded()),
    "position": random_state("numpy", 2, 2**31 - 1),  # NumPy would read what lies there
    "negative position": random_state("numpy", 2, -1),
    "keys": random_state("numpy", 1, expanded()),
    "few keys": random_state("numpy", 1, [1, 2, 3]),
    "Python's keys": random_state("python", 1, expanded()),
    "torch's state": lambda state: state["random_states"][0].update(
        torch=torch.zeros(1, dtype=torch.uint8).expand(5056)
    ),
}


@pytest.mark.parametrize("crafted", some(CRAFTED, ("class names", "layers", "weights", "step", "position")))
def test_states_made_to_hang_or_to_read_elsewhere(run, folder, crafted):
    state = read_state(folder / "last.ckpt")
    CRAFTED[crafted](state)
    torch.save(state, folder / "last.ckpt")
    (folder / "previous.ckpt").unlink()
    with pytest.raises(CheckpointError, match=r"last\.ckpt: ") as error, bounded():
        Trainer(run[0].config, run[0].data, folder, Console(quiet=True))
    assert len(str(error.value)) < 500
