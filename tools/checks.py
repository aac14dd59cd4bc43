"""What `tools.doctor` checks once all packages are installed: the machine and the data sets."""

import io
import os
import platform
import re
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import redirect_stderr, suppress
from importlib.util import find_spec
from pathlib import Path

import torch
from pointewa.tools.installed import BAD, INSTALL, NOTE, OK, Finding

from pointewa import datasets
from pointewa.config import Config
from pointewa.datasets.prepare import cache_dir
from pointewa.datasets.source import cores
from pointewa.errors import ConfigError, DataError, counted, first_line
from pointewa.models import Architecture, PointTransformerClassifier
from pointewa.ops import backend
from pointewa.tasks import task_class
from pointewa.train.device import keep_freed_memory, name_of, select_device, select_precision

LEAST_DISK, LEAST_MEMORY = 2**29, 2**30  # bytes that a small training needs
SECONDS = 8.0  # to look for data sets
_GET = {
    "modelnet40": "make data DATASET=modelnet40 WHAT=download, or data.root=FOLDER",
    "scanobjectnn": "ask at https://hkust-vgd.github.io/scanobjectnn/, then data.root=FOLDER",
    "shapenet55": "from https://shapenet.org, see docs/data.md, then data.root=FOLDER",
    "shapenetpart": "from https://shapenet.org, see docs/data.md, then data.root=FOLDER",
    "labeled_psb": "from https://segeval.cs.princeton.edu, see docs/data.md, then data.root=FOLDER",
    "sydney": "make data DATASET=sydney WHAT=download says where, then data.root=FOLDER",
    "images": "train/<class>/* and test/<class>/*, or a zip file of them, then data.root=FOLDER",
    "folder": "a folder a class of clouds or meshes, then data.root=FOLDER",
}


def machine(config: Config) -> Iterator[Finding]:
    """The device of a training, its precision and operators, and a training step on it."""
    try:
        device = select_device(config.train.device)
    except ConfigError as error:
        yield Finding("machine", "device", BAD, str(error), "train.device=auto")
        return
    names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    others = f"there is {', '.join(names)}" if names else "no GPU that torch can use"
    yield Finding("machine", "device", OK, f"{device.type} for train.device={config.train.device}; {others}")
    dtype = name_of(select_precision(config.train.precision, device))
    yield Finding("machine", "precision", OK, f"{dtype} for train.precision={config.train.precision}")
    threads, limit = torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS")
    few = bool(limit) and threads < cores() and device.type == "cpu"
    remedy = f"unset OMP_NUM_THREADS (it is {limit}), unless the cores have other work" if few else ""
    yield Finding("machine", "threads", NOTE if few else OK, f"{threads} on {counted(cores(), 'core')}", remedy)
    yield _operators()
    yield _step(device)


def _operators() -> Finding:
    name, why = "point operators", "pytorch3d is not installed"
    try:
        found = backend()
    except ValueError as error:
        return Finding("machine", name, BAD, str(error), "unset POINTEWA_OPS")
    if found == "pytorch3d" or "POINTEWA_OPS" in os.environ:
        return Finding("machine", name, OK, found)
    if find_spec("pytorch3d"):
        try:
            import pytorch3d._C  # noqa: F401
        except ImportError as error:
            why = f"pytorch3d does not load: {first_line(error)[:150]}"
    mends = (platform.system(), platform.machine()) == ("Linux", "x86_64")  # where there is a wheel of it
    return Finding("machine", name, NOTE, f"torch, slower on GPUs; {why}", INSTALL if mends else "")


def _step(device: torch.device) -> Finding:
    start = time.perf_counter()
    try:
        model = PointTransformerClassifier(Architecture(24, 1, 2, 8, 8, patch_width=8, patch_out=24), 2).to(device)
        loss = model(torch.rand(2, 64, 3, device=device)).square().mean()
        loss.backward()
        if not torch.isfinite(loss):
            raise RuntimeError(f"the loss is {loss.item()}")
    except Exception as error:  # of any kind: this is meant to find it
        remedy = "train.device=cpu" if device.type != "cpu" else INSTALL
        return Finding("machine", "training step", BAD, f"fails on {device}: {first_line(error)[:150]}", remedy)
    return Finding("machine", "training step", OK, f"works on {device.type}, {time.perf_counter() - start:.1f} s")


def resources(config: Config) -> Iterator[Finding]:
    """Free space on disk and in memory, and whether freed memory is kept."""
    for name, folder, remedy, state in (
        ("disk for runs", Path(config.run.dir), "free some space, or run.dir=FOLDER", BAD),
        (
            "disk for prepared data",
            cache_dir(),
            "free some space, or set POINTEWA_CACHE",
            NOTE,
        ),  # else a temporary one
    ):
        there = folder = folder.absolute()
        while not there.exists():
            there = there.parent
        free, writable = shutil.disk_usage(there).free, there.is_dir() and os.access(there, os.W_OK)
        fine = writable and free >= LEAST_DISK
        text = f"{_size(free)} free at {folder}{'' if writable else ', where nothing can be written'}"
        yield Finding("machine", name, OK if fine else state, text, "" if fine else remedy)
    if (free := free_memory()) is not None:
        fine = free >= LEAST_MEMORY
        yield Finding("machine", "memory", OK if fine else NOTE, f"{_size(free)} free",
                      "" if fine else "end other programs, or a smaller train.batch_size")  # fmt: skip
    kept = keeps_freed_memory()
    text = {
        True: "freed memory is kept for its next use",
        False: "freed memory is returned to the system, which slows training on a CPU",
        None: "this system does not show whether freed memory is kept",
    }[kept]
    yield Finding("machine", "allocator", OK if kept else NOTE, text)


def free_memory() -> int | None:
    """Bytes of available memory; None where the system does not show them."""
    with suppress(OSError):
        found = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
        return 1024 * int(found[1]) if found else None
    return None


def keeps_freed_memory() -> bool | None:
    """Whether `keep_freed_memory` works: 64 MiB that were used and freed still belong to this process.

    None where the system does not show it.
    """

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    keep_freed_memory()
    with suppress(OSError):
        block = torch.ones(2**24)
        used = resident()
        del block
        return used - resident() < 2**25
    return None


def data_sets(config: Config) -> Iterator[Finding]:
    """Where each known set is, by the code that training uses, within `SECONDS`."""
    chosen, found, task = config.data, {}, task_class(config.train.task)
    own = {"num_points": chosen.num_points, "variant": chosen.variant, "background": chosen.background,
           "normalize": chosen.normalize, "labelled": task.needs_labels, "parts": task.point_labels}  # fmt: skip

    def look() -> None:
        for name in sorted(datasets.NAMES, key=lambda name: name != chosen.name):
            try:
                source = datasets.open_source(name, chosen.root, "test", **(own if name == chosen.name else {}))
                found[name] = True, f"{source.layout}, {counted(len(source), 'test object')}, {source.path}"
            except Exception as error:  # unexpected files of one set must not hide the others
                known, others = isinstance(error, DataError), getattr(datasets.NAMES[name], "variants_at", None)
                found[name] = False, first_line(error) if known else f"{type(error).__name__}: {first_line(error)}"
                with suppress(Exception):
                    if others and name != chosen.name and (there := others(chosen.root)):
                        found[name] = True, f"with data.variant={' or '.join(there)}"

    with redirect_stderr(io.StringIO()):  # notes of the data modules
        thread = threading.Thread(target=look, daemon=True)  # left running if a set is very large
        thread.start()
        thread.join(SECONDS)
    root = Path(chosen.root).absolute()
    there = root.exists()
    yield Finding("data", "data.root", OK if there else NOTE, f"{root}{'' if there else ', which does not exist'}")
    for name in sorted(datasets.NAMES):
        there, text = found.get(name, (None, f"not searched within {SECONDS:.0f} s"))
        if there is False and name != chosen.name:
            text = "not found"
        state = OK if there else BAD if there is False and name == chosen.name else NOTE
        yield Finding("data", name, state, text, _GET.get(name, "") if there is False else "")


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"
