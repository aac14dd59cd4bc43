"""What each arm of the comparison is, in whole trainings."""

import json

import pytest
import torch

import pointewa.ewa as ewa
from pointewa.config import load_config
from pointewa.errors import ConfigError
from pointewa.models import PRESETS, PointTransformerClassifier
from pointewa.runs.weights import load_model
from pointewa.safe.torch_files import read_state
from pointewa.train.optimizer import build_optimizer

GATED = ("moe.router=top_k", "moe.num_experts=3")


def run(trainer):
    trainer.fit()
    return trainer.finish()


def state(trainer):
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


@pytest.mark.parametrize("arm", ["dense", "dense_ema", "rup", "ewa", "moe", "moe_ewa", "moe_early"])
def test_every_arm_has_a_configuration_that_says_what_it_is(arm):
    config = load_config([f"configs/arm/{arm}.yaml"])
    assert config.scheme == {"dense_ema": "dense", "moe_early": "moe_ewa"}.get(arm, arm)
    assert (config.train.ema_decay > 0) == (arm == "dense_ema")
    assert (config.ewa.until < 1) == (arm == "moe_early")
    assert config.ewa.share_rate == 0.3


def test_gated_experts_stay_in_the_saved_model(make_trainer):
    trainer = make_trainer(*GATED, "moe.top_k=2", "run.name=a")
    summary = run(trainer)
    assert summary["test_before_folding"] is None
    ffn = 2 * 24 * 96 + 24 + 96
    dense = sum(p.numel() for p in PointTransformerClassifier(trainer.model.architecture, 5).parameters())
    assert summary["parameters"] == summary["parameters_in_training"] == dense + 2 * (2 * ffn + 3 * 24)
    points = next(iter(trainer.data.test))[0]
    for path in (trainer.folder, trainer.folder / "last.ckpt"):
        loaded = load_model(path).model
        assert [moe.top_k for moe in ewa.moe_layers(loaded).values()] == [2, 2]
        assert torch.equal(loaded(points), trainer.model.eval()(points))


def test_gated_experts_go_on_exactly(make_trainer):
    whole = make_trainer(*GATED, "run.name=whole")
    whole.fit()
    part = make_trainer(*GATED, "run.name=part")
    part._run_epoch(0, None, *progress(part))
    resumed = make_trainer(*GATED, "run.name=part")
    assert resumed.step == 10
    resumed.fit()
    for name, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name


def progress(trainer):
    from pointewa.runs.folder import start_run
    from pointewa.train.progress import TrainingProgress
    from pointewa.train.signals import StopSignals

    start_run(trainer.folder, trainer.config).release()
    return TrainingProgress(trainer.console, trainer.task, 2, trainer.total_steps, 0), StopSignals(insist=True)


def test_the_balance_loss_takes_part_in_the_training(make_trainer):
    routers = []
    for weight in ("0", "1"):
        trainer = make_trainer(*GATED, f"moe.balance={weight}", "train.epochs=1", f"run.name=b{weight}")
        trainer.fit()
        routers.append(torch.cat([moe.router.weight.flatten() for moe in ewa.moe_layers(trainer.model).values()]))
    assert (routers[0] - routers[1]).abs().max() > 1e-4


def test_early_averaging_stops_at_its_fraction(make_trainer):
    """With full averaging the experts are equal after each step until then, and differ after the next one."""
    trainer = make_trainer(*GATED, f"ewa.share_rate={2 / 3}", "ewa.schedule=constant", "ewa.until=0.5", "run.name=a")
    assert trainer.total_steps == 20
    apart = []
    for batch in [*trainer.data.train.epoch(0), *trainer.data.train.epoch(1)]:
        trainer.train_step(batch)
        apart.append(max(ewa.disagreement(trainer.model).values()))
    assert all(value == 0 for value in apart[:10])
    assert all(value > 0 for value in apart[10:])


def test_the_average_of_the_weights_does_not_touch_the_training(make_trainer):
    plain, averaged = make_trainer("run.name=a"), make_trainer("run.name=b", "train.ema_decay=0.9")
    plain.fit()
    averaged.fit()
    for name, value in plain.model.state_dict().items():
        assert torch.equal(averaged.model.state_dict()[name], value), name


def test_the_average_of_the_weights_is_what_a_loop_gives_and_what_is_evaluated(make_trainer):
    trainer = make_trainer("ewa.enabled=false", "train.ema_decay=0.8", "run.name=a", "train.epochs=1")
    expected = None
    for number, batch in enumerate(trainer.data.train.epoch(0)):
        trainer.train_step(batch)
        decay = min(0.8, (1 + number) / (10 + number)) if number else 0.0
        now = {name: value.double() for name, value in state(trainer).items() if value.is_floating_point()}
        expected = now if expected is None else {k: decay * expected[k] + (1 - decay) * now[k] for k in now}
    average = trainer.ema.module.state_dict()
    for name, value in expected.items():
        torch.testing.assert_close(average[name].double(), value, rtol=1e-5, atol=1e-6)
    trainer = make_trainer("ewa.enabled=false", "train.ema_decay=0.8", "run.name=b", "train.epochs=1")
    run(trainer)
    for path in (trainer.folder, trainer.folder / "last.ckpt"):
        loaded = load_model(path).model.state_dict()
        for name, value in trainer.ema.module.state_dict().items():
            assert torch.equal(loaded[name], value), name
    resumed = make_trainer("ewa.enabled=false", "train.ema_decay=0.8", "run.name=b", "train.epochs=1")
    for name, value in trainer.ema.state_dict().items():
        assert torch.equal(resumed.ema.state_dict()[name], value), name


@pytest.mark.parametrize("head", ["linear", "point_mae"])
def test_probing_leaves_the_backbone_untouched_bit_for_bit(make_trainer, head):
    source = make_trainer("ewa.enabled=false", "run.name=source", "train.epochs=1")
    run(source)
    probe = make_trainer(f"train.init_from={source.folder}", "train.freeze_backbone=true", "ewa.enabled=false",
                         f"model.head={head}", "model.drop_path=0.5", "run.name=probe")  # fmt: skip
    before = state(probe)
    run(probe)
    changed = {name for name, value in state(probe).items() if not torch.equal(value, before[name])}
    names = {name for name in before if name.startswith("cls_head_finetune.")}
    assert changed == names
    for name, value in source.model.state_dict().items():
        if not name.startswith("cls_head_finetune."):
            assert torch.equal(before[name], value), name
    assert load_model(probe.folder).model.architecture.head == head


def test_probing_with_experts_is_refused(make_trainer):
    with pytest.raises(ConfigError, match=r"train\.freeze_backbone: .* set ewa\.enabled=false"):
        make_trainer("train.freeze_backbone=true")


def test_layer_decay_lowers_the_learning_rate_block_by_block(make_trainer):
    config = load_config(overrides=["train.layer_decay=0.5"]).train
    model = PointTransformerClassifier(PRESETS["tiny"], 5)
    optimizer = build_optimizer(model, config)
    scale = {id(p): group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    assert len(scale) == len(list(model.parameters()))
    of = {name: scale[id(parameter)] for name, parameter in model.named_parameters()}
    assert of["cls_head_finetune.0.weight"] == of["norm.bias"] == 1
    assert of["blocks.blocks.5.attn.qkv.weight"] == 0.5
    assert of["blocks.blocks.0.mlp.fc1.bias"] == 0.5**6
    assert of["cls_token"] == of["encoder.first_conv.0.weight"] == of["pos_embed.0.weight"] == 0.5**7
    trainer = make_trainer("train.layer_decay=0.5", "run.name=a", "train.warmup_epochs=0")
    trainer.train_step(next(trainer.data.train.epoch(0)))
    assert {group["lr"] for group in trainer.optimizer.param_groups} == {2e-3 * 0.5**power for power in range(6)}


def test_a_gated_run_logs_no_fold_gap(make_trainer):
    trainer = make_trainer(*GATED, "run.name=a", "train.epochs=1")
    trainer.fit()
    line = json.loads((trainer.folder / "metrics.jsonl").read_text())
    assert any(key.startswith("ewa/disagreement/") for key in line)
    assert not any(key.startswith("ewa/fold_gap/") for key in line)
    assert read_state(trainer.folder / "last.ckpt")["ewa"] is None


def test_a_skipped_step_leaves_the_average_of_the_weights_alone(make_trainer):
    trainer = make_trainer("train.ema_decay=0.8", "run.name=a")
    batches = list(trainer.data.train.epoch(0))
    for batch in batches[:3]:
        trainer.train_step(batch)
    before = {name: value.clone() for name, value in trainer.ema.state_dict().items()}
    trainer.train_step(batches[3]._replace(points=batches[3].points * torch.nan))
    assert trainer.take_skipped() == [3]
    for name, value in trainer.ema.state_dict().items():
        assert torch.equal(value, before[name]), name
    trainer.train_step(batches[4])
    assert int(trainer.ema.n_averaged) == 4
