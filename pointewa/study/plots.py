"""The plots of a study. An arm has the same colour in all of them, and the same figures give the same bytes."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pointewa.safe.files import atomic_write
from pointewa.study.figures import Arm, common_base, disagreement
from pointewa.tasks.base import Metric

PICTURES = ("curves.png", "disagreement.png", "differences.png")
# Okabe and Ito's palette for colour-blind readers, without its yellow, which is faint on white.
COLOURS = ("#000000", "#E69F00", "#0072B2", "#009E73", "#D55E00", "#CC79A7", "#56B4E9")
TOGETHER = len(COLOURS)  # arms that can be told apart in one panel; of more each has a panel of its own
EPOCHS = "epoch (line: mean, band: all seeds)"
Series = dict[tuple[int, str], dict[int, list[float]]]  # by the number and name of an arm, by epoch: of its seeds


def save_plots(out: Path, arms: Sequence[Arm], pdf: bool = False) -> list[str]:
    """Draw the plots that have data, and remove those of an earlier report that have none now; returns their names.

    Args:
        out: folder.
        arms: of the study, the baseline first.
        pdf: also as PDF.
    """
    import matplotlib

    made = []
    for name, draw in zip(PICTURES, (_curves, _disagreement, _differences), strict=True):
        figure = draw(arms)
        for suffix, dated in ((".png", "Software"), (".pdf", "CreationDate")):
            path = (out / name).with_suffix(suffix)
            if figure is None or (suffix == ".pdf" and not pdf):
                path.unlink(missing_ok=True)
                continue
            with atomic_write(path) as temporary, matplotlib.rc_context({"pdf.fonttype": 42}):  # not Type 3
                figure.savefig(temporary, dpi=120, format=suffix[1:], facecolor="white", metadata={dated: None})
        made += [name] if figure else []
    return made


def style(number: int) -> dict[str, Any]:
    """Colour and line of the arm with this number."""
    return {"color": COLOURS[number % len(COLOURS)]}


def _figure(columns: int, width: float, height: float) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure  # without pyplot, which looks for a display and keeps state

    figure = Figure((width, height), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)[0].tolist()
    for one in axes:
        _plain(one)
    return figure, axes


def _plain(axes: Any) -> None:
    axes.set_facecolor("white")
    axes.grid(color="0.9")
    axes.spines[["top", "right"]].set_visible(False)


def _curves(arms: Sequence[Arm]) -> Any:
    task = arms[0].task
    wanted = (("train/loss", "training loss"), (f"val/{task.primary()}", f"validation: {_primary(arms).axis}"))
    panels = [(series, label) for key, label in wanted if (series := _series(arms, lambda one, key=key: one.get(key)))]
    return _panels(arms, panels) if panels else None


def _disagreement(arms: Sequence[Arm]) -> Any:
    series = _series(arms, lambda epoch: disagreement(epoch) or None)  # no 0 on a log axis
    return _panels(arms, [(series, "disagreement of the experts, mean over layers")], log=True) if series else None


def _panels(arms: Sequence[Arm], panels: Sequence[tuple[Series, str]], log: bool = False) -> Any:
    """Each of the series in a panel with all arms; of too many arms in one panel an arm."""
    if max(len(series) for series, _ in panels) > TOGETHER:
        return _small_multiples(panels, log)
    figure, axes = _figure(len(panels), 2 + 5 * len(panels), max(4.2, 0.6 + 0.22 * len(arms)))
    for one, (series, label) in zip(axes, panels, strict=True):
        if log:
            one.set_yscale("log")
        for (number, name), by_epoch in series.items():
            _draw(one, by_epoch, name, style(number)["color"])
        one.set(xlabel=EPOCHS, ylabel=label)
    # Beside the panels, where it hides no curve.
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", frameon=False)
    return figure


def _small_multiples(panels: Sequence[tuple[Series, str]], log: bool) -> Any:
    """A block of panels for each of the series: in each panel an arm, on the first one, which is the baseline where it
    has values, and on all others in grey. The first epochs, in which the curves are steep, are left out."""
    from matplotlib.figure import Figure

    columns = 6
    rows = [-(-(len(series) - 1) // columns) for series, _ in panels]
    figure = Figure((2.2 * columns + 0.4, sum(1.5 * count + 0.6 for count in rows)), layout="constrained")
    blocks = figure.subfigures(len(panels), 1, squeeze=False, height_ratios=[1.5 * count + 0.6 for count in rows])
    for block, count, (series, label) in zip(blocks[:, 0], rows, panels, strict=True):
        (_, first), base = next(iter(series)), next(iter(series.values()))
        block.suptitle(f"{label} (each arm on {first}, in black, and all others, in grey)", fontsize=10)
        grid = block.subplots(count, columns, sharex=True, sharey=True, squeeze=False).ravel()
        for axes, ((number, name), by_epoch) in zip(grid, list(series.items())[1:], strict=False):
            for other in series.values():
                axes.plot(list(other), [sum(one) / len(one) for one in other.values()], color="0.85", linewidth=0.7)
            _draw(axes, base, first, COLOURS[0])
            _draw(axes, by_epoch, name, COLOURS[1 + number % (TOGETHER - 1)])
            axes.set_title(name, fontsize=9, pad=3)
            _plain(axes)
        for axes in grid[len(series) - 1 :]:
            axes.set_axis_off()
        if log:
            grid[0].set_yscale("log")
        else:
            grid[0].set_ylim(*_settled(series))
            last = max(max(by_epoch) for by_epoch in series.values())
            grid[0].set_xlim(last / 4, last * 1.03)
        for axes in grid[max(0, len(series) - 1 - columns) : len(series) - 1]:
            axes.tick_params(labelbottom=True)
        block.supxlabel(EPOCHS, fontsize=9)
    return figure


def _settled(series: Series) -> tuple[float, float]:
    """The range of all values of the second half of the epochs."""
    values = [one for by_epoch in series.values() for epoch, some in by_epoch.items()
              if epoch > max(by_epoch) / 2 for one in some]  # fmt: skip
    room = 0.05 * (max(values) - min(values)) or 1.0
    return min(values) - room, max(values) + room


def _differences(arms: Sequence[Arm]) -> Any:
    compared = [(number, arm) for number, arm in enumerate(arms) if arm.by_seed]
    if not compared:
        return None
    figure, (axes,) = _figure(1, 7, 1.6 + (0.6 if len(compared) < TOGETHER else 0.36) * len(compared))
    axes.axvline(0, color="0.5", linewidth=1)
    for place, (number, arm) in enumerate(compared):
        colour = style(number)["color"]
        axes.plot(list(arm.by_seed.values()), [place + 0.15] * len(arm.by_seed), "o", color=colour, alpha=0.6,
                  label="a seed" if not place else None)  # fmt: skip
        if found := arm.difference:
            sides = [[found.mean - found.low], [found.high - found.mean]]
            axes.errorbar([found.mean], [place - 0.15], xerr=sides, fmt="D", color=colour, capsize=4,
                          label="mean and 95 % interval" if not place else None)  # fmt: skip
    base = common_base(arms)
    axes.set_yticks(range(len(compared)), [arm.name if base else f"{arm.name} - {arm.base}" for _, arm in compared])
    axes.set_ylim(len(compared) - 0.5, -0.5)
    unit = "percentage points" if _primary(arms).unit == "%" else _primary(arms).unit
    axes.set_xlabel(
        ", ".join(filter(None, [f"difference{f' to {base}' if base else ''} in test {_primary(arms).label}", unit]))
    )
    axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
    return figure


def _primary(arms: Sequence[Arm]) -> Metric:
    return arms[0].task.metrics[arms[0].task.primary()]


def _series(arms: Sequence[Arm], value: Callable[[dict], float | None]) -> Series:
    """For each arm with values, those of its seeds by epoch, counted from 1."""
    found: Series = {}
    for number, arm in enumerate(arms):
        for result in arm.results.values():
            for epoch in result.epochs:
                if (one := value(epoch)) is not None:
                    found.setdefault((number, arm.name), {}).setdefault(epoch["epoch"] + 1, []).append(one)
    return found


def _draw(axes: Any, by_epoch: dict[int, list[float]], name: str, colour: str) -> None:
    """An arm: the mean of its seeds, and all of them as a band."""
    from matplotlib.ticker import MaxNLocator

    epochs, values = list(by_epoch), list(by_epoch.values())
    marker = "o" if len(epochs) < 3 else None
    axes.plot(epochs, [sum(one) / len(one) for one in values], label=name, linewidth=1.6, marker=marker, markersize=4,
              color=colour)  # fmt: skip
    if max(map(len, values)) > 1:
        low, high = ([pick(one) for one in values] for pick in (min, max))
        axes.fill_between(epochs, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
