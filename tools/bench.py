"""Measure what EWA costs in a training step, against the dense step, interleaved in one process.

python -m tools.bench --preset point_mae --batch-size 32
python -m tools.bench --preset tiny --rounds 30 --json
"""

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

import pointewa.ewa as ewa
from pointewa.config import load_config
from pointewa.engine import Data, Trainer
from pointewa.engine.device import environment
from pointewa.ewa.experts import random_partition
from tools import cli

NUM_POINTS, NUM_CLASSES = 1024, 40


class _Epoch:
    """As many batches as an epoch of ModelNet40 has; the loop's schedules ask for that number."""

    def __len__(self) -> int:
        return 307


def trainer(preset: str, batch_size: int, device: str, enabled: bool, console: Console) -> Trainer:
    """A trainer as `tools.train` makes it, without data."""
    config = load_config(overrides=[f"model.preset={preset}", f"train.batch_size={batch_size}",
                                    f"train.device={device}", f"ewa.enabled={enabled}"])  # fmt: skip
    names = tuple(map(str, range(NUM_CLASSES)))
    return Trainer(config, Data(_Epoch(), None, (), names), Path(), console)


def partition(model: torch.nn.Module, tokens: int, width: int, device: torch.device) -> Callable[[], None]:
    """What the random partition adds to the FFNs of a step: drawing, dealing and collecting, forward and backward."""
    layers = list(ewa.moe_layers(model).values())
    x = torch.randn(tokens, width, device=device, requires_grad=True)

    def run() -> None:
        for moe in layers:
            token_of_slot, slot_of_token = random_partition(tokens, moe.num_experts, device)
            x[token_of_slot][slot_of_token].backward(x.detach())

    return run


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = cli.parser(*__doc__.split("\n\n", 1))
    parser.add_argument("--preset", default="point_mae")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rounds", type=int, default=10)
    args = parser.parse_args(argv)
    console = Console(stderr=args.json)

    dense, moe = (trainer(args.preset, args.batch_size, args.device, on, console) for on in (False, True))
    device, arch = dense.device, moe.model.architecture
    points = torch.randn(args.batch_size, NUM_POINTS, 3, device=device)
    labels = torch.randint(NUM_CLASSES, (args.batch_size,), device=device)
    parts: dict[str, Callable[[], None]] = {
        "dense step": lambda: dense.train_step(points, labels),
        "EWA step": lambda: moe.train_step(points, labels),
        "averaging": moe.averaging.step,
        "partition": partition(moe.model, args.batch_size * (1 + arch.num_groups), arch.width, device),
    }

    def seconds(run: Callable[[], None]) -> float:
        started = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - started

    for run in parts.values():
        seconds(run)
    rounds = track(range(args.rounds), "measuring", console=console, transient=True, disable=not console.is_terminal)
    times = [{name: seconds(run) for name, run in parts.items()} for _ in rounds]
    for one in times:
        one["averaging + partition"] = one["averaging"] + one["partition"]

    def spread(values: list[float]) -> dict[str, float]:
        low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
        return {"median": middle, "lower_quartile": low, "upper_quartile": high}

    figures = {
        name: {
            "seconds": spread([one[name] for one in times]),
            "of_dense_step": spread([one[name] / one["dense step"] for one in times]),
        }
        for name in times[0]
    }
    if args.json:
        setting = {"preset": args.preset, "batch_size": args.batch_size, "rounds": args.rounds}
        print(json.dumps({**setting, "precision": str(dense.precision), "figures": figures, **environment(device)}))
        return
    table = Table(
        title=f"{args.preset}, batch {args.batch_size}, {args.rounds} rounds on {device.type}, median (quartiles)"
    )
    for column in ("", "milliseconds", "of the dense step of the same round"):
        table.add_column(column, justify="right" if column else "left")
    for name, figure in figures.items():
        ms, ratio = ([figure[key][q] for q in ("median", "lower_quartile", "upper_quartile")]
                     for key in ("seconds", "of_dense_step"))  # fmt: skip
        table.add_row(
            name,
            "{:.1f} ({:.1f} to {:.1f})".format(*(1000 * value for value in ms)),
            "{:.3f} ({:.3f} to {:.3f})".format(*ratio),
        )
    console.print(table)


if __name__ == "__main__":
    cli.run(main)
