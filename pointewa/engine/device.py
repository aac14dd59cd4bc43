"""What the machine offers."""

import platform

import torch

from pointewa.errors import ConfigError, first_line
from pointewa.ops import backend


def select_device(name: str) -> torch.device:
    """``"auto"`` is CUDA where there is a GPU, else the CPU.

    Raises:
        ConfigError: not a device, or one that is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"train.device: {name!r} cannot be used here ({first_line(error)}): try cpu or auto"
        ) from None
    return device


def select_precision(name: str, device: torch.device) -> torch.dtype:
    """The type of the matrix products: ``"auto"`` is bfloat16 where the hardware computes in it, else float32."""
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        # Elsewhere bfloat16 is emulated, which was measured hundreds of times slower than float32.
        fast = device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return torch.bfloat16 if fast else torch.float32


def environment(device: torch.device) -> dict[str, str | int]:
    """What a result depends on besides the configuration."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "ops": backend(),
        "platform": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
    }
