"""What a task may do around each optimizer step."""

import pytest
import torch

from pointewa.errors import ConfigError
from pointewa.tasks.classification import Classification


@pytest.fixture
def calls(monkeypatch):
    """What the hooks of the task were called with, beside the model: progress before a step, None after it."""
    found = []

    def before_step(self, model, progress):
        found.append((model, progress, next(model.parameters()).clone()))

    def after_step(self, model, gather):
        found.append((model, None, next(model.parameters()).clone()))

    monkeypatch.setattr(Classification, "before_step", before_step)
    monkeypatch.setattr(Classification, "after_step", after_step)
    return found


def test_hooks_see_the_model_before_and_after_each_optimizer_step(make_trainer, calls):
    trainer = make_trainer("run.name=a", "train.save_every=7", "train.accumulate=2")
    calls.clear()
    trainer.fit()
    mine = [(progress, weight) for model, progress, weight in calls if model is trainer.model]
    assert [progress for progress, _ in mine] == [value for step in range(20) for value in (step / 20, None)]
    for (_, before), (_, after), (_, following) in zip(mine[::2], mine[1::2], mine[2::2], strict=False):
        assert not torch.equal(before, after)
        assert torch.equal(after, following)


def test_progress_goes_on_where_a_run_is_resumed(make_trainer, calls, interrupt):
    interrupt(make_trainer("run.name=a", "train.save_every=7"), 13)
    resumed = make_trainer("run.name=a", "train.save_every=7")
    calls.clear()
    resumed.fit()
    assert [progress for _, progress, _ in calls if progress is not None] == [step / 20 for step in range(10, 20)]


@pytest.mark.parametrize("ema", [0, 0.5])
def test_a_skipped_step_has_no_after(make_trainer, calls, ema):
    trainer = make_trainer("run.name=a", f"train.ema_decay={ema}", "ewa.enabled=false")
    batch = next(trainer.data.train.epoch(0))
    trainer.train_step(batch)
    trainer.train_step(batch._replace(points=batch.points * torch.nan))
    trainer.train_step(batch)
    assert [progress for _, progress, _ in calls] == [0.0, None, 1 / 20, 2 / 20, None]
    assert trainer.take_skipped() == [1]


def test_more_trial_steps_than_the_training_has_are_no_progress_beyond_its_end(make_trainer, calls):
    trainer = make_trainer("run.name=a", "train.epochs=1", "train.batch_size=160")
    trainer._time_step()
    assert [progress for _, progress, _ in calls if progress is not None] == [0, 1, 1, 1]


@pytest.mark.parametrize("size", [1, 4])
def test_single_objects_in_front_of_a_batch_norm_are_refused_in_a_line(make_trainer, size):
    sizes = (f"train.batch_size={size}", f"train.accumulate={size}", "train.epochs=1")
    trainer = make_trainer("run.name=a", *sizes, "model.head=point_mae")
    told = f"at least 2 at a time, found 1: train.batch_size={size} in train.accumulate={size} parts on 1 process: set"
    with pytest.raises(ConfigError, match=told):
        trainer.fit()
    assert not trainer.folder.exists()
    other = make_trainer("run.name=b", *sizes, "model.head=linear")
    other.train_step(next(other.data.train.epoch(0)))
    assert other.take_skipped() == []
