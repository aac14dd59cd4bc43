"""The figures of a study, from its finished runs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pointewa.study.definition import Study, StudyRun
from pointewa.study.statistics import Paired, holm, mean_std, paired
from pointewa.tasks.base import Task


@dataclass(frozen=True)
class Result:
    """A finished run, or the mean of a seed's folds, see `over_folds`.

    Args:
        run: its definition; of folds the first.
        summary: its ``summary.json``.
        epochs: its ``metrics.jsonl``.
        task: what it has learned.
    """

    run: StudyRun
    summary: dict[str, Any]
    epochs: list[dict[str, float]]
    task: type[Task]

    @property
    def val_last(self) -> float | None:
        """The primary metric on the validation split after the last epoch; None without a validation split."""
        return self.epochs[-1].get(f"val/{self.task.primary()}") if self.epochs else None

    @property
    def train_loss(self) -> float | None:
        """The mean loss of the last epoch's steps, in training, of the model with its experts."""
        return self.epochs[-1].get("train/loss") if self.epochs else None

    @property
    def val_best(self) -> tuple[float, int] | None:
        """The best value of all epochs, and the first epoch with it, counted from 1."""
        key = f"val/{self.task.primary()}"
        found = [(epoch[key], epoch["epoch"] + 1) for epoch in self.epochs if key in epoch]
        best = max if self.task.metrics[self.task.primary()].higher_is_better else min
        return best(found, key=lambda one: one[0]) if found else None


@dataclass(frozen=True)
class Arm:
    """The figures of an arm, over its finished runs.

    Args:
        name: of the arm.
        task: what its runs learn.
        results: by seed; of a study with folds the mean over them, of the seeds all of whose folds are finished.
        runs: all finished ones.
        base: the name of its baseline, the arm that it is compared with; empty for the first arm.
        difference: of the primary metric on the test split to the baseline's; None with fewer than two common seeds.
        by_seed: the differences, of which it is the mean.
        slower: ratio of the seconds of training to the baseline's, for each common seed.
        corrected: p of the difference, corrected for the number of arms that have one (Holm).
        fit: difference of the mean training loss of the last epoch to the baseline's.
    """

    name: str
    task: type[Task]
    results: dict[int, Result]
    base: str = ""
    difference: Paired | None = None
    by_seed: dict[int, float] = field(default_factory=dict)
    slower: list[float] = field(default_factory=list)
    runs: list[Result] = field(default_factory=list)
    corrected: float | None = None
    fit: Paired | None = None

    def test(self, metric: str) -> list[float]:
        """A metric on the test split, for each seed."""
        return [result.summary["test"][metric] for result in self.results.values()]

    def by_fold(self) -> dict[str, list[float]]:
        """The primary metric on the test split of each fold, for the seeds that are finished."""
        found: dict[str, list[float]] = {}
        for result in self.runs:
            found.setdefault(result.run.fold, []).append(result.summary["test"][self.task.primary()])
        return found

    def figures(self) -> dict[str, Any]:
        """All figures, for JSON; None for those that do not exist."""
        first = next(iter(self.results.values())).summary if self.results else {}
        best = [result.val_best for result in self.results.values() if result.val_best]
        last = [result.val_last for result in self.results.values() if result.val_last is not None]
        primary = self.task.primary()
        series = {f"test_{name}": self.test(name) for name, metric in self.task.metrics.items() if metric.headline}
        series |= {f"val_{primary}_last": last, f"val_{primary}_best": [value for value, _ in best]}
        series["train_loss"] = [one.train_loss for one in self.results.values() if one.train_loss is not None]
        figures: dict[str, Any] = {"arm": self.name, "base": self.base or None, "seeds": list(self.results)}
        for name, values in series.items():
            figures[name], figures[f"{name}_std"] = (None if math.isnan(one) else one for one in mean_std(values))
        figures["val_best_epochs"] = [epoch for _, epoch in best]
        found = self.difference
        keys = {"difference": "mean", "low": "low", "high": "high", "p": "p", "pairs": "pairs"}
        figures |= {key: getattr(found, name) if found else None for key, name in keys.items()}
        figures["p"] = None if found is None or math.isnan(found.p) else found.p
        figures |= {"p_holm": self.corrected, "train_loss_difference": self.fit and self.fit.mean}
        return figures | {key: first.get(key) for key in ("parameters_in_training", "parameters")}


def gather(study: Study) -> list[Arm]:
    """The figures of each arm, as far as its runs are finished.

    Raises:
        CheckpointError: a damaged summary.
    """
    runs: dict[str, list[Result]] = {arm: [] for arm in study.arms}
    for run in study.runs:
        if summary := run.summary():
            runs[run.arm].append(Result(run, summary, run.epochs(), study.task))
    # Unless the runs are of data sets that report different metrics.
    reported = {tuple(one.summary.get("reported", ())) for mine in runs.values() for one in mine}
    task = study.task.reporting(next(iter(reported))) if len(reported) == 1 else study.task
    runs = {arm: [replace(one, task=task) for one in mine] for arm, mine in runs.items()}
    primary = task.primary()
    results = {arm: _by_seed(found, len(study.folds)) for arm, found in runs.items()}
    first = study.arms[0]
    arms = [Arm(first, task, results[first], runs=runs[first])]
    for name in study.arms[1:]:
        against = study.against.get(name, first)
        mine, base = results[name], results[against]
        pairs = [(seed, mine[seed].summary, base[seed].summary) for seed in mine if seed in base]
        values = [[one[place]["test"][primary] for one in pairs] for place in (1, 2)]
        by_seed = {seed: round(one["test"][primary] - other["test"][primary], 9) for seed, one, other in pairs}
        slower = [one["seconds"] / other["seconds"] for _, one, other in pairs if other["seconds"]]
        losses = [(mine[seed].train_loss, base[seed].train_loss) for seed in by_seed]
        losses = [pair for pair in losses if None not in pair]
        fit = paired(*zip(*losses, strict=True)) if losses else None
        arms.append(Arm(name, task, mine, against, paired(*values), by_seed, slower, runs[name], fit=fit))
    tested = [number for number, arm in enumerate(arms) if arm.difference and not math.isnan(arm.difference.p)]
    for number, p in zip(tested, holm([arms[number].difference.p for number in tested]), strict=True):
        arms[number] = replace(arms[number], corrected=p)
    return arms


def _by_seed(runs: Sequence[Result], folds: int) -> dict[int, Result]:
    """One result for each seed of which there are as many runs as folds."""
    seeds: dict[int, list[Result]] = {}
    for result in runs:
        seeds.setdefault(result.run.seed, []).append(result)
    return {seed: over_folds(mine) for seed, mine in seeds.items() if len(mine) == folds}


def over_folds(results: Sequence[Result]) -> Result:
    """The mean of a seed's folds as one result: of the metrics of its summary, of seconds and memory, and of each
    scalar of each epoch that all of them have."""
    first = results[0]
    if len(results) == 1:
        return first
    summaries = [result.summary for result in results]
    summary = dict(first.summary)
    for key in ("test", "test_before_folding"):
        summary[key] = _means([one[key] for one in summaries]) if all(one[key] for one in summaries) else None
    costs = ("seconds", "peak_memory_mb", "evaluation_seconds")
    summary |= _means([{key: one[key] for key in costs if key in one} for one in summaries])
    epochs = [
        _means(some) | {"epoch": some[0]["epoch"]} for some in zip(*(one.epochs for one in results), strict=False)
    ]
    return Result(first.run, summary, epochs, first.task)


def _means(mappings: Sequence[dict[str, float]]) -> dict[str, float]:
    """The mean of each entry that all of them have."""
    common = [key for key in mappings[0] if all(key in other for other in mappings)]
    return {key: mean_std([one[key] for one in mappings])[0] for key in common}


def mixed_precision(arms: Sequence[Arm]) -> list[str]:
    """Pairs that a difference is taken of although their runs computed in different precision, as ``auto`` gives on
    different machines: each as text."""
    runs = {(arm.name, one.run.seed, one.run.fold): one for arm in arms for one in arm.runs}
    found = []
    for arm in arms[1:]:
        for one in arm.runs:
            if other := runs.get((arm.base, one.run.seed, one.run.fold)):
                mine, theirs = (result.summary.get("precision") for result in (one, other))
                if mine != theirs:
                    found.append(f"{one.run.name} ({mine}) with {other.run.name} ({theirs})")
    return sorted(found)


def common_base(arms: Sequence[Arm]) -> str | None:
    """The arm that all others are compared with; None if they are compared with different ones."""
    return arms[0].name if {arm.base for arm in arms[1:]} <= {arms[0].name} else None


def disagreement(epoch: dict[str, float]) -> float | None:
    """Mean over the layers of the experts' disagreement; None without experts."""
    values = [value for name, value in epoch.items() if name.startswith("ewa/disagreement/")]
    return sum(values) / len(values) if values else None
