"""Of other people's optimizers: which one steps, and where it keeps weights."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from pointewa.ewa.optimizers import MuonAndAdamW


def stepping_optimizer(optimizer: Any, experts: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """The innermost optimizer that holds all the experts: of a wrapper, the one that changes the weights.

    It steps once an iteration: SAM (Foret et al., arXiv 2010.01412) perturbs the weights and takes that back itself,
    before the optimizer in it steps, and accelerate's wrapper leaves the step out while gradients accumulate.

    Raises:
        ValueError: what `ExpertAveraging.attach` refuses.
    """
    wanted = {id(parameter) for parameter in experts}
    while True:
        within = {id(one): one for one in _attributes(optimizer) if isinstance(one, torch.optim.Optimizer)}
        holding = [one for one in within.values() if one is not optimizer and wanted <= _held(one)]
        if len(holding) != 1:
            break
        (optimizer,) = holding
    name = type(optimizer).__name__
    if not hasattr(optimizer, "_optimizer_step_post_hooks"):
        raise ValueError(
            f"{name} is not a torch.optim.Optimizer and has none in it that holds all the experts: pass the one that "
            "it steps, or call step() of the averaging after each of its steps"
        )
    if missing := wanted - _held(optimizer):
        found = len(wanted) - len(missing)
        if found:
            raise ValueError(
                f"{name} holds {found} of the experts' {len(wanted)} parameters: with several optimizers do not "
                "attach, but call step() of the averaging once an iteration, after the last of them"
            )
        raise ValueError(
            f"{name}: the optimizer does not hold the experts' parameters: build it after ewa.to_moe; if it trains "
            "copies of them, do not attach, but call step() of the averaging after each of its steps"
        )
    matrices = _held(optimizer, lambda group: not group.get("use_fallback"))  # the key of timm's Muon
    if "muon" in name.lower() and not isinstance(optimizer, MuonAndAdamW) and wanted & matrices:
        raise ValueError(
            f"{name} would take the experts of a layer, stacked in one tensor, for one matrix: use ewa.MuonAndAdamW "
            "with ewa.param_groups, or leave them to timm's AdamW with fallback_list=ewa.stacked_parameters(model)"
        )
    return optimizer


def further_weights(optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    """The weights besides the parameters that a schedule-free optimizer keeps in its state.

    What its ``eval()`` puts into the model is computed from a parameter and its "z", so that both must be averaged.
    """
    free = _held(optimizer, lambda group: "weight_sum" in group)
    states = [optimizer.state[parameter] for parameter in parameters if id(parameter) in free]
    return [state[key] for state in states for key in ("x", "y", "z") if key in state]


def _held(optimizer: torch.optim.Optimizer, which: Any = lambda group: True) -> set[int]:
    return {id(parameter) for group in optimizer.param_groups if which(group) for parameter in group["params"]}


def _attributes(wrapper: Any) -> list[Any]:
    as_property = getattr(wrapper, "optimizer", None)  # Lightning's
    return [*getattr(wrapper, "__dict__", {}).values(), as_property]
