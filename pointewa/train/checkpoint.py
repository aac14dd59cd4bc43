"""Writing the state of a training."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from pointewa.errors import CheckpointError, first_line
from pointewa.runs.weights import PREVIOUS
from pointewa.safe.files import atomic_write
from pointewa.safe.torch_files import check_sums


def save_state(path: Path, state: Mapping[str, Any]) -> None:
    """Write a training state and read it back; the one that was there stays beside it as ``previous.ckpt``.

    At every moment one of the two is whole. On failure both are as they were.

    Raises:
        CheckpointError: the file cannot be written, as on a full disk.
    """
    kept = "the previous one is kept" if path.exists() else "nothing was written"
    try:
        with atomic_write(path) as temporary:
            torch.save(dict(state), temporary)
            check_sums(temporary)
            if path.exists():
                os.replace(path, path.with_name(PREVIOUS))
    except (OSError, RuntimeError, CheckpointError) as error:  # torch reports a short write as a RuntimeError
        raise CheckpointError(
            f"{path}: cannot write the checkpoint ({first_line(error)}); {kept}: free some space, then go on from it"
        ) from error
