"""The device, its precision, and the machine."""

import ctypes
import platform
import re
import resource
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from pointewa.config import TrainConfig
from pointewa.errors import ConfigError, TrainingError, first_line
from pointewa.ops import backend

PRECISIONS = ("auto", "bfloat16", "float32")


def select_device(name: str) -> torch.device:
    """``"auto"`` is CUDA where there is a GPU, else the CPU.

    Raises:
        ConfigError: not a device, or not one of this machine.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"  # the current GPU, which is the process's own
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"train.device: {name!r} cannot be used here ({first_line(error)}): try cpu or auto"
        ) from error
    return device


def select_precision(name: str, device: torch.device) -> torch.dtype:
    """The type of the matrix products: ``"auto"`` is bfloat16 where the hardware computes in it, else float32.

    Raises:
        ConfigError: an unknown name.
    """
    if name not in PRECISIONS:
        raise ConfigError(f"precision: expected one of {', '.join(PRECISIONS)}, found {name!r}")
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        # Elsewhere bfloat16 is emulated, which was measured hundreds of times slower than float32.
        fast = device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return torch.bfloat16 if fast else torch.float32


def name_of(precision: torch.dtype) -> str:
    """ "float32" or "bfloat16"."""
    return str(precision).removeprefix("torch.")


def environment(device: torch.device) -> dict[str, str | int]:
    """What a result depends on, besides the configuration."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cpu": cpu_name(),
        "commit": commit(),
        "ops": backend(),
        "platform": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
    }


def peak_memory(device: torch.device) -> int:
    """Peak memory in bytes: allocated by torch on a GPU, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if platform.system() == "Darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def commit() -> str:
    """The commit of this code, with "-dirty" if it has changed since; "unknown" outside a repository."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def cpu_name() -> str:
    """The processor's name; "unknown" where the system does not give it."""
    with suppress(OSError):
        if found := re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text()):
            return found[1]
    return platform.processor() or "unknown"


def keep_freed_memory() -> None:
    """Let this process keep the memory that it frees, for reuse. Works with glibc; does nothing elsewhere.

    By default glibc asks the kernel for every large tensor and returns it afterwards, and the kernel fills each page
    with zeros again: on a CPU that took a tenth of a training step.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, TypeError, AttributeError):  # another C library, another system
        return
    m_trim_threshold, m_mmap_max = -1, -4  # of malloc.h
    mallopt(m_mmap_max, 0)
    mallopt(m_trim_threshold, 2**31 - 1)


@contextmanager
def memory_advice(config: TrainConfig) -> Iterator[None]:
    """If memory runs out, say what can be done about it.

    Raises:
        TrainingError: instead of torch's error.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        advice = []
        if not config.activation_checkpointing:
            advice.append("train.activation_checkpointing=true (the same result, more time)")
        parts = [number for number in range(config.accumulate + 1, config.batch_size + 1)
                 if config.batch_size % number == 0]  # fmt: skip
        if parts:
            advice.append(f"train.accumulate={parts[0]} (the same batch in more parts)")
        advice.append("a smaller train.batch_size or model.preset")
        raise TrainingError(
            f"out of memory with train.batch_size={config.batch_size}, train.accumulate={config.accumulate}: try "
            f"{', or '.join(advice)} ({first_line(error)})"
        ) from error
