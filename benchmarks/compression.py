"""Training in few bits: memory and time of a step, each kind in a process of its own, and errors of gradients.

python -m benchmarks.compression
python -m benchmarks.compression --preset tiny --batch-size 8 --only errors

Errors are relative L2 distances from the gradient in float64, of each group of weights, for random clouds: of a fresh
model, and of one whose queries and keys are three times as large, so that its attention is sharper.
"""

import argparse
import json
import multiprocessing
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

import pointewa.ewa as ewa
from benchmarks.bench import NUM_CLASSES, NUM_POINTS, bench_trainer
from benchmarks.tables import markdown
from pointewa import compression
from pointewa.models import PRESETS, PointTransformerClassifier
from pointewa.models.patch_embed import make_patches
from pointewa.safe.files import atomic_write
from pointewa.tasks.base import Batch
from pointewa.tools import cli
from pointewa.train.device import peak_memory
from pointewa.train.optimizer import optimizer_state

ARMS = {
    "dense": ("ewa.enabled=false",),
    "dense, 8 bits": ("ewa.enabled=false", "compress.activations=8"),
    "dense, 4 bits": ("ewa.enabled=false", "compress.activations=4"),
    "EWA": (),
    "EWA, 4 bits": ("compress.activations=4",),
    "EWA, 4 bits, moments in 8": ("compress.activations=4", "train.optimizer=adamw8bit"),
}
BITS = {"16": (16, 16), "8": (8, 8), "4, attention in 16": (4, 16), "4, attention in 8": (4, 8),
        "4 everywhere": (4, 4), "2, attention in 8": (2, 8)}  # fmt: skip
GROUPS = {  # by what a parameter's name has in it
    "patch encoder": "encoder.", "position": "pos_embed", "qkv": ".qkv.", "attention's output": ".proj.",
    "fc1": ".fc1.", "fc2": ".fc2.", "norms": "norm", "head": "cls_head",
}  # fmt: skip


def measured(overrides: tuple[str, ...], args: argparse.Namespace) -> dict[str, Any]:
    """An arm's memory and time. To be called in a process that has done nothing else."""
    size = args.batch_size
    trainer = bench_trainer(args.preset, size, args.device, f"train.precision={args.precision}", *overrides)
    points = torch.randn(size, NUM_POINTS, 3, device=trainer.device)
    batch = Batch(points, torch.randint(NUM_CLASSES, (size,), device=trainer.device))
    seconds, worked = [], []
    for _ in range(1 + args.steps):
        started, before = time.perf_counter(), time.process_time()
        trainer.train_step(batch)
        trainer.totals.sum().item()  # waits for the device
        seconds.append(time.perf_counter() - started)
        worked.append(time.process_time() - before)
    peak = peak_memory(trainer.device)
    kept = trainer.compression.kept or compression.kept_bytes(
        trainer.model, lambda: trainer._loss(trainer.model, batch)[0]
    )
    weights = [one.nbytes for one in trainer.model.parameters()]
    states = optimizer_state(trainer.model, trainer.optimizer).values()
    moments = [one for state in states for one in state.values()]
    return {
        "weights and gradients MB": 2 * sum(weights) / 1e6,
        "moments MB": sum(one.nbytes for one in moments) / 1e6,
        "kept for backward MB": kept / 1e6,
        "peak of the process MB": peak / 1e6,
        "ms a step": 1000 * statistics.median(seconds[1:]),
        "of them of a CPU's": 1000 * statistics.median(worked[1:]),  # which other work on the machine changes less
    }


def memory(args: argparse.Namespace) -> dict[str, Any]:
    """Of each arm."""
    rows = {}
    for name, overrides in ARMS.items():
        with multiprocessing.get_context("spawn").Pool(1) as fresh:
            rows[name] = fresh.apply(measured, (overrides, args))
    return rows


def errors(args: argparse.Namespace) -> dict[str, Any]:
    """Of the gradients, by bits and group of weights, with EWA."""
    rows = {}
    for sharp in (False, True):
        torch.manual_seed(0)
        model = PointTransformerClassifier(PRESETS[args.preset], NUM_CLASSES)
        ewa.to_moe(model, 4, inplace=True)
        for one in model.modules():
            if isinstance(one, nn.Dropout):
                one.p = 0.0  # which draws other values in float64
        for name, one in model.named_parameters():
            if sharp and ".qkv." in name:
                one.data[: 2 * len(one) // 3] *= 3
        points, arch = torch.randn(args.batch_size, NUM_POINTS, 3), model.architecture
        patches, centers, _ = make_patches(points, arch.num_groups, arch.group_size)
        labels = torch.arange(args.batch_size) % NUM_CLASSES
        exact = _gradients(model.double(), patches.double(), centers.double(), labels)
        model = model.float()
        for bits, (rest, attention) in BITS.items():
            compressed = compression.activations(model, rest, attention)
            with compressed:
                found = _gradients(model, patches, centers, labels)
            rows[f"{bits}{', sharp' if sharp else ''}"] = _distances(found, exact)
    return rows


def _gradients(model: nn.Module, patches: Tensor, centers: Tensor, labels: Tensor) -> dict[str, Tensor]:
    torch.manual_seed(1)  # the same partition, and the same samples' branches dropped
    loss = nn.functional.cross_entropy(model.cls_head_finetune(model.encode(patches, centers)), labels)
    named = dict(model.named_parameters())
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


def _distances(found: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    groups: dict[str, list[str]] = {}
    for name in exact:
        group = next((group for group, part in GROUPS.items() if part in name), None)
        if group and name.endswith("weight"):
            groups.setdefault(group, []).append(name)
    row = {}
    for group in GROUPS:
        names = groups.get(group, [])
        error = sum(float((found[name].double() - exact[name]).square().sum()) for name in names)
        row[group] = (error / sum(float(exact[name].square().sum()) for name in names)) ** 0.5
    return row


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = cli.parser(*__doc__.split("\n\n", 1))
    parser.add_argument("--preset", default="point_mae", choices=tuple(PRESETS))
    cli.add_number(parser, "--batch-size", 2, default=32, help="default 32; batch norm needs two objects")
    cli.add_number(parser, "--steps", default=3, help="timed, after one that warms up; default 3")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", choices=("auto", "float32", "bfloat16"), default="auto")
    sections = {"memory": memory, "errors": errors}
    parser.add_argument("--only", nargs="+", choices=tuple(sections), default=tuple(sections), help="default: all")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write JSON there")
    args = parser.parse_args(argv)
    console, figures = Console(stderr=args.json), {}
    for name in args.only:
        figures[name] = sections[name](args)
        console.print(markdown({name: figures[name]}), highlight=False, markup=False, soft_wrap=True)
    if args.json:
        print(json.dumps(figures))
    if args.out:
        with atomic_write(args.out) as temporary:
            temporary.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    cli.run(main)
