"""Fit a linear support vector machine to the features of a frozen model, and report its accuracy on the test split.

python -m tools.svm runs/pretrained-modelnet40-tiny data.root=/data
python -m tools.svm runs/x --config configs/scanobjectnn.yaml data.root=/data data.train_fraction=0.1 --json

Data set and objects are those of the model's training, unless the arguments say otherwise. Features are scaled to
mean 0 and variance 1.
"""

import json

from rich.console import Console

from pointewa.datasets.subjects import Subjects
from pointewa.inference import svm
from pointewa.tools import cli


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = cli.parser(*__doc__.split("\n\n", 1))
    parser.add_argument("checkpoint", help="run folder, or a model file in it")
    strength = "inverse strength of the regularisation (default 0.01)"
    cli.add_number(parser, "--c", 0, float, above=True, default=0.01, help=strength)
    cli.add_config(parser)
    args = parser.parse_intermixed_args(argv)
    subjects = Subjects(args.checkpoint, "test", args.config, args.overrides)
    subjects.need_clouds("svm")
    data = subjects.config.data
    test = subjects.features(), subjects.clouds.labels.cpu()
    result = svm.fit(subjects.training_features(), test, len(subjects.clouds.class_names), args.c)
    accuracies = {name: round(value, 4) for name, value in result.metrics.items() if name != "loss"}
    if args.json:
        print(json.dumps({"model": args.checkpoint, "dataset": data.name, "train_fraction": data.train_fraction,
                          "val_fraction": data.val_fraction, "c": args.c, **accuracies}))  # fmt: skip
        return
    text = (
        f"linear SVM on {data.name}: overall accuracy {result.accuracy:.2f} %, mean-class "
        f"{result.mean_class_accuracy:.2f} %"
    )
    Console().print(text, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    cli.run(main)
