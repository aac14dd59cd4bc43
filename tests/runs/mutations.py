"""Damage for test_fuzz_runs.py: to bytes, to the structure of checkpoints, JSON and YAML, and to what a path is."""

import copy
import io
import json
import os
import resource
import signal
import zipfile
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import torch
import yaml


class Hangs(BaseException):
    """Not an `Exception`, so that nothing takes it for one of a damaged file."""


@contextmanager
def bounded():
    """Neither the time nor the memory that something takes is absurd."""

    def late(*_):
        raise Hangs("still at it after half a minute")

    status = Path("/proc/self/status")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from now
    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(30)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        lines = [line.split() for line in status.read_text().splitlines()]
        peak, now = (int(line[1]) for line in lines if line[0] in ("VmHWM:", "VmRSS:"))
        if peak - now > 500_000:
            raise AssertionError(f"{peak - now} kB more for a moment")


@contextmanager
def limited():
    """8 GiB more and no further: a test that fails must not take the machine along."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + 8 * 2**30, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def damaged_bytes(content, rng):
    """A damaged copy of a file's bytes."""
    content = bytearray(content)
    size, kind = len(content), int(rng.integers(12))
    start = int(rng.integers(size))
    end = min(size, start + int(rng.integers(1, 200)))
    match kind:
        case 0:
            return b"", "emptied"
        case 1:
            return rng.bytes(int(rng.integers(1, 5000))), "garbage"
        case 2:
            return bytes(content[:start]), f"cut off at {start}"
        case 3 | 4 | 5:  # flipped bits: one, many, or near the end, where a zip keeps its list
            places = rng.integers(max(0, size - 2000) if kind == 5 else 0, size, 30 if kind == 4 else 1)
            for place in places:
                content[place] ^= 1 << int(rng.integers(8))
            return bytes(content), f"bits flipped at {places[:3]}"
        case 6:
            content[start:end] = bytes(end - start)
        case 7:
            content[start:end] = rng.bytes(end - start)
        case 8:
            content[start:start] = content[start:end]
        case 9:
            content[start:start] = rng.bytes(end - start)
        case 10:
            del content[start:end]
        case 11:  # a size or an offset that is huge
            content[start : start + 8] = b"\xff" * 8
    return bytes(content), f"kind {kind} at {start} to {end}"


def damaged_pickle(content, rng):
    """A file of torch.save whose pickle is damaged, with checksums that fit."""
    target = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as source, zipfile.ZipFile(target, "w") as file:
        for part in source.infolist():
            data = source.read(part)
            if part.filename.endswith("data.pkl"):
                data, what = damaged_bytes(data, rng)
            file.writestr(part.filename, data)
    return target.getvalue(), f"pickle: {what}"


def way(tree, rng, top=None):
    """The way to a value somewhere in nested dictionaries, lists and tuples; every branch as likely as its sisters."""
    path = ()
    while True:
        keys = list(tree) if isinstance(tree, dict) else range(len(tree))
        keys = [key for key in keys if path or not top or key in top]
        path = (*path, keys[rng.integers(len(keys))])
        tree = tree[path[-1]]
        if not isinstance(tree, dict | list | tuple) or not tree or not rng.integers(4):
            return path


def replaced(tree, path, change):
    """A copy of a tree where ``change(container, key)`` was made to what the path leads to."""
    tree = copy.copy(tree)
    if isinstance(tree, tuple):
        tree = list(tree)
    if len(path) == 1:
        change(tree, path[0])
    else:
        tree[path[0]] = replaced(tree[path[0]], path[1:], change)
    return tree


def doubling():
    """A list that takes no memory and an eternity to print or compare."""
    value = ["x"]
    for _ in range(100):
        value = [value, value]
    return value


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


def plain_junk(rng):
    """A value that JSON and YAML can hold."""
    choices = (
        None, True, False, 0, 1, -1, 2, 7, 10**6, 10**9, 10**12, 2**31, 2**63, 10**30, -(10**30), 10**400, 0.5, -0.0,
        1.5, 1e308, float("nan"), float("inf"), float("-inf"), "", "x", "12", "a\nb", "\0", "\ud800", "../..",
        "x" * 500, "[/b]", "\x1b[2J", "${a}", "${train.lr}", "???", [], {}, [[]], [1, 2], ["a", "b"], {"a": 1},
        [None] * 50, nested(200),
    )  # fmt: skip
    return choices[rng.integers(len(choices))]


def junk(rng):
    """A value that a checkpoint can hold."""
    if rng.integers(3):
        return plain_junk(rng)
    choices = (
        (), (1, 2), {1, 2}, 1j, b"x", doubling(), {0: 1}, {(1, 2): 3}, torch.Size([2]), torch.device("cuda:7"),
        torch.float16, torch.tensor(1), torch.tensor(0.0), torch.tensor([0.0, 1.0]), torch.empty(0), torch.tensor(1j),
        torch.ones(2, 2).to_sparse(), torch.empty(2, device="meta"), torch.nn.Parameter(torch.ones(2)),
    )  # fmt: skip
    return choices[rng.integers(len(choices))]


def damaged_tensor(tensor, rng, others):
    """A tensor of another shape, type, layout, or with values that make no sense."""
    choices = (
        lambda: tensor.flatten()[:-1].clone(),
        lambda: tensor[None].clone(),
        lambda: tensor.to((torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.bool)[rng.integers(5)]),
        lambda: tensor.to(torch.complex64),
        lambda: tensor.to_sparse(),
        lambda: tensor.to("meta"),
        lambda: torch.ones((), dtype=tensor.dtype).expand(tensor.shape),
        lambda: torch.ones(1).expand(10**12),
        lambda: torch.full_like(tensor.float(), float("nan")),
        lambda: torch.full_like(tensor.float(), float("inf")),
        lambda: torch.full_like(tensor, -1 if tensor.dtype.is_signed else 255),
        lambda: tensor.mT if tensor.ndim > 1 else tensor.repeat(2)[::2],
        lambda: torch.nn.Parameter(tensor.float()),
        lambda: next((one for one in others if one.shape == tensor.shape and one is not tensor), others[0]),
        lambda: tensor.tolist(),
        lambda: tensor.to(torch.float8_e5m2),
        lambda: torch.quantize_per_tensor(tensor.float(), 0.1, 0, torch.qint8),
    )
    number = int(rng.integers(len(choices)))
    return choices[number](), number


def damaged_tree(tree, rng, junk=junk, top=None, tensors="model"):
    """A copy with one entry missing, added, renamed, replaced, or with a tensor that is not what it should be."""
    path = way(tree, rng, top)
    kind, what = int(rng.integers(6)), ["replaced"]

    def change(container, key):
        value = container[key]
        if isinstance(value, torch.Tensor) and kind > 1:
            container[key], number = damaged_tensor(value, rng, list(tree[tensors].values()))
            what[0] = f"tensor {number}"
        elif kind == 0:
            del container[key]
            what[0] = "removed"
        elif kind == 1 and isinstance(container, dict):
            names = (f"{key}x", "a\nb", "\ud800", 3, None, "x" * 500)
            container[names[rng.integers(len(names))]] = container.pop(key) if rng.integers(2) else value
            what[0] = "renamed"
        else:
            container[key] = junk(rng)
            what[0] = f"replaced by {type(container[key]).__name__}"

    return replaced(tree, path, change), f"{what[0]} at {path}"


def _loop(path):
    path.symlink_to(path.name)


def _pipe(path):
    os.mkfifo(path)


def _endless(path):
    path.symlink_to("/dev/zero")


def _dangling(path):
    path.symlink_to("nowhere")


def _folder(path):
    path.mkdir()
    (path / "file").touch()


# What may lie where a file is expected.
NOT_A_FILE = {
    "missing": lambda path: None, "folder": _folder, "loop": _loop, "pipe": _pipe, "endless": _endless,
    "dangling": _dangling,
}  # fmt: skip

_LETTERS = "abcdefghij"
_LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [*{before}" + f", *{before}" * 8 + "]\n" for before, name in pairwise(_LETTERS)
)
_GROWS = "ewa:\n  layers:\n    a: xxxxxxxxxx\n" + "".join(
    f"    {name}: '" + f"${{moe.layers.{before}}}" * 10 + "'\n" for before, name in pairwise(_LETTERS)
)
_GROWS_BY_ALIASES = "ewa:\n  layers:\n    a: [x]\n" + "".join(
    f"    {name}: [&{name} '${{moe.layers.{before}}}'" + f", *{name}" * 9 + "]\n" for before, name in pairwise(_LETTERS)
)
HOSTILE_YAML = (
    _LAUGHS, "ewa:\n  layers:\n    " + _LAUGHS.replace("\n", "\n    "), "&a [*a]", "ewa: &a {layers: *a}",
    "[" * 100_000, "{" * 100_000, "[" * 40_000 + "]" * 40_000, "a: " * 5_000, "- " * 5_000,
    "ewa: {layers: " + "[" * 3_000 + "]" * 3_000 + "}",
    "!!python/object/apply:os.system ['exit']", "train: !!python/object/apply:os.system ['exit']",
    "train: {lr: !!python/name:os.system }", "train: {lr: !!python/object/new:os.system ['exit']}",
    "train: {lr: !!int ''}", "train: {epochs: !!int x}", "train: {lr: !!float x}", "data: {root: !!timestamp x}",
    "data: {root: !!binary '!'}", "data: {root: !!binary aGk=}", "train: {compile: !!bool maybe}",
    "data: !!set {root}", "data: !!omap [root: x]", "train: {lr: !foreign 1}", "train: !!str x", "train: !!null",
    "train: !!seq {a: 1}", "data: {root: 2001-99-99}", "data: {root: 2001-01-01}", "data: {root: '${oc.env:HOME}'}",
    "data: {root: '${oc.env:X_}'}", "train: {lr: '${train.lr}'}",
    "train: {lr: '${train.min_lr}', min_lr: '${train.lr}'}", "train: {lr: '${a}'}", "train: {lr: '${'}",
    "train: {lr: '" + "${" * 3_000 + "'}", "train: ${data}", "train: '${oc.create:{lr: 1}}'",
    "data: {root: '${oc.decode:\"[1,2]\"}'}",
    _GROWS, _GROWS.replace("'", '"').replace("${", "\\x24{"), _GROWS_BY_ALIASES,
    "data: {root: '" + "${run.dir}" * 999 + "'}",
    "data: {name: '${.name}'}", "train: {lr: ???}", "run: {name: ???}", "train: ???", "??? : 1", "train.lr: 1",
    "train:", "train: {lr: 1, lr: 2}", "train: {lr: 1}\ntrain: {lr: 2}", "<<: {train: {lr: 1}}", "<<: 3", "<<: [1]",
    "? [1, 2]\n: 3", "? {a: 1}\n: 3", "1: 2", "~: 2", "true: 1", ".nan: 1", "!!binary aGk=: 1", "2001-01-01: 1",
    "1.5: 2", "train: {lr: " + "9" * 5_000 + "}", "train: {epochs: 1" + "0" * 400 + "}", "train: {lr: 1e999}",
    "train: {epochs: .inf}", "train: {seed: 99999999999999999999999}", "train: {epochs: .nan}",
    "train: {lr: 0x" + "f" * 400 + "}", "x", "3", "~", "", "- 1", "---\na: 1\n---\nb: 2", "%YAML 9.9\n---\ntrain: {}",
    "%TAG ! !\n---\n!x y", "\x00", "\ufeff", "train: {lr: \x07}", "\ud800", 'run: {name: "\\0"}', 'run: {dir: "\\0"}',
    'run: {name: "\\ud800"}', '"a\\nb": 1', 'train: {"a\\nb": 1}', 'train: "a\\nb"',
    "run: {name: " + "x" * 5_000 + "}", "ewa: {layers: {a: {b: {c: 1}}}}", "data: {stream: [1]}",
    "train: {save_every: [1, 2]}", "train: {save_every: '" + "9" * 3_000 + "min'}", "train: {lr: 1:1:1:1}",
    "model: {width: 1_0}", "train: {lr: &a 1, min_lr: *a}", "train: *a", "train: &a", "\t", "a:\n\t- b", "'", '"',
    "|", "train: {lr: @}", "`",
)  # fmt: skip
HOSTILE_JSON = (
    "[" * 100_000, '{"a":' * 100_000, "9" * 5_000, "-" + "9" * 4_000, "NaN", "Infinity", "null", "[]", "{}", '""',
    "{", "", "\x00", "\ufeff{}", '{"a": 1e999}', '"\\ud800"', "true", "1 2", "{'a': 1}", "[1, 2", '{"a": 1, "a": 2}',
    "\ud800",
)  # fmt: skip


def damaged_json(content, rng):
    """JSON with another value somewhere, or none."""
    if rng.integers(5) == 0:
        number = int(rng.integers(len(HOSTILE_JSON)))
        return HOSTILE_JSON[number].encode("utf-8", "surrogatepass"), f"text {number}"
    if rng.integers(4) == 0:
        return damaged_bytes(content, rng)
    tree, what = damaged_tree(json.loads(content), rng, plain_junk)
    return json.dumps(tree).encode("utf-16" if rng.integers(20) == 0 else "utf-8"), what


def damaged_yaml(content, rng):
    """YAML with another value somewhere, or none."""
    if rng.integers(3) == 0:
        return damaged_bytes(content, rng)
    tree, what = damaged_tree(yaml.safe_load(content), rng, plain_junk)
    return yaml.dump(tree, allow_unicode=True).encode("utf-8", "surrogatepass"), what
