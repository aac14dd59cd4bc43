"""What goes wrong in a training says so and loses nothing: signals, steps that are not finite, memory, a full disk."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from pointewa.errors import CheckpointError, Stopped, TrainingError
from pointewa.runs.weights import LAST, PREVIOUS
from pointewa.safe.torch_files import read_state
from pointewa.train import trainer as trainer_module
from pointewa.train.device import memory_advice
from pointewa.train.optimizer import optimizer_state
from pointewa.train.trainer import Trainer
from tests.conftest import TINY, build_trainer

ROOT = Path(__file__).parents[2]


def snapshot(trainer):
    """Everything that a step changes and a later one depends on; a batch norm's count of batches is not."""
    moments = optimizer_state(trainer.model, trainer.optimizer)
    values = [value for state in moments.values() for value in state.values()] + [trainer.totals]
    values += [value for value in trainer.model.state_dict().values() if value.is_floating_point()]
    return [value.clone() for value in values]


def same(first, second):
    return all(torch.equal(one, two) for one, two in zip(first, second, strict=True))


def before_step(monkeypatch, action):
    """Call ``action(trainer, points)``, which returns the points, before every step of a training that has begun."""
    step = Trainer.train_step

    def changed(self, batch):
        step(self, batch._replace(points=action(self, batch.points)) if self.lock else batch)

    monkeypatch.setattr(Trainer, "train_step", changed)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("at", [3, 9, 10, 19])
def test_a_signal_saves_the_step_it_came_in_and_the_run_goes_on_exactly(make_trainer, monkeypatch, number, at):
    whole = make_trainer("run.name=whole")
    whole.fit()

    def action(trainer, points):
        if trainer.step == at:
            os.kill(os.getpid(), number)
        return points

    handlers = [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)]
    with monkeypatch.context() as patch:
        before_step(patch, action)
        stopped = make_trainer("run.name=stopped")
        if at == 19:  # the last step: nothing is left to stop
            stopped.fit()
        else:
            with pytest.raises(Stopped, match=f"{at + 1} of 20 steps are saved in .*RUN=stopped") as error:
                stopped.fit()
            assert error.value.number == number
    assert handlers == [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)]
    assert read_state(stopped.folder / LAST)["step"] == at + 1
    resumed = make_trainer("run.name=stopped")
    resumed.fit()
    assert same(snapshot(resumed), snapshot(whole))
    epochs = [json.loads(line)["epoch"] for line in (whole.folder / "metrics.jsonl").read_text().splitlines()]
    assert epochs == [0, 1]


def test_a_second_interrupt_does_not_wait(make_trainer, monkeypatch):
    def action(trainer, points):
        if trainer.step == 3:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return points

    before_step(monkeypatch, action)
    trainer = make_trainer("run.name=a")
    with pytest.raises(KeyboardInterrupt) as error:
        trainer.fit()
    assert not isinstance(error.value, Stopped)
    assert not (trainer.folder / LAST).exists()


def test_checkpoints_within_an_epoch_by_iterations_and_by_minutes(make_trainer, monkeypatch):
    saved = []
    original = trainer_module.save_state

    def recorded(path, state):
        saved.append(state["step"])
        original(path, state)

    monkeypatch.setattr(trainer_module, "save_state", recorded)
    for every, expected in (
        ("0", [10, 20]),
        ("4", [4, 8, 10, 12, 16, 20]),
        ("0.000001min", list(range(1, 21))),
        ("60 min", [10, 20]),
    ):
        saved.clear()
        make_trainer(f"train.save_every={every}").fit()
        assert saved == expected


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_step_that_is_not_finite_leaves_everything_as_it_was(make_trainer, monkeypatch, enabled, value):
    seen = []

    def action(trainer, points):
        seen.append(snapshot(trainer))
        return points * value if trainer.step == 13 else points

    before_step(monkeypatch, action)
    console = Console(record=True, width=500, quiet=False, file=open(os.devnull, "w"))  # noqa: SIM115
    trainer = make_trainer(f"ewa.enabled={enabled}", "run.name=a", console=console)
    trainer.fit()
    assert same(seen[13], seen[14])
    assert not same(seen[12], seen[13])
    assert not same(seen[14], seen[15])
    assert trainer.finish()["skipped_steps"] == read_state(trainer.folder / LAST)["skipped"] == 1
    text = console.export_text()
    assert "the loss or a gradient is non-finite in epoch 2, step 14 of 20, with learning rate 0.00" in text
    for name in trainer.data.train.object_names(1, 3):
        assert name in text
    assert all(value.isfinite().all() for value in snapshot(trainer))


def test_too_many_such_steps_stop_the_run_and_keep_the_last_checkpoint(make_trainer, monkeypatch):
    before_step(monkeypatch, lambda trainer, points: points * (torch.nan if trainer.step in (3, 12, 14, 16) else 1))
    trainer = make_trainer("run.name=a", "train.max_skipped=2")
    with pytest.raises(
        TrainingError, match=r"non-finite in epoch 2, step 15 of 20.*3 such steps.*max_skipped=2"
    ) as error:
        trainer.fit()
    for name in trainer.data.train.object_names(1, 4):
        assert name in str(error.value)
    state = read_state(trainer.folder / LAST)
    assert (state["step"], state["skipped"]) == (10, 1)


@pytest.mark.parametrize("enabled", [True, False])
def test_activation_checkpointing_changes_no_bit_and_keeps_less(make_trainer, enabled):
    """With dropout, drop path and the partition: what is drawn is drawn again."""
    ends, kept = [], []
    for on in (False, True):
        trainer = make_trainer(f"train.activation_checkpointing={on}", f"ewa.enabled={enabled}", "model.drop_path=0.3")
        trainer.fit()
        ends.append(snapshot(trainer))
        kept.append(0)

        def pack(tensor):
            kept[-1] += tensor.numel()
            return tensor

        tokens = torch.randn(16, 9, 24, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            trainer.model.blocks(tokens, tokens)
    assert same(*ends)
    assert kept[1] < 0.1 * kept[0]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nMore"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you tried"),
        MemoryError(),
    ],
)
def test_out_of_memory_says_what_can_be_done(make_trainer, error):
    config = make_trainer("train.batch_size=12", "train.accumulate=2").config.train
    with pytest.raises(TrainingError) as raised, memory_advice(config):
        raise error
    assert "out of memory with train.batch_size=12, train.accumulate=2: try" in str(raised.value)
    assert "train.activation_checkpointing=true (the same result" in str(raised.value)
    assert "train.accumulate=3" in str(raised.value)
    assert "\n" not in str(raised.value)
    config.activation_checkpointing, config.accumulate = True, 12
    with pytest.raises(TrainingError) as raised, memory_advice(config):
        raise error
    assert "train.activation_checkpointing" not in str(raised.value)
    assert "try a smaller train.batch_size or model.preset" in str(raised.value)
    with pytest.raises(RuntimeError, match="shape"), memory_advice(config):
        raise RuntimeError("shape mismatch")


def test_a_damaged_checkpoint_falls_back_to_the_one_before_and_still_ends_the_same(make_trainer):
    whole = make_trainer("run.name=whole", "train.epochs=3")
    whole.fit()
    folder = whole.folder
    assert [read_state(folder / name)["step"] for name in (PREVIOUS, LAST)] == [20, 30]
    damaged = bytearray((folder / LAST).read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (folder / LAST).write_bytes(damaged)
    with pytest.warns(UserWarning, match=r"last\.ckpt: the checkpoint is damaged.*taking previous\.ckpt"):
        resumed = make_trainer("run.name=whole", "train.epochs=3")
    assert resumed.step == 20
    assert (folder / "last.ckpt.damaged").read_bytes() == bytes(damaged)
    assert not (folder / LAST).exists()  # so the sound one is not pushed out by it
    resumed.fit()
    assert same(snapshot(resumed), snapshot(whole))
    for name in (LAST, PREVIOUS):
        (folder / name).write_bytes(b"PK")
    with pytest.raises(CheckpointError, match=r"last\.ckpt.*and so is the one before it: .*previous\.ckpt"):
        make_trainer("run.name=whole", "train.epochs=3")


def test_a_checkpoint_that_was_written_wrongly_does_not_take_the_place_of_a_good_one(make_trainer, monkeypatch):
    trainer = make_trainer("run.name=a")
    save = torch.save

    def flipped(state, path):
        save(state, path)
        if state["step"] > 10:
            content = bytearray(Path(path).read_bytes())
            content[len(content) // 2] ^= 1
            Path(path).write_bytes(content)

    monkeypatch.setattr(torch, "save", flipped)
    with pytest.raises(CheckpointError, match=r"cannot write the checkpoint .*; the previous one is kept"):
        trainer.fit()
    assert read_state(trainer.folder / LAST)["step"] == 10


FULL = """
mount -t tmpfs -o size={small} tmpfs {folder} || exit 99
{train} && exit 98
test $? = 2 || exit 97
ls -A {folder}/a; {show} {folder}/a/last.ckpt
mount -o remount,size={large} {folder} && {train} > /dev/null && cp {folder}/a/model.safetensors {out}
"""


@pytest.mark.slow
def test_a_disk_that_fills_loses_no_earlier_state(tmp_path):
    """A real one: a tmpfs that has room for the first checkpoints but not for one more beside them."""
    if not shutil.which("unshare") or subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("no mounts here: unshare -rm is not permitted")
    options = [*TINY, "train.epochs=1", "train.save_every=6", "train.batch_size=64", "run.name=a"]
    train = f"{sys.executable} -m tools.train --config configs/shapes.yaml {' '.join(options)} run.dir="
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    call = {"cwd": ROOT, "env": environment, "capture_output": True, "text": True, "check": False}
    whole = subprocess.run(f"{train}{tmp_path}", shell=True, **call)
    assert whole.returncode == 0, whole.stderr
    size = (tmp_path / "a/last.ckpt").stat().st_size
    (tmp_path / "disk").mkdir()
    show = f"{sys.executable} -c 'import sys, torch; print(torch.load(sys.argv[1], weights_only=True)[\"step\"])'"
    script = FULL.format(
        small=int(2.5 * size), large=10 * size, folder=tmp_path / "disk", train=f"{train}{tmp_path / 'disk'}",
        show=show, out=tmp_path / "out",
    )  # fmt: skip
    done = subprocess.run(["unshare", "-rm", "sh", "-c", script], **call)
    if done.returncode == 99:
        pytest.skip("no tmpfs here")
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert "last.ckpt: cannot write the checkpoint" in done.stderr
    assert "(No space left on device); the previous one is kept: free some space, then resume with" in done.stderr
    assert ".tmp" not in done.stdout
    assert int(done.stdout.split()[-1]) == 12  # two checkpoints fitted
    assert (tmp_path / "out").read_bytes() == (tmp_path / "a/model.safetensors").read_bytes()


def test_a_folder_is_not_trained_in_twice(make_trainer, monkeypatch):
    def action(trainer, points):
        if trainer.step == 12:
            with pytest.raises(CheckpointError, match="another process is training in this folder"):
                build_trainer(trainer.folder.parent, "run.name=a")
        return points

    before_step(monkeypatch, action)
    make_trainer("run.name=a").fit()
