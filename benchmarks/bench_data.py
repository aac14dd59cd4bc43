"""Measure what data costs: farthest-point order by each implementation, and epochs from memory and from disk.

python -m benchmarks.bench_data
python -m benchmarks.bench_data --config configs/modelnet40.yaml data.root=/data model.preset=tiny --json
"""

import json
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from pointewa.config import Config
from pointewa.datasets import order
from pointewa.datasets.layouts import shapes
from pointewa.datasets.loader import TrainLoader
from pointewa.datasets.splits import load_split
from pointewa.ops import backend, farthest_point_sample
from pointewa.tools import cli
from pointewa.train.data import Data
from pointewa.train.device import environment
from pointewa.train.trainer import Trainer

ROUNDS, STEPS = 5, 20
SIZES = ((1024, 1024), (8192, 1200), (8192, 8192))  # points of a cloud, and how many of them are ordered


def _seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def shortfall(points: np.ndarray, picks: Sequence[int]) -> float:
    """By how much a pick is nearer than the farthest point, at worst, relatively, in float64: 0 for exact sampling.

    Args:
        points: ``[P, 3]``.
        picks: indices in the order they were picked.
    """
    points, worst = points.astype(np.float64), 0.0
    distance = np.full(len(points), np.inf)
    for last, pick in pairwise(picks):
        distance = np.minimum(distance, ((points - points[last]) ** 2).sum(1))
        worst = max(worst, 1 - (distance[pick] / distance.max()) ** 0.5) if distance.max() else worst
    return worst


def ordering() -> list[dict]:
    """Objects per hour for each size and implementation, on eight procedural clouds, interleaved."""
    rng = np.random.default_rng(0)
    names = list(shapes.CLASSES)[:8]
    clouds = [shapes.sample(name, rng, 8192).astype(np.float32) for name in names]
    rows = []
    for total, count in SIZES:
        some = [np.ascontiguousarray(cloud[:total]) for cloud in clouds]
        batch = torch.from_numpy(np.stack(some))
        methods: dict[str, Callable[[], Sequence]] = {
            name: partial(farthest_point_sample, batch, count, backend=name)
            for name in dict.fromkeys((backend(), "torch"))
        }
        if order.method() == "fpsample":
            methods["fpsample"] = partial(order.fps_order, some, count)
        picks = {name: np.asarray(run()) for name, run in methods.items()}
        times = [{name: _seconds(run) for name, run in methods.items()} for _ in range(ROUNDS)]
        for name in methods:
            taken = sorted(one[name] / len(clouds) for one in times)
            rows.append({
                "points": total, "ordered": count, "by": name,
                "milliseconds": [1000 * taken[0], 1000 * statistics.median(taken), 1000 * taken[-1]],
                "objects_an_hour": 3600 / statistics.median(taken),
                "shortfall": max(shortfall(cloud, mine) for cloud, mine in zip(some, picks[name], strict=True)),
            })  # fmt: skip
    return rows


def epochs(config: Config, console: Console) -> dict:
    """Time of training steps with clouds in memory and streamed, interleaved, over the same batches."""
    trainers = {}
    for name, stream in (("resident", False), ("streamed", True)):
        config.data.stream = stream
        clouds = load_split(config, "train")
        loader = TrainLoader(clouds, config.train.batch_size, config.data.num_points, config.data.augment, 0)
        trainers[name] = Trainer(config, Data(loader, None, (), clouds.class_names), Path(), console)

    def train(trainer: Trainer, epoch: int) -> None:
        for number, batch in enumerate(trainer.data.train.epoch(epoch)):
            if number == STEPS:
                break
            trainer.train_step(batch)

    def draw(trainer: Trainer, epoch: int) -> None:
        for number, _ in enumerate(trainer.data.train.epoch(epoch)):
            if number == STEPS:
                break

    result = {}
    for what, run in (("drawing", draw), ("training", train)):
        for trainer in trainers.values():
            run(trainer, 0)
        times = [
            {name: _seconds(partial(run, trainer, epoch)) for name, trainer in trainers.items()}
            for epoch in range(1, ROUNDS + 1)
        ]
        ratios = sorted(one["streamed"] / one["resident"] for one in times)
        result[what] = {
            "milliseconds_a_batch": {n: 1000 * statistics.median(one[n] for one in times) / STEPS for n in trainers},
            "ratio": [ratios[0], statistics.median(ratios), ratios[-1]],
        }
    return result


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = cli.parser(*__doc__.split("\n\n", 1))
    cli.add_config(parser)
    args = parser.parse_intermixed_args(argv)
    config, console = cli.config_from(args), Console(stderr=args.json)
    rows = ordering()
    figures = {"ordering": rows, "epochs": epochs(config, console), **environment(torch.device("cpu"))}
    if args.json:
        print(json.dumps(figures))
        return
    table = Table(title="farthest-point order, a cloud (median, fastest to slowest of 5 rounds)")
    for column in ("points", "ordered", "by", "milliseconds", "objects/h", "shortfall"):
        table.add_column(column, justify="right")
    for row in rows:
        low, middle, high = row["milliseconds"]
        table.add_row(str(row["points"]), str(row["ordered"]), row["by"], f"{middle:.2f} ({low:.2f} to {high:.2f})",
                      f"{row['objects_an_hour']:,.0f}", f"{row['shortfall']:.0e}")  # fmt: skip
    console.print(table)
    table = Table(title=f"{config.data.name}, {config.model.preset}: a batch of {config.train.batch_size}")
    for column in ("", "resident, ms", "streamed, ms", "ratio (lowest to highest of 5 rounds)"):
        table.add_column(column, justify="right")
    for what, figure in figures["epochs"].items():
        low, middle, high = figure["ratio"]
        times = (f"{figure['milliseconds_a_batch'][name]:.1f}" for name in ("resident", "streamed"))
        table.add_row(what, *times, f"{middle:.3f} ({low:.3f} to {high:.3f})")
    console.print(table)


if __name__ == "__main__":
    cli.run(main)
