"""Train a point transformer, with or without EWA; fold it, evaluate the dense model.

python -m tools.train --config configs/shapes.yaml
python -m tools.train --config configs/modelnet40.yaml data.root=/data model.preset=tiny train.epochs=10
"""

import json
from typing import Any

from rich.console import Console
from rich.table import Table

from datasets.loader import EvalLoader, TrainLoader
from pointewa.config import Config
from pointewa.engine import Data, Trainer
from pointewa.engine.runs import find_run
from tools import cli


def load_data(config: Config) -> Data:
    """The batches of training, validation (if ``data.val_fraction``) and test."""
    data, val = config.data, None
    train, test = cli.load(config, "train"), cli.load(config, "test")
    if data.val_fraction:
        train, held_out = train.split(data.val_fraction, seed=config.train.seed)
        val = EvalLoader(held_out, cli.EVAL_BATCH, data.num_points)
    return Data(
        TrainLoader(train, config.train.batch_size, data.num_points, data.augment, config.train.seed),
        val,
        EvalLoader(test, cli.EVAL_BATCH, data.num_points),
        train.class_names,
        "unit_sphere" if train.normalized else "none",
    )


def table(summary: dict[str, Any]) -> Table:
    """The result as people read it."""
    before, after = summary["test_before_folding"], summary["test"]
    result = Table(title=f"{summary['dataset']}, test split, after the last of {summary['epochs']} epochs")
    result.add_column("")
    if before:
        result.add_column("in training (MoE)", justify="right")
    result.add_column("folded (dense)" if before else "dense", justify="right")

    def row(name: str, *values: str) -> None:
        result.add_row(name, *(values if before else values[-1:]))

    row("overall accuracy", f"{before['oa']:.2f} %" if before else "", f"{after['oa']:.2f} %")
    row("mean-class accuracy", f"{before['macc']:.2f} %" if before else "", f"{after['macc']:.2f} %")
    row("parameters", f"{summary['parameters_in_training']:,}", f"{summary['parameters']:,}")
    if before:
        row("largest difference of logits", "", f"{summary['largest_logit_difference']:.1e}")
    row(
        "seconds of training",
        f"{summary['seconds']:.0f}" if before else "",
        "" if before else f"{summary['seconds']:.0f}",
    )
    return result


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = cli.parser(*__doc__.split("\n\n", 1))
    cli.add_config(parser)
    args = parser.parse_intermixed_args(argv)
    config = cli.config_from(args)
    console = Console(stderr=args.json)
    folder = find_run(config)
    trainer = Trainer(config, load_data(config), folder, console)
    trainer.fit()
    summary = trainer.finish()
    if args.json:
        print(json.dumps(summary))
    else:
        console.print(table(summary))
        console.print(f"run folder: {summary['run']}", highlight=False)


if __name__ == "__main__":
    cli.run(main)
