"""The figures of few-shot runs, and their report."""

import math
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from pointewa.errors import CheckpointError, ConfigError, counted
from pointewa.safe.files import atomic_write
from pointewa.study.definition import StudyRun
from pointewa.study.few_shot import FewShot, parse_setting
from pointewa.study.report import RESULTS, counted_texts, csv_text, environment_of, machine_of, markdown, p_text, spread
from pointewa.study.statistics import Paired, holm, mean_std, paired
from pointewa.tasks.base import Metric, Task

AID = """\
*How to read this.* A fold is a training on `way` classes x `shot` objects of the training split, and a test on 20
objects of each of these classes of the test split. *Last epoch* is the accuracy in percent of the model after the last
epoch, mean ± sample standard deviation over the folds; nothing is selected. *Best epoch, as published* takes of each
fold the epoch that is best on the queries themselves, as the published protocol does: it selects on the test data and
so flatters every arm; it is here only to stand beside published figures. Folds have different classes, so the
standard deviation is mostly how much harder one fold is than another. Arms are therefore compared fold by fold:
*difference* is the mean of the paired differences of the last epochs, with its 95 % interval (Student's t) and p of the
two-sided paired t test; *p, Holm* is corrected for the number of comparisons in the table. Folds share classes and
objects, so they are not wholly independent repetitions."""
DRAWN = "Folds were drawn by this library's seed: not comparable with published folds, in these figures or others."
PUBLISHED = "Folds are the published ones."


@dataclass(frozen=True)
class Cell:
    """The finished folds of an arm in a setting.

    Args:
        arm, setting: which.
        summaries: of its runs, by fold.
        primary: key of the task's primary metric.
    """

    arm: str
    setting: str
    summaries: dict[int, dict[str, Any]]
    primary: str

    def last(self) -> dict[int, float]:
        """The primary metric after the last epoch, by fold."""
        return {fold: summary["test"][self.primary] for fold, summary in self.summaries.items()}

    def best(self) -> dict[int, float]:
        """The primary metric of the epoch that is best on the queries, by fold."""
        return {fold: one["few_shot"]["best_on_queries"][self.primary] for fold, one in self.summaries.items()}

    def against(self, other: "Cell") -> Paired | None:
        """The difference to another arm on the folds that both have; None with fewer than two."""
        mine, theirs = self.last(), other.last()
        common = [fold for fold in mine if fold in theirs]
        return paired([mine[fold] for fold in common], [theirs[fold] for fold in common])


def gather(few_shot: FewShot) -> list[Cell]:
    """The finished runs, setting by setting.

    Raises:
        CheckpointError: a damaged summary, or folds of which some were drawn and others published.
    """
    primary = few_shot.study.task.primary()
    found: dict[str, dict[int, dict[str, Any]]] = {arm: {} for arm in few_shot.study.arms}
    origins: dict[bool, StudyRun] = {}
    for run in few_shot.study.runs:
        if summary := run.summary():
            entry = summary.get("few_shot")
            if not _fits(entry, primary):
                raise CheckpointError(f"{run.folder}: its summary has no figures of a few-shot fold: remove it, and "
                                      "the same command makes it again")  # fmt: skip
            found[run.arm][run.seed] = summary
            origins.setdefault(entry["drawn"], run)
    if len(origins) > 1:
        raise CheckpointError(f"{origins[True].folder} was trained on a fold that this library drew, and "
                              f"{origins[False].folder} on a published one: remove the runs of one kind, or choose "
                              "another name")  # fmt: skip
    return [
        Cell(arm, setting, found[f"{setting}-{arm}"], primary) for setting in few_shot.settings for arm in few_shot.arms
    ]


def _fits(entry: Any, primary: str) -> bool:
    best = entry.get("best_on_queries") if isinstance(entry, dict) else None
    known = isinstance(best, dict) and all(type(best.get(key)) in (int, float) for key in (primary, "epoch"))
    return known and isinstance(entry.get("drawn"), bool)


def table(few_shot: FewShot, cells: Sequence[Cell]) -> list[dict[str, str]]:
    """Of each arm a row of the last epoch and one of the best, with a column for each setting."""
    form, rows = _metric(few_shot).form, []
    for arm in dict.fromkeys(cell.arm for cell in cells):
        mine = [cell for cell in cells if cell.arm == arm]
        for what, values in (("last epoch", Cell.last), ("best epoch, as published", Cell.best)):
            texts = {}
            for cell in mine:
                few = f" ({len(cell.summaries)} of {few_shot.folds})" if len(cell.summaries) < few_shot.folds else ""
                texts[_title(cell.setting)] = spread(*mean_std([*values(cell).values()]), form) + few
            rows.append({"arm": arm, "accuracy of": what, **texts})
    return rows


@dataclass(frozen=True)
class Comparison:
    """An arm beside another one in a setting: the paired difference, and its p corrected for all comparisons (Holm)."""

    cell: Cell
    base: Cell
    found: Paired
    corrected: float | None


def compared(cells: Sequence[Cell]) -> list[Comparison]:
    """All arms beside each other, setting by setting, where they have two or more common folds."""
    pairs = [(cell, base, found) for base, cell in combinations(cells, 2)
             if cell.setting == base.setting and (found := cell.against(base))]  # fmt: skip
    known = [number for number, (_, _, found) in enumerate(pairs) if not math.isnan(found.p)]
    corrected = dict(zip(known, holm([pairs[number][2].p for number in known]), strict=True))
    return [Comparison(*pair, corrected.get(number)) for number, pair in enumerate(pairs)]


def differences(few_shot: FewShot, cells: Sequence[Cell]) -> list[dict[str, str]]:
    """The comparisons as text."""
    form, rows = _metric(few_shot).form, []
    for one in compared(cells):
        found = one.found
        rows.append({
            "setting": _title(one.cell.setting),
            "arm": one.cell.arm,
            "compared with": one.base.arm,
            "difference": f"{found.mean:+{form}}",
            "95 % interval": f"{found.low:+{form}} to {found.high:+{form}}",
            "p": p_text(_known(found.p)),
            "p, Holm": p_text(one.corrected),
            "folds": str(found.pairs),
        })  # fmt: skip
    return rows


def figures(cells: Sequence[Cell]) -> dict[str, Any]:
    """All figures, for JSON; None for those that do not exist."""
    rows = []
    for cell in cells:
        row = {"arm": cell.arm, "setting": cell.setting, "folds": list(cell.summaries)}
        for name, values in (("last", cell.last()), ("best", cell.best())):
            row[name], row[f"{name}_std"] = map(_known, mean_std([*values.values()]))
        rows.append(row)
    return {"drawn": _drawn(cells), "cells": rows, "differences": [
        {"setting": one.cell.setting, "arm": one.cell.arm, "compared_with": one.base.arm,
         "difference": one.found.mean, "low": one.found.low, "high": one.found.high, "p": _known(one.found.p),
         "p_holm": one.corrected, "pairs": one.found.pairs}
        for one in compared(cells)]}  # fmt: skip


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


def origin(cells: Sequence[Cell]) -> str:
    """Where the folds come from, for people."""
    return DRAWN if _drawn(cells) else PUBLISHED


def write_report(few_shot: FewShot, out: Path) -> list[Cell]:
    """Write README.md, results.csv and costs.csv.

    Raises:
        ConfigError: no run is finished.
        CheckpointError: see `gather`.
    """
    cells = gather(few_shot)
    if not any(cell.summaries for cell in cells):
        raise ConfigError(f"{few_shot.study.folder}: no run is finished: there is nothing to report")
    runs = [(cell, fold, summary) for cell in cells for fold, summary in cell.summaries.items()]
    texts = {
        RESULTS: csv_text(_row(few_shot.study.task, *run) for run in runs),
        "costs.csv": csv_text({**_place(cell, fold), "seconds": summary["seconds"], "epochs": summary["epochs"],
                               "device": environment_of(summary).get("device"),
                               "threads": environment_of(summary).get("threads")}
                              for cell, fold, summary in runs),
        "README.md": _readme(few_shot, cells),
    }  # fmt: skip
    for name, text in texts.items():
        with atomic_write(out / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return cells


def _readme(few_shot: FewShot, cells: Sequence[Cell]) -> str:
    summaries = [summary for cell in cells for summary in cell.summaries.values()]
    first = few_shot.study.runs[0].config
    done = f"{len(summaries)} of {counted(len(few_shot.study.runs), 'run')} are finished"
    train = first.train
    epochs = {run.arm.split("-")[0]: run.config.train.epochs for run in few_shot.study.runs}
    lengths = [counted(train.epochs, "epoch")] if len(set(epochs.values())) == 1 else [
        f"{setting} {counted(number, 'epoch')}" for setting, number in epochs.items()
    ]  # fmt: skip
    warmup = train.warmup_fraction if train.warmup_epochs is None else train.warmup_epochs / train.epochs
    schedule = f"{', '.join(lengths)}, of which {warmup:.1%} warm up"
    recipe = (
        f"{first.data.name}, {first.model.preset}, {schedule}; {train.optimizer}, learning rate {train.lr:g}, weight "
        f"decay {train.weight_decay:g}, batches of {train.batch_size}"
    )
    commits = Counter(str(environment_of(summary).get("commit", "unknown")) for summary in summaries)
    machines = Counter(machine_of(summary) for summary in summaries)
    rows = differences(few_shot, cells)
    return "\n".join([
        f"# Few-shot: {few_shot.study.name}", "", f"{recipe}. {done}.", "", f"**{origin(cells)}**", "",
        *markdown(table(few_shot, cells)), "", *([*markdown(rows), ""] if rows else []), AID, "",
        "```", shlex.join(few_shot.command), "```", "",
        f"Commit {counted_texts(commits)}. Machine: {counted_texts(machines)}.", "",
        "`results.csv` has a line per run, `costs.csv` the seconds that they took.", "",
    ])  # fmt: skip


def _place(cell: Cell, fold: int) -> dict[str, Any]:
    way, shot = parse_setting(cell.setting)
    return {"arm": f"{cell.setting}-{cell.arm}", "seed": fold, "way": way, "shot": shot, "fold": fold}


def _row(task: type[Task], cell: Cell, fold: int, summary: dict[str, Any]) -> dict[str, Any]:
    few_shot, environment = summary["few_shot"], environment_of(summary)
    best = few_shot["best_on_queries"]
    row = _place(cell, fold) | {"folds": "drawn" if few_shot["drawn"] else "published", "epochs": summary["epochs"]}
    row |= {f"test_{key}": summary["test"][key] for key in task.metrics}
    row |= {f"best_{cell.primary}_on_queries": best[cell.primary], "best_epoch_on_queries": best["epoch"]}
    row |= {"classes": " ".join(few_shot.get("classes", ())), "precision": summary.get("precision")}
    return row | {key: environment.get(key) for key in ("commit", "device", "threads", "torch", "ops", "platform")}


def _drawn(cells: Sequence[Cell]) -> bool:
    return next(summary for cell in cells for summary in cell.summaries.values())["few_shot"]["drawn"]


def _metric(few_shot: FewShot) -> Metric:
    return few_shot.study.task.metrics[few_shot.study.task.primary()]


def _title(setting: str) -> str:
    return "{}-way {}-shot".format(*parse_setting(setting))
