"""Finished runs side by side: metrics, curves, classes, and McNemar's test on the same test objects."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import torch

from pointewa.config import Config, differences, load_config
from pointewa.errors import CheckpointError, ConfigError, DataError
from pointewa.runs.folder import CONFIG
from pointewa.runs.log import read_metrics
from pointewa.runs.summary import SUMMARY, read_summary
from pointewa.study.statistics import holm
from pointewa.tasks import task_of
from pointewa.tasks.base import Subjects, Task
from pointewa.tasks.classification import Evaluation
from pointewa.viz.html import save_page, svg_html
from pointewa.viz.report import Curves, curves_figure, section_html, table_html

CAUTION = (
    "McNemar's exact test counts the objects that only one of two models classifies correctly. It says whether these "
    "two models differ on such objects, not whether the ways in which they were trained do: for that, compare seeds in "
    "a study."
)
_IGNORED = ("run.name", "run.dir", "run.overwrite", "run.report", "data.root", "data.stream", "train.device")


@dataclass(frozen=True)
class Run:
    """A finished run. Its model is evaluated when that is first asked for.

    Args:
        name: of it, among those that are compared.
        task: what it has learned.
        summary: its ``summary.json``.
        epochs: its ``metrics.jsonl``.
        config: of its training.
        subjects: its model, and its test split.
    """

    name: str
    task: type[Task]
    summary: dict[str, Any]
    epochs: list[dict[str, Any]]
    config: Config
    subjects: Subjects

    @property
    def objects(self) -> tuple[str, ...]:
        """Names of the N test objects."""
        return tuple(self.subjects.clouds.object_names)

    @property
    def evaluation(self) -> Evaluation | None:
        """Of the test objects, in their order; None for a task that predicts no classes."""
        return self.subjects.evaluation if self.task.predicts_classes else None

    @property
    def metrics(self) -> dict[str, float]:
        """Of the test split: evaluated now, or of the summary for a task that predicts no classes."""
        return self.evaluation.metrics if self.evaluation else self.summary["test"]


@dataclass(frozen=True)
class McNemar:
    """Two classifiers on the same objects.

    Args:
        only_first: objects that only the first one classifies correctly.
        only_second: objects that only the second one classifies correctly.
        p: of the exact two-sided test: were the two equally good, both counts would be a fair coin's.
    """

    only_first: int
    only_second: int
    p: float


@dataclass(frozen=True)
class Comparison:
    """A run beside the first one.

    Args:
        name: of the run.
        changed: keys of the configuration in which they differ, as ``"key: value -> value"``.
        difference: of the primary metric to that of the first run.
        test: McNemar's, for classifiers; the first run is the first.
        corrected: its p, corrected for the number of comparisons (Holm).
        per_class: differences of the classes' accuracies to the first run's in percentage points; None for a class
            without objects.
    """

    name: str
    changed: list[str]
    difference: float
    test: McNemar | None
    corrected: float | None
    per_class: dict[str, float | None]


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> McNemar:
    """McNemar's exact test of two classifiers, by which of the same objects each classifies correctly.

    Raises:
        ValueError: different numbers of objects.
    """
    pairs = list(zip(first, second, strict=True))
    b, c = sum(one and not other for one, other in pairs), sum(other and not one for one, other in pairs)
    if not b + c:
        return McNemar(0, 0, 1.0)
    from scipy.stats import binomtest  # slow to import

    return McNemar(b, c, float(binomtest(b, b + c).pvalue))


def read_run(folder: Path, name: str, subjects: Subjects) -> Run:
    """A finished run.

    Raises:
        CheckpointError: it is not finished, or no run folder.
        ConfigError: its configuration is not valid.
    """
    summary = read_summary(folder)
    if summary is None:
        raise CheckpointError(f"{folder}: not finished, or no run folder: the same training command resumes it")
    task, config = task_of(summary, str(folder / SUMMARY)), load_config([folder / CONFIG])
    return Run(name, task, summary, read_metrics(folder), config, subjects)


def compare(runs: Sequence[Run]) -> list[Comparison]:
    """All runs but the first, each beside the first.

    Raises:
        ConfigError: runs of different tasks or data sets.
        DataError: test objects that are not the same.
    """
    first, others = runs[0], runs[1:]
    orders = [_same_objects(first, run) for run in others]
    tests: list[McNemar | None] = [None] * len(others)
    if first.evaluation:
        right = [(run.evaluation.logits.argmax(1) == run.evaluation.labels) for run in runs]
        tests = [mcnemar(right[0].tolist(), mine[order].tolist())
                 for mine, order in zip(right[1:], orders, strict=True)]  # fmt: skip
    corrected = holm([test.p for test in tests if test]) or [None] * len(others)
    primary = first.task.primary()
    return [Comparison(run.name, differences(first.config, run.config, _IGNORED),
                       run.metrics[primary] - first.metrics[primary], test, p, _per_class(first, run))
            for run, test, p in zip(others, tests, corrected, strict=True)]  # fmt: skip


def notes(runs: Sequence[Run]) -> list[str]:
    """What a reader has to know: runs whose evaluation now is not what they recorded, data from several places."""
    found = []
    if len(roots := sorted({str(run.subjects.config.data.root) for run in runs})) > 1:
        found.append(f"the test objects are paired by their names, and come from {' and '.join(roots)}")
    for run in runs:
        primary, metric = run.task.primary(), run.task.metrics[run.task.primary()]
        now, then = run.metrics[primary], run.summary["test"][primary]
        if abs(now - then) > 100 / max(1, len(run.objects)):
            found.append(f"{run.name}: {metric.label} is {metric.text(now)} now, and was {metric.text(then)} after its "
                         "training: on other data, or another machine")  # fmt: skip
    return found


def _same_objects(first: Run, run: Run) -> list[int]:
    """Where the test objects of the first run are among those of another."""
    pairs = [("task", first.task.name, run.task.name)]
    pairs += [(f"data.{key}", *(getattr(one.subjects.config.data, key) for one in (first, run)))
              for key in ("name", "variant", "background")]  # fmt: skip
    for key, mine, theirs in pairs:
        if mine != theirs:
            raise ConfigError(
                f"{first.name} and {run.name}: {key} is {mine} and {theirs}: compare runs that have the same"
            )
    (mine, theirs), names = (one.subjects.clouds for one in (first, run)), run.objects
    order = list(range(len(names)))
    if first.objects != names:  # where they are the same, a name may occur twice
        places = {name: number for number, name in enumerate(names)}
        order = [places.get(name, -1) for name in first.objects]
    if (
        sorted(order) != list(range(len(names)))
        or mine.class_names != theirs.class_names
        or mine.labels.tolist() != theirs.labels[order].tolist()
    ):
        raise DataError(f"{first.name} and {run.name}: their test objects are not the same ({len(first.objects)} and "
                        f"{len(names)}): say by data.root=... where the data of both are")  # fmt: skip
    return order


def _per_class(first: Run, run: Run) -> dict[str, float | None]:
    if run.evaluation is None:
        return {}
    points = 100 * (run.evaluation.per_class - first.evaluation.per_class)
    return {name: None if torch.isnan(value) else value.item()
            for name, value in zip(first.subjects.clouds.class_names, points, strict=True)}  # fmt: skip


# As rows of tables, for the console and the page.


def metric_rows(runs: Sequence[Run]) -> tuple[list[str], list[list[str]]]:
    """Heading and a row for each run: metrics, parameters, seconds."""
    shown = {key: one for key, one in runs[0].task.metrics.items() if one.headline}
    header = ["run", *(one.label for one in shown.values()), "parameters", "epochs", "seconds of training"]
    rows = [[run.name, *(one.text(run.metrics[key]) for key, one in shown.items()), f"{run.summary['parameters']:,}",
             str(run.summary["epochs"]), f"{run.summary['seconds']:.0f}"] for run in runs]  # fmt: skip
    return header, rows


def test_rows(runs: Sequence[Run], found: Sequence[Comparison]) -> tuple[list[str], list[list[str]]]:
    """Heading and a row for each comparison: the difference, and McNemar's test."""
    metric, base = runs[0].task.metrics[runs[0].task.primary()], runs[0].name
    header = ["run", f"{metric.label}, difference to {base}", f"only {base} correct", "only this correct", "p"]
    header += ["p, Holm"] if len(found) > 1 else []
    rows = []
    for one in found:
        row = [one.name, f"{one.difference:+{metric.form}}"]
        if one.test:
            row += [str(one.test.only_first), str(one.test.only_second), _p(one.test.p)]
            row += [_p(one.corrected)] if len(found) > 1 else []
        rows.append(row)
    return header if all(one.test for one in found) else header[:2], rows


def class_rows(runs: Sequence[Run], found: Sequence[Comparison]) -> tuple[list[str], list[list[str]]]:
    """Heading and a row for each class: the first run's accuracy, and the differences of the others, in points."""
    header = ["class", "objects", runs[0].name, *(one.name for one in found)]
    if runs[0].evaluation is None:
        return header, []
    counts = runs[0].evaluation.confusion.sum(1).tolist()
    rows = []
    accuracies, names = runs[0].evaluation.per_class.tolist(), runs[0].subjects.clouds.class_names
    for name, count, accuracy in zip(names, counts, accuracies, strict=True):
        others = [one.per_class[name] for one in found]
        rows.append([name, str(count), f"{100 * accuracy:.1f} %" if count else "no objects",
                     *("-" if value is None else f"{value:+.1f}" for value in others)])  # fmt: skip
    return header, rows


def _p(value: float | None) -> str:
    return "-" if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"


def save(path: Path, runs: Sequence[Run], found: Sequence[Comparison]) -> None:
    """Write the comparison as a page of one file.

    Raises:
        OSError: it cannot be written.
    """
    data = runs[0].subjects.config.data.name
    parts = [f"<p>{escape(data)}, test split, {len(runs[0].objects)} objects, models after the last epoch.</p>\n"]
    parts += [f"<p>Caution: {escape(note)}.</p>\n" for note in notes(runs)]
    parts.append(section_html("Results", table_html(*reversed(metric_rows(runs)))))
    tests = table_html(*reversed(test_rows(runs, found)))
    parts.append(section_html("Differences", tests, f"<p>{CAUTION}</p>\n" if found[0].test else ""))
    if curves := curves_figure(_merged(runs), _diagrams(runs)):
        parts.append(section_html("Training", svg_html(curves)))
    if runs[0].evaluation:
        text = f"<p>Accuracy of {escape(runs[0].name)}, and differences to it in percentage points.</p>\n"
        parts.append(section_html("Classes", text, table_html(*reversed(class_rows(runs, found)))))
    for one in found:
        rows = [line.partition(": ")[::2] for line in one.changed] or [("nothing", "")]
        parts.append(section_html(f"What differs in the configuration: {runs[0].name} -> {one.name}", table_html(rows)))
    save_page(path, " and ".join(run.name for run in runs), parts)


def _merged(runs: Sequence[Run]) -> list[Mapping[str, Any]]:
    """Records of all runs, with the number of the run before each key."""
    return [{"epoch": record["epoch"], **{f"{number}/{key}": value for key, value in record.items()}}
            for number, run in enumerate(runs) for record in run.epochs]  # fmt: skip


def _diagrams(runs: Sequence[Run]) -> Iterable[Curves]:
    """Training and validation of each metric, the share rate: a curve a run."""
    metrics = {"loss": "loss"} | {key: one.axis for key, one in runs[0].task.metrics.items() if one.headline}
    keys = {f"{split}/{key}": f"{label}, {word}" for key, label in metrics.items()
            for split, word in (("train", "training"), ("val", "validation"))}  # fmt: skip
    keys["ewa/share_rate"] = "share rate"
    return [Curves(label, {run.name: f"{number}/{key}" for number, run in enumerate(runs)})
            for key, label in keys.items()]  # fmt: skip
