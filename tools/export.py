"""Export the folded dense model of a run: safetensors, TorchScript, torch.export, ONNX, other codebases' layouts.

python -m tools.export runs/shapes-tiny-ewa-seed0 model.onnx --format onnx --fuse-batch-norm
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
"""

import json
from dataclasses import asdict
from pathlib import Path

from pointewa.errors import counted
from pointewa.inference.export import OPSET, SUFFIXES, TOLERANCE, export
from pointewa.runs.weights import load_any
from pointewa.tools import cli


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = cli.parser(*__doc__.split("\n\n", 1))
    parser.add_argument("model", help="run folder, .safetensors or .ckpt")
    parser.add_argument("out", type=Path, help="file to write")
    parser.add_argument("--format", choices=SUFFIXES, required=True, help=" ".join(dict.fromkeys(SUFFIXES.values())))
    parser.add_argument(
        "--fuse-batch-norm", action="store_true", help="merge batch norms into the layers before them: faster"
    )
    args = parser.parse_args(argv)
    loaded = load_any(args.model)
    written = export(loaded, args.out, args.format, args.fuse_batch_norm)
    if args.json:
        opset = {"opset": OPSET} if args.format == "onnx" else {}
        print(json.dumps(asdict(written) | opset))
        return
    kind = f"onnx, opset {OPSET}" if args.format == "onnx" else args.format
    print(
        f"{written.path}: {kind}, {written.bytes / 2**20:.1f} MiB, for clouds of {counted(loaded.num_points, 'point')}"
    )
    if loaded.class_names:
        print(f"read back: largest difference of logits {written.difference:.1e}, accepted up to {TOLERANCE:.0e}")
    else:
        print(f"{counted(len(loaded.model.state_dict()), 'tensor')}, all weights of the pre-training")
    for note in written.notes:
        print(f"note: {note}")


if __name__ == "__main__":
    cli.run(main)
