"""The figures of a study, from its finished runs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pointewa.study.definition import Study, StudyRun
from pointewa.study.statistics import Paired, mean_std, paired
from pointewa.tasks.base import Task


@dataclass(frozen=True)
class Result:
    """A finished run.

    Args:
        run: its definition.
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
        results: by seed.
        difference: of the primary metric on the test split to the baseline's; None with fewer than two common seeds.
        by_seed: the differences, of which it is the mean.
        slower: ratio of the seconds of training to the baseline's, for each common seed.
    """

    name: str
    task: type[Task]
    results: dict[int, Result]
    difference: Paired | None = None
    by_seed: dict[int, float] = field(default_factory=dict)
    slower: list[float] = field(default_factory=list)

    def test(self, metric: str) -> list[float]:
        """A metric on the test split, for each seed."""
        return [result.summary["test"][metric] for result in self.results.values()]

    def figures(self) -> dict[str, Any]:
        """All figures, for JSON; None for those that do not exist."""
        first = next(iter(self.results.values())).summary if self.results else {}
        best = [result.val_best for result in self.results.values() if result.val_best]
        last = [result.val_last for result in self.results.values() if result.val_last is not None]
        primary = self.task.primary()
        series = {f"test_{name}": self.test(name) for name, metric in self.task.metrics.items() if metric.headline}
        series |= {f"val_{primary}_last": last, f"val_{primary}_best": [value for value, _ in best]}
        figures: dict[str, Any] = {"arm": self.name, "seeds": list(self.results)}
        for name, values in series.items():
            figures[name], figures[f"{name}_std"] = (None if math.isnan(one) else one for one in mean_std(values))
        figures["val_best_epochs"] = [epoch for _, epoch in best]
        found = self.difference
        keys = {"difference": "mean", "low": "low", "high": "high", "p": "p", "pairs": "pairs"}
        figures |= {key: getattr(found, name) if found else None for key, name in keys.items()}
        figures["p"] = None if found is None or math.isnan(found.p) else found.p
        return figures | {key: first.get(key) for key in ("parameters_in_training", "parameters")}


def gather(study: Study) -> list[Arm]:
    """The figures of each arm, as far as its runs are finished.

    Raises:
        CheckpointError: a damaged summary.
    """
    task, primary = study.task, study.task.primary()
    results: dict[str, dict[int, Result]] = {arm: {} for arm in study.arms}
    for run in study.runs:
        if summary := run.summary():
            results[run.arm][run.seed] = Result(run, summary, run.epochs(), task)
    base, arms = results[study.arms[0]], [Arm(study.arms[0], task, results[study.arms[0]])]
    for name in study.arms[1:]:
        mine = results[name]
        pairs = [(seed, mine[seed].summary, base[seed].summary) for seed in mine if seed in base]
        values = [[one[place]["test"][primary] for one in pairs] for place in (1, 2)]
        by_seed = {seed: round(one["test"][primary] - other["test"][primary], 9) for seed, one, other in pairs}
        slower = [one["seconds"] / other["seconds"] for _, one, other in pairs if other["seconds"]]
        arms.append(Arm(name, task, mine, paired(*values), by_seed, slower))
    return arms


def mixed_precision(arms: Sequence[Arm]) -> list[str]:
    """Pairs that a difference is taken of although their runs computed in different precision, as ``auto`` gives on
    different machines: each as text."""
    base, found = arms[0].results, []
    for arm in arms[1:]:
        for seed in arm.results.keys() & base.keys():
            mine, other = (one[seed].summary.get("precision") for one in (arm.results, base))
            if mine != other:
                found.append(f"{arm.name}-seed{seed} ({mine}) with {arms[0].name}-seed{seed} ({other})")
    return sorted(found)


def disagreement(epoch: dict[str, float]) -> float | None:
    """Mean over the layers of the experts' disagreement; None without experts."""
    values = [value for name, value in epoch.items() if name.startswith("ewa/disagreement/")]
    return sum(values) / len(values) if values else None
