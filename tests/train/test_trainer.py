"""The loop: reproducible, resumable, and the figures it reports are those of the folded model."""

import json

import pytest
import torch

import pointewa.ewa as ewa
from pointewa.errors import CheckpointError, ConfigError
from pointewa.models import PRESETS, PointTransformerClassifier
from pointewa.runs.weights import load_model
from pointewa.safe.torch_files import read_state
from pointewa.tasks.base import Batch
from pointewa.tasks.classification import evaluate
from pointewa.train.optimizer import no_decay


def run(trainer):
    trainer.fit()
    return trainer.finish()


def weights(trainer):
    return torch.cat([value.flatten().double() for value in trainer.model.state_dict().values()])


@pytest.fixture(scope="module")
def trained(trainer_in, tmp_path_factory):
    torch.manual_seed(0)
    trainer = trainer_in(tmp_path_factory.mktemp("runs"), "run.name=a", "train.epochs=20", "train.lr=5e-3")
    return trainer, run(trainer)


def test_an_ewa_run_learns_folds_and_leaves_a_run_folder(trained):
    trainer, summary = trained
    folder = trainer.folder
    names = {"config.yaml", "last.ckpt", "model.safetensors", "model.json", "metrics.jsonl", "summary.json"}
    assert names <= {path.name for path in folder.iterdir()}
    assert any(path.name.startswith("events.out.tfevents") for path in folder.iterdir())
    assert json.loads((folder / "summary.json").read_text()) == summary
    assert summary["test"]["oa"] > 50  # chance is 20
    assert summary["test"]["oa"] == summary["test_before_folding"]["oa"]
    assert summary["largest_logit_difference"] < 1e-5
    assert summary["parameters"] == sum(p.numel() for p in load_model(folder).model.parameters())
    # 4 experts in 2 of 4 blocks: 3 more copies of those FFNs
    ffn = 2 * 24 * 96 + 24 + 96
    assert summary["parameters_in_training"] - summary["parameters"] == 2 * 3 * ffn


def test_a_fold_that_changed_the_model_would_show(make_trainer, monkeypatch):
    trainer = make_trainer("train.epochs=1")
    trainer.fit()

    def wrong(model, fold=ewa.fold):
        dense = fold(model)
        with torch.no_grad():
            dense.blocks.blocks[1].mlp.fc1.weight.mul_(1.1)
        return dense

    monkeypatch.setattr(ewa, "fold", wrong)
    assert trainer.finish()["largest_logit_difference"] > 1e-4


def test_the_saved_model_is_the_evaluated_one_and_plainly_dense(trained):
    trainer, summary = trained
    loaded = load_model(trainer.folder)
    result = evaluate(loaded.model, trainer.data.test)
    assert {name: round(value, 4) for name, value in result.metrics.items()} == pytest.approx(summary["test"], abs=1e-4)
    fresh = PointTransformerClassifier(loaded.model.architecture, 5)
    assert list(fresh.state_dict()) == list(loaded.model.state_dict())
    from_checkpoint = load_model(trainer.folder / "last.ckpt").model
    for key, value in loaded.model.state_dict().items():
        assert torch.equal(from_checkpoint.state_dict()[key], value), key


def test_metrics_hold_a_line_an_epoch(trained):
    trainer, _ = trained
    lines = [json.loads(line) for line in (trainer.folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == list(range(20))
    assert lines[-1]["train/loss"] < lines[0]["train/loss"]
    assert lines[-1]["ewa/share_rate"] == pytest.approx(0.3)
    layers = [name for name in lines[0] if name.startswith("ewa/disagreement/")]
    assert layers == [f"ewa/disagreement/blocks.blocks.{i}.mlp" for i in (1, 3)]
    # independent experts start at N sqrt(N-1) = 6.9 and averaging pulls them together
    assert all(lines[-1][name] < 0.2 * lines[0][name] < 0.2 * 7 for name in layers)
    assert all(name in lines[0] for name in ("train/lr", "train/grad_norm", "ewa/fold_gap/blocks.blocks.1.mlp"))


@pytest.mark.parametrize("enabled", [True, False])
def test_a_seed_fixes_a_run_bit_for_bit(make_trainer, enabled):
    trainers = [make_trainer(f"ewa.enabled={enabled}", f"train.seed={seed}") for seed in (1, 1, 2)]
    first, second, other = (run(trainer) and weights(trainer) for trainer in trainers)
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("stop", [7, 10, 13])
def test_resuming_equals_not_having_stopped(make_trainer, interrupt, enabled, stop):
    scheme = (f"ewa.enabled={enabled}", "train.save_every=3")
    whole = make_trainer(*scheme, "run.name=whole")
    expected = run(whole)
    stopped = make_trainer(*scheme, "run.name=stopped")
    interrupt(stopped, stop)
    with open(stopped.folder / "metrics.jsonl", "a") as file:
        file.write('{"epoch": 0, "train/l')  # a line that was cut off
    torch.manual_seed(99)
    resumed = make_trainer(*scheme, "run.name=stopped")
    assert resumed.step == (stop // 3 * 3 if stop != 10 else 10)  # 10 steps are an epoch
    summary = run(resumed)
    assert torch.equal(weights(resumed), weights(whole))
    assert summary["test"] == expected["test"]

    def lines(trainer):
        read = map(json.loads, (trainer.folder / "metrics.jsonl").read_text().splitlines())
        return [{key: value for key, value in line.items() if key != "seconds"} for line in read]

    assert lines(resumed) == lines(whole)


def test_the_estimate_of_the_time_does_not_touch_the_run(make_trainer):
    timed, untimed = make_trainer(), make_trainer()
    assert timed._time_step() > 0
    assert timed.step == 0
    assert torch.equal(weights(timed), weights(untimed))
    assert not timed.optimizer.state
    assert torch.equal(run(timed) and weights(timed), run(untimed) and weights(untimed))


def test_dense_and_ewa_see_the_same_batches(make_trainer):
    seen = []
    for enabled in (True, False):
        trainer = make_trainer(f"ewa.enabled={enabled}")
        seen.append(torch.cat([points for points, *_ in trainer.data.train.epoch(1)]))
    assert torch.equal(*seen)


def test_averaging_runs_once_an_optimizer_step_also_with_accumulation(make_trainer):
    trainer = make_trainer("train.accumulate=4")
    trainer.fit()
    assert trainer.averaging.steps == trainer.step == 20


def test_accumulated_gradients_are_those_of_the_whole_batch(make_trainer):
    """Two equal halves have the batch norms' statistics of the whole; without dropout the steps must agree."""
    results = []
    for parts in (1, 2):
        trainer = make_trainer(f"train.accumulate={parts}", "ewa.enabled=false", "model.drop_path=0")
        for module in trainer.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        trainer.model.double()
        points, labels, _ = next(trainer.data.train.epoch(0))
        points, labels = points[:8].repeat(2, 1, 1).double(), labels[:8].repeat(2)
        trainer.train_step(Batch(points, labels))
        moments = [state["exp_avg"] for state in trainer.optimizer.state.values()]
        results.append((torch.cat([m.flatten() for m in moments]), trainer.totals.clone()))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=0, atol=1e-9)
    torch.testing.assert_close(results[0][1], results[1][1])


def test_a_full_disk_keeps_the_previous_checkpoint(make_trainer, monkeypatch):
    trainer = make_trainer("run.name=a")
    save = torch.save

    def full(state, path):
        if state["step"] > 10:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save(state, path)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(CheckpointError, match=r"No space left on device.*the previous one is kept"):
        trainer.fit()
    assert read_state(trainer.folder / "last.ckpt")["step"] == 10
    assert not [path for path in trainer.folder.iterdir() if path.suffix == ".tmp"]


def test_validation_is_held_out_of_training(make_trainer):
    trainer = make_trainer("data.val_fraction=0.25", "run.name=a")
    assert len(trainer.data.train.clouds) == 120
    assert not set(trainer.data.train.clouds.object_names) & set(trainer.data.val.clouds.object_names)
    trainer.fit()
    line = json.loads((trainer.folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert {"val/loss", "val/oa", "val/macc"} <= line.keys()


def test_bfloat16_trains_with_float32_weights(make_trainer):
    trainer = make_trainer("train.precision=bfloat16", "train.epochs=1")
    assert all(parameter.dtype == torch.float32 for parameter in trainer.model.parameters())
    summary = run(trainer)
    assert summary["precision"] == "bfloat16"
    assert summary["largest_logit_difference"] < 1e-5


def test_fine_tuning_starts_from_equal_experts(make_trainer, trained):
    source, _ = trained
    dense = load_model(source.folder).model
    trainer = make_trainer(f"train.init_from={source.folder}")
    for moe in ewa.moe_layers(trainer.model).values():
        assert all((stacked == stacked[:1]).all() for stacked in moe.parameters())
    points = next(iter(trainer.data.test))[0]
    torch.testing.assert_close(trainer.model.eval()(points), dense(points), rtol=0, atol=1e-5)


def test_starting_from_another_architecture_is_refused(make_trainer, trained):
    source, _ = trained
    with pytest.raises(CheckpointError, match="another architecture") as error:
        make_trainer(f"train.init_from={source.folder}", "model.depth=5")
    assert str(source.folder) in str(error.value)


@pytest.mark.parametrize("missing", ["optimizer", "averaging", "step", "random_states"])
def test_a_checkpoint_that_lacks_a_part_is_refused(make_trainer, missing):
    trainer = make_trainer("run.name=a", "train.epochs=1")
    trainer.fit()
    state = read_state(trainer.folder / "last.ckpt")
    del state[missing]
    torch.save(state, trainer.folder / "last.ckpt")
    with pytest.raises(CheckpointError, match=rf"last\.ckpt: (does not fit the run|not a training state).*{missing}"):
        make_trainer("run.name=a", "train.epochs=1")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("ewa.share_rate=0.76", r"share_rate must be between 0 and \(N-1\)/N = 0.75 for 4 experts, got 0.76"),
        ("ewa.share_rate=-0.1", "share_rate must be a number between 0 and 1, got -0.1"),
        ("moe.num_experts=1", "num_experts must be at least 2, got 1"),
        ("moe.layers=[4]", "the model's 4 FFNs"),
        ("moe.layers=some", "every_other"),
        ("ewa.until=1.5", "fraction must be a number between 0 and 1, got 1.5"),
        ("train.device=cuda:99", "train.device"),
    ],
)
def test_a_scheme_that_cannot_be_is_refused_before_anything_is_written(make_trainer, tmp_path, override, message):
    with pytest.raises(ConfigError, match=message):
        make_trainer(override)
    assert not list(tmp_path.iterdir())


def test_stacked_biases_and_norms_have_no_weight_decay():
    model = PointTransformerClassifier(PRESETS["tiny"], 5)
    dense = no_decay(model)
    moe = ewa.to_moe(model, layers="all")
    expected = {name.replace(".mlp.", ".mlp.experts.") for name in dense}
    assert no_decay(moe) == expected
    assert moe.get_parameter("blocks.blocks.1.mlp.experts.fc1.bias").ndim == 2
    decayed = {name for name, _ in moe.named_parameters()} - no_decay(moe)
    assert {"blocks.blocks.0.mlp.experts.fc1.weight", "encoder.first_conv.0.weight"} <= decayed
    assert {"cls_token", "norm.weight", "encoder.first_conv.1.weight"} <= no_decay(moe)
    assert decayed - {name for name in decayed if name.endswith(".weight")} == {"cls_pos"}


def test_modules_in_evaluation_mode_stay_in_it(make_trainer):
    trainer = make_trainer("data.val_fraction=0.2", "train.epochs=1")
    frozen = trainer.model.encoder.first_conv[1].eval()  # a batch norm whose statistics are not to move
    statistics = frozen.running_mean.clone()
    trainer.fit()
    assert not frozen.training
    assert torch.equal(frozen.running_mean, statistics)
    assert trainer.model.encoder.second_conv[1].training


def test_a_model_in_which_an_error_is_planted_shows_it(make_trainer, monkeypatch):
    monkeypatch.setattr(PointTransformerClassifier, "features", lambda self, points: self.no_such_name)
    with pytest.raises(AttributeError, match="no_such_name"):
        make_trainer().fit()


def test_the_time_left_is_told_with_a_single_batch_an_epoch(make_trainer):
    trainer = make_trainer("train.batch_size=160", "data.num_points=32")
    assert trainer.steps_per_epoch == 1
    assert trainer._time_step() > 0


def test_the_logbook_is_closed(make_trainer, monkeypatch):
    from torch.utils.tensorboard import SummaryWriter

    closed, close = [], SummaryWriter.close
    monkeypatch.setattr(SummaryWriter, "close", lambda self: (closed.append(self), close(self)))
    make_trainer("train.epochs=1").fit()
    assert len(closed) == 1
