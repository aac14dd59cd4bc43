"""Draw clouds, patches and what a model does with them: as PNG, PDF or SVG, as a page for any browser, or in a window.

python -m tools.visualize cloud --config configs/shapes.yaml --html clouds.html
python -m tools.visualize cloud --object chair --object 17 --object my_mesh.obj --up z --out clouds.png
python -m tools.visualize patches --object mug --num-groups 64 --group-size 32
python -m tools.visualize saliency --run runs/x --object mug_test_0001
python -m tools.visualize errors --run runs/x --count 12 --html errors.html
python -m tools.visualize reconstruction --run runs/pretrained
python -m tools.visualize parts --run runs/parts --object chair
python -m tools.visualize embedding --run runs/x --method tsne
python -m tools.visualize experts --run runs/x

cloud           objects by index, name, class or file; by default one of each class
patches         centres and groups, as the model of --run or of the configuration forms them
saliency        what the prediction rests on: gradient x input, and the effect of leaving out each patch
errors          the most confident mistakes on the split
reconstruction  of a pre-training run: masked input, prediction, truth
parts           of a part segmentation: truth, prediction, errors
embedding       the features of the split, coloured by class
experts         their disagreement during training, and their distances at the end
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pointewa.config import build_architecture
from pointewa.datasets.subjects import Subjects
from pointewa.errors import CheckpointError, ConfigError, counted
from pointewa.inference import page
from pointewa.tasks import part_segmentation
from pointewa.tools import cli
from pointewa.viz import drawings, offscreen
from pointewa.viz.clouds import FIGURES, PAGES, check_suffix, clouds_figure, save_figure
from pointewa.viz.drawings import Drawing
from pointewa.viz.embedding import METHODS
from pointewa.viz.html import clouds_html, save_page, svg_html
from pointewa.viz.panels import Picture
from pointewa.viz.window import show


def _cloud(subjects: Subjects, args: argparse.Namespace) -> Drawing:
    items = subjects.items(args.object, args.count or 12)
    return drawings.clouds(items, f"{subjects.what}, {counted(subjects.num_points, 'point')}", args.columns)


def _patches(subjects: Subjects, args: argparse.Namespace) -> Drawing:
    arch = subjects.loaded.model.architecture if args.run else build_architecture(subjects.config.model)
    items = subjects.items(args.object, args.count or 2)
    return drawings.patches(items, args.num_groups or arch.num_groups, args.group_size or arch.group_size)


def _saliency(subjects: Subjects, args: argparse.Namespace) -> Drawing:
    loaded, items = subjects.classifier, subjects.items(args.object, args.count or 3)
    return drawings.saliencies(loaded.model, loaded.class_names, items, f"what the prediction rests on, {args.run}")


def _errors(subjects: Subjects, args: argparse.Namespace) -> Drawing:
    names, result = subjects.classifier.class_names, subjects.evaluation
    return drawings.mistakes(result.logits, result.labels, names, subjects.at, args.count or 12, args.columns, args.run)


def _reconstruction(subjects: Subjects, args: argparse.Namespace) -> Drawing:
    model, items = subjects.autoencoder.model, subjects.items(args.object, args.count or 4)
    return drawings.reconstructions(model, items, subjects.config.train.seed, f"reconstruction by {args.run}")


def _parts(subjects: Subjects, args: argparse.Namespace) -> Drawing:
    loaded, items = subjects.segmenter, subjects.items(args.object, args.count or 4)
    return part_segmentation.draw(loaded.model, loaded.class_names, items, f"parts by {args.run}")


def _embedding(subjects: Subjects, args: argparse.Namespace) -> Drawing:
    clouds, method = subjects.clouds, args.method or "tsne"
    title = f"features of {args.run} on {subjects.what}, {({'pca': 'PCA', 'tsne': 't-SNE'})[method]}"
    seed = subjects.config.train.seed
    return drawings.embedding(subjects.features(), clouds.labels, clouds.class_names, method, seed, title)


def _experts(subjects: Subjects, args: argparse.Namespace) -> Drawing:
    if not Path(args.run).is_dir():
        raise CheckpointError(f"{args.run}: expected a run folder, whose metrics and checkpoint are drawn")
    drawing = page.experts(Path(args.run), f"the experts of {args.run}")
    if drawing is None:
        raise CheckpointError(f"{args.run}: a dense run, which has no experts: name a run with ewa.enabled=true")
    return drawing


KINDS: dict[str, Callable[[Subjects, argparse.Namespace], Drawing]] = {
    "cloud": _cloud, "patches": _patches, "saliency": _saliency, "errors": _errors, "reconstruction": _reconstruction,
    "parts": _parts, "embedding": _embedding, "experts": _experts,
}  # fmt: skip
_WITHOUT_RUN = ("cloud", "patches")
_OF_OBJECTS = ("cloud", "patches", "saliency", "reconstruction", "parts")
_USED_BY = {
    "object": _OF_OBJECTS, "up": _OF_OBJECTS, "count": (*_OF_OBJECTS, "errors"), "columns": ("cloud", "errors"),
    "num_groups": ("patches",), "group_size": ("patches",), "method": ("embedding",),
}  # fmt: skip


def _figure(found: Any, renderer: str) -> tuple[Any, str]:
    """A matplotlib figure, and what drew it: Open3D renders clouds if that is wanted and works here."""
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


def _write(drawing: Drawing, what: str, out: Path | None, html: Path | None, renderer: str) -> str:
    """Write the picture and the HTML page, if wanted; returns what drew the picture."""
    drawer = ""
    if out:
        figure, drawer = _figure(drawing.of("png"), renderer)
        save_figure(out, figure)
    if html:
        found = drawing.of("html")
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
                        help="index, object name, class or file; may be repeated")  # fmt: skip
    cli.add_number(parser, "--count", metavar="N", help="at most N objects; of a class its first N")
    parser.add_argument("--split", choices=("test", "train"), default="test", help="of the data set (default test)")
    cli.add_up(parser, "axis of a file that points up (default: as in training, else y)")
    cli.add_number(parser, "--num-groups", metavar="G", help="patches: how many")
    cli.add_number(parser, "--group-size", metavar="K", help="patches: points in each")
    parser.add_argument("--method", choices=METHODS, help="embedding: how (default tsne)")
    cli.add_number(parser, "--columns", metavar="N", help="of the grid of cloud and errors")
    parser.add_argument(
        "--out", metavar="FILE", help="a picture: .png, .pdf or .svg; or a page: .html (default WHAT.png)"
    )
    parser.add_argument("--html", metavar="FILE", help="a page for any browser, in addition to --out or instead of it")
    parser.add_argument("--renderer", choices=("auto", "open3d", "matplotlib"), default="auto",
                        help="for the clouds of a picture (default auto: Open3D where it can render)")  # fmt: skip
    parser.add_argument("--show", action="store_true", help="open a window of Open3D, where there is a display")
    return parser


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    args = _parser().parse_intermixed_args(argv)
    cli.refuse_unused(args, args.what, _USED_BY)
    if args.run is None and args.what not in _WITHOUT_RUN:
        raise ConfigError(f"--run: {args.what} needs a run, such as --run runs/x")
    out, html = args.out and Path(args.out), args.html and Path(args.html)
    if out:
        check_suffix("--out", out, (*FIGURES, *PAGES))
    if html:
        check_suffix("--html", html, PAGES)
    if out and out.suffix.lower() in PAGES:
        if html:
            raise ConfigError(f"--out and --html: both are pages, {out} and {html}: leave one out")
        out, html = None, out
    if not (out or html or args.show):
        out = Path(f"{args.what}.png")
    if args.renderer == "open3d" and not offscreen.available():
        raise ConfigError(f"--renderer open3d: Open3D is not installed: {offscreen.REMEDY}, or leave the option out")
    subjects = Subjects(args.run, args.split, args.config, args.overrides, args.up)
    if args.what != "experts":
        subjects.need_clouds(args.what)
    drawing = KINDS[args.what](subjects, args)
    drawer = _write(drawing, args.what if not args.run else f"{args.what} of {args.run}", out, html, args.renderer)
    written = {"png": None, "html": str(html) if html else None}
    if out:
        written[out.suffix.lower()[1:]] = str(out)
    if args.json:
        print(json.dumps({"what": args.what, **written, **drawing.numbers}))
    stream = sys.stderr if args.json else sys.stdout
    for kind, path in written.items():
        if path:
            print(f"wrote {path} ({'open it in any browser' if kind == 'html' else f'drawn by {drawer}'})", file=stream)
    if args.show:
        found = drawing.of("html")
        if not isinstance(found, Picture):
            raise ConfigError(f"--show: {args.what} is a flat figure: use --out or --html")
        print("a window of Open3D: drag to turn, close it to continue", file=stream)
        show(found)


if __name__ == "__main__":
    cli.run(main)
