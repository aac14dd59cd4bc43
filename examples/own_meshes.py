"""Your own meshes, a folder a class: train on them, and classify new files. The meshes here are made on the spot.

.venv/bin/python examples/own_meshes.py OUT    # 2 minutes on two CPU cores
.venv/bin/python examples/own_meshes.py OUT --epochs 2

What it runs, on meshes of your own:

    make train DATASET=folder DATA_ROOT=OUT/meshes RUN=meshes
    .venv/bin/python -m tools.predict runs/meshes OUT/new/*.stl
"""

import argparse
from pathlib import Path

import numpy as np
import trimesh

from pointewa.tools import predict, train


def mesh(name: str, rng: np.random.Generator) -> trimesh.Trimesh:
    """A solid of some proportions, turned about the up axis, y."""
    a, b, c = rng.uniform(0.3, 1.0, 3)
    solid = {
        "box": lambda: trimesh.creation.box((a, b, c)),
        "cone": lambda: trimesh.creation.cone(a, 2 * b),
        "cylinder": lambda: trimesh.creation.cylinder(a / 2, 2 * b),
        "torus": lambda: trimesh.creation.torus(1.0, 0.1 + a / 3),
    }[name]()
    return solid.apply_transform(trimesh.transformations.rotation_matrix(rng.uniform(0, 2 * np.pi), (0, 1, 0)))


def main() -> None:
    """Make, train, classify."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--epochs", type=int, default=50)  # fewer than 300 steps are too few for BatchNorm
    args = parser.parse_args()
    rng, new = np.random.default_rng(0), []
    for name in ("box", "cone", "cylinder", "torus"):
        folder = args.out / "meshes" / name
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(40):
            mesh(name, rng).export(folder / f"{number:02}.stl")
        (args.out / "new").mkdir(exist_ok=True)
        new.append(str(args.out / "new" / f"{name}.stl"))
        mesh(name, rng).export(new[-1])
    train.main([
        "--config", "configs/folder.yaml", f"data.root={args.out / 'meshes'}", f"train.epochs={args.epochs}",
        "train.batch_size=16", f"run.dir={args.out}", "run.name=run",
    ])  # fmt: skip
    predict.main([str(args.out / "run"), *new])


if __name__ == "__main__":
    main()
