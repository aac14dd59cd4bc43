"""Evaluate the dense model of a run or checkpoint on a test split.

python -m tools.evaluate runs/shapes-tiny-ewa-seed0
python -m tools.evaluate model.safetensors --config configs/modelnet40.yaml data.root=/data --json
python -m tools.evaluate point_mae.pth --config configs/modelnet40.yaml data.root=/data
"""

import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

import datasets
from datasets import PointClouds
from datasets.loader import EvalLoader
from pointewa.config import Config, build_architecture
from pointewa.engine import evaluate, load_foreign, load_model
from pointewa.engine.device import select_device
from pointewa.errors import CheckpointError
from tools import cli


def load_test(config: Config) -> PointClouds:
    """The test split of the configuration's data set."""
    return datasets.load(config.data.name, config.data.root, "test", config.data.num_points)


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = cli.parser(*__doc__.split("\n\n", 1))
    parser.add_argument("checkpoint", help="run folder, .safetensors, .ckpt, or a .pth of Point-MAE or Point-BERT")
    cli.add_config(parser)
    args = parser.parse_args(argv)
    if Path(args.checkpoint).suffix in (".pth", ".pt"):
        config = cli.config_from(args)
        clouds = load_test(config)
        model = load_foreign(args.checkpoint, build_architecture(config.model), len(clouds.class_names))
    else:
        loaded = load_model(args.checkpoint)
        config = cli.config_from(args, {"data": {"name": loaded.dataset, "num_points": loaded.num_points}})
        model, clouds = loaded.model, load_test(config)
        if loaded.class_names != clouds.class_names:
            raise CheckpointError(
                f"{args.checkpoint}: trained for {len(loaded.class_names)} classes "
                f"({', '.join(loaded.class_names[:3])}, ...), {clouds.source} has {len(clouds.class_names)} "
                f"({', '.join(clouds.class_names[:3])}, ...): choose the data set of the training (DATASET)"
            )
    device = select_device(config.train.device)
    batches = EvalLoader(clouds.to(device), cli.EVAL_BATCH, config.data.num_points)
    result = evaluate(model.to(device), batches)
    per_class = dict(zip(clouds.class_names, (100 * result.per_class).tolist(), strict=True))
    if args.json:
        figures = {"dataset": config.data.name, "objects": len(result.labels), "oa": result.oa, "macc": result.macc}
        print(json.dumps(figures | {"loss": result.loss, "per_class": per_class}))
        return
    table = Table(title=f"{config.data.name}, test split, {len(result.labels)} objects")
    table.add_column("")
    table.add_column("accuracy", justify="right")
    for name, value in per_class.items():
        table.add_row(name, f"{value:.1f} %")
    table.add_section()
    table.add_row("overall", f"{result.oa:.2f} %")
    table.add_row("mean of classes", f"{result.macc:.2f} %")
    Console().print(table)


if __name__ == "__main__":
    cli.run(main)
