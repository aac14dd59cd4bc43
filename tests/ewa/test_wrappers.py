"""Other people's optimizers: wrappers, SAM, Lookahead, schedule-free ones.

The wrappers here are what the packages' own come to: accelerate 1.15, schedulefree 1.4.1, and SAM's published code.
"""

import types

import pytest
import torch
from timm.optim import Lookahead
from torch import nn

import pointewa.ewa as ewa

D = 6


def make_model(num_experts=4):
    """Dense, MoE, dense; the experts differ."""
    torch.manual_seed(0)
    ffn = nn.Sequential(nn.Linear(D, 8), nn.GELU(), nn.LayerNorm(8), nn.Linear(8, D))
    return nn.Sequential(nn.Linear(D, D), ewa.RandomPartitionMoE(ffn, num_experts), nn.Linear(D, 2)).double()


def loss_of(model, seed):
    torch.manual_seed(seed)
    return model(torch.randn(10, D, dtype=torch.float64)).square().mean()


def experts_of(model):
    return {name: one.detach().clone() for name, one in ewa.stacked_parameters(model).items()}


def are_equal(model):
    return all(torch.allclose(one, one[:1].expand_as(one), rtol=0, atol=1e-12) for one in experts_of(model).values())


class Accelerated(torch.optim.Optimizer):
    """accelerate's AcceleratedOptimizer: an optimizer by its class, whose own hooks were never set up."""

    def __init__(self, optimizer):
        self.optimizer, self.sync = optimizer, True

    @property
    def param_groups(self):
        return self.optimizer.param_groups

    def step(self, closure=None):
        if self.sync:  # gradients are accumulated otherwise
            self.optimizer.step(closure)


class Sam(torch.optim.Optimizer):
    """Sharpness-aware minimisation: ``first_step``, another backward pass, ``second_step``; or one with a closure."""

    def __init__(self, params, base_optimizer, rho=0.05, **kwargs):
        super().__init__(params, {"rho": rho, **kwargs})
        self.base_optimizer = base_optimizer(self.param_groups, **kwargs)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def first_step(self):
        parameters = [one for group in self.param_groups for one in group["params"] if one.grad is not None]
        norm = torch.stack([one.grad.norm() for one in parameters]).norm()
        for one in parameters:
            self.state[one]["old"] = one.clone()
            one.add_(one.grad, alpha=self.defaults["rho"] / norm)

    @torch.no_grad()
    def second_step(self):
        for group in self.param_groups:
            for one in group["params"]:
                one.copy_(self.state[one]["old"])
        self.base_optimizer.step()

    @torch.no_grad()
    def step(self, closure):
        closure = torch.enable_grad()(closure)
        self.first_step()
        closure()
        self.second_step()


class ScheduleFreeSgd(torch.optim.Optimizer):
    """schedulefree's SGD: the parameter is y in training, and x in evaluation; z is in the state."""

    def __init__(self, params, lr, momentum=0.9):
        super().__init__(params, {"lr": lr, "momentum": momentum, "k": 0, "train_mode": True, "weight_sum": 0.0})

    @torch.no_grad()
    def swap(self, train):
        for group in self.param_groups:
            weight = 1 - group["momentum"] if train else 1 - 1 / group["momentum"]
            for one in group["params"] if group["train_mode"] != train else ():
                if "z" in self.state[one]:
                    one.lerp_(self.state[one]["z"], weight)
            group["train_mode"] = train

    def train(self):
        self.swap(True)

    def eval(self):
        self.swap(False)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            assert group["train_mode"]
            group["weight_sum"] += group["lr"] ** 2
            share = group["lr"] ** 2 / group["weight_sum"]
            for one in group["params"]:
                z = self.state[one].setdefault("z", one.clone())
                one.lerp_(z, share)
                one.add_(one.grad, alpha=group["lr"] * (group["momentum"] * (1 - share) - 1))
                z.sub_(one.grad, alpha=group["lr"])


class ScheduleFreeWrapper(torch.optim.Optimizer):
    """schedulefree's wrapper: x is in the state while the optimizer in it steps z in the parameter's place."""

    def __init__(self, base, momentum=0.9):
        self.base, self.momentum, self.weight_sum = base, momentum, 0

    param_groups = property(lambda self: self.base.param_groups)
    state = property(lambda self: self.base.state)

    def zero_grad(self, set_to_none=True):
        self.base.zero_grad(set_to_none)

    def parameters(self):
        return [one for group in self.param_groups for one in group["params"]]

    @torch.no_grad()
    def eval(self):
        for one in self.parameters():
            one.lerp_(self.state[one]["z"], 1 - 1 / self.momentum)

    @torch.no_grad()
    def step(self, closure=None):
        for one in self.parameters():
            z = self.state[one].setdefault("z", one.clone())
            one.lerp_(z, 1 - 1 / self.momentum)
            x = one.clone()
            one.copy_(z)
            z.copy_(x)
        self.base.step()
        for group in self.param_groups:
            group["weight_sum"] = group.get("weight_sum", 0) + group["lr"] ** 2
            for one in group["params"]:
                z, x = one.clone(), self.state[one]["z"].clone()
                x.lerp_(z, group["lr"] ** 2 / group["weight_sum"])
                self.state[one]["z"].copy_(z)
                one.copy_(x.lerp(z, 1 - self.momentum))


def train(model, optimizer, seeds):
    for seed in seeds:
        optimizer.zero_grad()
        loss_of(model, seed).backward()
        optimizer.step()


# Which optimizer of a wrapper steps


def test_the_optimizer_in_an_accelerate_wrapper_is_found_and_accumulated_gradients_are_not_averaged_for():
    model = make_model()
    optimizer = Accelerated(torch.optim.SGD(model.parameters(), lr=0.1))
    averaging = ewa.ExpertAveraging(model, 0.75).attach(optimizer)
    for seed in range(4):
        optimizer.sync = seed % 2 == 1
        loss_of(model, seed).backward()
        optimizer.step()
        assert averaging.steps == (seed + 1) // 2
    assert are_equal(model)


def test_a_wrapper_within_a_wrapper_and_one_that_is_no_optimizer_at_all():
    model = make_model()
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    averaging = ewa.ExpertAveraging(model, 0.75)
    averaging.attach(types.SimpleNamespace(optimizer=Accelerated(inner), other=3))
    train(model, inner, [1])
    assert averaging.steps == 1
    averaging.detach()
    train(model, inner, [2])
    assert averaging.steps == 1


def test_what_has_no_optimizer_in_it_is_refused_with_what_to_pass():
    model = make_model()
    averaging = ewa.ExpertAveraging(model, 0.5)
    with pytest.raises(ValueError, match=r"SimpleNamespace is not a torch\.optim\.Optimizer.*pass the one.*step\(\)"):
        averaging.attach(types.SimpleNamespace(step=lambda: None))
    halves = [torch.optim.SGD(part, lr=0.1) for part in (list(model.parameters())[:4], list(model.parameters())[4:])]
    with pytest.raises(ValueError, match=r"not a torch\.optim\.Optimizer"):
        averaging.attach(types.SimpleNamespace(first=halves[0], second=halves[1]))
    with pytest.raises(ValueError, match=r"SGD holds 2 of the experts' 6 parameters.*after the last of them"):
        averaging.attach(halves[0])
    copies = torch.optim.SGD([one.detach().clone() for one in model.parameters()], lr=0.1)
    with pytest.raises(ValueError, match=r"after ewa\.to_moe.*copies"):
        averaging.attach(copies)


@pytest.mark.parametrize("with_closure", [False, True])
def test_sam_averages_once_an_iteration_and_never_the_perturbed_weights(with_closure):
    model, twin = make_model(), make_model()
    optimizers = [Sam(one.parameters(), torch.optim.SGD, lr=0.1) for one in (model, twin)]
    averaging = ewa.ExpertAveraging(model, 0.3).attach(optimizers[0])
    for seed in range(3):
        for one, optimizer in zip((model, twin), optimizers, strict=True):

            def closure(one=one, optimizer=optimizer, seed=seed):
                optimizer.zero_grad()
                loss_of(one, seed + 10).backward()

            optimizer.zero_grad()
            loss_of(one, seed).backward()
            if with_closure:
                optimizer.step(closure)
            else:
                optimizer.first_step()
                closure()
                optimizer.second_step()
        for stacked in ewa.stacked_parameters(twin).values():  # what must have happened, by hand
            ewa.average_experts_(stacked, 0.3)
        assert averaging.steps == seed + 1
    torch.testing.assert_close(model.state_dict(), twin.state_dict(), rtol=0, atol=1e-14)


def test_lookahead_averages_once_a_step():
    model = make_model()
    optimizer = Lookahead(torch.optim.SGD(model.parameters(), lr=0.1), k=2)
    averaging = ewa.ExpertAveraging(model, 0.3).attach(optimizer)
    train(model, optimizer, range(4))
    assert averaging.steps == 4


# Schedule-free


def mixed(stacked, share_rate):
    count = len(stacked)
    matrix = torch.full((count, count), share_rate / (count - 1), dtype=stacked.dtype)
    return torch.tensordot(matrix.fill_diagonal_(1 - share_rate), stacked, 1)


@pytest.mark.parametrize(
    "make",
    [
        lambda parameters: ScheduleFreeSgd(parameters, lr=0.1),
        lambda parameters: ScheduleFreeWrapper(torch.optim.SGD(parameters, lr=0.1)),
    ],
)
def test_schedule_free_weights_are_averaged_where_eval_reads_them(make):
    """Against x, y and z, each mixed by hand after a step without averaging."""
    model, twin = make_model(), make_model()
    optimizer, plain = make(model.parameters()), make(twin.parameters())
    ewa.ExpertAveraging(model, 0.4).attach(optimizer)
    for seed in range(3):
        train(model, optimizer, [seed])
        train(twin, plain, [seed])
        with torch.no_grad():
            for stacked in ewa.stacked_parameters(twin).values():
                stacked.copy_(mixed(stacked, 0.4))
                plain.state[stacked]["z"].copy_(mixed(plain.state[stacked]["z"], 0.4))
    torch.testing.assert_close(model.state_dict(), twin.state_dict(), rtol=0, atol=1e-13)
    optimizer.eval(), plain.eval()
    torch.testing.assert_close(model.state_dict(), twin.state_dict(), rtol=0, atol=1e-12)
    assert not are_equal(model)


def test_full_averaging_leaves_equal_experts_in_the_weights_that_schedule_free_evaluates():
    model = make_model()
    optimizer = ScheduleFreeSgd(model.parameters(), lr=0.1)
    ewa.ExpertAveraging(model, 0.75).attach(optimizer)
    train(model, optimizer, range(3))
    optimizer.eval()
    assert are_equal(model)
    folded, x = ewa.fold(model.eval()), torch.randn(5, D, dtype=torch.float64)
    torch.testing.assert_close(folded(x), model(x), rtol=0, atol=1e-12)
    optimizer.train()
    train(model, optimizer, range(2))
    assert are_equal(model)


def test_a_z_that_is_no_weight_is_left_alone():
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    stacked = next(iter(ewa.stacked_parameters(model).values()))
    optimizer.state[stacked]["z"] = kept = torch.randn_like(stacked)
    before = kept.clone()
    ewa.ExpertAveraging(model, 0.75).attach(optimizer)
    train(model, optimizer, [0])
    assert torch.equal(kept, before)
