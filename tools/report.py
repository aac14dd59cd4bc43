"""One page of a run: figures, curves, confusion matrix, surest mistakes, what predictions rest on, how it was made.

python -m tools.report runs/x
python -m tools.report runs/x --out x.html data.root=/data

The page is one file that opens in any browser without a network. The run must be finished, and a classifier's.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from pointewa.engine.checkpoint import has_state, restore
from pointewa.engine.runs import CONFIG, read_summary
from pointewa.errors import CheckpointError, ConfigError
from pointewa.ewa.experts import moe_layers
from pointewa.viz.experts import disagreements, experts_figure, pairwise_distances, read_metrics
from pointewa.viz.html import clouds_html, save_page, svg_html
from pointewa.viz.report import confusion_html, curves_figure, result_html, table_html, text_html
from tools import cli, visualize
from tools.subjects import Subjects

_HTML = "report.html"


def parts(folder: Path, subjects: Subjects, args: argparse.Namespace) -> tuple[list[str], dict[str, Any]]:
    """The page from top to bottom, and the figures on it."""
    summary = read_summary(folder)
    if summary is None:
        raise CheckpointError(f"{folder}: not finished, or no run folder: the same training command goes on with it")
    names, result = subjects.classifier.class_names, subjects.evaluation()
    what = f"{subjects.what}, {len(result.labels)} objects"
    page = [
        f"<h2>Result</h2>\n<p>{what}, after the last of {summary['epochs']} epochs. "
        f"Evaluated again for this page: {result.oa:.2f} %, mean-class {result.macc:.2f} %.</p>\n",
        result_html(summary),
    ]
    records = read_metrics(folder)
    if curves := curves_figure(records):
        page += ["<h2>Training</h2>\n", svg_html(curves)]
    if has_state(folder) and moe_layers(model := restore(folder).model):
        page += ["<h2>Experts</h2>\n", svg_html(experts_figure(disagreements(records), pairwise_distances(model), ""))]
    page += ["<h2>Confusion matrix</h2>\n", confusion_html(result.confusion, names, what)]
    figures: dict[str, Any] = {"oa": result.oa, "macc": result.macc, "objects": len(result.labels)}
    if result.oa < 100:
        mistakes, found = visualize.errors(subjects, args, result)
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


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = cli.parser(*__doc__.split("\n\n", 1))
    parser.add_argument("run", help="run folder of a finished training")
    cli.add_config(parser)
    parser.add_argument("--count", type=int, default=8, metavar="N", help="mistakes to show (default 8)")
    parser.add_argument("--out", metavar="FILE", help=f"the page (default {_HTML} in the run folder)")
    args = parser.parse_intermixed_args(argv)
    if args.count < 1:
        raise ConfigError(f"--count: expected at least 1, found {args.count}")
    folder = Path(args.run)
    out = Path(args.out) if args.out else folder / _HTML
    if not (folder / CONFIG).is_file():
        raise CheckpointError(f"{folder}: expected a run folder, found no {CONFIG} in it")
    args.split, args.up, args.object, args.columns = "test", "y", [], None
    page, figures = parts(folder, Subjects(args), args)
    save_page(out, f"run {folder.resolve().name}", page)
    if args.json:
        print(json.dumps({"html": str(out), **figures}))
    print(f"wrote {out} (open it in any browser)", file=sys.stderr if args.json else sys.stdout)


if __name__ == "__main__":
    cli.run(main)
