"""Measure training, inference and operators against a plain twin of the published code, part by part, in one process.

python -m benchmarks.bench
python -m benchmarks.bench --device cuda --budget 300 --out results/bench_cuda
python -m benchmarks.bench --device cuda --out results/bench_cuda --resume
python -m benchmarks.bench --preset tiny --only train parts --json
python -m benchmarks.bench --peer torch-pointcloud --only peer
python -m benchmarks.bench --run runs/modelnet40-tiny-ewa-seed0 --only agreement
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
from benchmarks import peers, twin
from benchmarks.agreement import agreement, has_int8, int8
from benchmarks.tables import markdown, measured, write
from benchmarks.timing import Aside, interleave
from pointewa.compression import kept_bytes
from pointewa.config import load_config
from pointewa.datasets.base import PointClouds
from pointewa.datasets.loader import TrainLoader
from pointewa.datasets.transforms import scale_shift
from pointewa.errors import ConfigError
from pointewa.inference.int8 import Clouds
from pointewa.models import Architecture, fuse_batch_norm, in_precision
from pointewa.models.patch_embed import linear_max, make_patches
from pointewa.ops import backend, farthest_point_sample, knn
from pointewa.ops.backend import BACKENDS
from pointewa.runs.description import LoadedModel
from pointewa.tasks.base import Batch
from pointewa.tools import cli
from pointewa.train.data import Data
from pointewa.train.device import environment, name_of, select_device
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
        on_cpu = self.device.type == "cpu" and not {"train", "inference", "int8"}.isdisjoint(args.only)
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

    def _step(self, trainer: Trainer) -> Callable[[], None]:
        generator = torch.Generator(self.device)
        return lambda: trainer.train_step(Batch(scale_shift(self.points, generator), self.labels))

    def _lowered(self, model: torch.nn.Module) -> dict[str, torch.nn.Module]:
        """The model in the precision of the training, where that is not float32."""
        lower = self.moe.precision
        return {} if lower == torch.float32 else {name_of(lower): in_precision(model.eval(), lower)}

    def train(self) -> dict[str, Any]:
        """Whole training steps. Ours receive augmented points, as from the loader; the twin augments by itself."""
        parts = self._twin("step") | {"dense": self._step(self.dense), "EWA": self._step(self.moe)}
        times = interleave(parts, self.args.budget, self.device)
        rows = {name: times.row(name, ["twin", "dense"]) for name in parts}
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
        for parameter in (*model.parameters(), *self.dense.model.parameters()):
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
            "AdamW of the dense model": self.dense.optimizer.step,
            "averaging": step.averaging.step,
            "partition": partition,
            "EWA step": lambda: step.train_step(Batch(points, self.labels)),
        }
        times = interleave(parts, self.args.budget, device)
        for one in (step, self.dense):
            one.optimizer.zero_grad()
        return {name: times.row(name, ["EWA step"]) for name in parts}

    def inference(self) -> dict[str, Any]:
        """The folded model against the twin's: a batch, a single cloud, and the throughput of the best batch."""
        folded = ewa.fold(self.moe.model).eval()
        fused = fuse_batch_norm(folded)
        models = {"folded": folded, "folded, batch norms fused": fused}
        models |= {f"folded, {name}": model for name, model in self._lowered(folded).items()}
        if self.args.compile:
            models["fused and compiled"] = torch.compile(fused, dynamic=False)
        rows = {}
        for size in (self.args.batch_size, 1):
            points = self.points[:size]
            runs = self._twin(f"batch {size}")
            runs |= {name: torch.inference_mode()(lambda m=model, p=points: m(p)) for name, model in models.items()}
            times = interleave(runs, self.args.budget / 2, self.device)
            rows |= {f"{name}, batch {size}": times.row(name, ["twin"]) for name in runs}
        best, fastest = (0.0, 0), next(iter(self._lowered(folded).values()), fused)
        for size in (8, 32, 128, 512)[: 2 if self.device.type == "cpu" else 4]:
            points = self.points[:1].expand(size, -1, -1).contiguous()
            run = {"fastest": torch.inference_mode()(lambda p=points: fastest(p))}
            best = max(best, (size / interleave(run, 1, self.device).seconds("fastest").median, size))
        rows["throughput"] = {"clouds/s": best[0], "batch": best[1]}
        return rows

    def int8(self) -> dict[str, Any]:
        """The folded model as an ONNX file in 8 bits, in onnxruntime, against the twin's inference."""
        names = tuple(map(str, range(NUM_CLASSES)))
        loaded = LoadedModel(ewa.fold(self.moe.model).eval(), names, NUM_POINTS, "none", "unit_sphere")
        run = int8(loaded, Clouds.of(torch.randn(16, NUM_POINTS, 3)))  # the time does not depend on the ranges
        rows = {}
        for size in (self.args.batch_size, 1):
            runs = self._twin(f"batch {size}") | {"int8": lambda p=self.points[:size]: run(p)}
            times = interleave(runs, self.args.budget / 2, self.device)
            rows |= {f"{name}, batch {size}": times.row(name, ["twin"]) for name in runs}
        return rows

    def agreement(self) -> dict[str, Any]:
        """How often the classes or parts of a trained model are the same as in float32, and its metrics."""
        return agreement(self.args.run, self.device, self.moe.precision)

    def peer(self) -> dict[str, Any]:
        """A training step and inference of another implementation with the weights of our dense model.

        Raises:
            ConfigError: it is not installed.
            RuntimeError: its logits are not ours.
        """
        steps = {"dense": self._step(self.dense), "EWA": self._step(self.moe)}
        batch, aside = (self.points, self.labels), self.device.type == "cpu"
        return peers.measure(self.dense.model, batch, steps, self._lowered, self.args.budget, aside)

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
            rows |= {f"{operator}, {name}": times.row(name, [names[0]]) for name in runs}
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
            kept = step.compression.kept or kept_bytes(step.model, lambda one=step: one._loss(one.model, batch)[0])
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
        return {f"{name} objects": times.row(name, ["1000"]) for name in loaders}

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


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    sections = ("machine", "train", "parts", "inference", "int8", "agreement", "peer", "operators", "memory", "epochs")
    parser = cli.parser(*__doc__.split("\n\n", 1))
    parser.add_argument("--preset", default="point_mae")
    cli.add_number(parser, "--batch-size", 2, default=32, help="default 32; batch norm needs two objects")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", choices=("auto", "float32", "bfloat16"), default="auto")
    seconds = "seconds per section (default 60); at least 3 rounds"
    cli.add_number(parser, "--budget", 0, float, default=60, help=seconds)
    parser.add_argument("--compile", action="store_true", help="our models through torch.compile")
    parser.add_argument("--only", nargs="+", choices=sections, default=sections, help="sections; default: all")
    parser.add_argument("--run", metavar="RUN", help="a trained model, for the section agreement, on its test split")
    parser.add_argument("--peer", choices=("torch-pointcloud",), help="another implementation, for the section peer")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write README.md and bench.json there")
    parser.add_argument("--resume", action="store_true", help="keep the sections that --out has already")
    args = parser.parse_args(argv)
    args.only = [name for name in args.only if _wanted(name, args, named=args.only is not sections)]
    if args.resume and not args.out:
        raise ConfigError("--resume: it needs --out, the folder with what was measured before")
    console = Console(stderr=args.json)
    bench = Bench(args)
    setting = {key: getattr(args, key) for key in ("preset", "batch_size", "budget", "compile", "run", "peer")}
    report = setting | environment(bench.device) | {"precision": str(bench.moe.precision)}
    figures = measured(args.out / "bench.json", report) if args.resume else {}
    command = shlex.join(sys.argv[1:] if argv is None else argv)
    for name in args.only:
        if name not in figures:
            figures[name] = getattr(bench, name)()
        console.print(markdown({name: figures[name]}), highlight=False, markup=False, soft_wrap=True)
        if args.out:  # after each section, so that little is lost where a machine is lent for minutes
            write(args.out, command, report, figures)
    if args.json:
        print(json.dumps(report | {"figures": figures}, indent=1))


def _wanted(section: str, args: argparse.Namespace, named: bool) -> bool:
    """Whether a section is to be measured: three need an option or a package, without which they are left out unless
    asked for."""
    needs = {"agreement": "run", "peer": "peer"}.get(section)
    if needs and getattr(args, needs) is None:
        if named:
            raise ConfigError(f"--only {section}: it needs --{needs}")
        return False
    if section == "int8" and not has_int8(select_device(args.device)):
        if named:
            raise ConfigError("--only int8: on a CPU, with pip install onnx onnxscript onnxruntime")
        return False
    if section == "peer":
        peers.need()
    return True


if __name__ == "__main__":
    cli.run(main)
