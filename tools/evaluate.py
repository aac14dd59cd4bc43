"""Evaluate the dense model of a run or checkpoint on a test split.

python -m tools.evaluate runs/shapes-tiny-ewa-seed0
python -m tools.evaluate model.safetensors --config configs/modelnet40.yaml data.root=/data --votes 10 --json
python -m tools.evaluate runs/modelnet40-tiny-ewa-seed0 --config configs/scanobjectnn.yaml data.root=/data
python -m tools.evaluate runs/modelnet40-tiny-ewa-seed0 --corrupt --confusion confusion.png
python -m tools.evaluate point_mae.pth --config configs/modelnet40.yaml data.root=/data
python -m tools.evaluate runs/shapes-tiny-part_segmentation-ewa-seed0 --points all --votes 10
python -m tools.evaluate runs/shapes-tiny-ewa-seed0 --precision auto
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from pointewa.datasets.registry import reported
from pointewa.datasets.subjects import Subjects
from pointewa.errors import counted
from pointewa.inference.corruptions import SEVERITIES
from pointewa.inference.segmentation import segment_all_points, votes
from pointewa.tasks import part_segmentation
from pointewa.tasks.classification import Classification, Evaluation
from pointewa.tools import cli
from pointewa.viz.clouds import check_suffix, save_figure
from pointewa.viz.confusion import confusion_figure, confusion_text


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def accuracies(
    title: str, names: tuple[str, ...], results: dict[str, Evaluation], further: Sequence[str] = ()
) -> Table:
    """Accuracy of each class, overall, and as the mean of the classes, with a column for each way of evaluating.

    Args:
        title: of the table.
        names: of the classes.
        results: by the way of evaluating.
        further: metrics that the data set reports, which come first.
    """
    table = Table(title=title)
    table.add_column("")
    for name in results:
        table.add_column(name, justify="right")
    for index, name in enumerate(names):
        row = [100 * result.per_class[index].item() for result in results.values()]
        table.add_row(name, *(f"{value:.1f} %" if value == value else "no objects" for value in row))
    table.add_section()
    for key in further:
        metric = Classification.further[key]
        table.add_row(metric.label, *(metric.text(result.metrics[key]) for result in results.values()))
    table.add_row("overall", *(f"{result.accuracy:.2f} %" for result in results.values()))
    table.add_row("mean of classes", *(f"{result.mean_class_accuracy:.2f} %" for result in results.values()))
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


def show_parts(subjects: Subjects, args: argparse.Namespace) -> None:
    """Print the IoU of each category, and the metrics, of a model that predicts the parts of points."""
    loaded, task = subjects.segmenter, subjects.task
    every_part, device = args.argmax == "all", next(loaded.model.parameters()).device
    ways = {"plain": part_segmentation.plain}
    if args.votes:
        ways[counted(args.votes, "vote")] = votes(args.votes, device, subjects.config.train.seed)
    results = {}
    for name, predict in ways.items():
        batches = subjects.batches(title=name)
        if args.points == "all":
            found = segment_all_points(loaded.model, batches, subjects.originals(), predict, every_part)
        else:
            found = part_segmentation.segment(loaded.model, batches, predict, every_part)
        results[name] = found
    (first, *others), names, dataset = results.values(), loaded.class_names, subjects.config.data.name
    by_class = [result.by_class(len(names)).tolist() for result in results.values()]
    if args.json:
        ious = {name: value if value == value else None for name, value in zip(names, by_class[0], strict=True)}
        report = {"dataset": dataset, "objects": len(first.labels), "points": args.points or "sample",
                  "argmax": args.argmax or "category", "precision": subjects.precision, **first.metrics,
                  "miou_by_class": ious}  # fmt: skip
        if others:
            report["voted"] = {"votes": args.votes, **others[0].metrics}
        print(json.dumps(report))
        return
    seen = "all points" if args.points == "all" else f"{counted(subjects.num_points, 'point')} a cloud"
    among = "all parts" if every_part else "the parts of the true category"
    objects = counted(len(first.labels), "object")
    table = Table(title=f"{subjects.what}, {objects}, {seen}, argmax over {among}")
    table.add_column("")
    for name in results:
        table.add_column(name, justify="right")
    for name, *values in zip(names, *by_class, strict=True):
        table.add_row(name, *(f"{value:.1f} %" if value == value else "no objects" for value in values))
    table.add_section()
    for key, metric in task.metrics.items():
        table.add_row(metric.label, *(metric.text(result.metrics[key]) for result in results.values()))
    Console().print(table)


def show_metrics(subjects: Subjects, as_json: bool) -> None:
    """Print the metrics of a model that predicts no classes."""
    metrics, dataset, objects = subjects.metrics(), subjects.config.data.name, len(subjects.clouds)
    if as_json:
        print(json.dumps({"dataset": dataset, "objects": objects, **metrics}))
        return
    table = Table("", "", title=f"{subjects.what}, {counted(objects, 'object')}", show_header=False)
    for key, metric in subjects.task.metrics.items():
        table.add_row(metric.label, metric.text(metrics[key]))
    Console().print(table)


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = cli.parser(*__doc__.split("\n\n", 1))
    parser.add_argument("checkpoint", help="run folder, .safetensors, .ckpt, or a .pth of Point-MAE or Point-BERT")
    cli.add_config(parser)
    cli.add_number(parser, "--votes", metavar="N", help="also evaluate with N votes")
    parser.add_argument("--corrupt", action="store_true", help="also evaluate under corruptions")
    parser.add_argument("--points", choices=("sample", "all"),
                        help="of parts: measured on the model's points (default), or on all of the files")  # fmt: skip
    parser.add_argument("--argmax", choices=("category", "all"),
                        help="of parts: among those of the true category (default), or among all")  # fmt: skip
    cli.add_precision(parser)
    parser.add_argument(
        "--confusion",
        nargs="?",
        const="",
        metavar="FILE",
        help="print the confusion matrix, and draw it to a .png, .pdf or .svg",
    )
    args = parser.parse_intermixed_args(argv)
    if args.confusion:
        check_suffix("--confusion", Path(args.confusion))
    subjects = Subjects(args.checkpoint, "test", args.config, args.overrides, precision=args.precision or "float32")
    task = subjects.task
    of_classes, of_parts = ((task.name,) if one else () for one in (task.predicts_classes, task.point_labels))
    cli.refuse_unused(args, task.name, {"votes": of_classes + of_parts, "corrupt": of_classes, "confusion": of_classes,
                                        "points": of_parts, "argmax": of_parts,
                                        "precision": of_classes + of_parts})  # fmt: skip
    if not task.predicts_classes:
        if task.point_labels:
            show_parts(subjects, args)
        else:
            show_metrics(subjects, args.json)
        return
    if args.votes or args.corrupt:
        subjects.need_clouds("--votes, --corrupt")
    evaluator, dataset = subjects.evaluator, subjects.config.data.name
    names = evaluator.class_names
    results = {"plain": evaluator.plain()}
    if args.votes:
        results[counted(args.votes, "vote")] = evaluator.voted(args.votes, subjects.draw, subjects.config.train.seed)
    errors = evaluator.corrupted() if args.corrupt else None
    plain = results["plain"]
    if args.confusion:
        title = f"{subjects.what}, plain"
        save_figure(Path(args.confusion), confusion_figure(plain.confusion, names, title), dpi=150)
    if args.json:
        # A class without objects has no accuracy, and JSON no NaN.
        accuracies_ = [value if value == value else None for value in (100 * plain.per_class).tolist()]
        per_class = dict(zip(names, accuracies_, strict=True))
        report = {"dataset": dataset, "objects": len(plain.labels), "precision": subjects.precision, **plain.metrics,
                  "per_class": per_class, "restricted": evaluator.shared is not None}  # fmt: skip
        if args.votes:
            report["voted"] = {"votes": args.votes, **results[counted(args.votes, "vote")].metrics}
        if args.confusion is not None:
            report["confusion"] = plain.confusion.tolist()
        if errors:
            report["corruption_errors"] = errors
            report["mean_corruption_error"] = _mean([_mean(row) for row in errors.values()])
        print(json.dumps(report))
        return
    console, what = Console(), f"{subjects.what}, {counted(len(plain.labels), 'object')}"
    if evaluator.shared:
        what += f" of the {len(names)} classes that the model has too, argmax over these"
    console.print(accuracies(what, names, results, reported(dataset)))
    if errors:
        console.print(robustness(errors, 100 - plain.accuracy))
    if args.confusion is not None:
        print(confusion_text(plain.confusion, names))


if __name__ == "__main__":
    cli.run(main)
