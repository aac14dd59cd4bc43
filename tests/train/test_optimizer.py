"""The optimizers and the learning rate over a run."""

from dataclasses import replace

import pytest
import torch

from pointewa.config import TrainConfig, load_config
from pointewa.errors import ConfigError
from pointewa.models import PRESETS, MaskedAutoencoder, PointTransformerClassifier, PointTransformerSegmenter
from pointewa.models.decoders import PRESET_DECODERS
from pointewa.models.parts import Parts
from pointewa.train.optimizer import build_optimizer, learning_rate, load_optimizer_state, no_decay, optimizer_state


def test_warm_up_is_linear_then_a_cosine():
    config = TrainConfig(epochs=300, lr=5e-4, min_lr=1e-6)  # 10 of 300 epochs of warm-up
    assert learning_rate(0, 100, config) == pytest.approx(1e-6)
    assert learning_rate(500, 100, config) == pytest.approx((5e-4 + 1e-6) / 2)
    assert learning_rate(1000, 100, config) == pytest.approx(5e-4)
    assert learning_rate(1000 + 29_000 // 2, 100, config) == pytest.approx((5e-4 + 1e-6) / 2)
    assert learning_rate(29_999, 100, config) == pytest.approx(1e-6, rel=1e-3)
    rates = [learning_rate(step, 100, config) for step in range(30_000)]
    assert rates[:1001] == sorted(rates[:1001])
    assert rates[1000:] == sorted(rates[1000:], reverse=True)


def test_a_short_run_has_a_short_warm_up():
    config = TrainConfig(epochs=10)
    assert learning_rate(round(307 / 3), 307, config) == pytest.approx(config.lr)
    assert learning_rate(0, 307, TrainConfig(epochs=1, warmup_epochs=0)) == pytest.approx(5e-4)
    by_fraction = TrainConfig(epochs=50, warmup_fraction=0.1)
    assert [learning_rate(step, 10, by_fraction) for step in (25, 50)] == pytest.approx([(5e-4 + 1e-6) / 2, 5e-4])
    assert learning_rate(20, 10, TrainConfig(epochs=50, warmup_fraction=0.1, warmup_epochs=2)) == pytest.approx(5e-4)


RECIPES = {
    "adamw": (),
    "sgd": ("train.optimizer=sgd", "train.lr=0.01"),
    "muon": ("train.optimizer=muon",),
    "adamw8bit": ("train.optimizer=adamw8bit",),
    "momentum_free": ("train.optimizer=sgd", "train.momentum=0", "train.lr=0.01"),
}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("router", ["random", "none"])
def test_every_optimizer_resumes_exactly(make_trainer, interrupt, recipe, router):
    keys = (*RECIPES[recipe], f"ewa.enabled={str(router == 'random').lower()}", "train.save_every=7")
    whole = make_trainer(*keys, "run.name=whole")
    before = {name: value.clone() for name, value in whole.model.named_parameters()}
    whole.fit()
    assert all(not torch.equal(value, before[name]) for name, value in whole.model.named_parameters())
    interrupt(make_trainer(*keys, "run.name=part"), 9)
    resumed = make_trainer(*keys, "run.name=part")
    assert resumed.step == 7
    resumed.fit()
    for name, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name


def test_a_checkpoint_of_another_optimizer_is_refused(make_trainer):
    trainer = make_trainer("run.name=a")
    trainer.train_step(next(trainer.data.train.epoch(0)))
    state = optimizer_state(trainer.model, trainer.optimizer)
    other = make_trainer("run.name=b", "train.optimizer=muon")
    with pytest.raises(ValueError, match="of another kind"):
        load_optimizer_state(other.model, other.optimizer, state)


def test_muon_steps_each_expert_as_a_matrix_of_its_own_and_leaves_the_rest_to_adamw(make_trainer):
    trainer = make_trainer("train.optimizer=muon", "train.weight_decay=0.1", "train.clip_norm=0", "run.name=a")
    model, config = trainer.model, trainer.config.train
    kinds = {one: group["kind"] for group in trainer.optimizer.param_groups for one in group["params"]}
    named = dict(model.named_parameters())
    muon = {name for name, one in named.items() if kinds[one] == "muon"}
    assert {"blocks.blocks.0.attn.qkv.weight", "blocks.blocks.0.mlp.fc1.weight"} <= muon
    assert {"blocks.blocks.1.mlp.experts.fc1.weight", "blocks.blocks.1.mlp.experts.fc2.weight"} <= muon
    assert all(name.startswith("blocks.") and name.endswith(".weight") and "norm" not in name for name in muon)
    copies = {name: [row.detach().clone() for row in (one if one.ndim == 3 else [one])] for name, one in named.items()
              if name in muon}  # fmt: skip
    twins = {
        name: torch.optim.Muon(
            [torch.nn.Parameter(row) for row in rows], 1.0, 0.1, config.momentum, adjust_lr_fn="match_rms_adamw"
        )
        for name, rows in copies.items()
    }
    trainer.averaging.detach()
    gradients, zero = {}, trainer.optimizer.zero_grad
    trainer.optimizer.zero_grad = lambda: (gradients.update({n: p.grad.clone() for n, p in named.items()}), zero())
    for batch in list(trainer.data.train.epoch(0))[:3]:
        trainer.train_step(batch)
        for name, twin in twins.items():
            (group,) = twin.param_groups
            group["lr"] = trainer.optimizer.param_groups[0]["lr"]
            rows = gradients[name] if named[name].ndim == 3 else [gradients[name]]
            for parameter, row in zip(group["params"], rows, strict=True):
                parameter.grad = row
            twin.step()
            found = named[name] if named[name].ndim == 3 else [named[name]]
            for parameter, row in zip(group["params"], found, strict=True):
                torch.testing.assert_close(row, parameter, rtol=0, atol=1e-6)


@pytest.mark.parametrize("decoder", PRESET_DECODERS.values())
def test_a_segmenter_s_decoder_is_its_head(decoder):
    parts = Parts(("a", "b"), (0, 1))
    model = PointTransformerSegmenter(replace(PRESETS["tiny"], depth=2), parts, 2, decoder)
    optimizer = build_optimizer(model, load_config(overrides=["train.layer_decay=0.5"]).train)
    scales = {one: group["lr_scale"] for group in optimizer.param_groups for one in group["params"]}
    found = {name: scales[one] for name, one in model.named_parameters()}
    of_trunk = ("encoder.", "reduce_dim.", "cls_", "pos_embed.", "blocks.")
    assert {scale for name, scale in found.items() if not name.startswith(of_trunk)} == {1}
    assert [found[f"blocks.blocks.{block}.norm1.weight"] for block in range(2)] == [0.25, 0.5]
    assert found["encoder.first_conv.0.weight"] == 0.125


def test_layer_decay_needs_blocks(make_trainer):
    with pytest.raises(ConfigError, match=r"train\.layer_decay: works on the blocks of a classifier or a segmenter"):
        make_trainer("train.task=masked_autoencoding", "train.layer_decay=0.9")
    trainer = make_trainer("train.layer_decay=0.5")
    scales = {one: group["lr_scale"] for group in trainer.optimizer.param_groups for one in group["params"]}
    found = {name: scales[one] for name, one in trainer.model.named_parameters()}
    assert found["cls_head_finetune.0.weight"] == found["norm.weight"] == 1
    assert [found[f"blocks.blocks.{block}.norm1.weight"] for block in range(4)] == [0.0625, 0.125, 0.25, 0.5]
    assert found["encoder.first_conv.0.weight"] == found["cls_pos"] == 0.5**5


def test_weight_decay_spares_what_the_published_rule_spares():
    """Parameters of one dimension, biases, and names with "token" in them: `cls_pos` is decayed, `mask_token` not."""
    models = [PointTransformerClassifier(PRESETS["point_bert"], 40), MaskedAutoencoder(PRESETS["tiny"])]
    for model in models:
        published = {name for name, one in model.named_parameters()
                     if len(one.shape) == 1 or name.endswith(".bias") or "token" in name}  # fmt: skip
        assert no_decay(model) == published
    assert "cls_pos" not in no_decay(models[0])
    assert "mask_token" in no_decay(models[1])


def test_betas_reach_adamw(make_trainer):
    trainer = make_trainer("train.betas=[0.8,0.95]")
    assert {group["betas"] for group in trainer.optimizer.param_groups} == {(0.8, 0.95)}


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_moments_of_version_0_1_come_back_by_their_numbers_and_it_says_what_differs(make_trainer, recwarn, decay):
    """There the parameters were numbered group by group: those with weight decay, then those without."""
    trainer = make_trainer(f"train.weight_decay={decay}")
    model = trainer.model
    for batch in list(trainer.data.train.epoch(0))[:2]:
        trainer.train_step(batch)
    state = optimizer_state(model, trainer.optimizer)
    spared = no_decay(model) | {"cls_pos"} if decay else set()
    order = sorted(state, key=lambda name: name in spared)  # stable: else in the order of the model
    trainer.optimizer.state.clear()
    load_optimizer_state(model, trainer.optimizer, {number: state[name] for number, name in enumerate(order)})
    again = optimizer_state(model, trainer.optimizer)
    assert all(torch.equal(again[name]["exp_avg"], state[name]["exp_avg"]) for name in state)
    said = [str(warning.message) for warning in recwarn if "version 0.1" in str(warning.message)]
    assert len(said) == (decay > 0)
