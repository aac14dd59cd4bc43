"""From clouds as a source has them to clouds as training wants them, cached on disk."""

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from datasets.base import PointClouds
from pointewa.files import atomic_write
from pointewa.ops import backend, farthest_point_sample

_VERSION = 1  # raise it when prepared clouds change


def cache_dir() -> Path:
    """``$POINTEWA_CACHE``, else ``$XDG_CACHE_HOME/pointewa``, else ``~/.cache/pointewa``."""
    if "POINTEWA_CACHE" in os.environ:
        return Path(os.environ["POINTEWA_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pointewa"


def unit_sphere(points: Tensor) -> Tensor:
    """Centre each cloud ``[..., P, 3]`` at its mean and scale it to largest norm 1."""
    points = points - points.mean(-2, keepdim=True)
    return points / points.norm(dim=-1).amax(-1)[..., None, None].clamp(min=1e-12)


def fps_order(points: Tensor, title: str) -> Tensor:
    """Each cloud of ``[N, P, 3]`` in farthest-point order, from its first point. Shows its progress as ``title``."""
    console = Console(stderr=True)
    chunks = track(points.split(64), title, console=console, transient=True, disable=not console.is_terminal)
    order = [farthest_point_sample(chunk, points.shape[1]) for chunk in chunks]
    return points.gather(1, torch.cat(order).unsqueeze(-1).expand(-1, -1, 3))


def prepared(
    name: str, files: Iterable[Path], settings: dict, read: Callable[[], PointClouds], normalize: bool = True
) -> PointClouds:
    """What ``read`` returns, normalised to the unit sphere if asked and put into farthest-point order.

    The result is cached, keyed by the source files (path, size, time of change) and the settings. A cache that
    cannot be read is made again; one that cannot be written costs only the time to prepare.
    """
    sources = [(str(file.resolve()), (stat := file.stat()).st_size, stat.st_mtime_ns) for file in files]
    key = json.dumps([_VERSION, sources, settings, normalize, backend()])
    path = cache_dir() / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.safetensors"
    cached = _read_cache(path)
    if cached is not None:
        return cached
    clouds = read()
    points = unit_sphere(clouds.points) if normalize else clouds.points
    points = fps_order(points, f"preparing {name}, once")
    clouds = PointClouds(points, clouds.labels, clouds.class_names, clouds.object_names, clouds.source)
    metadata = {
        "class_names": json.dumps(clouds.class_names),
        "object_names": json.dumps(clouds.object_names),
        "source": clouds.source,
    }
    try:
        with atomic_write(path) as temporary:
            safetensors.torch.save_file({"points": points, "labels": clouds.labels}, temporary, metadata)
    except OSError as error:
        print(
            f"note: the prepared clouds could not be cached in {path.parent} ({error}); set POINTEWA_CACHE",
            file=sys.stderr,
        )
    return clouds


def _read_cache(path: Path) -> PointClouds | None:
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata()
            return PointClouds(
                file.get_tensor("points"),
                file.get_tensor("labels"),
                tuple(json.loads(metadata["class_names"])),
                tuple(json.loads(metadata["object_names"])),
                metadata["source"],
            )
    except FileNotFoundError:
        return None
    except Exception as error:  # whatever is wrong with it, it can be made again
        print(f"note: {path} cannot be read ({type(error).__name__}); preparing it again", file=sys.stderr)
        return None
