"""The paired differences of several studies in one picture: a forest plot, from the tables that their reports wrote."""

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from omegaconf import OmegaConf

from pointewa.config import read_yaml
from pointewa.errors import ConfigError
from pointewa.safe.files import atomic_write
from pointewa.study.plots import COLOURS
from pointewa.study.report import RESULTS
from pointewa.study.statistics import Paired, mean_std, paired
from pointewa.tasks import names, task_class
from pointewa.tasks.base import Metric


@dataclass(frozen=True)
class Row:
    """An arm beside another one of the same study.

    Args:
        study: name of the study.
        arm: name of the arm.
        base: that it is compared with.
        metric: the study's primary one.
        difference: over the seeds that both have.
    """

    study: str
    arm: str
    base: str
    metric: Metric
    difference: Paired

    @property
    def p(self) -> float | None:
        """Of the difference; None if it is the same for every seed, so that its spread is unknown."""
        return None if math.isnan(self.difference.p) else self.difference.p


def read_rows(folder: Path, pairs: Sequence[tuple[str, str]] = ()) -> list[Row]:
    """The differences in a study's report, in percentage points of its primary metric.

    Args:
        folder: with the report's ``results.csv``.
        pairs: arms and what each is compared with, of which a study may lack some; none: all arms, each with the one
            that its study compares it with.

    Raises:
        ConfigError: no such report, or its metric has another unit.
    """
    path = folder / RESULTS
    try:
        with open(path, newline="", encoding="utf-8") as file:
            lines = list(csv.DictReader(file))
        key = next(name for name in lines[0] if name.startswith("test_"))
        found: dict[str, dict[int, dict[str, float]]] = {}
        for line in lines:
            found.setdefault(line["arm"], {}).setdefault(int(line["seed"]), {})[line.get("fold", "")] = float(line[key])
    except FileNotFoundError as error:
        raise ConfigError(f"{folder}: expected a study's report, found no {RESULTS} in it") from error
    except (IndexError, KeyError, StopIteration, TypeError, ValueError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{path}: expected a study's table, with arm, seed and test_... of each run") from error
    if "way" in lines[0]:
        raise ConfigError(f"{path}: expected a study's table, found that of few-shot folds, which has its differences "
                          "itself: leave it out")  # fmt: skip
    known = [task_class(task) for task in names()]
    metrics = {f"test_{key}": metric for task in known for key, metric in {**task.metrics, **task.further}.items()}
    if key not in metrics or metrics[key].unit != "%":
        raise ConfigError(f"{path}: expected a metric in percent, found {key}: leave this study out")
    # Over folds, if there are any, a seed has the mean; one that lacks some does not count, as in the report.
    folds = {fold for seeds in found.values() for mine in seeds.values() for fold in mine}
    means = {
        arm: {seed: mean_std([*mine.values()])[0] for seed, mine in seeds.items() if mine.keys() == folds}
        for arm, seeds in found.items()
    }
    rows, against = [], _against(folder / "study.yaml")
    for arm, base in pairs or [(arm, against.get(arm, next(iter(means)))) for arm in list(means)[1:]]:
        common = [seed for seed in means.get(arm, ()) if seed in means.get(base, ())]
        if difference := paired([means[arm][seed] for seed in common], [means[base][seed] for seed in common]):
            rows.append(Row(folder.resolve().name, arm, base, metrics[key], difference))
    return rows


def _against(path: Path) -> dict[str, str]:
    """What the report's copy of its study says of arms that are not compared with the first one."""
    found = OmegaConf.to_container(read_yaml(path)).get("against") if path.exists() else None
    return found if isinstance(found, dict) else {}


def save(path: Path, rows: Sequence[Row]) -> None:
    """Draw the differences with their 95 % intervals, study by study.

    Args:
        path: .png, .pdf or .svg.
        rows: those of a study one after the other.
    """
    from matplotlib.figure import Figure  # without pyplot, which looks for a display and keeps state

    figure = Figure((8, 1.2 + 0.34 * len(rows)), layout="constrained")
    axes = figure.subplots()
    axes.axvline(0, color="0.5", linewidth=1)
    for place, row in enumerate(rows):
        found = row.difference
        clear = found.low > 0 or found.high < 0
        axes.errorbar([found.mean], [place], xerr=[[found.mean - found.low], [found.high - found.mean]], fmt="D",
                      color=COLOURS[2] if clear else "0.45", capsize=4, markersize=5)  # fmt: skip
        if place and row.study != rows[place - 1].study:
            axes.axhline(place - 0.5, color="0.85", linewidth=1)
    texts = [f"{row.study}: {row.arm} - {row.base} (n = {row.difference.pairs})" for row in rows]
    axes.set_yticks(range(len(rows)), texts)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(axis="x", color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    labels = " / ".join(dict.fromkeys(row.metric.label for row in rows))
    figure.supxlabel(f"difference in test {labels}, percentage points\n"
                     "(mean and 95 % interval; blue where it does not contain 0)", fontsize="medium")  # fmt: skip
    dated = {".png": "Software", ".pdf": "CreationDate", ".svg": "Date"}[path.suffix]
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=120, format=path.suffix[1:], facecolor="white", metadata={dated: None})
