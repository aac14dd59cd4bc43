"""Two optimizer steps on the gradients of a batch, the first before they are clipped, as published part segmentations
were trained."""

import pytest
import torch

import pointewa.ewa as ewa
from pointewa.errors import ConfigError
from pointewa.train.optimizer import learning_rate

TWICE = ("train.steps_per_batch=2", "train.clip_norm=0.5", "train.epochs=1", "train.precision=float32")


def state(trainer):
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


@pytest.mark.parametrize("parts", [1, 2])
def test_it_is_the_naive_loop(make_trainer, parts):
    """Eq. 6 after both steps, its share rate rising over twice as many averagings as there are batches."""
    # SGD: Adam would make steps of the rounding errors where a gradient is 0, as of the biases before batch norms
    more = (f"train.accumulate={parts}", "train.optimizer=sgd", "train.lr=0.01")
    trainer, naive = make_trainer(*TWICE, *more, "run.name=a"), make_trainer(*TWICE, *more, "run.name=b")
    naive.averaging.detach()
    experts = [one for moe in ewa.moe_layers(naive.model).values() for one in moe.experts.parameters()]
    batches = list(trainer.data.train.epoch(0))
    done, total = 0, 2 * len(batches)
    few = batches[: 4 // parts]  # norms over a few objects make differences of rounding grow, ever faster
    torch.manual_seed(1)
    for batch in few:
        trainer.train_step(batch)
    torch.manual_seed(1)
    for batch in few:
        for group in naive.optimizer.param_groups:
            group["lr"] = learning_rate(done // 2, naive.steps_per_epoch, naive.config.train)
        for part in batch.chunk(parts):
            (naive.task.loss(naive.model, part)[0] / parts).backward()
        for clip in (False, True):
            if clip:
                assert torch.nn.utils.clip_grad_norm_(naive.model.parameters(), 0.5) > 0.5  # it does clip
            naive.optimizer.step()
            with torch.no_grad():
                for one in experts:
                    pull = 0.3 * done / (total - 1) * 4 / 3
                    one.copy_(one + pull * (one.mean(0, keepdim=True) - one))
            done += 1
        naive.optimizer.zero_grad()
    assert trainer.averaging.steps == done == 2 * len(few)
    for name, value in naive.model.state_dict().items():
        torch.testing.assert_close(trainer.model.state_dict()[name], value, rtol=0, atol=5e-5)
    once = make_trainer(*TWICE[1:], *more, "run.name=c")
    torch.manual_seed(1)
    for batch in few:
        once.train_step(batch)
    name = "blocks.blocks.0.attn.qkv.weight"
    difference = (once.model.state_dict()[name] - naive.model.state_dict()[name]).abs().max()
    assert difference > 1e-3  # two steps are not one


def test_a_non_finite_gradient_changes_nothing_in_either_step(make_trainer):
    trainer = make_trainer(*TWICE, "train.lr=1e-2")
    batches = list(trainer.data.train.epoch(0))
    trainer.train_step(batches[0])
    before, moments = state(trainer), {k: v["exp_avg"].clone() for k, v in trainer.optimizer.state.items()}
    trainer.train_step(batches[1]._replace(points=batches[1].points * torch.nan))
    assert trainer.take_skipped() == [1]
    for name, value in before.items():
        if not name.endswith("num_batches_tracked"):
            assert torch.equal(trainer.model.state_dict()[name], value), name
    assert all(torch.equal(trainer.optimizer.state[key]["exp_avg"], value) for key, value in moments.items())


def test_it_resumes_exactly(make_trainer, interrupt):
    def make(name):
        return make_trainer(*TWICE[:2], f"run.name={name}", "train.save_every=7")

    whole = make("whole")
    whole.fit()
    assert whole.averaging.steps == 2 * whole.total_steps
    interrupt(make("part"), 13)
    resumed = make("part")
    assert (resumed.step, resumed.averaging.steps) == (10, 20)
    resumed.fit()
    for name, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name


@pytest.mark.parametrize("value", ["0", "3", "true"])
def test_another_number_is_refused(make_trainer, value):
    with pytest.raises(ConfigError, match=r"train\.steps_per_batch: "):
        make_trainer(f"train.steps_per_batch={value}")
