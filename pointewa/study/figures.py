"""The figures of a study, of its finished runs."""

import math
from dataclasses import dataclass, field
from typing import Any

from pointewa.study.definition import Study, StudyRun
from pointewa.study.statistics import Paired, mean_std, paired


@dataclass(frozen=True)
class Result:
    """A finished run.

    Args:
        run: which.
        summary: its ``summary.json``.
        epochs: its ``metrics.jsonl``.
    """

    run: StudyRun
    summary: dict[str, Any]
    epochs: list[dict[str, float]]

    @property
    def val_last(self) -> float | None:
        """Validation accuracy after the last epoch, in percent; None without a validation split."""
        return self.epochs[-1].get("val/oa") if self.epochs else None

    @property
    def val_best(self) -> tuple[float, int] | None:
        """The highest validation accuracy, and its first epoch, counted from 1."""
        found = [(epoch["val/oa"], epoch["epoch"] + 1) for epoch in self.epochs if "val/oa" in epoch]
        return max(found, key=lambda one: one[0]) if found else None


@dataclass(frozen=True)
class Arm:
    """The figures of an arm, over its finished runs.

    Args:
        name: of the arm.
        results: by seed.
        difference: of test accuracy to the baseline, in percentage points; None with fewer than two common seeds.
        by_seed: the differences that it is the mean of.
        slower: seconds of training by those of the baseline, of each common seed.
    """

    name: str
    results: dict[int, Result]
    difference: Paired | None = None
    by_seed: dict[int, float] = field(default_factory=dict)
    slower: list[float] = field(default_factory=list)

    def test(self, figure: str) -> list[float]:
        """``oa``, ``macc`` or ``loss`` on the test split, of each seed."""
        return [result.summary["test"][figure] for result in self.results.values()]

    def figures(self) -> dict[str, Any]:
        """All of it as JSON; None where there is nothing to tell."""
        first = next(iter(self.results.values())).summary if self.results else {}
        best = [result.val_best for result in self.results.values() if result.val_best]
        last = [result.val_last for result in self.results.values() if result.val_last is not None]
        series = {"test_oa": self.test("oa"), "test_macc": self.test("macc"), "val_oa_last": last,
                  "val_oa_best": [value for value, _ in best]}  # fmt: skip
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
    results: dict[str, dict[int, Result]] = {arm: {} for arm in study.arms}
    for run in study.runs:
        if summary := run.summary():
            results[run.arm][run.seed] = Result(run, summary, run.epochs())
    base, arms = results[study.arms[0]], [Arm(study.arms[0], results[study.arms[0]])]
    for name in study.arms[1:]:
        mine = results[name]
        pairs = [(seed, mine[seed].summary, base[seed].summary) for seed in mine if seed in base]
        values = [[one[place]["test"]["oa"] for one in pairs] for place in (1, 2)]
        by_seed = {seed: round(one["test"]["oa"] - other["test"]["oa"], 9) for seed, one, other in pairs}
        slower = [one["seconds"] / other["seconds"] for _, one, other in pairs if other["seconds"]]
        arms.append(Arm(name, mine, paired(*values), by_seed, slower))
    return arms


def disagreement(epoch: dict[str, float]) -> float | None:
    """Mean over the layers of how far the experts are apart; None where there are none."""
    values = [value for name, value in epoch.items() if name.startswith("ewa/disagreement/")]
    return sum(values) / len(values) if values else None
