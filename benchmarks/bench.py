"""Measure training, inference and operators against a plain twin of the published code, part by part, in one process.

python -m benchmarks.bench
python -m benchmarks.bench --device cuda --budget 300 --out results/bench_cuda
python -m benchmarks.bench --preset tiny --only train parts --json
"""

import argparse
import copy
import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import pointewa.ewa as ewa
from benchmarks import twin
from benchmarks.timing import Aside, Times, interleave
from pointewa.compression import kept_bytes
from pointewa.config import load_config
from pointewa.datasets.base import PointClouds
from pointewa.datasets.loader import TrainLoader
from pointewa.datasets.transforms import scale_shift
from pointewa.models import Architecture, fuse_batch_norm
from pointewa.models.patch_embed import linear_max, make_patches
from pointewa.ops import backend, farthest_point_sample, knn
from pointewa.ops.backend import BACKENDS
from pointewa.safe.files import atomic_write
from pointewa.tasks.base import Batch
from pointewa.tools import cli
from pointewa.train.data import Data
from pointewa.train.device import environment
from pointewa.train.trainer import Trainer

NUM_POINTS, NUM_CLASSES = 1024, 40
OPERATORS = {  # what the models ask for, and what preparing a set of 8192 points does
    "FPS 1024 -> 64": lambda points, name: farthest_point_sample(points[:, :1024], 64, backend=name),
    "FPS 8192 -> 1200": lambda points, name: farthest_point_sample(points, 1200, backend=name),
    "kNN 32 of 1024": lambda points, name: knn(points[:, :64], points[:, :1024], 32, backend=name),
}


def twin_parts(arch: Architecture, batch_size: int, device: torch.device) -> dict[str, Callable[[], object]]:
    """The plain twin's parts: a training step, inference of a batch and of a single cloud."""
    model = twin.PlainClassifier(arch, NUM_CLASSES).to(device)
    optimizer = twin.plain_optimizer(model)
    points = torch.randn(batch_size, NUM_POINTS, 3, device=device)
    labels = torch.randint(NUM_CLASSES, (batch_size,), device=device)
    return {
        "step": lambda: twin.plain_step(model.train(), optimizer, points, labels),
        f"batch {batch_size}": torch.inference_mode()(lambda: model.eval()(points)),
        "batch 1": torch.inference_mode()(lambda: model.eval()(points[:1])),
    }


class _Epoch:
    """As many batches as an epoch of ModelNet40 has, a number that the schedules need."""

    def __len__(self) -> int:
        return 307


def bench_trainer(preset: str, batch_size: int, device: str, *overrides: str) -> Trainer:
    """A trainer without data, that works on batches it is given."""
    keys = [f"model.preset={preset}", f"train.batch_size={batch_size}", f"train.device={device}", *overrides]
    data = Data(_Epoch(), None, (), tuple(map(str, range(NUM_CLASSES))))
    return Trainer(load_config(overrides=keys), data, Path(), Console(stderr=True))


class Bench:
    """What is measured, on one device.

    Args:
        args: of the command line.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        dense, moe = (self._trainer(f"ewa.enabled={enabled}") for enabled in (False, True))
        self.dense, self.moe, self.device = dense, moe, moe.device
        self.arch = moe.model.architecture
        self.twin = twin_parts(self.arch, args.batch_size, self.device)
        # On a CPU the twin runs in a process without our memory settings, as its users run it.
        on_cpu = self.device.type == "cpu" and not {"train", "inference"}.isdisjoint(args.only)
        self.aside = Aside(twin_parts, self.arch, args.batch_size, self.device) if on_cpu else None
        self.points = torch.randn(args.batch_size, NUM_POINTS, 3, device=self.device)
        self.labels = torch.randint(NUM_CLASSES, (args.batch_size,), device=self.device)

    def _trainer(self, *overrides: str) -> Trainer:
        args = self.args
        more = (f"train.compile={args.compile}", f"train.precision={args.precision}", *overrides)
        trainer = bench_trainer(args.preset, args.batch_size, args.device, *more)
        if args.compile:
            trainer.forward = torch.compile(trainer.model)
        return trainer

    def _twin(self, name: str) -> dict[str, Callable[[], object]]:
        here = self.twin[name]
        return {"twin": self.aside.part(name), "twin, memory kept": here} if self.aside else {"twin": here}

    def train(self) -> dict[str, Any]:
        """Whole training steps. Ours receive augmented points, as from the loader; the twin augments by itself."""

        def ours(trainer: Trainer) -> Callable[[], None]:
            generator = torch.Generator(self.device)
            return lambda: trainer.train_step(Batch(scale_shift(self.points, generator), self.labels))

        parts = self._twin("step") | {"dense": ours(self.dense), "EWA": ours(self.moe)}
        times = interleave(parts, self.args.budget, self.device)
        rows = {name: self._row(times, name, ["twin", "dense"]) for name in parts}
        for name, run in (parts | {"twin": self.twin["step"]}).items():
            rows[name]["GFLOP"] = _flops(run) / 1e9
            rows[name]["GFLOP/s"] = rows[name]["GFLOP"] / times.seconds(name).median
        return rows

    def parts(self) -> dict[str, Any]:
        """The parts of a training step with EWA, each alone; forward passes keep what the backward pass needs."""
        model, arch, device = self.moe.model.train(), self.arch, self.device
        generator, points, step = torch.Generator(device), self.points, self.moe
        centers = points[:, : arch.num_groups].contiguous()
        patches = make_patches(points, arch.num_groups, arch.group_size, check_finite=False).patches
        x = torch.randn(len(points), 1 + arch.num_groups, arch.width, device=device, requires_grad=True)
        features = torch.randn(len(points), 2 * arch.width, device=device)
        last = model.encoder.second_conv[-1]
        weight, rows = last.weight.squeeze(-1), arch.num_groups * arch.group_size * len(points)
        of_points = torch.randn(rows, last.in_channels, device=device, requires_grad=True)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        dealing = [copy.deepcopy(moe) for moe in ewa.moe_layers(model).values()]
        for moe in dealing:
            moe.experts = torch.nn.Identity()

        def cast(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
            def inside() -> Tensor:
                with torch.autocast(device.type, step.precision, enabled=step.precision != torch.float32):
                    return run()

            return inside

        def loss() -> Tensor:
            return torch.nn.functional.cross_entropy(model.cls_head_finetune(features), self.labels)

        def forward_backward() -> None:
            cast(lambda: torch.nn.functional.cross_entropy(model(points), self.labels))().backward()

        def maximum(run: Callable[[Tensor, Tensor, Tensor, int], Tensor]) -> Callable[[], None]:
            return lambda: cast(lambda: run(of_points, weight, last.bias, arch.group_size).sum())().backward()

        def partition() -> None:
            for moe in dealing:
                moe(x).backward(x.detach())

        parts: dict[str, Callable[[], Any]] = {
            "augmentation": lambda: scale_shift(points, generator),
            "FPS": lambda: farthest_point_sample(points, arch.num_groups, check_finite=False),
            "kNN": lambda: knn(centers, points, arch.group_size, check_finite=False),
            "patch encoder, forward": cast(lambda: model.encoder(patches)),
            "its last convolution and maximum, forward and backward": maximum(linear_max),
            "the same, plain": maximum(_plain_linear_max),
            "blocks, forward": cast(lambda: model.blocks(x, x)),
            "head and loss, forward": cast(loss),
            "forward and backward": forward_backward,
            "clip": lambda: torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0),
            "AdamW": lambda: _without_averaging(step),
            "averaging": step.averaging.step,
            "partition": partition,
            "EWA step": lambda: step.train_step(Batch(points, self.labels)),
        }
        times = interleave(parts, self.args.budget, device)
        step.optimizer.zero_grad()
        return {name: self._row(times, name, ["EWA step"]) for name in parts}

    def inference(self) -> dict[str, Any]:
        """The folded model against the twin's: a batch, a single cloud, and the throughput of the best batch."""
        folded = ewa.fold(self.moe.model).eval()
        fused = fuse_batch_norm(folded)
        models = {"folded": folded, "folded, batch norms fused": fused}
        if self.args.compile:
            models["fused and compiled"] = torch.compile(fused, dynamic=False)
        rows = {}
        for size in (self.args.batch_size, 1):
            points = self.points[:size]
            runs = self._twin(f"batch {size}")
            runs |= {name: torch.inference_mode()(lambda m=model, p=points: m(p)) for name, model in models.items()}
            times = interleave(runs, self.args.budget / 2, self.device)
            rows |= {f"{name}, batch {size}": self._row(times, name, ["twin"]) for name in runs}
        best = (0.0, 0)
        for size in (8, 32, 128, 512)[: 2 if self.device.type == "cpu" else 4]:
            points = self.points[:1].expand(size, -1, -1).contiguous()
            run = {"fused": torch.inference_mode()(lambda p=points: fused(p))}
            best = max(best, (size / interleave(run, 1, self.device).seconds("fused").median, size))
        rows["throughput"] = {"clouds/s": best[0], "batch": best[1]}
        return rows

    def operators(self) -> dict[str, Any]:
        """Each operator by each implementation, for a batch; the base is pytorch3d's."""
        points = torch.randn(self.args.batch_size, 8192, 3, device=self.device)
        names = [name for name in BACKENDS if name == "torch" or backend() == "pytorch3d"]
        rows = {}
        for operator, run in OPERATORS.items():
            runs = {name: lambda r=run, n=name: r(points, n) for name in names} | {
                "ours": lambda r=run: r(points, None)
            }
            times = interleave(runs, self.args.budget / 4, self.device)
            rows |= {f"{operator}, {name}": self._row(times, name, [names[0]]) for name in runs}
        return rows

    def memory(self) -> dict[str, Any]:
        """Bytes of weights, gradients, moments, and what the forward pass keeps; on a GPU also the peak of a step."""
        trainers = {"dense": self.dense, "EWA": self.moe}
        if not self.args.compile:
            few = "compress.activations=4"
            trainers |= {"dense, 4 bits": self._trainer("ewa.enabled=false", few), "EWA, 4 bits": self._trainer(few)}
        rows, batch = {}, Batch(self.points, self.labels)
        for name, step in trainers.items():
            step.train_step(batch)
            weights = sum(parameter.nbytes for parameter in step.model.parameters())
            moments = sum(value.nbytes for state in step.optimizer.state.values() for value in state.values())
            kept = step.compression.kept or kept_bytes(
                step.model, lambda one=step: one.task.loss(one.model.train(), batch)[0]
            )
            rows[name] = {
                "weights, gradients, moments MB": (2 * weights + moments) / 1e6,
                "kept for backward MB": kept / 1e6,
            }
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
                step.train_step(batch)
                rows[name]["peak MB"] = torch.cuda.max_memory_allocated() / 1e6
        return rows

    def epochs(self) -> dict[str, Any]:
        """An epoch's batches, drawn and augmented, from sets of different size; the rest is the same for all."""
        loaders = {}
        for size in (1000, 3000, 10_000):
            points = torch.randn(size, NUM_POINTS, 3, device=self.device)
            labels = torch.zeros(size, dtype=torch.int64, device=self.device)
            clouds = PointClouds(points, labels, ("none",), ("none",) * size, "random")
            loaders[str(size)] = TrainLoader(clouds, self.args.batch_size, NUM_POINTS, ["scale_shift"], seed=0)
        runs = {name: lambda one=loader: [None for _ in one.epoch(0)] for name, loader in loaders.items()}
        times = interleave(runs, self.args.budget / 8, self.device)
        return {f"{name} objects": self._row(times, name, ["1000"]) for name in loaders}

    def machine(self) -> dict[str, Any]:
        """The speed of this machine's matrix product and copy, in the same run."""
        big = [torch.randn(4096, 4096, device=self.device) for _ in range(2)]
        runs = {"float32": lambda: big[0] @ big[1]}
        if self.moe.precision == torch.bfloat16:
            half = [one.bfloat16() for one in big]
            runs["bfloat16"] = lambda: half[0] @ half[1]
        source, target = (torch.empty(64 * 2**20, device=self.device) for _ in range(2))
        runs["copy"] = lambda: target.copy_(source)
        times = interleave(runs, self.args.budget / 8, self.device)
        rows = {f"{name} matmul": {"GFLOP/s": 2 * 4096**3 / times.seconds(name).median / 1e9}
                for name in runs if name != "copy"}  # fmt: skip
        return rows | {"copy": {"GB/s": 2 * source.nbytes / times.seconds("copy").median / 1e9}}

    @staticmethod
    def _row(times: Times, name: str, bases: list[str]) -> dict[str, Any]:
        row: dict[str, Any] = {"ms": times.seconds(name).text(factor=1000), "rounds": len(times.rounds)}
        return row | {f"of {base}": times.ratio(name, base).text(".3f") for base in bases if base in times.rounds[0]}


def _without_averaging(trainer: Trainer) -> None:
    trainer.averaging.detach()
    trainer.optimizer.step()
    trainer.averaging.attach(trainer.optimizer)


def _plain_linear_max(x: Tensor, weight: Tensor, bias: Tensor, group_size: int) -> Tensor:
    return torch.nn.functional.linear(x, weight, bias).unflatten(0, (-1, group_size)).max(1).values


def _flops(run: Callable[[], object]) -> float:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def markdown(figures: dict[str, dict[str, dict[str, Any]]]) -> str:
    """The tables."""
    lines = []
    for section, rows in figures.items():
        columns = list(dict.fromkeys(column for row in rows.values() for column in row))
        lines += [f"**{section}**", "", f"| | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
        for name, row in rows.items():
            cells = [f"{row[column]:.4g}" if isinstance(row.get(column), float) else str(row.get(column, ""))
                     for column in columns]  # fmt: skip
            lines.append(f"| {name} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    sections = ("machine", "train", "parts", "inference", "operators", "memory", "epochs")
    parser = cli.parser(*__doc__.split("\n\n", 1))
    parser.add_argument("--preset", default="point_mae")
    cli.add_number(parser, "--batch-size", 2, default=32, help="default 32; batch norm needs two objects")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", choices=("auto", "float32", "bfloat16"), default="auto")
    seconds = "seconds per section (default 60); at least 3 rounds"
    cli.add_number(parser, "--budget", 0, float, default=60, help=seconds)
    parser.add_argument("--compile", action="store_true", help="our models through torch.compile")
    parser.add_argument("--only", nargs="+", choices=sections, default=sections, help="sections; default: all")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write README.md and bench.json there")
    args = parser.parse_args(argv)
    console = Console(stderr=args.json)
    bench = Bench(args)
    figures = {}
    for name in args.only:
        figures[name] = getattr(bench, name)()
        console.print(markdown({name: figures[name]}), highlight=False, markup=False, soft_wrap=True)
    setting = {key: getattr(args, key) for key in ("preset", "batch_size", "budget", "compile")}
    report = setting | environment(bench.device) | {"precision": str(bench.moe.precision)}
    result = json.dumps(report | {"figures": figures}, indent=1)
    if args.json:
        print(result)
    if args.out:
        command = shlex.join(sys.argv[1:] if argv is None else argv)
        head = f"# Bench\n\n`python -m benchmarks.bench {command}`:\n\n"
        head += "\n".join(f"- {key}: {value}" for key, value in report.items())
        for file, text in (("README.md", f"{head}\n\n{markdown(figures)}"), ("bench.json", f"{result}\n")):
            with atomic_write(args.out / file) as temporary:
                temporary.write_text(text)


if __name__ == "__main__":
    cli.run(main)
