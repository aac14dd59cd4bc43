"""How long a small training step takes while nothing else uses the cores, and beside processes that keep them busy.

python -m benchmarks.waiting
python -m benchmarks.waiting --budget 120 --json

Threads of OpenMP wait for each other several times in every operator. Whether they spin meanwhile, and for how long, is
read from the environment when torch is loaded; so each setting has a process of its own, and they work in turn.
"""

import json
import multiprocessing
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

from benchmarks.timing import Aside, Times, interleave
from pointewa.datasets.source import cores
from pointewa.models import PRESETS, PointTransformerClassifier
from pointewa.tools import cli
from pointewa.train.device import environment, select_precision

BASE = "GOMP_SPINCOUNT=300000"  # libgomp's default
SETTINGS = (BASE, "GOMP_SPINCOUNT=10000", "OMP_WAIT_POLICY=passive")


def training_step() -> dict[str, Callable[[], object]]:
    """A step of the smallest preset on a batch of the default size."""
    model = PointTransformerClassifier(PRESETS["tiny"], 40)
    optimizer = torch.optim.AdamW(model.parameters())
    points, labels = torch.randn(32, 1024, 3), torch.randint(40, (32,))
    precision = select_precision("auto", torch.device("cpu"))

    def step() -> None:
        with torch.autocast("cpu", precision, enabled=precision != torch.float32):
            loss = F.cross_entropy(model(points), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return {"step": step}


def _spin() -> None:
    while True:
        pass


@contextmanager
def busy(count: int) -> Iterator[None]:
    """As many processes that do nothing but use a core each."""
    processes = [multiprocessing.get_context("spawn").Process(target=_spin, daemon=True) for _ in range(count)]
    for process in processes:
        process.start()
    try:
        yield
    finally:
        for process in processes:
            process.kill()


def measure(budget: float) -> dict[str, Times]:
    """The times of a step with each of `SETTINGS`, idle and beside a busy process for each core."""
    parts = {}
    for setting in SETTINGS:
        own = {key: value for key, value in os.environ.items() if key not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
        with patch.dict(os.environ, own | dict([setting.split("=")]), clear=True):
            parts[setting] = Aside(training_step).part("step")
    idle = interleave(parts, budget / 2, torch.device("cpu"))
    with busy(cores()):
        return {"idle": idle, "busy": interleave(parts, budget / 2, torch.device("cpu"))}


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = cli.parser(*__doc__.split("\n\n", 1))
    cli.add_number(parser, "--budget", 0, float, default=60, metavar="SECONDS", help="for all of it (default 60)")
    args = parser.parse_args(argv)
    times = measure(args.budget)
    if args.json:
        found: dict[str, Any] = {
            when: {name: vars(one.seconds(name)) for name in SETTINGS} for when, one in times.items()
        }
        print(json.dumps(found | {"environment": environment(torch.device("cpu"))}))
        return
    table = Table("", *(f"{when}, ms" for when in times), *(f"{when}, relative" for when in times))
    for name in SETTINGS:
        table.add_row(name, *(one.seconds(name).text(".0f", 1e3) for one in times.values()),
                      *(one.ratio(name, BASE).text(".2f") for one in times.values()))  # fmt: skip
    Console(width=140).print(table)


if __name__ == "__main__":
    cli.run(main)
