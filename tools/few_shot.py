"""Few-shot classification: arms x settings x folds, resumed wherever that was stopped, and their table.

python -m tools.few_shot --config configs/modelnet40.yaml --init-from runs/pretrained data.root=/data model.preset=tiny
python -m tools.few_shot --config configs/shapes.yaml --settings 5w10s 5w20s --folds 3 train.epochs=50 --jobs 2
python -m tools.few_shot --config configs/modelnet40.yaml --settings 5w10s --report-only model.preset=tiny
python -m tools.few_shot --config configs/modelnet40.yaml --steps 120 model.preset=tiny

A fold is `way` classes: `shot` training objects of each to train on, 20 test objects of each to test on. The arms are
scratch, and with --init-from pretrained and pretrained-ewa; scratch-ewa is trained if --only names it. The recipe is
configs/task/few_shot.yaml on top of the first --config. Published folds of ModelNet40, under data.root in
ModelNetFewshot/5way_10shot/0.pkl and so on, are used if they are there, else folds are drawn by a fixed seed; the table
says which.

Each run has its folder runs/NAME/SETTING-ARM-foldK, and its output is in a file beside it, with .log; training states
are removed as runs finish, their models stay. The report of all finished runs of these settings and folds is in
runs/NAME/report; --publish writes it to results/NAME.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from pointewa.datasets.splits import fold_entry, load_split
from pointewa.study.definition import StudyRun
from pointewa.study.few_shot import ARMS, FOLDS, SETTINGS, default_arms, load_few_shot
from pointewa.study.few_shot_report import differences, figures, gather, origin, table, write_report
from pointewa.study.queue import Outcome
from pointewa.study.report import check_place
from pointewa.tasks import task_class
from pointewa.tools import cli, study
from pointewa.train.progress import say


def check(runs: Sequence[StudyRun]) -> None:
    """Refuse what would make the trainings fail one after the other; also prepares the data, once for all of them.

    Raises:
        UserError: data that are not found or too few, weights that do not fit.
    """
    classes: dict[tuple[int, int], tuple[str, ...]] = {}
    for run in runs:
        config = replace(run.config, train=replace(run.config.train, device="cpu"))
        fold_entry(config)  # refuses missing ones of published folds
        setting = config.data.way, config.data.shot
        if setting not in classes:
            classes[setting] = load_split(config, "train").class_names
            load_split(config, "test")
    if first := next((run.config for run in runs if run.config.train.init_from), None):
        task = task_class(first.train.task)(first)
        task.load_initial(task.build_model(classes[first.data.way, first.data.shot]), first.train.init_from)


def show(console: Console, title: str, rows: list[dict[str, str]]) -> None:
    """Print rows as a table."""
    result = Table(*rows[0], title=title)
    for row in rows:
        result.add_row(*row.values())
    console.print(result)


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = cli.parser(*__doc__.split("\n\n", 1))
    cli.add_config(parser)
    parser.add_argument("--init-from", metavar="RUN", help="a pre-training for the arms pretrained and pretrained-ewa")
    parser.add_argument(
        "--settings", nargs="+", action="extend", default=[], metavar="5w10s", help=f"default: {' '.join(SETTINGS)}"
    )
    cli.add_number(parser, "--folds", metavar="N", default=FOLDS, help=f"folds 0 to N-1 (default {FOLDS})")
    parser.add_argument(
        "--only", nargs="+", action="extend", default=[], metavar="ARM", help=f"train only some of {', '.join(ARMS)}"
    )
    parser.add_argument("--name", help="of the folder of the runs (default few_shot-DATASET-MODEL)")
    cli.add_number(parser, "--steps", metavar="N", help="optimizer steps of a run, at least, in place of train.epochs")
    cli.add_number(parser, "--jobs", metavar="N", help="trainings at a time (default 1)")
    again = "stop after so long; the same command resumes"
    cli.add_number(parser, "--budget", 0, float, metavar="SECONDS", help=again)
    parser.add_argument("--report-only", action="store_true", help="train nothing")
    place = parser.add_mutually_exclusive_group()
    place.add_argument("--publish", action="store_true", help="write the report to results/NAME")
    place.add_argument("--out", type=Path, metavar="FOLDER", help="of the report (default runs/NAME/report)")
    args = parser.parse_intermixed_args(argv)
    overrides = list(args.overrides)
    for words in (args.settings, args.only):  # what follows them is taken for theirs, and none of them has a '='
        overrides += [word for word in words if "=" in word]
        words[:] = [word for word in words if "=" not in word]
    if args.report_only:
        cli.refuse_unused(args, "--report-only", dict.fromkeys(("jobs", "budget", "only"), ()))
    only = [] if args.report_only else args.only or default_arms(args.init_from)
    settings = args.settings or SETTINGS
    few_shot = load_few_shot(args.config, overrides, args.init_from, settings, args.folds, args.name, only, args.steps)
    whole, wanted = few_shot.study, few_shot.runs(only)
    beside = whole.folder / "report"
    out = args.out or (Path("results", whole.name) if args.publish else beside)
    if out != beside:  # with all of these trained
        check_place(out, sum(run in wanted or run.summary() is not None for run in whole.runs))
    console = cli.console_of(args.json)
    todo, outcome, problems = [run for run in wanted if run.summary() is None], Outcome(), []
    if todo:
        check(todo)
    if wanted:
        outcome = study.train(whole, wanted, console, args.jobs or 1, args.budget, keep_state=False)
    finished = sum(len(cell.summaries) for cell in gather(few_shot))
    out = study.still_free(out, beside, finished, problems)
    cells = write_report(few_shot, out) if finished or args.report_only else []
    if args.json:
        print(json.dumps(figures(cells) if cells else {}))
    elif cells:
        show(console, f"{whole.name}: mean ± standard deviation over folds", table(few_shot, cells))
        if rows := differences(few_shot, cells):
            show(console, "last epoch, fold by fold", rows)
        say(console, origin(cells))
        say(console, "The last epoch is the result. Best epoch, as published: selected by the queries themselves.")
    if cells:
        say(console, f"report: {out / 'README.md'}")
    if few_shot.left_out:
        say(console, f"note: without {' and '.join(few_shot.left_out)}, which have runs: say what they start from "
                     "(--init-from, CKPT=runs/x)")  # fmt: skip
    study.complain(problems, outcome, len(wanted))


if __name__ == "__main__":
    cli.run(main)
