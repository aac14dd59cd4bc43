"""Train arms x seeds one after the other, resume wherever that was stopped, and report the differences.

python -m tools.study studies/layers.yaml data.root=/data
python -m tools.study studies/layers.yaml --jobs 2 --budget 3600 train.device=cuda
python -m tools.study studies/layers.yaml --report-only

A study file:

    description: Does averaging help, and in which layers?
    configs: [configs/modelnet40.yaml]  # as for tools.train --config
    settings: {model: {preset: tiny}, train: {epochs: 10}, data: {val_fraction: 0.1}}  # of all arms
    arms:  # the first is the baseline
      dense: {ewa: {enabled: false}}
      ewa:
      ewa-all: {moe: {layers: all}}
    seeds: [0, 1, 2]  # or for some arms others: {default: [0, 1, 2], dense: [0, 1, 2, 3, 4]}
    # folds: {data.variant: [fold0, fold1]}  # of a cross-validated set: a seed's result is the mean over them

Each run has its folder runs/STUDY/ARM-seedK (with folds ARM-FOLD-seedK), and its output is in a file beside it, with
.log. Whatever ends the tool ends its trainings too, and the same command resumes it. The report of all finished runs is
in runs/STUDY/report; --publish writes it to results/STUDY, unless a report of more runs is there.
"""

import json
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from pointewa.errors import ConfigError, Stopped, counted
from pointewa.runs.folder import Lock
from pointewa.study.definition import Study, StudyRun, load_study
from pointewa.study.figures import mixed_precision
from pointewa.study.queue import Outcome, QueueProgress, work
from pointewa.study.report import check_place, table, write_report
from pointewa.tools import cli
from pointewa.train.build import task_of_run
from pointewa.train.progress import say

TRAIN = (sys.executable, "-m", "pointewa", "train")


def train(
    study: Study, runs: list[StudyRun], console: Console, jobs: int, budget: float | None, keep_state: bool = True
) -> Outcome:
    """Train those of the runs that are not finished.

    Raises:
        ConfigError: a run that cannot start.
        CheckpointError: another process works on this study.
        Stopped: by SIGTERM or SIGINT; the trainings have saved and ended.
    """
    for run in runs:
        try:
            task_of_run(run.config, run.folder)
        except ConfigError as error:
            raise ConfigError(f"{run.name}: {error}") from error
    study.folder.mkdir(parents=True, exist_ok=True)
    with Lock(study.folder), QueueProgress(console, study.name, runs, jobs) as progress:
        progress.say(f"{study.name}: {progress.state()}")
        outcome = work(runs, TRAIN, progress, budget, keep_state)
        state = progress.state()
    if outcome.signal:
        raise Stopped(outcome.signal, f"{state}; the same command resumes")
    if outcome.out_of_time:
        say(console, f"The budget of {budget:g} s is used up: {state}; the same command resumes")
    return outcome


def still_free(out: Path, beside: Path, finished: int, problems: list[str]) -> Path:
    """Where the report goes after the trainings: ``out``, unless a fuller one has come there, which is a problem."""
    try:
        if finished and out != beside:
            check_place(out, finished)
    except ConfigError as error:
        problems.append(f"{error}; the report is in {beside}")
        return beside
    return out


def complain(problems: list[str], outcome: Outcome, count: int) -> None:
    """Raise what went wrong, if anything did.

    Raises:
        ConfigError: the problems, and the runs of ``count`` that failed.
    """
    if outcome.failures:
        lines = [f"  {name}: {failure}" for name, failure in outcome.failures.items()]
        problems.append("\n".join([f"{len(lines)} of {counted(count, 'run')} failed:", *lines]))
    if problems:
        raise ConfigError("\n".join(problems))


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = cli.parser(*__doc__.split("\n\n", 1))
    parser.add_argument("study", metavar="STUDY.yaml", help="the study file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="configuration of every run")
    cli.add_number(parser, "--jobs", metavar="N", help="trainings at a time (default 1)")
    again = "stop after so long; the same command resumes"
    cli.add_number(parser, "--budget", 0, float, metavar="SECONDS", help=again)
    parser.add_argument("--only", nargs="+", default=[], metavar="ARM", help="train only these; the report has all")
    parser.add_argument("--report-only", action="store_true", help="train nothing")
    parser.add_argument("--pdf", action="store_true", help="also write the plots of the report as PDF")
    place = parser.add_mutually_exclusive_group()
    place.add_argument("--publish", action="store_true", help="write the report to results/STUDY")
    place.add_argument("--out", type=Path, metavar="FOLDER", help="of the report (default runs/STUDY/report)")
    args = parser.parse_intermixed_args(argv)
    # What follows --only is taken for arms, and no arm's name has a '='.
    overrides = args.overrides + [word for word in args.only if "=" in word]
    only = [word for word in args.only if "=" not in word]
    if args.report_only:
        cli.refuse_unused(args, "--report-only", dict.fromkeys(("jobs", "budget"), ()))
        if only:
            raise ConfigError("--only: the report has all runs: leave it out")
    study = load_study(args.study, overrides)
    if unknown := [arm for arm in only if arm not in study.arms]:
        raise ConfigError(f"--only: expected some of {', '.join(study.arms)}, found {unknown[0]!r}")
    beside = study.folder / "report"
    out = args.out or (Path("results", study.name) if args.publish else beside)
    wanted = [] if args.report_only else [run for run in study.runs if not only or run.arm in only]
    if out != beside:  # with all of these trained
        check_place(out, sum(run in wanted or run.summary() is not None for run in study.runs))
    console = cli.console_of(args.json)
    outcome = Outcome() if args.report_only else train(study, wanted, console, args.jobs or 1, args.budget)
    finished, problems = sum(run.summary() is not None for run in study.runs), []
    out = still_free(out, beside, finished, problems)
    arms = write_report(study, out, args.pdf) if finished or args.report_only else []
    if args.json:
        print(json.dumps([arm.figures() for arm in arms]))
    elif arms:
        rows = table(arms)
        shown = list(rows[0])[: list(rows[0]).index("p, Holm") + 1]
        rows = [{key: row[key] for key in shown} for row in rows]
        result = Table(*rows[0], title=f"{study.name}: mean ± standard deviation over seeds")
        for row in rows:
            result.add_row(*row.values())
        console.print(result)
    if arms and (mixed := mixed_precision(arms)):
        say(console, f"caution: runs of different precision are compared: {', '.join(mixed)}", style="yellow")
    if arms:
        say(console, f"report: {out / 'README.md'}")
    complain(problems, outcome, len(study.runs))


if __name__ == "__main__":
    cli.run(main)
