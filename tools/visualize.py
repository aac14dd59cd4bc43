"""Draw clouds, patches, and what a model makes of them: as PNG, as a page that turns in any browser, in a window.

python -m tools.visualize cloud --config configs/shapes.yaml --html clouds.html
python -m tools.visualize cloud --object chair --object 17 --object my_mesh.obj --up z --out clouds.png
python -m tools.visualize patches --object mug --num-groups 64 --group-size 32
python -m tools.visualize saliency --run runs/x --object mug_test_0001
python -m tools.visualize errors --run runs/x --count 12 --html errors.html
python -m tools.visualize reconstruction --run runs/pretrained
python -m tools.visualize embedding --run runs/x --method tsne
python -m tools.visualize experts --run runs/x

cloud           objects by index, name, class or file; without any one of each class
patches         centres and groups as the model of --run, or of the configuration, makes them
saliency        what the prediction rests on: gradient x input, and leaving out each patch
errors          the most confident mistakes on the split
reconstruction  of a pre-training: masked input, prediction, truth
embedding       the features of the split, coloured by class
experts         their disagreement over the training, and how far they are from each other now
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from pointewa.config import build_architecture
from pointewa.errors import CheckpointError, ConfigError, first_line
from pointewa.ewa.experts import moe_layers
from pointewa.ops import UP_AXES
from pointewa.runs.log import read_metrics
from pointewa.runs.weights import restore
from pointewa.viz import offscreen
from pointewa.viz.clouds import clouds_figure, save_figure
from pointewa.viz.embedding import METHODS, embed, embedding_figure, embedding_picture
from pointewa.viz.experts import disagreements, experts_figure, pairwise_distances
from pointewa.viz.html import clouds_html, save_page, svg_html
from pointewa.viz.mistakes import confident_mistakes, mistake_title
from pointewa.viz.panels import Picture, plain_panel
from pointewa.viz.patches import cut, patch_panels
from pointewa.viz.reconstruction import reconstruction_picture
from pointewa.viz.saliency import SALIENCY_LEGEND, saliency, saliency_panels
from pointewa.viz.window import show
from tools import cli
from tools.subjects import Item, Subjects

# What is drawn: clouds in a grid, or a function from where it is drawn ("png", "html") to a figure or a picture; and
# the numbers behind it.
Drawing = tuple[Picture | Callable[[str], Any], dict[str, Any]]


def cloud(subjects: Subjects, args: argparse.Namespace) -> Drawing:
    """Clouds in a grid."""
    items = subjects.items(args.object, args.count or 12)
    known = any(item.class_name for item in items)
    heading = f"{subjects.what}, {subjects.num_points} points" if known else ""
    return Picture([plain_panel(item.points, _named(item)) for item in items], heading, args.columns), _names(items)


def patches(subjects: Subjects, args: argparse.Namespace) -> Drawing:
    """A row an object."""
    arch = subjects.loaded.model.architecture if args.run else build_architecture(subjects.config.model)
    groups, size = args.num_groups or arch.num_groups, args.group_size or arch.group_size
    items, panels = subjects.items(args.object, args.count or 2), []
    for item in items:
        with _fitting(item.name):
            panels += patch_panels(item.points, cut(item.points, groups, size), _named(item))
    heading = f"{groups} patches of {size} points, {subjects.num_points} points a cloud"
    return Picture(panels, heading, 3), _names(items) | {"num_groups": groups, "group_size": size}


def saliency_of(subjects: Subjects, args: argparse.Namespace) -> Drawing:
    """A row an object."""
    loaded, panels, numbers = subjects.classifier, [], []
    for item in subjects.items(args.object, args.count or 3):
        with _fitting(item.name):
            found = saliency(loaded.model, item.points)
        said = loaded.class_names[found.predicted]
        panels += saliency_panels(item.points, found, _named(item), said)
        numbers.append({"object": item.name, "truth": item.class_name, "predicted": said,
                        "probability": found.probabilities[found.predicted].item(),
                        "drops": found.drops.tolist()})  # fmt: skip
    return Picture(panels, f"what the prediction rests on, {args.run}", 3, SALIENCY_LEGEND), {"objects": numbers}


def errors(subjects: Subjects, args: argparse.Namespace) -> Drawing:
    """The surest mistakes first."""
    names = subjects.classifier.class_names
    result = subjects.evaluation
    every = confident_mistakes(result)
    shown = every[: args.count or 12]
    if not shown:
        raise ConfigError(f"{args.run} makes no mistake on {subjects.what}: there is nothing to draw")
    items = subjects.at([one.index for one in shown])
    panels = [plain_panel(item.points, mistake_title(one, names)) for one, item in zip(shown, items, strict=True)]
    heading = f"the {len(shown)} most confident of {len(every)} mistakes on {len(result.labels)} objects, {args.run}"
    rows = [{"index": one.index, "object": item.name, "truth": names[one.truth], "predicted": names[one.said],
             "confidence": one.confidence} for one, item in zip(shown, items, strict=True)]  # fmt: skip
    return Picture(panels, heading, args.columns), {
        "mistakes": len(every),
        "objects": len(result.labels),
        "shown": rows,
    }


def reconstruction(subjects: Subjects, args: argparse.Namespace) -> Drawing:
    """A row an object."""
    model = subjects.autoencoder.model
    items = subjects.items(args.object, args.count or 4)
    torch.manual_seed(subjects.config.train.seed)  # which patches are masked
    with _fitting("objects"):
        found = model.reconstruct(torch.stack([item.points for item in items]))
    return reconstruction_picture(found, [_named(item) for item in items], f"reconstruction by {args.run}"), _names(
        items
    )


def embedding(subjects: Subjects, args: argparse.Namespace) -> Drawing:
    """A flat figure as PNG, a cloud that turns as HTML."""
    features, clouds = subjects.features(), subjects.clouds
    title = f"features of {args.run} on {subjects.what}, {'t-SNE' if args.method == 'tsne' else 'PCA'}"

    def draw(kind: str) -> Any:
        make, dimensions = (embedding_figure, 2) if kind == "png" else (embedding_picture, 3)
        with _fitting(subjects.what):
            places = embed(features, args.method, dimensions, subjects.config.train.seed)
        return make(places, clouds.labels, clouds.class_names, title)

    return draw, {"objects": len(features), "features": features.shape[1], "method": args.method}


def experts(subjects: Subjects, args: argparse.Namespace) -> Drawing:
    """Curves and matrices."""
    if not Path(args.run).is_dir():
        raise CheckpointError(f"{args.run}: expected a run folder, whose metrics and checkpoint are drawn")
    model = restore(args.run).model
    if not moe_layers(model):
        raise CheckpointError(f"{args.run}: a dense run, which has no experts: name a run with ewa.enabled=true")
    distances, series = pairwise_distances(model), disagreements(read_metrics(Path(args.run)))
    numbers = {"distances": {name: matrix.tolist() for name, matrix in distances.items()}, "disagreement": series}
    return lambda kind: experts_figure(series, distances, f"the experts of {args.run}"), numbers


KINDS: dict[str, Callable[[Subjects, argparse.Namespace], Drawing]] = {
    "cloud": cloud, "patches": patches, "saliency": saliency_of, "errors": errors, "reconstruction": reconstruction,
    "embedding": embedding, "experts": experts,
}  # fmt: skip
_WITHOUT_RUN = ("cloud", "patches")


@contextmanager
def _fitting(what: str) -> Iterator[None]:
    """Objects of too few points, or too few objects, are the user's to mend."""
    try:
        yield
    except (ValueError, RuntimeError) as error:
        raise ConfigError(f"{what}: {first_line(error)}") from error


def _named(item: Item) -> str:
    return item.name if item.class_name is None or item.class_name in item.name else f"{item.class_name}, {item.name}"


def _names(items: list[Item]) -> dict[str, Any]:
    return {"objects": [item.name for item in items]}


def _figure(found: Any, renderer: str) -> tuple[Any, str]:
    """A matplotlib figure, and what drew it. A picture's clouds are Open3D's where it is wanted and can be had."""
    if not isinstance(found, Picture):
        return found, "matplotlib"
    if renderer == "matplotlib" or (renderer == "auto" and not offscreen.available()):
        return clouds_figure(found), "matplotlib"
    try:
        return clouds_figure(found, offscreen.render(found)), "Open3D"
    except offscreen.RenderError as error:
        if renderer == "open3d":
            raise ConfigError(f"--renderer open3d: {error}: {offscreen.REMEDY}") from error
        return clouds_figure(found), f"matplotlib: {error}"


def write(drawing: Picture | Callable[[str], Any], what: str, out: Path | None, html: Path | None,
          renderer: str = "matplotlib") -> str:  # fmt: skip
    """Write the PNG and the HTML page, as far as they are wanted; tells what drew the PNG."""
    drawn, drawer = (lambda kind: drawing) if isinstance(drawing, Picture) else drawing, ""
    if out:
        figure, drawer = _figure(drawn("png"), renderer)
        save_figure(out, figure)
    if html:
        found = drawn("html")
        if isinstance(found, Picture):
            save_page(html, found.heading or what, [clouds_html(found)])
        else:
            save_page(html, what, [svg_html(found)])
    return drawer


def _parser() -> argparse.ArgumentParser:
    parser = cli.parser(*__doc__.split("\n\n", 1))
    parser.add_argument("what", choices=KINDS, metavar="WHAT", help=", ".join(KINDS))
    cli.add_config(parser)
    parser.add_argument("--run", metavar="RUN", help="run folder, .safetensors, .ckpt, or a .pth of Point-MAE")
    parser.add_argument("--object", action="append", default=[], metavar="X",
                        help="index, object name, class, or file; may be given several times")  # fmt: skip
    parser.add_argument("--count", type=int, metavar="N", help="objects at most; of a class its first N")
    parser.add_argument("--split", choices=("test", "train"), default="test", help="of the data set (default test)")
    parser.add_argument("--up", choices=UP_AXES, default="y", help="axis of a file that points up (default y)")
    parser.add_argument("--num-groups", type=int, metavar="G", help="patches: how many")
    parser.add_argument("--group-size", type=int, metavar="K", help="patches: points in each")
    parser.add_argument("--method", choices=METHODS, default="tsne", help="embedding: how (default tsne)")
    parser.add_argument("--columns", type=int, metavar="N", help="of the grid of cloud and errors")
    parser.add_argument("--out", metavar="FILE", help="PNG; or HTML where it ends in .html (default WHAT.png)")
    parser.add_argument("--html", metavar="FILE", help="a page that turns in any browser, besides or in place of --out")
    parser.add_argument("--renderer", choices=("auto", "open3d", "matplotlib"), default="auto",
                        help="of a PNG's clouds (default auto: Open3D where it can render)")  # fmt: skip
    parser.add_argument("--show", action="store_true", help="a window of Open3D, where there is a display")
    return parser


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    args = _parser().parse_intermixed_args(argv)
    for name in ("count", "num_groups", "group_size", "columns"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')}: expected at least 1, found {getattr(args, name)}")
    if args.run is None and args.what not in _WITHOUT_RUN:
        raise ConfigError(f"--run: {args.what} is of a run, say which: --run runs/x")
    out, html = args.out and Path(args.out), args.html and Path(args.html)
    if out and out.suffix.lower() in (".html", ".htm"):
        out, html = None, out
    if not (out or html or args.show):
        out = Path(f"{args.what}.png")
    if out and out.suffix.lower() != ".png":
        raise ConfigError(f"--out: expected a name ending in .png or .html, found {out}")
    if args.renderer == "open3d" and not offscreen.available():
        raise ConfigError(f"--renderer open3d: Open3D is not installed: {offscreen.REMEDY}, or leave the option out")
    drawing, numbers = KINDS[args.what](Subjects(args), args)
    drawer = write(drawing, args.what if not args.run else f"{args.what} of {args.run}", out, html, args.renderer)
    written = {"png": str(out) if out else None, "html": str(html) if html else None}
    if args.json:
        print(json.dumps({"what": args.what, **written, **numbers}))
    stream = sys.stderr if args.json else sys.stdout
    for kind, path in written.items():
        if path:
            print(f"wrote {path} ({f'drawn by {drawer}' if kind == 'png' else 'open it in any browser'})", file=stream)
    if args.show:
        found = drawing if isinstance(drawing, Picture) else drawing("html")
        if not isinstance(found, Picture):
            raise ConfigError(f"--show: {args.what} is a flat figure: use --out or --html")
        print("a window of Open3D: drag to turn, close it to go on", file=stream)
        show(found)


if __name__ == "__main__":
    cli.run(main)
