"""The state of a training: writing it so that one copy is always whole, and resuming from it exactly."""

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from pointewa.errors import CheckpointError, first_line, is_bug
from pointewa.runs.folder import again
from pointewa.runs.weights import LAST, PREVIOUS, Restored
from pointewa.safe.files import atomic_write
from pointewa.safe.torch_files import check_sums
from pointewa.train.optimizer import load_optimizer_state, optimizer_state
from pointewa.train.rng import random_state, seed_all, set_random_state
from pointewa.train.step import Training


def save_state(path: Path, state: Mapping[str, Any]) -> None:
    """Write a training state and read it back; the one before it is kept beside it as ``previous.ckpt``.

    At every moment one of the two is whole. On failure both are as they were.

    Raises:
        CheckpointError: the file cannot be written, as on a full disk.
    """
    kept = "the previous one is kept" if path.exists() else "nothing was written"
    try:
        with atomic_write(path, check_sums, path.with_name(PREVIOUS)) as temporary:
            torch.save(dict(state), temporary)
    except (OSError, RuntimeError, CheckpointError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise CheckpointError(
            f"{path}: cannot write the checkpoint ({reason}); {kept}: {again(path.parent)}"
        ) from error


def training_state(training: Training, description: Mapping[str, Any]) -> dict[str, Any]:
    """What a training resumes from, apart from the random states of its processes.

    It lacks the order of the data and the learning rate, which follow from the seed and the step.

    Args:
        training: between two steps.
        description: of its model, see `pointewa.runs.description`.
    """
    moe = training.config.moe
    return {
        "description": description,
        "ewa": {"num_experts": moe.num_experts, "layers": moe.layers} if training.foldable else None,
        "model": training.model.state_dict(),
        "optimizer": optimizer_state(training.model, training.optimizer),
        "averaging": training.averaging.state_dict() if training.averaging else None,
        "ema": training.ema.state_dict() if training.ema else None,
        "step": training.step,
        "seconds": training.seconds,
        "skipped": training.skipped,
        "totals": dict(zip(training.sums, training.totals.tolist(), strict=True)),
    }


def load_training_state(training: Training, restored: Restored) -> tuple[dict[str, Any], int]:
    """Put a training where a checkpoint in its run folder was made.

    Returns:
        The random state to resume with, and the number of processes that wrote the checkpoint. If that is another
        number than today's, the random states are drawn anew.

    Raises:
        CheckpointError: damaged, or of another run.
    """
    state, rank, folder = restored.state, training.world.rank, restored.path.parent
    try:
        for part in ("optimizer", *(["averaging"] if training.averaging else []), *(["ema"] if training.ema else [])):
            if not isinstance(state[part], dict):
                raise ValueError(f"{part}: expected a dictionary, found a {type(state[part]).__name__}")
        training.model.load_state_dict(restored.model.state_dict())
        load_optimizer_state(training.model, training.optimizer, state["optimizer"])
        if training.averaging:
            training.averaging.load_state_dict({"steps": _whole(state["averaging"]["steps"], training.optimizer_steps)})
        if training.ema:
            training.ema.load_state_dict(state["ema"])
        training.step = _whole(state["step"], training.total_steps)
        training.seconds, training.skipped = state["seconds"], _whole(state["skipped"], training.total_steps)
        totals = _totals(state["totals"], training.sums)
        if type(training.seconds) not in (int, float) or not math.isfinite(training.seconds):
            raise ValueError("seconds")
        training.totals.copy_(torch.tensor(totals))
        random_states = state["random_states"]
        if not isinstance(random_states, list):
            raise ValueError("random_states: expected a list")
        if len(random_states) == training.world.size:
            set_random_state(random_states[rank])
        else:
            seed_all(training.config.train.seed + training.step, rank)
    except (AttributeError, KeyError, IndexError, OverflowError, TypeError, ValueError, RuntimeError) as error:
        if is_bug(error):
            raise
        raise CheckpointError(
            f"{restored.path}: does not fit the run ({type(error).__name__}: {first_line(error)}): start over with "
            "run.overwrite=true"
        ) from error
    if restored.path.name == PREVIOUS and training.world.first and (folder / LAST).exists():
        # So that the next checkpoint does not replace the intact one by the damaged one.
        os.replace(folder / LAST, folder / f"{LAST}.damaged")
    return random_state(), len(random_states)


def _totals(found: Any, names: tuple[str, ...]) -> list[float]:
    """The sums of the epoch so far, in the order of ``names``; version 0.1 saved loss, correctly classified objects,
    objects, gradient norm."""
    if isinstance(found, torch.Tensor) and found.shape == (4,):
        loss, correct, objects, norm = found.tolist()
        found = {name: 100 * correct for name in names} | {"loss": loss, "objects": objects, "grad_norm": norm}
    if not isinstance(found, dict) or not all(isinstance(found.get(name), float) for name in names):
        raise ValueError("totals")
    return [found[name] for name in names]


def _whole(value: Any, largest: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= largest:
        found = value if isinstance(value, int) else type(value).__name__  # printing anything can take forever
        raise ValueError(f"expected a whole number from 0 to {largest}, found {found}")
    return value
