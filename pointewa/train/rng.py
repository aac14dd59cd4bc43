"""The random states of a process: Python's, NumPy's, torch's on the CPU and on each GPU.

Batches do not depend on them: `pointewa.datasets.loader.TrainLoader` draws each from the seed, the epoch and its
number. Dropout, drop path and the partition of the tokens draw from torch's generator of their device.
"""

import random
from typing import Any

import numpy as np
import torch


def seed_all(seed: int, rank: int = 0) -> None:
    """Seed every generator: each rank differently, and rank 0 like a single process."""
    if rank:
        seed = int(np.random.SeedSequence([seed, rank]).generate_state(1, np.uint64)[0] >> 1)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def random_state() -> dict[str, Any]:
    """The states, as tensors and plain values."""
    name, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (name, keys.tolist(), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Resume from a `random_state`.

    Raises:
        KeyError, TypeError, ValueError, RuntimeError: not such a state.
    """
    if not isinstance(state, dict) or not all(isinstance(state[name], tuple) for name in ("python", "numpy")):
        raise ValueError("expected tuples")
    name, keys, position, *rest = state["numpy"]
    if type(keys) is not list or type(position) is not int or not 0 <= position <= len(keys):
        raise ValueError("keys or position: out of range")  # NumPy would read past the keys
    random.setstate(state["python"])
    np.random.set_state((name, keys, position, *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
