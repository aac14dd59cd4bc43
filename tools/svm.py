"""Fit a linear support vector machine on the features of a frozen model, and say its accuracy on the test split.

python -m tools.svm runs/pretrained-modelnet40-tiny data.root=/data
python -m tools.svm runs/x --config configs/scanobjectnn.yaml data.root=/data data.train_fraction=0.1 --json

The data set is the model's own unless said otherwise. Features are scaled to mean 0 and variance 1.
"""

import json

import torch
from rich.console import Console
from torch import Tensor

from datasets.base import Clouds
from datasets.loader import EvalLoader
from datasets.source import progress
from pointewa.config import Config
from pointewa.errors import ConfigError
from pointewa.ops import unit_sphere
from pointewa.runs.description import LoadedModel
from pointewa.runs.weights import load_any
from pointewa.tasks.classification import Evaluation
from tools import cli


@torch.no_grad()
def features(loaded: LoadedModel, clouds: Clouds, num_points: int, name: str) -> tuple[Tensor, Tensor]:
    """Features ``[N, 2 * width]`` of each cloud's farthest-point sample, and the labels ``[N]``, on the CPU."""
    device, found = clouds.labels.device, []
    model = loaded.model.to(device).eval()
    scale = loaded.normalize == "unit_sphere" and not clouds.normalized
    for points, *_ in progress(EvalLoader(clouds, cli.EVAL_BATCH, num_points), name):
        found.append(model.features(unit_sphere(points) if scale else points).cpu())
    return torch.cat(found), clouds.labels.cpu()


def fit(loaded: LoadedModel, config: Config, c: float) -> Evaluation:
    """Fit on the training split, decide on the test split."""
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import LinearSVC

    train, test = cli.load(config, "train"), cli.load(config, "test")
    if config.data.train_fraction < 1:
        train = train.split(config.data.train_fraction, seed=0)[1]
    x, y = features(loaded, train, config.data.num_points, "training split")
    svm = make_pipeline(StandardScaler(), LinearSVC(C=c, random_state=0)).fit(x.numpy(), y.numpy())
    x, y = features(loaded, test, config.data.num_points, "test split")
    decision = torch.as_tensor(svm.decision_function(x.numpy()))
    if decision.ndim == 1:  # of two classes scikit-learn gives one column
        decision = torch.stack([-decision, decision], 1)
    logits = torch.full((len(x), len(test.class_names)), -torch.inf)
    logits[:, torch.as_tensor(svm.classes_)] = decision.float()
    return Evaluation(logits, y)


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = cli.parser(*__doc__.split("\n\n", 1))
    parser.add_argument("checkpoint", help="run folder, or a model file in it")
    parser.add_argument("--c", type=float, default=0.01, help="inverse strength of the regularisation (default 0.01)")
    cli.add_config(parser)
    args = parser.parse_intermixed_args(argv)
    if not args.c > 0:
        raise ConfigError(f"--c: expected more than 0, found {args.c}")
    loaded = load_any(args.checkpoint)
    args.overrides = [f"data.num_points={loaded.num_points}", *args.overrides]
    config = cli.config_from(args, {"data": {"name": loaded.dataset}})
    result = fit(loaded, config, args.c)
    figures = {"model": args.checkpoint, "dataset": config.data.name, "train_fraction": config.data.train_fraction,
               "c": args.c, "oa": round(result.accuracy, 4), "macc": round(result.mean_class_accuracy, 4)}  # fmt: skip
    if args.json:
        print(json.dumps(figures))
        return
    text = f"linear SVM on {config.data.name}: overall accuracy {result.accuracy:.2f} %, mean-class {result.mean_class_accuracy:.2f} %"
    Console().print(text, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    cli.run(main)
