"""Train a point transformer, with or without EWA; fold it, evaluate the dense model. Resumes an unfinished run.

python -m tools.train --config configs/shapes.yaml
python -m tools.train --config configs/shapes.yaml --nproc 2 run.name=x
python -m tools.train --config configs/modelnet40.yaml data.root=/data model.preset=tiny train.epochs=10
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from pointewa.config import Config
from pointewa.datasets.splits import training_data
from pointewa.datasets.subjects import Subjects
from pointewa.errors import ConfigError, Stopped, UserError, first_line
from pointewa.inference import page
from pointewa.runs.folder import find_run
from pointewa.runs.summary import SUMMARY, after_training, fold_text, read_summary
from pointewa.tasks import task_of
from pointewa.tools import cli
from pointewa.train.build import task_of_run
from pointewa.train.device import memory_advice
from pointewa.train.distributed import World, launch, launched, process_group
from pointewa.train.progress import say
from pointewa.train.trainer import Trainer

SETTLED = 300  # steps


def train(config: Config, world: World, console: Console) -> dict[str, Any]:
    """Train from the run's current state; returns its summary."""
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0))
    if restarts and config.run.name is None:
        raise ConfigError("run.name: torchrun --max-restarts needs a name to find the run by: run.name=x")
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)):
        config.run.overwrite = False  # what is there was written before the restart
    folder = world.broadcast(world.first and find_run(config))
    summary = None if config.run.overwrite else read_summary(folder)
    if summary:
        say(console, f"{folder} is finished already; run.overwrite=true starts it over")
        return summary
    task_of_run(config, folder)  # refuses what does not fit before the data is read
    trainer = world.first_then_others(lambda: Trainer(config, training_data(config, world), folder, console, world))
    settles = any(isinstance(module, torch.nn.BatchNorm1d) for module in trainer.model.modules())
    if settles and trainer.total_steps < SETTLED and not trainer.resumed:
        advice = f"BatchNorm's averages, which evaluation uses, take some {SETTLED} steps to settle"
        enough = -(-SETTLED // trainer.steps_per_epoch)
        say(console, f"{advice}, and these are {trainer.total_steps}: try EPOCHS={enough}", style="yellow")
    trainer.fit()
    summary = trainer.finish()
    if world.first and config.run.report:
        try:
            show_run(trainer)
        except KeyboardInterrupt as error:
            told = f"the run is finished; make report CKPT={folder} draws its page"
            raise Stopped(getattr(error, "number", signal.SIGINT), told) from error
    return summary


def show_run(trainer: Trainer) -> None:
    """Write the page of the run and, to TensorBoard, all but the curves. The run is finished even if that fails."""
    say(trainer.console, "drawing the run's page")
    data, train = trainer.config.data, trainer.config.train
    try:
        overrides = [f"train.device={train.device}", f"data.stream={data.stream}"]
        page.write(trainer.folder, Subjects(trainer.folder, overrides=overrides), step=trainer.step)
    except (UserError, OSError, ImportError) as error:
        say(trainer.console, f"no page of the run: {first_line(error)}", style="yellow")


def table(summary: dict[str, Any]) -> Table:
    """The result as a table."""
    columns, rows = task_of(summary, str(Path(summary["run"], SUMMARY))).result(summary)
    few_shot = summary.get("few_shot")
    split = f"queries of {fold_text(few_shot)}" if few_shot else "test split"
    table = Table(title=f"{summary['dataset']}, {split}, {after_training(summary)}")
    for name in columns:
        table.add_column(name, justify="right" if name else "left")
    for row in rows:
        table.add_row(*row)
    if few_shot:
        best = few_shot["best_on_queries"]
        metric = task_of(summary).metrics[task_of(summary).primary()]
        value = metric.text(best[task_of(summary).primary()])
        table.caption = f"best epoch on the queries, as published figures select: {value}, epoch {best['epoch']}"
    return table


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = cli.parser(*__doc__.split("\n\n", 1))
    cli.add_config(parser)
    cli.add_number(parser, "--nproc", default=1, metavar="N", help="processes on this machine, by torchrun")
    args = parser.parse_intermixed_args(argv)
    if args.nproc > 1 and launched().size == 1:
        cli.config_from(args)  # an error is reported once, and at once
        given = sys.argv[1:] if argv is None else argv
        return launch(args.nproc, __spec__.name, given)
    with process_group() as world:
        config = world.first_then_others(lambda: cli.config_from(args))
        console = Console(stderr=args.json, quiet=not world.first)
        with memory_advice(config.train):
            summary = train(config, world, console)
    if not world.first:
        return
    if args.json:
        print(json.dumps(summary))
    else:
        console.print(table(summary))
        console.print(f"run folder: {summary['run']}", highlight=False, soft_wrap=True)
        if (drawn := Path(summary["run"], page.HTML)).exists():
            console.print(f"its page: {drawn}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    cli.run(main)
