"""Point-BERT's tokenizer in the common loop: its schedules, its metrics, and what comes of a run."""

import json
import math

import pytest
import torch

from pointewa.config import load_config
from pointewa.datasets.subjects import Subjects
from pointewa.errors import CheckpointError, ConfigError
from pointewa.inference import export, page
from pointewa.models import TOKENIZERS, DiscreteVAE, TokenizerSizes
from pointewa.models.dvae import reconstruction_losses
from pointewa.models.patch_embed import make_patches
from pointewa.runs.weights import load_any, load_model
from pointewa.tasks.tokenizer import Tokenizer, kl_weight, sizes_of, temperature

RECIPE = (
    "train.task=tokenizer", "ewa.enabled=false", "model.width=null", "model.depth=null", "model.heads=null",
    "model.codebook_size=16", "train.lr=5e-3", "train.clip_norm=0", "run.name=t",
)  # fmt: skip
SMALL = TokenizerSizes(num_groups=8, group_size=8, patch_width=8, patch_out=24, codebook_size=32, codebook_width=16,
                       graph_width=8, feature_width=16, folding_width=32)  # fmt: skip


@pytest.fixture
def tokenizing(make_trainer, monkeypatch):
    monkeypatch.setitem(TOKENIZERS, "tiny", SMALL)
    return lambda *overrides: make_trainer(*RECIPE, *overrides)


@pytest.mark.parametrize(
    ("epoch", "hotness", "weight"), [(50, 0.773, 0.012), (100, 0.312, 0.059), (152, 0.0625, 0.097)]
)
def test_the_schedules_at_the_published_length_are_the_published_ones(epoch, hotness, weight):
    progress = epoch * 655 / (301 * 655)
    assert temperature(progress) == pytest.approx(hotness, abs=5e-4)
    assert kl_weight(progress) == pytest.approx(weight, abs=5e-4)


def test_the_schedules_begin_and_end_where_they_are_said_to():
    assert (temperature(0), kl_weight(0)) == (1, 0)
    steps = 655 * 301
    assert temperature(50_000 / steps) == pytest.approx((1 + 0.0625) / 2)
    assert kl_weight(10_000 / steps) == 0 < kl_weight(10_100 / steps)
    assert kl_weight(60_000 / steps) == pytest.approx(0.05)
    for later in (100_001 / steps, 0.6, 1.0):
        assert temperature(later) == 0.0625
    assert kl_weight(109_900 / steps) < 0.1
    assert kl_weight(110_001 / steps) == kl_weight(1.0) == 0.1


def test_a_training_sets_the_schedules_by_its_progress(tokenizing, monkeypatch):
    trainer, seen = tokenizing("train.epochs=1"), []
    forward = DiscreteVAE.forward

    def recorded(model, points):
        seen.append((model.temperature, model.kl_weight))
        losses = forward(model, points)
        total = losses.coarse + losses.fine + model.kl_weight * losses.divergence
        torch.testing.assert_close(losses.total, total, rtol=0, atol=1e-7)
        return losses

    monkeypatch.setattr(DiscreteVAE, "forward", recorded)
    for batch in trainer.data.train.epoch(0):
        trainer.train_step(batch)
    assert seen == [(temperature(step / 10), kl_weight(step / 10)) for step in range(10)]


@pytest.mark.parametrize(("preset", "scale"), [("tiny", 3), ("point_bert", 1)])
def test_the_logits_of_small_tokenizers_start_larger(preset, scale, monkeypatch):
    monkeypatch.setitem(TOKENIZERS, preset, SMALL)
    task = Tokenizer(load_config(["configs/task/tokenizer.yaml"], [f"model.preset={preset}"]))
    model = task.build_model(())
    assert set(model.dgcnn_1.layer5[1].weight.tolist()) == {scale}
    assert set(model.dgcnn_2.layer5[1].weight.tolist()) == {1}


def test_metrics_against_a_loop(tokenizing):
    trainer = tokenizing()
    model = trainer.model.eval()
    state = torch.get_rng_state()
    outputs = trainer.evaluate(model, trainer.data.test)
    found = trainer.task.measure(outputs)
    assert trainer.task.measure(trainer.evaluate(model, trainer.data.test)) == found
    assert torch.equal(torch.get_rng_state(), state)
    counts, fine, coarse = {}, [], []
    with torch.no_grad():
        for batch in trainer.data.test:
            for cloud in batch.points:
                cut = make_patches(cloud[None], 8, 8)
                losses = reconstruction_losses(model.autoencode(cloud[None]))
                coarse.append(losses[0].item())
                fine.append(losses[1].item())
                for token in model.logits(cut.patches, cut.centers)[0].argmax(1).tolist():
                    counts[token] = counts.get(token, 0) + 1
    total = sum(counts.values())
    assert total == 60 * 8
    assert found["usage"] == pytest.approx(100 * len(counts) / 16)
    entropy = -sum(count / total * math.log(count / total) for count in counts.values())
    assert found["perplexity"] == pytest.approx(math.exp(entropy), rel=1e-9)
    assert found["cd"] == pytest.approx(sum(fine) / 60, rel=1e-4)
    assert found["coarse"] == pytest.approx(sum(coarse) / 60, rel=1e-4)


@pytest.mark.parametrize(("tokens", "usage", "perplexity"), [([3, 3, 3, 3], 12.5, 1), ([0, 1, 2, 7], 50, 4)])
def test_usage_and_perplexity_of_codes_worked_out_by_hand(tokens, usage, perplexity):
    rows = torch.tensor(tokens).view(2, 2)
    zero = torch.zeros(2)
    outputs = {"tokens": rows, "codebook_size": torch.full((2,), 8.0), "cd": zero, "coarse": zero}
    found = Tokenizer(load_config()).measure(outputs)
    assert (found["usage"], found["perplexity"]) == (usage, pytest.approx(perplexity))


def test_it_learns_and_leaves_a_tokenizer_that_loads_evaluates_draws_and_exports(tokenizing, tmp_path):
    trainer = tokenizing("train.epochs=6", "data.val_fraction=0.2")
    trainer.fit()
    summary = trainer.finish()
    lines = [json.loads(line) for line in (trainer.folder / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["train/cd"] < 0.5 * lines[0]["train/cd"]
    assert lines[-1]["val/cd"] < lines[0]["val/cd"]
    assert (summary["task"], summary["test_before_folding"]) == ("tokenizer", None)
    assert set(summary["test"]) == {"cd", "coarse", "usage", "perplexity"}
    assert (trainer.folder / "tokenizer.safetensors").is_file()
    for path in (trainer.folder, trainer.folder / "last.ckpt"):
        loaded = load_any(path)
        assert (loaded.class_names, loaded.task) == ((), "tokenizer")
        assert loaded.model.sizes == trainer.model.sizes
        found = trainer.task.measure(trainer.evaluate(loaded.model, trainer.data.test))
        assert found["cd"] == pytest.approx(summary["test"]["cd"], rel=1e-5)
    with pytest.raises(
        CheckpointError,
        match=f"found a dvae: it is a tokenizer: pre-train on it with train.task=mas.* task.tokenizer={trainer.folder}",
    ):
        load_model(trainer.folder)
    written = export.export(load_any(trainer.folder), tmp_path / "dvae.pth", "point_mae")
    state = torch.load(written.path, weights_only=True)["base_model"]
    assert state.keys() == {f"module.{name}" for name in trainer.model.state_dict()}
    again = tokenizing(f"train.init_from={written.path}", "run.name=again")
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value), name


def test_its_page_has_metrics_and_reconstructions_and_its_split_is_measured(tokenizing):
    trainer = tokenizing("train.epochs=1", "data.num_points=64")
    trainer.fit()
    summary = trainer.finish()
    subjects = Subjects(trainer.folder, overrides=["train.device=cpu"])
    subjects.clouds = trainer.data.test.clouds
    assert subjects.metrics()["cd"] == pytest.approx(summary["test"]["cd"], rel=1e-4)
    page.write(trainer.folder, subjects, count=2)
    text = (trainer.folder / "report.html").read_text()
    for part in ("CD-L1 of fine points", "codes in use", "perplexity", "Reconstructions from one code a patch"):
        assert part in text
    with pytest.raises(CheckpointError, match="a tokenizer, which predicts no classes"):
        subjects.classifier.model.eval()
    assert subjects.features().shape == (60, 2 * SMALL.codebook_width)


def test_an_interrupted_run_goes_on_exactly(tokenizing, interrupt):
    whole = tokenizing("run.name=whole")
    whole.fit()
    part = tokenizing("run.name=part", "train.save_every=7")
    interrupt(part, 13)
    resumed = tokenizing("run.name=part", "train.save_every=7")
    assert resumed.step == 10
    resumed.fit()
    for name, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name


def test_the_published_file_is_taken_as_a_start(tokenizing, tmp_path):
    model = DiscreteVAE(TokenizerSizes())
    names = {f"module.{name}": value for name, value in model.state_dict().items()}
    torch.save({"base_model": names, "epoch": 300, "metrics": {"CDL1": 1.0}}, tmp_path / "dVAE.pth")
    full = ("model.preset=point_bert", "model.codebook_size=null", "model.num_groups=null", "model.group_size=null",
            f"train.init_from={tmp_path / 'dVAE.pth'}")  # fmt: skip
    trainer = tokenizing(*full)
    assert sum(value.numel() for value in trainer.model.parameters()) == 27_620_891
    for name, value in model.state_dict().items():
        assert torch.equal(trainer.model.state_dict()[name], value), name
    with pytest.raises(CheckpointError, match=r"of another architecture: codebook \[8192, 256\], expected \[16, 256\]"):
        tokenizing(*full, "model.codebook_size=16")
    del names["module.dgcnn_1.layer5.1.bias"]
    torch.save({"base_model": names}, tmp_path / "dVAE.pth")
    with pytest.raises(CheckpointError, match=r"dgcnn_1\.layer5\.1\.bias missing"):
        tokenizing(*full)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("ewa.enabled=true", "ewa.enabled: a tokenizer has no FFNs that could be experts: set ewa.enabled=false"),
        ("moe.router=top_k", "ewa.enabled: a tokenizer has no FFNs"),
        ("model.width=24", "model.width: tokenizer does not read it, found 24: leave it out"),
        ("model.head=linear", "model.head: tokenizer does not read it"),
        ("model.codebook_size=10", "model.codebook_size must be a multiple of 4, got 10"),
        ("model.codebook_size=0", "model.codebook_size must be 1 to 262144, got 0"),
        ("model.group_size=6", "model.group_size must be a multiple of 4, got 6"),
        ("model.preset=huge", "model.preset: expected one of tiny, small, point_mae, point_bert, found 'huge'"),
        ("train.optimizer=muon", "train.optimizer=muon: a tokenizer has no transformer blocks"),
        ("train.activation_checkpointing=true", "train.activation_checkpointing: a tokenizer has no"),
        ("train.freeze_backbone=true", "train.freeze_backbone: tokenizer trains the whole model"),
    ],
)
def test_what_does_not_go_with_a_tokenizer_is_refused(tokenizing, override, message):
    with pytest.raises(ConfigError, match=message):
        tokenizing(override)


def test_the_shipped_configuration_is_the_published_recipe():
    config = load_config(["configs/task/tokenizer.yaml"], ["model.preset=point_bert"])
    train = config.train
    assert (train.task, train.batch_size, train.lr, train.weight_decay, train.clip_norm, train.epochs) == (
        "tokenizer", 64, 5e-4, 5e-4, 0, 300)  # fmt: skip
    assert (config.data.augment, config.router, sizes_of(config.model)) == ([], "none", TokenizerSizes())
