"""Export the folded dense model of a run: safetensors, TorchScript, torch.export, ONNX, other codebases' layouts.

python -m tools.export runs/shapes-tiny-ewa-seed0 model.onnx --format onnx --fuse-batch-norm
python -m tools.export runs/shapes-tiny-ewa-seed0 model.onnx --format onnx --int8
python -m tools.export runs/shapes-tiny-ewa-seed0 model.pt --format torchscript
python -m tools.export runs/shapes-tiny-ewa-seed0 model.pt2 --format torch_export
python -m tools.export runs/shapes-tiny-ewa-seed0 ckpt.pth --format point_mae
python -m tools.export runs/shapes-tiny-ewa-seed0 model.safetensors --format torch_pointcloud
python -m tools.export runs/pretrained ckpt.pth --format point_mae

The exported programs take points float32 [B, num_points, 3], prepared as in the model's training: turned so that the
axis `up` of model.json becomes y, then normalised as its `normalize` says. Those of a part segmentation also take
labels int64 [B], the numbers of the categories among its `class_names`. They return logits; the patch embedding is part
of them. Each file is read back and compared with the model. Of a pre-training there are point_mae and safetensors, with
all its weights.

With --int8 the large matrix products are computed in 8 bits (onnxruntime's static quantisation). Clouds of the run's
training split, found where the run found them unless key=value says otherwise, give the ranges of the activations;
others of it show how many of the classes are still the model's.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from pointewa.datasets.subjects import Subjects
from pointewa.errors import counted
from pointewa.inference.export import OPSET, SUFFIXES, TOLERANCE, export
from pointewa.inference.int8 import CALIBRATE, HOLD_OUT, LEAST_AGREEMENT, Clouds
from pointewa.runs.description import LoadedModel
from pointewa.runs.weights import load_any
from pointewa.tools import cli


def training_clouds(run: str, files: Sequence[str], overrides: Sequence[str]) -> tuple[LoadedModel, Clouds]:
    """A model, and clouds that its run was trained on: of the first ones the ranges, of others the comparison.

    Raises:
        UserError: a model or a training split that cannot be had.
    """
    subjects = Subjects(run, "train", files, [*overrides, "train.device=cpu"])
    subjects.need_clouds("--int8")
    index = torch.randperm(len(subjects.clouds), generator=torch.Generator().manual_seed(0))[: CALIBRATE + HOLD_OUT]
    points = torch.stack([item.points for item in subjects.at(index.tolist())])
    labels = (subjects.clouds.labels[index],) if subjects.task.point_labels else ()
    return subjects.loaded, Clouds.of(points, *labels)


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = cli.parser(*__doc__.split("\n\n", 1))
    parser.add_argument("model", help="run folder, .safetensors or .ckpt")
    parser.add_argument("out", type=Path, help="file to write")
    parser.add_argument("--format", choices=SUFFIXES, required=True, help=" ".join(dict.fromkeys(SUFFIXES.values())))
    parser.add_argument(
        "--fuse-batch-norm", action="store_true", help="merge batch norms into the layers before them: faster"
    )
    parser.add_argument("--int8", action="store_true", help="of onnx: 8 bits, calibrated on the training split")
    cli.add_config(parser)
    args = parser.parse_intermixed_args(argv)
    cli.refuse_unused(args, "--int8" if args.int8 else "an export without --int8",
                      dict.fromkeys(("config", "overrides"), ("--int8",)))  # fmt: skip
    clouds = None
    if args.int8:
        loaded, clouds = training_clouds(args.model, args.config, args.overrides)
    else:
        loaded = load_any(args.model)
    written = export(loaded, args.out, args.format, args.fuse_batch_norm, clouds)
    if args.json:
        opset = {"opset": OPSET} if args.format == "onnx" else {}
        print(json.dumps(asdict(written) | opset))
        return
    kind = f"onnx, opset {OPSET}" if args.format == "onnx" else args.format
    print(
        f"{written.path}: {kind}, {written.bytes / 2**20:.1f} MiB, for clouds of {counted(loaded.num_points, 'point')}"
    )
    if clouds:
        print(f"in 8 bits: {written.agreement:.1f} % of the classes on {clouds.count} held-out clouds are the model's, "
              f"at least {LEAST_AGREEMENT:g} % are accepted; logits differ by {written.difference:.1e}")  # fmt: skip
    elif loaded.class_names:
        print(f"read back: largest difference of logits {written.difference:.1e}, accepted up to {TOLERANCE:.0e}")
    else:
        print(f"{counted(len(loaded.model.state_dict()), 'tensor')}, all weights of the pre-training")
    for note in written.notes:
        print(f"note: {note}")


if __name__ == "__main__":
    cli.run(main)
