"""Several processes that train one model, by torch's DistributedDataParallel and torchrun."""

import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar
from uuid import uuid4

import torch
import torch.distributed as dist
from torch import Tensor

from pointewa.errors import ConfigError, TrainingError, UserError, first_line

T = TypeVar("T")

# A process that dies is noticed at once; the time is for one that prepares a large set while the others wait.
_TIMEOUT = timedelta(hours=3)


@dataclass(frozen=True)
class World:
    """The processes of a run.

    Args:
        rank: number of this one.
        size: how many there are.
    """

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """The one process that writes and prints."""
        return self.rank == 0

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum over the processes, in place; the same bits on each."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def largest(self, values: Sequence[int]) -> list[int]:
        """For each of ``values`` the maximum over the processes. Does not touch the GPU."""
        tensor = torch.tensor(values)
        if self.size > 1:
            dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return tensor.tolist()

    def gather(self, value: T) -> list[T]:
        """The values of all processes, by rank, on the first one; an empty list on the others."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size if self.first else []
        dist.gather_object(value, values if self.first else None)
        return values

    def concatenate(self, rows: Tensor) -> Tensor:
        """The rows ``[N_rank, ...]`` of all processes one after another, by rank; N may differ, and may be 0."""
        if self.size == 1:
            return rows
        counts = self.sum_(torch.eye(self.size, dtype=torch.int64)[self.rank] * len(rows)).tolist()
        padded = rows.new_zeros(max(counts), *rows.shape[1:])
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    def first_then_others(self, function: Callable[[], T]) -> T:
        """``function()``, on the first process before the others, so that they find what it has prepared.

        A `UserError` there ends the others without a second message.
        """
        failed = None
        try:
            if self.first:
                return function()
        except UserError as error:
            failed = str(error)
            raise
        finally:
            failed = self.broadcast(failed)
        if failed:
            sys.exit(2)
        return function()

    def broadcast(self, value: T) -> T:
        """The first process's value, on all of them."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values)
        return values[0]


ALONE = World()


def launched() -> World:
    """The processes by torchrun's environment variables; a single one without them."""
    return World(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))


def launch(processes: int, module: str, arguments: Sequence[str]) -> None:
    """Start ``python -m module`` in so many processes on this machine, as ``torchrun --standalone`` does, and wait.

    What torchrun prints about a process that ended is left out, since processes say themselves what went wrong.

    Raises:
        SystemExit: with the code of the process that ended first, or after a signal to this one.
        TrainingError: one of them was killed.
    """
    from torch.distributed.elastic.multiprocessing import SignalException  # these take a while to import
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.setdefault("OMP_NUM_THREADS", str(-(-torch.get_num_threads() // processes)))  # share the cores
    logging.disable()
    here = LaunchConfig(
        1, 1, processes, run_id=uuid4().hex, rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=0
    )
    try:
        elastic_launch(here, sys.executable)("-m", module, *arguments)
    except SignalException as error:
        sys.exit(128 + error.sigval)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            name = signal.Signals(-failure.exitcode).name
            raise TrainingError(f"process {rank} was ended by {name}: the same command resumes the run") from error
        sys.exit(failure.exitcode)


def _store() -> dist.Store:
    """Where the processes exchange their addresses."""
    store = next(iter(dist.rendezvous("env://", timeout=_TIMEOUT)))[0]
    restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    if restarts and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # torchrun gives restarted processes the store of the dead ones, with the old addresses (torch 2.12). Its count
        # of restarts keeps them apart, but only the processes of one machine agree on it.
        if os.environ.get("GROUP_WORLD_SIZE") != "1":
            raise ConfigError("TORCH_DISABLE_SHARE_RDZV_TCP_STORE: restarts on several machines need it to be 1")
        store = dist.PrefixStore(f"after restart {restarts}", store)
    return store


@contextmanager
def process_group() -> Iterator[World]:
    """Join the other processes that torchrun has started, if any.

    Raises:
        TrainingError: one of them has ended.
    """
    world = launched()
    if world.size == 1:
        yield world
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # CPU tensors always go by gloo, so that processes can communicate while their GPUs work.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=_store(), rank=world.rank, world_size=world.size, timeout=_TIMEOUT)
    try:
        yield world
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or "gloo" in str(error) or "NCCL" in str(error):
            raise TrainingError(
                f"process {world.rank} of {world.size} lost another one ({first_line(error)}): the run has ended; the "
                "same command resumes it from its last checkpoint"
            ) from error
        raise
    finally:
        dist.destroy_process_group()
