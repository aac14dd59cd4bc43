"""Masked pre-training in the common loop, and what comes of it."""

import json

import pytest
import torch

import pointewa.ewa as ewa
from pointewa.errors import CheckpointError, ConfigError
from pointewa.runs.weights import load_any, load_model

PRETRAINING = ("train.task=masked_autoencoding", "train.lr=3e-3", "run.name=p")


@pytest.fixture
def pretraining(make_trainer):
    return lambda *overrides: make_trainer(*PRETRAINING, *overrides)


def loss(trainer, model):
    return trainer.task.measure(trainer.evaluate(model, trainer.data.test))["loss"]


@pytest.mark.parametrize("experts", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_pretraining_learns_and_leaves_what_a_classifier_starts_from(pretraining, make_trainer, experts):
    trainer = pretraining("train.epochs=20", f"ewa.enabled={experts}", "data.val_fraction=0.2")
    trainer.fit()
    summary = trainer.finish()
    lines = [json.loads(line) for line in (trainer.folder / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["train/loss"] < 0.75 * lines[0]["train/loss"]
    assert lines[-1]["val/loss"] < 0.75 * lines[0]["val/loss"]
    assert not any(key.endswith("oa") for line in lines for key in line)
    assert (summary["test_before_folding"] is not None) == experts
    if experts:
        assert summary["test"]["loss"] == pytest.approx(summary["test_before_folding"]["loss"], rel=1e-5)
    loaded = load_any(trainer.folder).model
    assert not ewa.moe_layers(loaded)
    assert loss(trainer, loaded) == pytest.approx(summary["test"]["loss"], rel=1e-5)
    tuned = make_trainer("ewa.enabled=false", f"train.init_from={trainer.folder}", "run.name=t")
    for name, value in loaded.MAE_encoder.state_dict().items():
        assert torch.equal(tuned.model.state_dict()[name], value), name
    with pytest.raises(CheckpointError, match=r"found a masked_autoencoder: train a classifier from it with train"):
        load_model(trainer.folder)


def test_the_loss_of_a_set_has_the_same_masks_each_time_and_draws_nothing(pretraining):
    trainer = pretraining()
    state = torch.get_rng_state()
    losses = [loss(trainer, trainer.model) for _ in range(2)]
    assert losses[0] == losses[1]
    assert torch.equal(torch.get_rng_state(), state)


def test_an_interrupted_pretraining_goes_on_exactly(pretraining, interrupt):
    whole = pretraining("run.name=whole")
    whole.fit()
    part = pretraining("run.name=part", "train.save_every=7")
    interrupt(part, 13)
    assert load_any(part.folder).class_names == ()
    resumed = pretraining("run.name=part", "train.save_every=7")
    assert resumed.step == 10
    resumed.fit()
    for name, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.mask_ratio=0.99", "model.mask_ratio must leave both masked and visible patches"),
        ("model.mask_ratio=1", "model.mask_ratio must leave"),
        ("model.decoder_depth=0", "model.decoder_depth must be at least 1"),
        ("train.init_from=x", "train.init_from: masked_autoencoding starts from scratch"),
        ("moe.router=top_k", "moe.router: masked_autoencoding folds its experts"),
        ("train.freeze_backbone=true ewa.enabled=false", "train.freeze_backbone: masked_autoencoding trains"),
    ],
)
def test_what_cannot_be_pretrained_is_refused(pretraining, override, message):
    if override == "model.mask_ratio=0.99":
        pretraining(override)  # 7 of 8 patches: one is left
        override = "model.mask_ratio=0.1"
    with pytest.raises(ConfigError, match=message):
        pretraining(*override.split())
