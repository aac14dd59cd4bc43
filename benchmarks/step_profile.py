"""Where the time of a training step, or of inference, goes: torch's profiler by operator, and the median step.

python -m benchmarks.step_profile --preset tiny
python -m benchmarks.step_profile --preset point_mae --inference --batch-size 1 --frozen

Times are of the process on all its threads, which other work on the machine changes less than the clock's.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from benchmarks.bench import NUM_CLASSES, NUM_POINTS, bench_trainer
from pointewa import ewa
from pointewa.models import in_precision
from pointewa.tasks.base import Batch
from pointewa.tools import cli

STEPS, PROFILED = 20, 10
KINDS = {  # by what an operator's name has in it; the first that fits
    "matrix products": ("mm", "linear_pointwise"), "attention and softmax": ("attention", "softmax"),
    "batch norms": ("batch_norm",), "layer norms": ("layer_norm",), "GELU": ("gelu",),
    "ReLU": ("threshold", "clamp_min", "relu"),
    "maxima and their gathered gradients": ("max_pool", "embedding_bag", "amax"),
    "sampling and neighbours": ("topk", "cdist", "aten::max", "argmax"), "AdamW": ("adamw", "AdamW"),
    "copies and casts": ("copy_",), "compiled kernels": ("CompiledFxGraph",),
}  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="point_mae")
    cli.add_number(parser, "--batch-size", 1, default=32)
    cli.add_number(parser, "--threads", 1, default=1)
    parser.add_argument("--precision", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--dense", action="store_true", help="train without EWA")
    parser.add_argument("--inference", action="store_true", help="of the folded model, in place of a training step")
    parser.add_argument("--compile", action="store_true", help="by torch.compile")
    parser.add_argument("--frozen", action="store_true", help="of --inference: compiled, with the weights as constants")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    run = _inference(args) if args.inference else _step(args)
    for _ in range(3):
        run()
    times = []
    for _ in range(STEPS):
        worked, started = time.process_time(), time.perf_counter()
        run()
        times.append((time.process_time() - worked, time.perf_counter() - started))
    cpu, wall = (1000 * statistics.median(column) for column in zip(*times, strict=True))
    with profile(activities=[ProfilerActivity.CPU]) as found:
        for _ in range(PROFILED):
            run()
    table = Table("", "ms", "share", title=f"{cpu:.1f} ms of a CPU, {wall:.1f} by the clock")
    parts = _parts(found)
    for kind, spent in sorted(parts.items(), key=lambda one: -one[1]):
        table.add_row(kind, f"{spent:.1f}", f"{spent / sum(parts.values()):.0%}")
    Console().print(table)


def _step(args: argparse.Namespace) -> Callable[[], Any]:
    keys = (f"train.precision={args.precision}", f"ewa.enabled={not args.dense}")
    trainer = bench_trainer(args.preset, args.batch_size, "cpu", *keys)
    if args.compile:
        trainer.forward = torch.compile(trainer.model)
    points = torch.randn(args.batch_size, NUM_POINTS, 3)
    batch = Batch(points, torch.randint(NUM_CLASSES, (args.batch_size,)))
    return lambda: trainer.train_step(batch)


def _inference(args: argparse.Namespace) -> Callable[[], Any]:
    trainer = bench_trainer(args.preset, 2, "cpu", f"train.precision={args.precision}")
    model = in_precision(ewa.fold(trainer.model).eval(), trainer.precision)
    if args.frozen:
        from torch._inductor import config

        config.freezing = True
    if args.compile or args.frozen:
        model = torch.compile(model, dynamic=False)
    points = torch.randn(args.batch_size, NUM_POINTS, 3)
    return torch.no_grad()(lambda: model(points))


def _parts(found: profile) -> dict[str, float]:
    """Milliseconds of a step by kind of operator."""
    parts: dict[str, float] = {}
    for one in found.key_averages():
        kind = next((kind for kind, words in KINDS.items() if any(word in one.key for word in words)), "the rest")
        parts[kind] = parts.get(kind, 0.0) + one.self_cpu_time_total / PROFILED / 1000
    return parts


if __name__ == "__main__":
    cli.run(main)
