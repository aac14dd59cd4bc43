"""Evaluate the dense model of a run or checkpoint on a test split.

python -m tools.evaluate runs/shapes-tiny-ewa-seed0
python -m tools.evaluate model.safetensors --config configs/modelnet40.yaml data.root=/data --votes 10 --json
python -m tools.evaluate runs/modelnet40-tiny-ewa-seed0 --config configs/scanobjectnn.yaml data.root=/data
python -m tools.evaluate runs/modelnet40-tiny-ewa-seed0 --corrupt --confusion confusion.png
python -m tools.evaluate point_mae.pth --config configs/modelnet40.yaml data.root=/data
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Generator, Tensor

from datasets.loader import EvalLoader
from datasets.prepare import unit_sphere
from datasets.source import progress
from datasets.transforms import random_subset, scale_shift
from pointewa.config import build_architecture
from pointewa.errors import ConfigError
from pointewa.inference.corruptions import CORRUPTIONS, SEVERITIES, corrupt
from pointewa.inference.shared_classes import shared_classes
from pointewa.runs.description import LoadedModel
from pointewa.runs.weights import load_foreign, load_model
from pointewa.tasks.classification import Evaluation, evaluate
from pointewa.viz.clouds import save_figure
from pointewa.viz.confusion import confusion_figure, confusion_text
from tools import cli


class Judge:
    """Evaluates one model on one set, as its clouds are and transformed.

    Args:
        args: of the command line.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        path = args.checkpoint
        if Path(path).suffix in (".pth", ".pt"):
            self.config = cli.config_from(args)
            self.clouds = cli.load(self.config, "test")
            names, data = self.clouds.class_names, self.config.data
            model = load_foreign(path, build_architecture(self.config.model), len(names))
            loaded = LoadedModel(model, names, data.num_points, data.name, "none")
        else:
            loaded = load_model(path)
            # The number of points is the model's, whatever the data set's recipe says, unless the user says otherwise.
            args.overrides = [f"data.num_points={loaded.num_points}", *args.overrides]
            self.config = cli.config_from(args, {"data": {"name": loaded.dataset}})
            self.clouds = cli.load(self.config, "test")
        self.device = self.clouds.labels.device
        self.model, self.num_points = loaded.model.to(self.device), self.config.data.num_points
        self.normalize = loaded.normalize == "unit_sphere" and not self.clouds.normalized
        if loaded.normalize == "none" and self.clouds.normalized and loaded.dataset != self.config.data.name:
            print("note: the model was trained on clouds as they come, these are scaled to norm 1", file=sys.stderr)
        self.names, self.shared = self.clouds.class_names, None
        if loaded.class_names != self.clouds.class_names:
            self.shared = shared_classes(
                loaded.dataset, loaded.class_names, self.config.data.name, self.clouds.class_names
            )
            self.names = tuple(one.name for one in self.shared)

    def plain(self) -> Evaluation:
        """On each cloud's farthest-point sample."""
        return self._restricted(self._run(lambda points: points[:, : self.num_points], "evaluating"))

    def voted(self, votes: int) -> Evaluation:
        """Mean logits over random samples, each scaled and shifted, as Point-BERT and Point-MAE vote."""
        generator = Generator(self.device).manual_seed(self.config.train.seed)
        results = [
            self._run(lambda points: scale_shift(random_subset(points, self.num_points, generator), generator))
            for _ in progress(range(votes), "voting")
        ]
        return self._restricted(Evaluation(torch.stack([one.logits for one in results]).mean(0), results[0].labels))

    def corrupted(self) -> dict[str, list[float]]:
        """Overall error in percent for each corruption, by severity. The draws are the same for every model."""
        errors: dict[str, list[float]] = {name: [] for name in CORRUPTIONS}
        cases = [(name, severity) for name in CORRUPTIONS for severity in SEVERITIES]
        for number, (name, severity) in enumerate(progress(cases, "corrupting")):
            generator = Generator(self.device).manual_seed(number)
            result = self._run(
                lambda points, n=name, s=severity, g=generator: corrupt(points[:, : self.num_points], n, s, g)
            )
            errors[name].append(100 - self._restricted(result).oa)
        return errors

    def _run(self, transform: Any, title: str = "") -> Evaluation:
        def prepared(points: Tensor) -> Tensor:
            return transform(unit_sphere(points) if self.normalize else points)

        batches = EvalLoader(self.clouds, cli.EVAL_BATCH, self.num_points, prepared)
        return evaluate(self.model, progress(batches, title) if title else batches)  # one bar at a time

    def _restricted(self, result: Evaluation) -> Evaluation:
        return result.restricted([(one.model, one.data) for one in self.shared]) if self.shared else result


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def accuracies(title: str, names: tuple[str, ...], results: dict[str, Evaluation]) -> Table:
    """Accuracy of each class, over all and as the mean of the classes, a column for each way of evaluating."""
    table = Table(title=title)
    table.add_column("")
    for name in results:
        table.add_column(name, justify="right")
    for index, name in enumerate(names):
        row = [100 * result.per_class[index].item() for result in results.values()]
        table.add_row(name, *(f"{value:.1f} %" if value == value else "no objects" for value in row))
    table.add_section()
    table.add_row("overall", *(f"{result.oa:.2f} %" for result in results.values()))
    table.add_row("mean of classes", *(f"{result.macc:.2f} %" for result in results.values()))
    return table


def robustness(errors: dict[str, list[float]], clean: float) -> Table:
    """Error of each corruption by severity, and their means."""
    table = Table(title=f"overall error under corruptions, in percent ({clean:.2f} without)")
    table.add_column("severity")
    for name in (*map(str, SEVERITIES), "mean"):
        table.add_column(name, justify="right")
    for name, row in errors.items():
        table.add_row(name, *(f"{value:.1f}" for value in row), f"{_mean(row):.2f}")
    table.add_section()
    columns = [_mean(list(column)) for column in zip(*errors.values(), strict=True)]
    table.add_row("mean corruption error", *(f"{value:.1f}" for value in columns), f"{_mean(columns):.2f}")
    return table


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = cli.parser(*__doc__.split("\n\n", 1))
    parser.add_argument("checkpoint", help="run folder, .safetensors, .ckpt, or a .pth of Point-MAE or Point-BERT")
    cli.add_config(parser)
    parser.add_argument("--votes", type=int, default=0, metavar="N", help="evaluate with N votes besides")
    parser.add_argument("--corrupt", action="store_true", help="evaluate under corruptions besides")
    parser.add_argument("--confusion", nargs="?", const="", metavar="PNG", help="print the confusion matrix, draw it")
    args = parser.parse_intermixed_args(argv)
    if args.votes < 0:
        raise ConfigError(f"--votes: expected at least 1, found {args.votes}")
    judge = Judge(args)
    results = {"plain": judge.plain()}
    if args.votes:
        results[f"{args.votes} votes"] = judge.voted(args.votes)
    errors = judge.corrupted() if args.corrupt else None
    plain = results["plain"]
    if args.confusion:
        title = f"{judge.config.data.name}, test split, plain"
        save_figure(Path(args.confusion), confusion_figure(plain.confusion, judge.names, title), dpi=150)
    if args.json:
        per_class = dict(zip(judge.names, (100 * plain.per_class).tolist(), strict=True))
        figures = {"dataset": judge.config.data.name, "objects": len(plain.labels), "oa": plain.oa, "macc": plain.macc}
        figures |= {"loss": plain.loss, "per_class": per_class, "restricted": judge.shared is not None}
        if args.votes:
            voted = results[f"{args.votes} votes"]
            figures["voted"] = {"votes": args.votes, "oa": voted.oa, "macc": voted.macc}
        if args.confusion is not None:
            figures["confusion"] = plain.confusion.tolist()
        if errors:
            figures["corruption_errors"] = errors
            figures["mean_corruption_error"] = _mean([_mean(row) for row in errors.values()])
        print(json.dumps(figures))
        return
    console, what = Console(), f"{judge.config.data.name}, test split, {len(plain.labels)} objects"
    if judge.shared:
        what += f" of the {len(judge.names)} classes that the model knows, argmax among these"
    console.print(accuracies(what, judge.names, results))
    if errors:
        console.print(robustness(errors, 100 - plain.oa))
    if args.confusion is not None:
        print(confusion_text(plain.confusion, judge.names))


if __name__ == "__main__":
    cli.run(main)
