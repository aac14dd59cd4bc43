"""The state of a training, and going on from it exactly."""

import math
import os
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pointewa.errors import CheckpointError, first_line
from pointewa.runs.weights import LAST, PREVIOUS, restore
from pointewa.train.progress import say
from pointewa.train.rng import random_state, seed_all, set_random_state

if TYPE_CHECKING:
    from pointewa.train.trainer import Trainer

_MOMENTS = {"step", "exp_avg", "exp_avg_sq"}


def training_state(trainer: "Trainer") -> dict[str, Any]:
    """What a training goes on from, the random states of its processes aside.

    The order of the data and the learning rate are not in it: they follow from the seed and the step.
    """
    scheme = trainer.config.ewa
    return {
        "description": trainer.loaded(trainer.model).description(),
        "ewa": {"num_experts": scheme.num_experts, "layers": scheme.layers} if trainer.foldable else None,
        "model": trainer.model.state_dict(),
        "optimizer": trainer.optimizer.state_dict()["state"],
        "averaging": trainer.averaging.state_dict() if trainer.averaging else None,
        "ema": trainer.ema.state_dict() if trainer.ema else None,
        "step": trainer.step,
        "seconds": trainer.seconds,
        "skipped": trainer.skipped,
        "totals": trainer.totals,
    }


def load_training_state(trainer: "Trainer") -> None:
    """Put a trainer where the checkpoint in its run folder was made.

    Raises:
        CheckpointError: missing, damaged, or of another run.
    """
    restored = restore(trainer.folder)
    state = restored.state
    try:
        trainer.model.load_state_dict(restored.model.state_dict())
        _load_optimizer(trainer.optimizer, state["optimizer"])
        if trainer.averaging:
            trainer.averaging.load_state_dict({"steps": _whole(state["averaging"]["steps"], trainer.total_steps)})
        if trainer.ema:
            trainer.ema.load_state_dict(state["ema"])
        trainer.step = _whole(state["step"], trainer.total_steps)
        trainer.seconds, trainer.skipped = float(state["seconds"]), _whole(state["skipped"], trainer.total_steps)
        if not math.isfinite(trainer.seconds) or state["totals"].shape != trainer.totals.shape:
            raise ValueError("seconds or totals")
        trainer.totals.copy_(state["totals"])
        random_states = state["random_states"]
        if not isinstance(random_states, list):
            raise TypeError("random_states: expected a list")
        if len(random_states) == trainer.world.size:
            trainer.rng = random_states[trainer.world.rank]
            set_random_state(trainer.rng)
    except (AttributeError, KeyError, IndexError, OverflowError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{restored.path}: does not fit the run ({type(error).__name__}: {first_line(error)}): start over with "
            "run.overwrite=true"
        ) from error
    if len(random_states) != trainer.world.size:
        seed_all(trainer.config.train.seed + trainer.step, trainer.world.rank)
        trainer.rng = random_state()
        say(
            trainer.console,
            f"{len(random_states)} processes trained so far, {trainer.world.size} go on: as good, but not bit for bit "
            "what the same number would have given",
            style="yellow",
        )
    if restored.path.name == PREVIOUS and trainer.world.first and (trainer.folder / LAST).exists():
        # So that the next checkpoint does not put the damaged one in the place of the sound one.
        os.replace(trainer.folder / LAST, trainer.folder / f"{LAST}.damaged")


def _load_optimizer(optimizer: torch.optim.Optimizer, state: dict[int, dict[str, Tensor]]) -> None:
    """Load AdamW's moments; `Optimizer.load_state_dict` would take any shape."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if state.keys() - set(range(len(parameters))):
        raise ValueError("optimizer: of other parameters")
    loaded: dict[int, dict[str, Tensor]] = {}
    for number, moments in state.items():
        shape = parameters[number].shape
        if moments.keys() != _MOMENTS or any(moments[name].shape != shape for name in _MOMENTS - {"step"}):
            raise ValueError(f"optimizer: moments of parameter {number}")
        if moments["step"].shape != ():
            raise ValueError(f"optimizer: step of parameter {number}")
        loaded[number] = {name: value.clone(memory_format=torch.contiguous_format) for name, value in moments.items()}
    optimizer.load_state_dict({"state": loaded, "param_groups": optimizer.state_dict()["param_groups"]})


def _whole(value: Any, largest: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= largest:
        found = value if isinstance(value, int) else type(value).__name__  # printing anything can take forever
        raise ValueError(f"expected a whole number from 0 to {largest}, found {found}")
    return value
