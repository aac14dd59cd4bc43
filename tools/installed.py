"""Which packages are installed, found with the standard library only, since any other may be missing."""

import importlib.metadata
import importlib.util
import platform
import re
import sys
from collections.abc import Iterator
from contextlib import suppress
from ctypes.util import find_library
from dataclasses import dataclass

from pointewa.clone import CONFIGS

OK, NOTE, BAD = "ok", "note", "missing"
LIBUSB = "apt install libusb-1.0-0"
INSTALL = "make setup, or pip install -r requirements.txt"
_REQUIREMENTS = CONFIGS.parent / "requirements.txt"
_TRAINING = "training"
# For each package the name to import, and what it is needed for.
PACKAGES = {
    "torch": ("torch", _TRAINING),
    "numpy": ("numpy", _TRAINING),
    "h5py": ("h5py", _TRAINING),
    "omegaconf": ("omegaconf", _TRAINING),
    "pydantic": ("pydantic", _TRAINING),
    "safetensors": ("safetensors", _TRAINING),
    "rich": ("rich", _TRAINING),
    "tensorboard": ("tensorboard", "curves and clouds in TensorBoard"),
    "matplotlib": ("matplotlib", _TRAINING),
    "easypytorch3d": ("pytorch3d", "the faster point operators"),
    "fpsample": ("fpsample", "fast preparation of data sets"),
    "trimesh": ("trimesh", "meshes"),
    "pypcd4": ("pypcd4", "pcd files"),
    "laspy": ("laspy", "las and laz files"),
    "lazrs": ("lazrs", "laz files"),
    "mapbox-earcut": ("mapbox_earcut", "meshes with concave polygons"),
    "scipy": ("scipy", "paired tests in studies"),
    "scikit-learn": ("sklearn", "SVMs on features"),
    "timm": ("timm", "image classification"),
    "torchvision": ("torchvision", "image classification"),
    "torchao": ("torchao", "train.optimizer=adamw8bit"),
    "open3d-cpu": ("open3d", "windows and rendered pictures"),
    "onnx": ("onnx", "ONNX export"),
    "onnxscript": ("onnxscript", "ONNX export"),
    "onnxruntime": ("onnxruntime", "ONNX export"),
}


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Args:
        group: "packages", "machine" or "data".
        name: what was checked.
        state: `OK`, `NOTE` (training can run) or `BAD` (it cannot).
        found: what was found.
        remedy: what to do about it, if anything.
    """

    group: str
    name: str
    state: str
    found: str
    remedy: str = ""


def packages() -> Iterator[Finding]:
    """Python and every package that is needed here; none of them is imported."""
    new = sys.version_info >= (3, 11)
    yield Finding("packages", "Python", OK if new else BAD, platform.python_version(),
                  "" if new else "make setup PYTHON=... of version 3.11 or newer")  # fmt: skip
    tried = dict(re.findall(r"^([\w-]+)==([\w.]+)", _REQUIREMENTS.read_text(), re.MULTILINE))
    for package, (module, purpose) in PACKAGES.items():
        if importlib.util.find_spec(module) is None:
            remedy = INSTALL if package in tried else f"pip install {package}"
            yield Finding("packages", package, BAD if purpose == _TRAINING else NOTE, f"missing, for {purpose}", remedy)
            continue
        version = "of unknown version"
        for distribution in (module, package):  # its distribution is pytorch3d or easypytorch3d, open3d or open3d-cpu
            with suppress(importlib.metadata.PackageNotFoundError):
                version = importlib.metadata.version(distribution)
        if module == "open3d" and find_library("usb-1.0") is None:
            missing = f"{version}, but its import needs libusb; pictures are drawn by matplotlib"
            yield Finding("packages", package, NOTE, missing, LIBUSB)
        elif package in tried and version.partition("+")[0] != tried[package]:
            yield Finding("packages", package, NOTE, f"{version}, tried with {tried[package]}", INSTALL)
        else:
            yield Finding("packages", package, OK, version)


def tell_of_libraries() -> None:
    """Print a line for each package that lacks a system library; `make setup` ends with it."""
    for one in packages():
        if one.remedy == LIBUSB:
            print(f"note: {one.name} {one.found}: {one.remedy}")


if __name__ == "__main__":
    tell_of_libraries()
