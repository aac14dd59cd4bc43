"""Evaluate the dense model of a run or checkpoint on a test split.

python -m tools.evaluate runs/shapes-tiny-ewa-seed0
python -m tools.evaluate model.safetensors --config configs/modelnet40.yaml data.root=/data --json
"""

import json

from rich.console import Console
from rich.table import Table

from pointewa.engine import evaluate, load_model
from pointewa.engine.device import select_device
from tools import cli


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = cli.parser(*__doc__.split("\n\n", 1))
    parser.add_argument("checkpoint", help="run folder, model.safetensors (with its .json), or last.ckpt")
    cli.add_config(parser)
    args = parser.parse_args(argv)
    loaded = load_model(args.checkpoint)
    config = cli.config_from(args, {"data": {"name": loaded.dataset, "num_points": loaded.num_points}})
    device = select_device(config.train.device)
    result = evaluate(loaded.model.to(device), cli.test_batches(config, loaded.class_names, device))
    per_class = dict(zip(loaded.class_names, (100 * result.per_class).tolist(), strict=True))
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
