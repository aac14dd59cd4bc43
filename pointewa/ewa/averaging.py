"""Eq. 6 of arXiv 2308.06093: after every optimizer step the experts of a layer move towards each other.

With N experts, share rate b and the weights W_i after the optimizer step,

    W_i <- (1 - b) W_i + b/(N-1) * sum_{j != i} W_j .

In terms of their mean m that is  W_i <- W_i + s (m - W_i)  with  s = b N/(N-1): one lerp towards the mean.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor, nn

from pointewa.ewa.experts import moe_layers
from pointewa.ewa.wrappers import further_weights, stepping_optimizer


def _check_number(name: str, value: Any, low: float, high: float = math.inf, kind: type = Real) -> None:
    """Refuse what is no number (``kind`` Integral: no whole one) from ``low`` to ``high``; NaN is none."""
    if not isinstance(value, kind) or isinstance(value, bool) or not low <= value <= high or value == math.inf:
        noun = "a whole number" if kind is Integral else "a number"
        bound = f"at least {low:g}" if high == math.inf else f"between {low:g} and {high:g}"
        raise ValueError(f"{name} must be {noun} {bound}, got {value!r}")


def _check_share_rate(share_rate: float, num_experts: int) -> None:
    if num_experts < 2:
        raise ValueError(f"averaging needs at least 2 experts, got {num_experts}")
    limit = (num_experts - 1) / num_experts
    if not 0 <= share_rate <= limit + 1e-12:  # 1 - 1/N and (N-1)/N differ in the last digit
        raise ValueError(
            f"share_rate must be between 0 and (N-1)/N = {limit:g} for {num_experts} experts, got {share_rate:g}: "
            "above that Eq. 6 overshoots the mean"
        )


@torch.no_grad()
def average_experts_(stacked: Tensor, share_rate: float, skip: Tensor | None = None) -> Tensor:
    """Eq. 6 in place on one stacked parameter ``[N, ...]``; returns it.

    Args:
        stacked: the parameter.
        share_rate: b.
        skip: one element, 1 to leave the parameter as it is, 0 to average; on the device, so that nothing waits for it.

    Raises:
        ValueError: ``share_rate`` outside [0, (N-1)/N], or a DTensor that is sharded along its first dimension.
    """
    num_experts = stacked.shape[0]
    if any(placement.is_shard(0) for placement in getattr(stacked, "placements", ())):  # of a DTensor
        raise ValueError(
            "the experts are sharded over processes, so that averaging them would need communication: pass "
            "shard_placement_fn=lambda p: Shard(1) to fully_shard for ewa.stacked_parameters(model).values()"
        )
    _check_share_rate(share_rate, num_experts)
    # The limit must give exactly 1, so that full averaging leaves the experts bit-identical.
    pull = min(share_rate * num_experts / (num_experts - 1), 1.0)
    if skip is not None:
        pull = pull * (1 - skip.to(stacked))
    return stacked.lerp_(stacked.mean(0, keepdim=True), pull)


@dataclass(frozen=True)
class ShareRate:
    """Share rate b as a function of the number of averagings done so far (0 for the first).

    Args:
        peak: the largest value, from the start or at the end of the rise.
        rise_steps: number of averagings over which b rises linearly from 0 to ``peak``; 0 for no rise.
        stop_step: b is 0 from this averaging on; None to never stop.

    Raises:
        ValueError: a value out of range or of a wrong type. The limit of ``peak`` depends on the number of experts, and
            is below 1 for any.
    """

    peak: float
    rise_steps: int = 0
    stop_step: int | None = None

    def __post_init__(self) -> None:
        _check_number("share_rate", self.peak, 0, 1)
        _check_number("rise_steps", self.rise_steps, 0, kind=Integral)
        if self.stop_step is not None:
            _check_number("stop_step", self.stop_step, 0, kind=Integral)

    def __call__(self, step: int) -> float:
        """b for the averaging number ``step``, counted from 0."""
        if self.stop_step is not None and step >= self.stop_step:
            return 0.0
        return self.peak * min(step / (self.rise_steps - 1), 1.0) if self.rise_steps > 1 else self.peak


def constant(share_rate: float) -> ShareRate:
    """The same share rate at every step."""
    return ShareRate(share_rate)


def linear(share_rate: float, total_steps: int) -> ShareRate:
    """From 0 at the first of ``total_steps`` steps to ``share_rate`` at the last."""
    _check_number("total_steps", total_steps, 1, kind=Integral)
    return ShareRate(share_rate, rise_steps=total_steps)


def until(schedule: ShareRate, fraction: float, total_steps: int) -> ShareRate:
    """``schedule`` for the first ``fraction`` of ``total_steps``, then no averaging (the paper's "Early EWA")."""
    if not isinstance(schedule, ShareRate):
        raise ValueError(f"schedule must be a ShareRate, such as ewa.linear(...), got {schedule!r}")
    _check_number("fraction", fraction, 0, 1)
    _check_number("total_steps", total_steps, 1, kind=Integral)
    return replace(schedule, stop_step=round(fraction * total_steps))


class ExpertAveraging:
    """Applies Eq. 6 to all MoE layers of a model after each step of an optimizer.

    Optimizer state is left alone, except for the weights that schedule-free optimizers (Defazio et al., arXiv
    2405.15682) keep there: what their ``eval()`` puts into the model is averaged too. With gradient accumulation it
    runs once per optimizer step. It changes nothing after a skipped step: `torch.amp.GradScaler` does not make the step
    at all, or sets ``found_inf`` of a fused optimizer. Several processes (DDP) average locally: their weights stay
    equal.

    Args:
        model: what `to_moe` returned.
        share_rate: a constant b, a `ShareRate`, or any function from the number of averagings done to b.

    Raises:
        ValueError: no model, no MoE layers in it, or a share rate that is no number from 0 to (N-1)/N. Of a function
            the first value is looked at, the others when they are used.

    Example:
        >>> averaging = ExpertAveraging(model, linear(0.3, total_steps)).attach(optimizer)
    """

    def __init__(self, model: nn.Module, share_rate: float | Callable[[int], float]) -> None:
        if not isinstance(model, nn.Module):
            raise ValueError(f"model must be what ewa.to_moe returned, got {type(model).__name__}")
        self._layers = list(moe_layers(model).values())
        if not self._layers:
            raise ValueError("the model has no MoE layers: convert it with ewa.to_moe first")
        self._share_rate = share_rate if callable(share_rate) else constant(share_rate)
        self._handle = None
        self.steps = 0
        # Before training, not once the rise gets there.
        largest = self._share_rate.peak if isinstance(self._share_rate, ShareRate) else self._share_rate(0)
        _check_number("share_rate", largest, 0, 1)
        for moe in self._layers:
            _check_share_rate(largest, moe.num_experts)

    @property
    def share_rate(self) -> float:
        """The share rate that the next averaging will use."""
        return self._share_rate(self.steps)

    @torch.no_grad()
    def step(self, skip: Tensor | None = None) -> None:
        """Average once. `attach` calls this after every optimizer step; call it yourself only in a loop without
        an optimizer.

        Args:
            skip: one element, 1 to average nothing, 0 to average.
        """
        self._average(self._parameters(), skip)

    def _average(self, stacked: Iterable[Tensor], skip: Tensor | None) -> None:
        share_rate = self.share_rate
        if share_rate != 0:
            for one in stacked:
                average_experts_(one, share_rate, skip)
        self.steps += 1

    def _parameters(self) -> Iterator[nn.Parameter]:
        # looked up each time: load_state_dict(..., assign=True) replaces them
        return (parameter for moe in self._layers for parameter in moe.experts.parameters())

    def attach(self, optimizer: torch.optim.Optimizer) -> "ExpertAveraging":
        """Run after every step of ``optimizer`` from now on; returns self.

        Of a wrapper (accelerate's, SAM, Lookahead, ...) it takes the optimizer within, which steps once an iteration.

        Raises:
            ValueError: attached already; the optimizer does not hold the experts (it was built before `to_moe`), or not
                all of them; no optimizer in it; or a Muon that takes the experts of a layer for one matrix.
        """
        if self._handle is not None:
            raise ValueError("attached already: detach first, or the experts would be averaged twice per step")
        inner = stepping_optimizer(optimizer, [one for one in self._parameters() if one.requires_grad])
        self._handle = inner.register_step_post_hook(self._after_step)
        return self

    def detach(self) -> None:
        """Stop running after the optimizer's steps."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _after_step(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        parameters = list(self._parameters())
        self._average([*parameters, *further_weights(optimizer, parameters)], getattr(optimizer, "found_inf", None))

    def state_dict(self) -> dict[str, int]:
        """What `load_state_dict` needs to resume: the number of averagings done."""
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Resume from a `state_dict`."""
        self.steps = int(state["steps"])
