"""The page of a finished run: its result, curves, experts, what its task shows, and how it was made."""

import json
import shlex
import warnings
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from pointewa.config import Config, flat, load_config
from pointewa.errors import CheckpointError, ConfigError, counted, first_line
from pointewa.ewa.experts import moe_layers
from pointewa.runs.folder import CONFIG
from pointewa.runs.log import board_writer, read_metrics
from pointewa.runs.summary import SUMMARY, after_training, read_summary
from pointewa.runs.weights import has_state, restore
from pointewa.tasks import task_of
from pointewa.tasks.base import Shown, Subjects, Task
from pointewa.viz import drawings
from pointewa.viz.board import add_cloud, add_features, add_hyperparameters
from pointewa.viz.drawings import Drawing
from pointewa.viz.html import save_page, svg_html
from pointewa.viz.panels import plain_panel
from pointewa.viz.patches import cut, patch_panels
from pointewa.viz.report import Curves, curves_figure, section_html, table_html, text_html

HTML = "report.html"
_PLACES = ("data.root", "data.stream")  # they say where a run was made, not how


def write(
    folder: Path, subjects: Subjects, out: Path | None = None, count: int = 8, step: int | None = None
) -> dict[str, Any]:
    """Write the page of a finished run.

    Args:
        folder: of the run.
        subjects: its model, and the split that it was tested on.
        out: the page; None: ``report.html`` in the folder.
        count: mistakes or reconstructions that are shown at most.
        step: the iteration under which TensorBoard shows the same; None: it does not.

    Returns:
        The numbers on the page, and as "html" where it is.

    Raises:
        CheckpointError: the run is not finished.
        UserError: what the pictures need is missing or damaged.
        OSError: the page cannot be written.
    """
    summary = read_summary(folder)
    if summary is None:
        raise CheckpointError(f"{folder}: not finished, or no run folder: the same training command resumes it")
    task = task_of(summary, str(folder / SUMMARY))
    shown = task(subjects.config).show(subjects, count)
    out = out or folder / HTML
    save_page(out, f"run {folder.resolve().name}", _sections(folder, summary, subjects, task, shown))
    if step is not None:
        _fill_board(folder, summary, subjects, shown, step)
    return {"html": str(out), **shown.metrics, "objects": len(subjects.clouds), **shown.numbers}


def experts(folder: Path, title: str = "") -> Drawing | None:
    """The experts of the run in a folder; None of one without, or whose state of training is gone."""
    if not has_state(folder):
        return None
    model = restore(folder).model
    return drawings.experts(model, read_metrics(folder), title) if moe_layers(model) else None


def _sections(folder: Path, summary: dict[str, Any], subjects: Subjects, task: type[Task], shown: Shown) -> list[str]:
    """The page from top to bottom."""
    again = ", ".join(f"{one.label} {one.text(shown.metrics[key])}"
                      for key, one in task.metrics.items() if key in shown.metrics)  # fmt: skip
    what = f"{subjects.what}, {counted(len(subjects.clouds), 'object')}, {after_training(summary)}. "
    what += f"Finished {_finished(folder, summary)}."
    text = f"<p>{escape(what)}{again and f' Evaluated again for this page: {escape(again)}.'}</p>\n"
    columns, rows = task.result(summary)
    page = [section_html("Result", text, table_html(rows, columns))]
    if curves := curves_figure(read_metrics(folder), _diagrams(task)):
        page.append(section_html("Training", svg_html(curves)))
    if drawn := experts(folder):
        page.append(section_html("Experts", svg_html(drawn.of("html"))))
    page += shown.sections
    if command := _command(folder, summary):
        page.append(section_html("The same training again", text_html(command)))
    environment = summary.get("environment")
    if isinstance(environment, dict) and environment:
        page.append(section_html("Environment", table_html(list(environment.items()))))
    page.append(section_html("Configuration", text_html((folder / CONFIG).read_text(errors="replace"))))
    return page


def _finished(folder: Path, summary: dict[str, Any]) -> str:
    """When the run ended; of one of version 0.2 or earlier, when its summary was last written."""
    try:
        ended = datetime.fromisoformat(summary["finished"])
    except (KeyError, TypeError, ValueError):
        ended = datetime.fromtimestamp((folder / SUMMARY).stat().st_mtime, UTC)
    return f"{ended:%Y-%m-%d %H:%M} {ended.tzname() or ''}".strip()


def _command(folder: Path, summary: dict[str, Any]) -> str:
    """A command that trains as the run was trained, wherever the files of its configuration are now; empty for a run
    whose configuration is not valid."""
    try:
        config = load_config([folder / CONFIG])
    except ConfigError:
        return ""
    processes, ours, theirs = summary.get("processes", 1), flat(config), flat(Config())
    nproc = ["--nproc", str(processes)] if processes != 1 else []
    keys = [f"{key}={_plain(value)}" for key, value in ours.items()
            if value != theirs[key] and not key.startswith("run.")]  # fmt: skip
    return shlex.join(["python", "-m", "tools.train", *nproc, *keys])


def _plain(value: Any) -> str:
    """As YAML on one line: text as it is where that is read as the same text."""
    if isinstance(value, str) and OmegaConf.from_dotlist([f"key={value}"]).key == value:
        return value
    return json.dumps(value)


def _diagrams(task: type[Task]) -> list[Curves]:
    """The loss, the metrics, the optimizer's curves, and the share rate of experts that are averaged."""
    metrics = [Curves(one.axis, {"training": f"train/{key}", "validation": f"val/{key}"})
               for key, one in task.metrics.items() if key != "loss"]  # fmt: skip
    return [
        Curves("loss", {"training": "train/loss", "validation": "val/loss"}),
        *metrics,
        Curves("learning rate", {"learning rate": "train/lr"}, logarithmic=True),
        Curves("share rate", {"share rate": "ewa/share_rate"}),
        Curves("norm of the gradient", {"norm of the gradient": "train/grad_norm"}, logarithmic=True),
    ]


def _fill_board(folder: Path, summary: dict[str, Any], subjects: Subjects, shown: Shown, step: int) -> None:
    """Add to the run's TensorBoard what is no curve: clouds and their patches, the task's figures, features,
    hyperparameters with the result."""
    if (writer := board_writer(folder)) is None:
        return
    clouds, model = subjects.clouds, subjects.loaded.model
    task, arch = task_of(summary), getattr(model, "architecture", None)
    with writer as board:
        for item in subjects.items([], 4) if task.of_points else ():
            add_cloud(board, f"clouds/{item.name}", plain_panel(item.points, item.name), step)
            if arch:
                patches = cut(item.points, arch.num_groups, arch.group_size)
                add_cloud(board, f"patches/{item.name}", patch_panels(item.points, patches, item.name)[1], step)
        for tag, figure in shown.figures.items():
            board.add_figure(tag, figure, step)
        if task.of_points and hasattr(model, "features"):
            try:
                add_features(board, subjects.features(), clouds.labels, clouds.class_names, step)
            except ValueError as error:  # too few objects, or features that are not finite
                warnings.warn(f"TensorBoard's projector is left out: {first_line(error)}", stacklevel=2)
        add_hyperparameters(board, _hyperparameters(load_config([folder / CONFIG])), summary["test"], step)


def _hyperparameters(config: Config) -> dict[str, Any]:
    return {key: value for key, value in flat(config).items()
            if value is not None and not key.startswith("run.") and key not in _PLACES}  # fmt: skip
