"""One page of a run: figures, curves, confusion matrix, surest mistakes, what predictions rest on, how it was made.

python -m tools.report runs/x
python -m tools.report runs/x --out x.html data.root=/data

The page is one file that opens in any browser without a network. The run must be finished, and a classifier's.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pointewa.config import load_config
from pointewa.errors import CheckpointError, ConfigError
from pointewa.ewa.experts import moe_layers
from pointewa.runs.folder import CONFIG
from pointewa.runs.log import read_metrics
from pointewa.runs.summary import read_summary
from pointewa.runs.weights import has_state, restore
from pointewa.viz.board import add_cloud, add_features, add_hyperparameters
from pointewa.viz.confusion import confusion_figure
from pointewa.viz.experts import disagreements, experts_figure, pairwise_distances
from pointewa.viz.html import clouds_html, save_page, svg_html
from pointewa.viz.panels import plain_panel
from pointewa.viz.patches import cut, patch_panels
from pointewa.viz.report import confusion_html, curves_figure, result_html, table_html, text_html
from tools import cli, visualize
from tools.subjects import Subjects

HTML = "report.html"


def parts(folder: Path, subjects: Subjects, args: argparse.Namespace) -> tuple[list[str], dict[str, Any]]:
    """The page from top to bottom, and the figures on it."""
    summary = read_summary(folder)
    if summary is None:
        raise CheckpointError(f"{folder}: not finished, or no run folder: the same training command resumes it")
    names, result = subjects.classifier.class_names, subjects.evaluation
    what = f"{subjects.what}, {len(result.labels)} objects"
    page = [
        f"<h2>Result</h2>\n<p>{what}, after the last of {summary['epochs']} epochs. "
        f"Evaluated again for this page: {result.accuracy:.2f} %, mean-class {result.mean_class_accuracy:.2f} %.</p>\n",
        result_html(summary),
    ]
    records = read_metrics(folder)
    if curves := curves_figure(records):
        page += ["<h2>Training</h2>\n", svg_html(curves)]
    if has_state(folder) and moe_layers(model := restore(folder).model):
        page += ["<h2>Experts</h2>\n", svg_html(experts_figure(disagreements(records), pairwise_distances(model), ""))]
    page += ["<h2>Confusion matrix</h2>\n", confusion_html(result.confusion, names, what)]
    figures: dict[str, Any] = {"oa": result.accuracy, "macc": result.mean_class_accuracy, "objects": len(result.labels)}
    if result.accuracy < 100:
        mistakes, found = visualize.errors(subjects, args)
        page += [f"<h2>{mistakes.heading}</h2>\n", clouds_html(mistakes)]
        figures |= {"mistakes": found["mistakes"]}
        args.object = [str(found["shown"][0]["index"])]
    args.object += ["0", str(len(result.labels) // 2)]
    drawn, _ = visualize.saliency_of(subjects, args)
    page += ["<h2>What predictions rest on</h2>\n", clouds_html(drawn)]
    environment = summary.get("environment")
    rows = list(environment.items()) if isinstance(environment, dict) else []
    page += ["<h2>Environment</h2>\n", table_html(rows)] if rows else []
    page += ["<h2>Configuration</h2>\n", text_html((folder / CONFIG).read_text(errors="replace"))]
    return page, figures


def fill_board(folder: Path, subjects: Subjects, step: int) -> None:
    """Add to the run's TensorBoard what is no curve: clouds and their patches, confusion matrix, features,
    hyperparameters with the result."""
    from torch.utils.tensorboard import SummaryWriter

    clouds, confusion, arch = subjects.clouds, subjects.evaluation.confusion, subjects.loaded.model.architecture
    with SummaryWriter(str(folder)) as board:
        for item in subjects.items([], 4):
            add_cloud(board, f"clouds/{item.name}", plain_panel(item.points, item.name), step)
            patches = cut(item.points, arch.num_groups, arch.group_size)
            add_cloud(board, f"patches/{item.name}", patch_panels(item.points, patches, item.name)[1], step)
        board.add_figure("confusion matrix", confusion_figure(confusion, clouds.class_names, subjects.what), step)
        add_features(board, subjects.features(), clouds.labels, clouds.class_names, step)
        add_hyperparameters(board, load_config([folder / CONFIG]), read_summary(folder)["test"], step)


def write(
    folder: Path,
    overrides: Sequence[str] = (),
    config: Sequence[str] = (),
    out: Path | None = None,
    count: int = 8,
    step: int | None = None,
) -> dict[str, Any]:
    """Write the page of a finished run.

    Args:
        folder: of the run.
        overrides: of its configuration, such as where its data are now.
        config: files of configuration.
        out: the page; None: in the folder.
        count: mistakes to show.
        step: the iteration at which `fill_board` is to be called too.

    Returns:
        The figures on the page, and as ``html`` where it is.

    Raises:
        UserError: not finished, no classifier, or its data are not found.
    """
    if not (folder / CONFIG).is_file():
        raise CheckpointError(f"{folder}: expected a run folder, found no {CONFIG} in it")
    args = argparse.Namespace(run=str(folder), config=config, overrides=overrides, split="test", up="y", object=[],
                              columns=None, count=count)  # fmt: skip
    subjects, out = Subjects(args), out or folder / HTML
    page, figures = parts(folder, subjects, args)
    save_page(out, f"run {folder.resolve().name}", page)
    if step is not None:
        fill_board(folder, subjects, step)
    return {"html": str(out), **figures}


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = cli.parser(*__doc__.split("\n\n", 1))
    parser.add_argument("run", help="run folder of a finished training")
    cli.add_config(parser)
    parser.add_argument("--count", type=int, default=8, metavar="N", help="mistakes to show (default 8)")
    parser.add_argument("--out", type=Path, metavar="FILE", help=f"the page (default {HTML} in the run folder)")
    args = parser.parse_intermixed_args(argv)
    if args.count < 1:
        raise ConfigError(f"--count: expected at least 1, found {args.count}")
    figures = write(Path(args.run), args.overrides, args.config, args.out, args.count)
    if args.json:
        print(json.dumps(figures))
    print(f"wrote {figures['html']} (open it in any browser)", file=sys.stderr if args.json else sys.stdout)


if __name__ == "__main__":
    cli.run(main)
