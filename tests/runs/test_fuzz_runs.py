"""Damaged and hostile run folders, checkpoints and configurations: each is refused by one line, or it loads and works.

More than 2,000 a run of the tests. POINTEWA_FUZZ=20 makes twenty times as many, from other seeds.
"""

import dataclasses
import io
import json
import os
import re
import shutil
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from pointewa.tools.train import table
from rich.console import Console

from pointewa.config import Config, build_architecture, load_config, to_yaml
from pointewa.errors import UserError
from pointewa.models import Architecture, PointTransformerClassifier
from pointewa.runs.description import LoadedModel
from pointewa.runs.folder import find_run, start_run
from pointewa.runs.log import Logbook
from pointewa.runs.summary import read_summary
from pointewa.runs.weights import init_from, load_foreign, load_model, read_weights, restore, save_model
from pointewa.safe.torch_files import read_state
from pointewa.train.data import Data
from pointewa.train.trainer import Trainer
from tests.runs import mutations

ROUNDS = int(os.environ.get("POINTEWA_FUZZ", "1"))
SMALL = ("model.width=8", "model.depth=2", "data.num_points=64", "train.save_every=3")
REFUSED = "refused"
SECTIONS = [section.name for section in dataclasses.fields(Config)]


@dataclasses.dataclass
class Runs:
    """A finished run ``a`` and an unfinished one ``b``, of 20 steps each, and what their files hold."""

    root: Path
    configs: dict[str, Config]
    files: dict[str, dict[str, bytes]]
    data: Data
    batch: tuple[torch.Tensor, torch.Tensor]

    def put(self, name, checkpoints=True):
        """The folder of a run, as it was."""
        folder = self.root / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for file, content in self.files[name].items():
            if checkpoints or not file.endswith(".ckpt"):
                (folder / file).write_bytes(content)
        return folder

    def resume(self, folder):
        """Go on with a run, for a step."""
        trainer = Trainer(self.configs[folder.name], self.data, folder, Console(quiet=True))
        trainer.train_step(self.batch)
        assert trainer.step <= 21
        assert trainer.averaging.steps <= 21
        return trainer

    def resume_file(self, path):
        """Go on with the run that a file belongs to."""
        self.resume(path.parent)


@pytest.fixture(scope="module")
def runs(trainer_in, tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    trainer = trainer_in(root, *SMALL, "run.name=a")
    trainer.fit()
    trainer.finish()
    unfinished = trainer_in(root, *SMALL, "run.name=b")
    with pytest.MonkeyPatch.context() as patch:
        step = Trainer.train_step

        def interrupted(self, *batch):
            if self.step == 13 and self.folder.exists():
                raise KeyboardInterrupt
            step(self, *batch)

        patch.setattr(Trainer, "train_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            unfinished.fit()
    files = {
        name: {path.name: path.read_bytes() for path in (root / name).iterdir() if not path.name.startswith("events")}
        for name in "ab"
    }
    assert files["a"].keys() - files["b"].keys() == {"model.safetensors", "model.json", "summary.json"}
    configs = {"a": trainer.config, "b": unfinished.config}
    made = Runs(root, configs, files, trainer.data, next(trainer.data.train.epoch(0)))
    with mutations.limited():
        yield made


def attempt(use, path, label):
    """What ``use(path)`` returns, or REFUSED, with a message that a user can do something with."""
    try:
        with mutations.bounded(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return use(path)
    except UserError as error:
        message = str(error)
        first, *rest = message.splitlines()
        key = re.match(rf"({'|'.join(SECTIONS)})\.\w+:? ", message)
        assert key or str(path) in message or str(path.parent) in message, f"{label}: {message}"
        assert not rest or first.endswith("what differs:"), f"{label}: {message}"
        assert len(message) < 3000, f"{label}: {message}"
        return REFUSED
    except BaseException as error:
        error.add_note(f"POINTEWA_FUZZ={ROUNDS}, {label}")
        raise


def works(loaded):
    """A model that was loaded can be used."""
    assert isinstance(loaded, LoadedModel)
    assert loaded.model(torch.rand(2, 64, 3)).shape == (2, len(loaded.class_names))
    assert type(loaded.num_points) is int
    save_model(Path(os.environ["POINTEWA_CACHE"]) / "again.safetensors", loaded)


def use_model(path):
    works(load_model(path))


def use_description(path):
    works(load_model(path.with_name("model.safetensors")))


def restore_folder(path):
    restore(path.parent)


def use_state(path):
    """As tools.fold does it."""
    state = restore(path).state
    works(load_model(path))
    json.dumps({"step": state["step"], "experts": state["ewa"] and state["ewa"]["num_experts"]})


@pytest.fixture
def fuzz(runs, capfd):
    """A function that tries each of many damaged copies of a file, and returns how many loaded."""

    def run(name, file, count, damage, uses, seed, alone=True):
        loaded = 0
        for number in range(count * ROUNDS):
            rng = np.random.default_rng([seed, number, ROUNDS])
            folder = runs.put(name, file.endswith((".ckpt", ".pth")))
            path = folder / file
            damaged, what = damage(path.read_bytes(), rng)
            path.write_bytes(damaged)
            if alone:
                (folder / "previous.ckpt").unlink(missing_ok=True)
            use = uses[number % len(uses)]
            label = f"{file}, number {number}: {what}, {getattr(use, '__name__', use)}"
            loaded += attempt(use, path, label) is not REFUSED
            assert not list(folder.glob("*.tmp")), label
        captured = capfd.readouterr()
        assert captured.out == ""
        assert captured.err == ""
        return loaded

    return run


def as_tensors(content, rng):
    """Damage to the structure of a safetensors file."""
    weights = dict(safetensors.torch.load(content))
    names = list(weights)
    name = names[rng.integers(len(names))]
    value = weights.pop(name)
    choices = (
        lambda: {}, lambda: {name: value.double()}, lambda: {name: value.flatten()}, lambda: {f"{name}\n": value},
        lambda: {name: value.to(torch.float8_e5m2)}, lambda: {name: value.to(torch.complex64)},
        lambda: {name: value[None]}, lambda: {name: value.bool()}, lambda: {name: torch.empty(0)},
        lambda: {name: value * float("nan")},
        lambda: {name: value, "x" * 500: value.clone()},
    )  # fmt: skip
    number = int(rng.integers(len(choices)))
    return safetensors.torch.save(weights | choices[number]()), f"{number} of {name}"


def as_state(change):
    """Damage to the structure of a checkpoint, whose checksums fit."""

    def damage(content, rng):
        state, what = change(torch.load(io.BytesIO(content), weights_only=True), rng)
        file = io.BytesIO()
        torch.save(state, file, _use_new_zipfile_serialization=bool(rng.integers(8)))
        return file.getvalue(), what

    return damage


# Every function below is called with the path of the damaged file.


@pytest.mark.hostile
def test_damaged_checkpoints_never_load(runs, fuzz):
    whole = torch.load(runs.root / "a/last.ckpt", weights_only=True)

    def same(path):
        state = read_state(path)
        assert state.keys() == whole.keys()
        assert all(torch.equal(state["model"][name], value) for name, value in whole["model"].items())
        assert (state["step"], state["random_states"][0]["numpy"]) == (20, whole["random_states"][0]["numpy"])

    loaded = fuzz("a", "last.ckpt", 300, mutations.damaged_bytes, [same], 1)
    assert loaded < 60 * ROUNDS  # where what was hit is not content: padding, times


@pytest.mark.hostile
def test_damaged_pickles_in_checkpoints(runs, fuzz):
    uses = [use_state, runs.resume_file, read_weights]
    loaded = fuzz("b", "last.ckpt", 120, mutations.damaged_pickle, uses, 2)
    assert loaded < 80 * ROUNDS


@pytest.mark.hostile
def test_checkpoints_of_another_structure(runs, fuzz):
    model = ("description", "ewa", "model", "step")
    loaded = fuzz("b", "last.ckpt", 60, as_state(partial(mutations.damaged_tree, top=model)), [use_state], 3)
    loaded += fuzz("b", "last.ckpt", 110, as_state(mutations.damaged_tree), [runs.resume_file], 4)
    assert 0 < loaded < 100 * ROUNDS


def test_both_checkpoints_damaged(runs, fuzz):
    def both(content, rng):
        place = rng.integers(1000, len(content) - 30_000)
        (runs.root / "b/last.ckpt").write_bytes(content[:place])
        return mutations.damaged_bytes(content, rng)

    loaded = fuzz("b", "previous.ckpt", 80, both, [restore_folder, runs.resume_file], 5, alone=False)
    assert loaded < 20 * ROUNDS


@pytest.mark.hostile
def test_models(fuzz):
    loaded = fuzz("a", "model.safetensors", 150, mutations.damaged_bytes, [use_model, read_weights], 6)
    loaded += fuzz("a", "model.safetensors", 60, as_tensors, [use_model, read_weights], 7)
    assert 0 < loaded < 200 * ROUNDS


@pytest.mark.hostile
def test_descriptions_of_models(fuzz):
    loaded = fuzz("a", "model.json", 300, mutations.damaged_json, [use_description], 8)
    assert 0 < loaded < 100 * ROUNDS


@pytest.mark.hostile
def test_weights_of_other_codebases(runs, fuzz):
    def start(path):
        init_from(PointTransformerClassifier(arch, 5), str(path))

    def use(path):
        assert load_foreign(path, arch, 5)(torch.rand(2, 64, 3)).shape == (2, 5)

    def broken(state, rng):
        state, what = mutations.damaged_tree(state, rng, top=("base_model",), tensors="base_model")
        return state.get("base_model", state) if rng.integers(2) else state, what

    model = load_model(runs.put("a")).model
    arch, uses = model.architecture, [start, use, read_weights]
    for legacy in (False, True):
        file = io.BytesIO()
        state = {"base_model": model.state_dict(), "model": {}, "epoch": 3, "metrics": {"acc": 91.5}}
        torch.save(state, file, _use_new_zipfile_serialization=not legacy)
        runs.files["c"] = {"ckpt.pth": file.getvalue()}
        loaded = fuzz("c", "ckpt.pth", 60, mutations.damaged_bytes, uses, 9 + legacy)
        loaded += fuzz("c", "ckpt.pth", 40, mutations.damaged_pickle, uses, 11) if not legacy else 0
        loaded += fuzz("c", "ckpt.pth", 80, as_state(broken), uses, 12 + legacy)
        assert 0 < loaded < 120 * ROUNDS


def use_config(path):
    config = load_config([path])
    build_architecture(config.model)
    path.write_text(to_yaml(config))
    assert repr(load_config([path])) == repr(config)  # NaN is not equal to itself
    find_run(config)


@pytest.mark.hostile
def test_configurations(fuzz, runs):
    def go_on(path):
        find_run(runs.configs["b"])

    loaded = fuzz("b", "config.yaml", 200, mutations.damaged_yaml, [use_config, go_on], 14)
    assert 0 < loaded < 150 * ROUNDS


@pytest.mark.hostile
@pytest.mark.parametrize("number", range(len(mutations.HOSTILE_YAML)))
def test_hostile_configurations(runs, number):
    path = runs.put("b", checkpoints=False) / "config.yaml"
    for use in (use_config, lambda path: find_run(runs.configs["b"])):
        path.write_bytes(mutations.HOSTILE_YAML[number].encode("utf-8", "surrogatepass"))
        attempt(use, path, f"hostile YAML {number}")


def test_summaries(fuzz):
    def use(path):
        summary = read_summary(path.parent)
        Console(file=io.StringIO()).print(table(summary))
        json.dumps(summary)

    loaded = fuzz("a", "summary.json", 250, mutations.damaged_json, [use], 15)
    assert 0 < loaded < 200 * ROUNDS


def use_log(path):
    log = Logbook(path.parent, 1, 10)
    log.write(1, 20, {"train/loss": 0.5})
    log.close()
    lines = (path.parent / "metrics.jsonl").read_text(errors="replace").rstrip("\n").split("\n")
    assert all(json.loads(line)["epoch"] <= 1 for line in lines)


def test_logs(fuzz):
    def damaged(content, rng):
        if rng.integers(2):
            return mutations.damaged_bytes(content, rng)
        lines = content.split(b"\n")
        lines[0], what = mutations.damaged_json(lines[0], rng)
        return b"\n".join(lines), what

    assert fuzz("b", "metrics.jsonl", 120, damaged, [use_log], 16) == 120 * ROUNDS


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[] if kind == "pipe" else pytest.mark.hostile) for kind in mutations.NOT_A_FILE]
)
def test_what_is_no_file(runs, kind):
    def begin(path):
        start_run(path.parent, runs.configs["a"]).release()

    def initial(path):
        init_from(PointTransformerClassifier(Architecture(), 3), str(path))

    folder = [restore_folder, runs.resume_file, begin]
    weights = [read_weights, load_model, restore, read_state, initial, *folder]
    model = [lambda path: load_model(path.parent), *folder]
    entrances = {
        "last.ckpt": [*weights, lambda path: load_model(path.parent)], "previous.ckpt": weights, "model.json": model,
        "model.safetensors": [*weights, *model], "config.yaml": [lambda path: find_run(runs.configs["b"]), *folder],
        "metrics.jsonl": [use_log, *folder], "summary.json": [lambda path: read_summary(path.parent), *folder],
    }  # fmt: skip
    assert entrances.keys() == runs.files["a"].keys()
    for file, uses in entrances.items():
        for number, use in enumerate(uses):
            path = runs.put("b" if file in runs.files["b"] else "a") / file
            path.unlink()
            mutations.NOT_A_FILE[kind](path)
            attempt(use, path, f"{file}: {kind}, entrance {number}")
