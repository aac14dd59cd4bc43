"""Fold an EWA run, finished or not, into a dense model: weights as safetensors, the rest as JSON beside them.

python -m tools.fold runs/shapes-tiny-ewa-seed0 dense.safetensors
python -m tools.fold runs/shapes-tiny-ewa-seed0 for_inference.safetensors --fuse-batch-norm
"""

import json
from pathlib import Path

from pointewa.errors import CheckpointError, ConfigError, counted
from pointewa.models import fuse_batch_norm
from pointewa.models.registry import PREDICTING
from pointewa.runs.weights import as_classifier, load_any, restore, save_model
from pointewa.tools import cli


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = cli.parser(*__doc__.split("\n\n", 1))
    parser.add_argument("checkpoint", help="run folder, or its last.ckpt")
    parser.add_argument("out", type=Path, help="file to write, ending in .safetensors")
    parser.add_argument(
        "--fuse-batch-norm",
        action="store_true",
        help="merge batch norms into the layers before them: faster, for inference only",
    )
    args = parser.parse_args(argv)
    if args.out.suffix != ".safetensors":
        raise ConfigError(f"out: expected a file name ending in .safetensors, found {str(args.out)!r}")
    restored = restore(args.checkpoint)
    state, path = restored.state, restored.path
    if not state["ewa"]:
        raise CheckpointError(
            f"{path}: nothing to fold: the run was dense (ewa.enabled=false) or has gated experts, which stay"
        )
    loaded = as_classifier(load_any(path), path, PREDICTING)
    if args.fuse_batch_norm:
        loaded.model = fuse_batch_norm(loaded.model)
    save_model(args.out, loaded)
    figures = {"out": str(args.out), "experts": state["ewa"]["num_experts"], "step": state["step"]}
    print(json.dumps(figures) if args.json else f"folded {path} after {counted(state['step'], 'step')} into {args.out}")


if __name__ == "__main__":
    cli.run(main)
