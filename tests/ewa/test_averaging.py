"""Eq. 6 on the weights, its schedules, and its place in a training loop."""

import copy
import os

import pytest
import torch
from torch import nn

import pointewa.ewa as ewa

D = 6


def make_model(num_experts=4):
    """A small dense-MoE-dense model whose experts differ."""
    torch.manual_seed(0)
    ffn = nn.Sequential(nn.Linear(D, 8), nn.GELU(), nn.Linear(8, D))
    return nn.Sequential(nn.Linear(D, D), ewa.RandomPartitionMoE(ffn, num_experts), nn.Linear(D, 2))


def backward(model, seed, scaler=None):
    torch.manual_seed(seed)
    loss = model(torch.randn(10, D)).square().mean()
    (loss if scaler is None else scaler.scale(loss)).backward()


def train(model, optimizer, seeds):
    for seed in seeds:
        optimizer.zero_grad()
        backward(model, seed)
        optimizer.step()


def experts_of(model):
    return {name: p.detach().clone() for name, p in ewa.stacked_parameters(model).items()}


def assert_bitwise(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


# Eq. 6


@pytest.mark.parametrize("num_experts", [2, 3, 4, 8])
@pytest.mark.parametrize("fraction_of_limit", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_equation_6_against_a_double_loop_over_a_snapshot(num_experts, fraction_of_limit):
    torch.manual_seed(0)
    b = fraction_of_limit * (num_experts - 1) / num_experts
    w = torch.randn(num_experts, 3, 5, dtype=torch.float64)
    before = w.clone()
    expected = []
    for i in range(num_experts):
        row = (1 - b) * before[i]
        for j in range(num_experts):
            if j != i:
                row = row + b / (num_experts - 1) * before[j]
        expected.append(row)
    assert ewa.average_experts_(w, b) is w
    torch.testing.assert_close(w, torch.stack(expected), rtol=0, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_share_rate_zero_changes_no_bit(dtype):
    w = torch.randn(4, 33, dtype=dtype)
    assert_bitwise(ewa.average_experts_(w.clone(), 0.0), w)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("num_experts", [2, 3, 4, 7, 10, 49])
def test_full_averaging_leaves_the_experts_bit_identical(num_experts, dtype):
    w = torch.randn(num_experts, 33, dtype=dtype)
    ewa.average_experts_(w, (num_experts - 1) / num_experts)
    assert_bitwise(w, w[:1].expand_as(w))


@pytest.mark.parametrize(("num_experts", "b"), [(2, 0.51), (4, 0.76), (4, 1.0), (4, -0.01), (4, float("nan"))])
def test_a_share_rate_outside_the_limits_is_refused(num_experts, b):
    w = torch.randn(num_experts, 5)
    before, limit = w.clone(), (num_experts - 1) / num_experts
    with pytest.raises(ValueError, match=f"between 0 and .*{limit:g} for {num_experts} experts, got {b:g}"):
        ewa.average_experts_(w, b)
    assert_bitwise(w, before)


@pytest.mark.parametrize("b", [0.51, -0.01, ewa.linear(0.51, 100), ewa.until(ewa.linear(0.51, 100), 0.5, 100)])
def test_a_schedule_that_would_pass_the_limit_is_refused_before_training(b):
    ewa.ExpertAveraging(make_model(num_experts=4), 0.51)
    with pytest.raises(ValueError, match="between 0 and"):
        ewa.ExpertAveraging(make_model(num_experts=2), b)


def test_a_model_without_experts_is_refused():
    with pytest.raises(ValueError, match=r"no MoE layers.*to_moe"):
        ewa.ExpertAveraging(nn.Linear(2, 2), 0.3)


# Schedules


@pytest.mark.parametrize(
    ("schedule", "values"),
    [
        (ewa.constant(0.3), [0.3] * 6),
        (ewa.linear(0.4, 5), [0, 0.1, 0.2, 0.3, 0.4, 0.4]),
        (ewa.linear(0.3, 2), [0, 0.3, 0.3]),
        (ewa.linear(0.3, 1), [0.3, 0.3]),  # its only step is its last
        (ewa.until(ewa.linear(0.4, 5), 0.6, 5), [0, 0.1, 0.2, 0, 0]),
        (ewa.until(ewa.constant(0.3), 0.5, 4), [0.3, 0.3, 0, 0]),
        (ewa.until(ewa.constant(0.3), 0.0, 4), [0, 0, 0, 0]),
        (ewa.until(ewa.constant(0.3), 1.0, 4), [0.3, 0.3, 0.3, 0.3]),
    ],
)
def test_schedule_values(schedule, values):
    assert [schedule(step) for step in range(len(values))] == pytest.approx(values, abs=1e-15)


@pytest.mark.parametrize("fraction", [-0.1, 1.1])
def test_until_a_fraction_outside_0_to_1_is_refused(fraction):
    with pytest.raises(ValueError, match=f"fraction must be a number between 0 and 1, got {fraction}"):
        ewa.until(ewa.constant(0.3), fraction, 10)


def test_the_schedule_is_applied_step_by_step():
    model, values = make_model(), [0.0, 0.2, 0.05]
    averaging = ewa.ExpertAveraging(model, lambda step: values[step])  # any function of the step will do
    for step, b in enumerate(values):
        expected = {name: ewa.average_experts_(w, b) for name, w in experts_of(model).items()}
        assert averaging.share_rate == b
        averaging.step()
        assert averaging.steps == step + 1
        assert_bitwise(experts_of(model), expected)


# In a training loop


@pytest.mark.parametrize(
    "make_optimizer",
    [
        lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
        lambda parameters: torch.optim.AdamW(parameters, lr=0.01, amsgrad=True),
    ],
)
def test_only_the_experts_weights_change_never_the_optimizer_state_or_the_parameter_objects(make_optimizer):
    plain, averaged = make_model(), make_model()
    optimizers = [make_optimizer(model.parameters()) for model in (plain, averaged)]
    averaging = ewa.ExpertAveraging(averaged, 0.2).attach(optimizers[1])
    objects = {name: (id(p), p.data_ptr()) for name, p in averaged.named_parameters()}
    train(plain, optimizers[0], [1])
    train(averaged, optimizers[1], [1])

    assert averaging.steps == 1
    states = [optimizer.state_dict()["state"] for optimizer in optimizers]
    assert len(states[0]) == len(objects)
    assert_bitwise(states[1], states[0])
    expected = dict(plain.state_dict())
    expected.update({name: ewa.average_experts_(w, 0.2) for name, w in experts_of(plain).items()})
    assert_bitwise(dict(averaged.state_dict()), expected)

    train(averaged, optimizers[1], [2, 3])
    assert {name: (id(p), p.data_ptr()) for name, p in averaged.named_parameters()} == objects
    held = {id(p) for group in optimizers[1].param_groups for p in group["params"]}
    assert held == {i for i, _ in objects.values()}


def test_the_weights_are_averaged_before_anything_after_the_step_can_read_them():
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)  # it wraps step()
    ewa.ExpertAveraging(model, 0.75).attach(optimizer)
    ema = torch.optim.swa_utils.AveragedModel(model)
    train(model, optimizer, [1])
    ema.update_parameters(model)
    scheduler.step()
    for reader in (model, ema):
        for weights in experts_of(reader).values():
            assert_bitwise(weights, weights[:1].expand_as(weights))


def test_gradient_accumulation_averages_once_an_optimizer_step():
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    averaging = ewa.ExpertAveraging(model, 0.1).attach(optimizer)
    for micro_batch in range(6):
        backward(model, seed=micro_batch)
        assert averaging.steps == micro_batch // 3
        if micro_batch % 3 == 2:
            optimizer.step()
            optimizer.zero_grad()
    assert averaging.steps == 2


@pytest.mark.parametrize("unscale_first", [False, True])
@pytest.mark.parametrize(
    ("make_optimizer", "step_is_called_on_overflow"),
    [
        (lambda parameters: torch.optim.SGD(parameters, lr=0.1), False),
        (lambda parameters: torch.optim.AdamW(parameters, lr=0.1), False),
        (lambda parameters: torch.optim.AdamW(parameters, lr=0.1, fused=True), True),
        (lambda parameters: torch.optim.SGD(parameters, lr=0.1, fused=True), True),
    ],
)
def test_an_optimizer_step_that_the_scaler_skips_is_not_followed_by_averaging(
    make_optimizer, step_is_called_on_overflow, unscale_first
):
    model = make_model()
    optimizer = make_optimizer(model.parameters())
    averaging = ewa.ExpertAveraging(model, 0.75).attach(optimizer)
    calls = []
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    def scaled_step(overflow):
        optimizer.zero_grad()
        backward(model, seed=1, scaler=scaler)
        if overflow:
            model[0].weight.grad[0, 0] = float("inf")
        if unscale_first:  # what gradient clipping needs
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()

    before = copy.deepcopy(model.state_dict())
    scaled_step(overflow=True)
    assert scaler.get_scale() == 512
    assert len(calls) == step_is_called_on_overflow
    assert averaging.steps == step_is_called_on_overflow
    assert_bitwise(model.state_dict(), before)

    scaled_step(overflow=False)
    assert averaging.steps == 1 + step_is_called_on_overflow
    assert not torch.equal(model[0].weight, before["0.weight"])
    for weights in experts_of(model).values():
        assert_bitwise(weights, weights[:1].expand_as(weights))


def test_an_optimizer_made_before_the_experts_is_refused():
    dense = nn.TransformerEncoderLayer(D, 2, 8, batch_first=True)
    early = torch.optim.SGD(dense.parameters(), lr=0.1)
    moe = ewa.to_moe(dense, layers="all", inplace=True)
    averaging = ewa.ExpertAveraging(moe, 0.1)
    with pytest.raises(ValueError, match=r"after ewa\.to_moe"):
        averaging.attach(early)
    averaging.attach(torch.optim.SGD(moe.parameters(), lr=0.1))


def test_an_optimizer_without_frozen_experts_is_accepted():
    model = make_model()
    model[1].requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    averaging = ewa.ExpertAveraging(model, 0.1).attach(optimizer)
    train(model, optimizer, [1])
    assert averaging.steps == 1


def test_detach_ends_the_averaging():
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    averaging = ewa.ExpertAveraging(model, 0.1).attach(optimizer)
    train(model, optimizer, [1])
    averaging.detach()
    before = experts_of(model)
    train(model, optimizer, [2])
    assert averaging.steps == 1
    assert_bitwise(experts_of(model), before)


def test_resuming_from_the_state_dicts_equals_not_having_stopped():
    def start():
        model = make_model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        return model, optimizer, ewa.ExpertAveraging(model, ewa.linear(0.3, 8)).attach(optimizer)

    whole, optimizer, averaging = start()
    train(whole, optimizer, range(8))
    assert averaging.state_dict() == {"steps": 8}

    first = start()
    train(*first[:2], range(5))
    second = start()
    for old, new in zip(first, second, strict=True):
        new.load_state_dict(copy.deepcopy(old.state_dict()))
    assert second[2].share_rate == pytest.approx(0.3 * 5 / 7)
    train(*second[:2], range(5, 8))
    assert_bitwise(second[0].state_dict(), whole.state_dict())


# Distributed


def _ddp_worker(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model = make_model()
    groups = []  # the tokens as they are dispatched to the experts
    model[1].experts.register_forward_pre_hook(lambda _, args: groups.append(args[0].detach()[..., 0]))
    parallel = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    averaging = ewa.ExpertAveraging(model, ewa.linear(0.3, 5)).attach(optimizer)
    x = torch.randn(12, D, generator=torch.Generator().manual_seed(1))  # the same on both
    torch.manual_seed(rank)
    for _ in range(5):
        optimizer.zero_grad()
        parallel(x).square().mean().backward()
        optimizer.step()
    result = {"weights": model.state_dict(), "groups": groups[0], "steps": averaging.steps}
    torch.save(result, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_ddp_processes_draw_their_own_partitions_and_end_with_identical_weights(tmp_path):
    torch.multiprocessing.spawn(_ddp_worker, args=(os.fspath(tmp_path),), nprocs=2)
    one, two = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert not torch.equal(one["groups"], two["groups"])
    assert_bitwise(one["groups"].flatten().sort().values, two["groups"].flatten().sort().values)
    assert one["steps"] == two["steps"] == 5
    assert_bitwise(one["weights"], two["weights"])
    assert not torch.equal(one["weights"]["1.experts.0.weight"], make_model().state_dict()["1.experts.0.weight"])


def test_attaching_twice_is_refused_and_detaching_allows_it_again():
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    averaging = ewa.ExpertAveraging(model, 0.1)
    averaging.detach()  # nothing to detach: no error
    averaging.attach(optimizer)
    with pytest.raises(ValueError, match="attached already"):
        averaging.attach(optimizer)
    averaging.detach()
    averaging.attach(optimizer)
    train(model, optimizer, [0])
    assert averaging.steps == 1


def test_parameters_that_were_put_in_the_place_of_others_are_averaged():
    model = make_model()
    averaging = ewa.ExpertAveraging(model, 0.75)
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)
    averaging.step()
    assert all((stacked == stacked[:1]).all() for stacked in ewa.stacked_parameters(model).values())


@pytest.mark.parametrize("num_experts", range(2, 65))
def test_both_spellings_of_the_limit_are_accepted(num_experts):
    stacked = torch.randn(num_experts, 4)
    assert ewa.average_experts_(stacked, 1 - 1 / num_experts) is stacked
    assert (stacked == stacked[0]).all()


def test_what_cannot_be_averaged_is_refused():
    with pytest.raises(ValueError, match="at least 2 experts, got 1"):
        ewa.average_experts_(torch.randn(1, 3), 0.0)
    with pytest.raises(ValueError, match="total_steps must be a whole number at least 1"):
        ewa.linear(0.3, 0)
