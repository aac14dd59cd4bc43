"""Trainings in few bits: what they keep, that they resume exactly, and what is refused."""

import pytest
import torch

from pointewa.config import load_config
from pointewa.errors import CheckpointError, ConfigError
from pointewa.runs.weights import LAST
from pointewa.safe.torch_files import read_state
from pointewa.tasks import task_of

FEW = ("compress.activations=4", "train.epochs=1")


@pytest.fixture(autouse=True)
def everything_is_large(monkeypatch):
    monkeypatch.setattr("pointewa.compression.hooks.SMALL", 64)


@pytest.mark.parametrize(
    "keys",
    [
        ("compress.stochastic=true", "train.accumulate=2"),
        pytest.param(("compress.adaptive=true", "train.ema_decay=0.9"), marks=pytest.mark.slow),
        ("train.activation_checkpointing=true", "ewa.enabled=false"),
    ],
)
def test_it_resumes_exactly(make_trainer, interrupt, keys):
    whole = make_trainer(*FEW, *keys, "run.name=whole")
    whole.fit()
    part = make_trainer(*FEW, *keys, "run.name=part", "train.save_every=3")
    interrupt(part, 5)
    resumed = make_trainer(*FEW, *keys, "run.name=part", "train.save_every=3")
    assert resumed.step == 3
    resumed.fit()
    for name, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name
    assert resumed.compression.state()["activations"]["chosen"] == whole.compression.state()["activations"]["chosen"]


def test_the_result_says_what_was_kept(make_trainer):
    trainer = make_trainer(*FEW)
    trainer.fit()
    summary = trainer.finish()
    found = summary["compression"]
    assert 0 < found["kept_mb"] < found["kept_mb_without"] / 5
    rows = dict(row[:2] for row in task_of(summary).result(summary)[1])
    assert rows["kept for the backward pass, MB"] == (
        f"{found['kept_mb']:.1f} ({found['kept_mb_without']:.1f} uncompressed)"
    )
    assert int(rows["peak memory of the process, MB"].replace(",", "")) == summary["peak_memory_mb"]
    assert make_trainer("run.name=plain").compression.state() is None  # so that neither file speaks of it


def test_adaptive_bits_keep_their_average(make_trainer):
    trainer = make_trainer(*FEW, "compress.adaptive=true")
    assert trainer.compression.state()["activations"]["chosen"] == {}
    trainer.train_step(next(trainer.data.train.epoch(0)))
    chosen, sizes = trainer.compression.activations.chosen, trainer.compression.activations.sizes
    assert set(chosen.values()) > {4}  # not all alike
    assert sum(chosen[number] * size for number, size in enumerate(sizes)) <= 4 * sum(sizes)


def test_a_damaged_state_is_refused(make_trainer, interrupt):
    keys = (*FEW, "run.name=part", "train.save_every=1")
    trainer = make_trainer(*keys)
    interrupt(trainer, 1)
    state = read_state(trainer.folder / LAST)
    for wrong in ([{"activations": {"chosen": {0: 7}, "generators": {}}}], [{"activations": {"chosen": 4}}], []):
        torch.save(state | {"compression": wrong}, trainer.folder / LAST)
        (trainer.folder / "previous.ckpt").unlink(missing_ok=True)
        with pytest.raises(CheckpointError, match="does not fit the run"):
            make_trainer(*keys)


def test_the_first_line_says_what_is_compressed(make_trainer):
    described = list(make_trainer(*FEW, "compress.gradients=8").compression.description())
    assert described == ["activations in 4 bits", "one process: no gradients to exchange"]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["compress.activations=5"], "compress.activations: .*5"),
        (["compress.activations=4", "train.compile=true"], "compress.activations: .*compiled code: set train.compile"),
        (["compress.gradients=8", "train.compile=true"], "compress.gradients: .*not been tried: set train.compile"),
        (["compress.adaptive=true"], "compress.adaptive: expected compress.activations of 2, 4 or 8.*found 32"),
        (["compress.stochastic=true"], "compress.stochastic: nothing is compressed: set compress.activations"),
        (["compress.attention=16"], "compress.attention: activations are not compressed"),
        (
            ["compress.activations=4", "compress.adaptive=true", "compress.attention=16"],
            "attention: the bits .* chosen",
        ),
        (["compress.error_feedback=true"], "compress.error_feedback: nothing is compressed: set compress.gradients"),
    ],
)
def test_what_does_not_go_is_refused(keys, message):
    with pytest.raises(ConfigError, match=message):
        load_config(overrides=keys)
