"""Classify clouds and meshes from disk: ply, pcd, las, txt, npy, off, obj, stl, glb, and their like; or images.

docs/data.md lists what is read.

python -m tools.predict runs/shapes-tiny-ewa-seed0 chair.ply
python -m tools.predict runs/modelnet40-tiny-ewa-seed0 scans/*.pcd --up z --json
"""

import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

import pointewa
from pointewa.datasets.files import read_points
from pointewa.datasets.images import read_image
from pointewa.datasets.source import progress
from pointewa.errors import ConfigError, DataError, counted, first_line
from pointewa.inference.predict import ImagePredictor
from pointewa.safe.files import printable, reading
from pointewa.tools import cli

TOP = 3


def classify(model: pointewa.Predictor, path: Path, up: str | None) -> dict[str, Any]:
    """The classes and probabilities of one file.

    Raises:
        DataError: it cannot be read, or holds no cloud that a model can take.
    """
    if isinstance(model, ImagePredictor):
        with reading(path, "an image"):
            data = path.read_bytes()
        seen = read_image(path, data)
        size = {"height": seen.shape[0], "width": seen.shape[1]}
    else:
        # as many on a mesh as in `pointewa.datasets.layouts.folder`
        seen = read_points(path, samples=max(10_000, 2 * model.num_points))
        size = {"points": len(seen)}
    try:
        name, probabilities = model.predict(seen, up=up)
    except ValueError as error:
        raise DataError(f"{path}: {first_line(error)}: remove or repair the file") from error
    ranked = sorted(zip(model.class_names, probabilities.tolist(), strict=True), key=lambda pair: -pair[1])
    return {"file": str(path), **size, "class": name, "probabilities": dict(ranked)}


def as_table(predictions: list[dict[str, Any]]) -> Table:
    """A row per file, the most probable classes first."""
    table = Table()
    table.add_column("file", overflow="fold")
    for place in ("class", "second", "third")[:TOP]:
        table.add_column(place)
    for one in predictions:
        best = list(one["probabilities"].items())[:TOP]
        table.add_row(escape(printable(one["file"])), *(f"{escape(name)} {100 * share:.1f} %" for name, share in best))
    return table


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = cli.parser(*__doc__.split("\n\n", 1))
    parser.add_argument("model", help="run folder, .safetensors or .ckpt")
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="cloud, mesh or image")
    cli.add_up(parser, "axis of the files that points up (default: as in training)")
    parser.add_argument("--device", default="auto", help="cpu, cuda; auto: a GPU where there is one")
    args = parser.parse_args(argv)
    model = pointewa.load(args.model, args.device)
    if isinstance(model, ImagePredictor):
        if args.up:
            raise ConfigError(f"--up: for point clouds, and {args.model} classifies images: leave it out")
    elif args.up is None and model.up != "y":
        note = f"note: the files are turned from {model.up} up to y up, as in training; --up names another axis"
        print(note, file=sys.stderr)
    predictions, failed = [], []
    for path in progress(args.files, "classifying", len(args.files)):
        try:
            predictions.append(classify(model, path, args.up))
        except DataError as error:
            failed.append({"file": str(path), "error": str(error)})
    if args.json:
        print(json.dumps({"model": args.model, "predictions": predictions, "failed": failed}))
    elif predictions:
        Console().print(as_table(predictions))
    for one in failed:
        print(one["error"], file=sys.stderr)
    if failed:
        raise DataError(f"{len(failed)} of {counted(len(args.files), 'file')} could not be classified")


if __name__ == "__main__":
    cli.run(main)
