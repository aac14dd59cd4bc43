"""The plots of a study. An arm has the same colour in all of them, and the same figures give the same bytes."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pointewa.safe.files import atomic_write
from pointewa.study.figures import Arm, disagreement
from pointewa.tasks.base import Metric

PICTURES = ("curves.png", "disagreement.png", "differences.png")
# Okabe and Ito's palette for colour-blind readers, without its yellow, which is faint on white.
COLOURS = ("#000000", "#E69F00", "#0072B2", "#009E73", "#D55E00", "#CC79A7", "#56B4E9")
DASHES = ("-", "--", ":", "-.")  # for more arms than colours


def save_plots(out: Path, arms: Sequence[Arm]) -> list[str]:
    """Draw the plots that have data; returns the names of the files.

    Args:
        out: folder.
        arms: of the study, the baseline first.
    """
    made = []
    for name, draw in zip(PICTURES, (_curves, _disagreement, _differences), strict=True):
        if figure := draw(arms):
            with atomic_write(out / name) as temporary:
                figure.savefig(temporary, dpi=120, format="png", facecolor="white", metadata={"Software": None})
            made.append(name)
    return made


def style(number: int) -> dict[str, Any]:
    """Colour and line of the arm with this number."""
    return {"color": COLOURS[number % len(COLOURS)], "linestyle": DASHES[number // len(COLOURS) % len(DASHES)]}


def _figure(columns: int, width: float, height: float) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure  # without pyplot, which looks for a display and keeps state

    figure = Figure((width, height), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)[0].tolist()
    for one in axes:
        one.set_facecolor("white")
        one.grid(color="0.9")
        one.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _curves(arms: Sequence[Arm]) -> Any:
    task = arms[0].task
    wanted = (("train/loss", "training loss"), (f"val/{task.primary()}", f"validation: {_primary(arms).axis}"))
    panels = [(series, label) for key, label in wanted if (series := _series(arms, lambda one, key=key: one.get(key)))]
    if not panels:
        return None
    figure, axes = _figure(len(panels), 2 + 5 * len(panels), _height(arms))
    for one, (series, label) in zip(axes, panels, strict=True):
        _draw(one, series, label)
    _legend(axes[0])
    return figure


def _disagreement(arms: Sequence[Arm]) -> Any:
    series = _series(arms, lambda epoch: disagreement(epoch) or None)  # no 0 on a log axis
    if not series:
        return None
    figure, (axes,) = _figure(1, 7.5, _height(arms))
    axes.set_yscale("log")
    _draw(axes, series, "disagreement of the experts, mean over layers")
    _legend(axes)
    return figure


def _differences(arms: Sequence[Arm]) -> Any:
    compared = [(number, arm) for number, arm in enumerate(arms) if arm.by_seed]
    if not compared:
        return None
    figure, (axes,) = _figure(1, 7, 1.6 + 0.6 * len(compared))
    axes.axvline(0, color="0.5", linewidth=1)
    for place, (number, arm) in enumerate(compared):
        colour = style(number)["color"]
        axes.plot(list(arm.by_seed.values()), [place + 0.15] * len(arm.by_seed), "o", color=colour, alpha=0.6,
                  label="a seed" if not place else None)  # fmt: skip
        if found := arm.difference:
            sides = [[found.mean - found.low], [found.high - found.mean]]
            axes.errorbar([found.mean], [place - 0.15], xerr=sides, fmt="D", color=colour, capsize=4,
                          label="mean and 95 % interval" if not place else None)  # fmt: skip
    axes.set_yticks(range(len(compared)), [arm.name for _, arm in compared])
    axes.set_ylim(len(compared) - 0.5, -0.5)
    unit = "percentage points" if _primary(arms).unit == "%" else _primary(arms).unit
    axes.set_xlabel(", ".join(filter(None, [f"difference to {arms[0].name} in test {_primary(arms).label}", unit])))
    axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
    return figure


def _primary(arms: Sequence[Arm]) -> Metric:
    return arms[0].task.metrics[arms[0].task.primary()]


def _series(arms: Sequence[Arm], value: Callable[[dict], float | None]) -> dict[tuple[int, str], dict[int, list]]:
    """For each arm with values, those of its seeds by epoch, counted from 1."""
    found: dict[tuple[int, str], dict[int, list]] = {}
    for number, arm in enumerate(arms):
        for result in arm.results.values():
            for epoch in result.epochs:
                if (one := value(epoch)) is not None:
                    found.setdefault((number, arm.name), {}).setdefault(epoch["epoch"] + 1, []).append(one)
    return found


def _draw(axes: Any, series: dict[tuple[int, str], dict[int, list]], label: str) -> None:
    from matplotlib.ticker import MaxNLocator

    for (number, name), by_epoch in series.items():
        epochs, values = list(by_epoch), list(by_epoch.values())
        means, marker = [sum(one) / len(one) for one in values], "o" if len(epochs) < 3 else None
        axes.plot(epochs, means, label=name, linewidth=1.6, marker=marker, markersize=4, **style(number))
        if max(map(len, values)) > 1:
            axes.fill_between(epochs, [min(one) for one in values], [max(one) for one in values],
                              color=style(number)["color"], alpha=0.15, linewidth=0)  # fmt: skip
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="epoch (line: mean, band: all seeds)", ylabel=label)


def _legend(axes: Any) -> None:
    """Beside the panels, where it hides no curve."""
    axes.figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", frameon=False)


def _height(arms: Sequence[Arm]) -> float:
    return max(4.2, 0.6 + 0.22 * len(arms))
