"""What a training compresses: what is kept for the backward pass, and gradients between processes."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pointewa import compression
from pointewa.compression.adaptive import CHOICES
from pointewa.config import Config
from pointewa.train.distributed import World

if TYPE_CHECKING:
    from pointewa.train.step import Training


class Compression:
    """By the group ``compress`` of a configuration.

    Args:
        config: the configuration.
        model: which is trained.
        world: the processes that train it.
        adaptive: measure which tensor needs how many bits, if the configuration says so.

    Attributes:
        kept: the most bytes that were kept for a backward pass; 0 without compression of activations.
    """

    def __init__(self, config: Config, model: nn.Module, world: World, adaptive: bool = True) -> None:
        self.keys = keys = config.compress
        seed = (config.train.seed + (world.rank << 32)) % 2**63
        self.model, self.world, self.adaptive = model, world, adaptive and keys.adaptive
        self.activations = self.gradients = None
        self.kept, self.steps = 0, 0
        if keys.activations < 32:
            self.activations = compression.activations(
                model, keys.activations, keys.attention, stochastic=keys.stochastic, seed=seed
            )
        if keys.gradients < 32 and world.size > 1:
            self.gradients = compression.GradientExchange(keys.gradients, error_feedback=keys.error_feedback)

    def description(self) -> Iterator[str]:
        """What is compressed, for who starts a training."""
        keys = self.keys
        if keys.activations < 32:
            yield f"activations in {keys.activations} bits" + (" on average" if keys.adaptive else "")
        if keys.gradients < 32:
            yield f"gradients in {keys.gradients} bits" if self.gradients else "one process: no gradients to exchange"

    def forward(self) -> AbstractContextManager:
        """Around the forward pass."""
        return self.activations or nullcontext()

    def between(self) -> None:
        """Between the forward and the backward pass."""
        if self.activations:
            self.kept = max(self.kept, self.activations.nbytes)

    def adapt(self, run: Callable[[], Tensor]) -> None:
        """Choose the bits of each tensor on a first batch, once; the first process does for all.

        Args:
            run: the forward pass without DDP, to the loss.
        """
        if self.adaptive and not self.activations.chosen:
            bits = float(self.activations.bits)
            chosen = compression.adapt(self.activations, run, bits) if self.world.first else None
            self.activations.chosen = self.world.broadcast(chosen)

    def attach(self, model: DistributedDataParallel) -> None:
        """Exchange the model's gradients."""
        if self.gradients:
            self.gradients.attach(model)

    def state(self) -> dict[str, Any] | None:
        """What this process resumes from; None if that is nothing."""
        parts = {"activations": self.activations, "gradients": self.gradients}
        return {name: part.state_dict() for name, part in parts.items() if part} or None

    def load_state(self, states: list[dict[str, Any]]) -> None:
        """Resume from the `state` of each process, by rank. With another number of processes only the bits are kept.

        Raises:
            KeyError, TypeError, ValueError: not such states.
        """
        if not isinstance(states, list) or not all(isinstance(state, dict) for state in states):
            raise ValueError("compression: expected a list of dictionaries")
        same = len(states) == self.world.size
        state = states[self.world.rank if same else 0]
        if self.activations:
            chosen, generators = state["activations"]["chosen"], state["activations"]["generators"]
            if not isinstance(chosen, dict) or not isinstance(generators, dict):
                raise ValueError("compress.activations: expected dictionaries")
            if not all(type(number) is int and bits in CHOICES for number, bits in chosen.items()):
                raise ValueError("compress.activations: bits")
            here = {name: one for name, one in generators.items() if torch.device(name).type == self._device.type}
            self.activations.load_state_dict({"chosen": chosen, "generators": here if same else {}})
        if self.gradients and same:
            left, shapes = state["gradients"], {name: one.shape for name, one in self.model.named_parameters()}
            if not isinstance(left, dict) or not all(isinstance(one, Tensor) for one in left.values()):
                raise ValueError("compress.gradients: expected tensors by name")
            if any(one.shape != shapes[name] for name, one in left.items()):
                raise ValueError("compress.gradients: of other parameters")
            self.gradients.load_state_dict(left)

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device


def compressed(training: "Training", batches: Any) -> dict[str, dict[str, float]]:
    """For the summary of a run: megabytes kept for the backward pass, sent in a step, and what would be without.

    Args:
        training: at its end.
        batches: of its training split.

    Returns:
        "compression" and its figures; nothing where nothing is compressed, and on other processes than the first.
    """
    mine, found = training.compression, {}
    if mine.state() is None or not training.world.first:
        return {}
    if mine.activations:
        batch, twin = next(batches.epoch(0)), training.twin()
        few = next(batch.chunk(max(len(batch.labels) // 2, 1)))  # all of it might not fit without compression
        factor = len(batch.labels) / training.config.train.accumulate / len(few.labels)
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            without = compression.kept_bytes(twin.model, lambda: twin._loss(twin.model, few)[0])
        found |= {"kept_mb": mine.kept / 1e6, "kept_mb_without": factor * without / 1e6}
    if mine.gradients and mine.steps:
        sent, plain = mine.gradients.sent, mine.gradients.plain
        found |= {"sent_mb_a_step": sent / mine.steps / 1e6, "sent_mb_a_step_without": plain / mine.steps / 1e6}
    return {"compression": {name: round(value, 3) for name, value in found.items()}}
