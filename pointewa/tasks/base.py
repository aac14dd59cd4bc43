"""What a task has to say: its model, the loss of a batch, the metrics of a split, and how they are shown.

The training loop, studies, reports and tools know tasks by this interface only.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from pointewa.config import Config
from pointewa.errors import CheckpointError, ConfigError
from pointewa.models import LoadReport
from pointewa.runs.description import LoadedModel

if TYPE_CHECKING:
    from pointewa.viz.drawings import Item


class Batch(NamedTuple):
    """Clouds as the loaders give them, on the device of the training.

    Args:
        points: float32 ``[B, P, 3]``.
        labels: int64 ``[B]``, of the clouds.
        point_labels: int64 ``[B, P]``, of their points, in step with them; None where the data set has none.
    """

    points: Tensor
    labels: Tensor
    point_labels: Tensor | None = None

    def chunk(self, parts: int) -> Iterator["Batch"]:
        """The batch in parts of about equal size, one after another."""
        columns = [[None] * parts if one is None else one.chunk(parts) for one in self]
        return (Batch(*rows) for rows in zip(*columns, strict=True))


@dataclass(frozen=True)
class Metric:
    """How a metric of a split is shown.

    Args:
        label: what it is.
        form: of its value, as in f-strings.
        unit: such as "%".
        short: its name in a line of progress.
        digits: decimals that summaries keep.
        higher_is_better: else lower.
        headline: whether it belongs in short tables.
    """

    label: str
    form: str = ".4g"
    unit: str = ""
    short: str = ""
    digits: int = 6
    higher_is_better: bool = True
    headline: bool = True

    def text(self, value: float | None) -> str:
        """A value as people read it."""
        return "-" if value is None else f"{value:{self.form}} {self.unit}".rstrip()

    @property
    def axis(self) -> str:
        """The label with the unit."""
        return f"{self.label}, {self.unit}" if self.unit else self.label


Outputs = dict[str, Tensor]


class Task(ABC):
    """What is learned. A task holds no weights and no state: it is made of the configuration.

    Args:
        config: the whole configuration.

    Raises:
        ConfigError: keys that do not go with the task.

    Attributes:
        name: what ``train.task`` calls it.
        metrics: of a split, by their keys in summaries; the first is the primary one.
        train_metrics: those that `loss` sums up besides the loss.
        model_file: the file in the run folder that the trained dense model is written to.
        predicts_classes: the model gives logits ``[B, C]``: votes, corruptions and confusion matrices make sense.
    """

    name: ClassVar[str]
    metrics: ClassVar[Mapping[str, Metric]]
    train_metrics: ClassVar[tuple[str, ...]] = ()
    model_file: ClassVar[str] = "model.safetensors"
    predicts_classes: ClassVar[bool] = False

    def __init__(self, config: Config) -> None:
        self.config = config

    @abstractmethod
    def build_model(self, class_names: tuple[str, ...]) -> nn.Module:
        """The dense model with fresh weights. Its class is in `pointewa.models.registry`, so that it can be loaded.

        Raises:
            ConfigError: values that do not go together.
        """

    def load_initial(self, model: nn.Module, path: str) -> LoadReport:
        """Give a fresh model the weights of ``train.init_from``.

        Raises:
            ConfigError: the task starts from scratch only.
            CheckpointError: missing, damaged, or of another architecture.
        """
        raise ConfigError(f"train.init_from: {self.name} starts from scratch: leave it out")

    def trained_head(self, model: nn.Module) -> nn.Module:
        """The part that ``train.freeze_backbone`` leaves to be trained.

        Raises:
            ConfigError: the task has no such part.
        """
        raise ConfigError(f"train.freeze_backbone: {self.name} trains the whole model: leave it out")

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean loss ``[]`` of a batch, and for each of `train_metrics` its sum ``[]`` over the objects.

        Called under autocast; what needs float32 has to see to it.
        """

    @abstractmethod
    def outputs(self, model: nn.Module, batches: Iterable[Batch]) -> Outputs:
        """What `measure` needs of a split, a row an object in each tensor, on the CPU. The model is in evaluation mode.

        With several processes each has a part of the split; their rows are put together.
        """

    @abstractmethod
    def measure(self, outputs: Outputs) -> dict[str, float]:
        """The `metrics` of a split."""

    def compare(self, before: Outputs, after: Outputs) -> dict[str, float]:
        """What folding changed, for the summary; nothing by default."""
        return {}

    def input_classes(self, class_names: tuple[str, ...]) -> tuple[str, ...]:
        """The classes that the model knows: those of the data set by default."""
        return class_names

    # How results are shown.

    @classmethod
    def primary(cls) -> str:
        """The key of the metric that counts."""
        return next(iter(cls.metrics))

    @classmethod
    def result(cls, summary: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
        """The figures of a finished run as a table: headings, and rows."""
        before, after = summary["test_before_folding"], summary["test"]
        # Version 0.1 said only whether there were experts; those that do not fold are behind a router.
        scheme = summary.get("scheme", "moe" if summary.get("ewa") and not before else "dense")
        kind = "folded (dense)" if before else "gated MoE" if scheme.startswith("moe") else "dense"
        rows = [
            [one.label, one.text((before or after)[key]), one.text(after[key])]
            for key, one in cls.metrics.items()
            if one.headline
        ]
        rows.append(["parameters", f"{summary['parameters_in_training']:,}", f"{summary['parameters']:,}"])
        if before and isinstance(difference := summary.get("largest_logit_difference"), float):
            rows.append(["largest difference of logits", "", f"{difference:.1e}"])
        rows.append(["seconds of training", f"{summary['seconds']:.0f}", "" if before else f"{summary['seconds']:.0f}"])
        if before:
            return ["", "in training (MoE)", kind], rows
        return ["", kind], [[label, value] for label, _, value in rows]

    @classmethod
    def check_summary(cls, summary: Mapping[str, Any], source: str) -> None:
        """Refuse the summary of a run that lacks a metric.

        Raises:
            CheckpointError: naming ``source`` and the metric.
        """
        for part in (summary["test"], summary["test_before_folding"] or summary["test"]):
            if missing := [key for key in cls.metrics if key not in part]:
                raise CheckpointError(f"{source}: damaged ({missing[0]!r} is missing): remove it, and the same command "
                                      "makes it again")  # fmt: skip

    def show(self, subjects: "Subjects", count: int) -> "Shown":
        """What the page of a finished run shows of it; nothing by default.

        Args:
            subjects: the model with the split that it was tested on.
            count: objects to show at most in each picture.
        """
        return Shown([])


@dataclass
class Shown:
    """What a task shows of a run.

    Args:
        sections: parts of the page, each under its heading.
        metrics: measured again for the page.
        numbers: what else is said in JSON.
        figures: matplotlib figures for TensorBoard, by their tags.
    """

    sections: list[str]
    metrics: dict[str, float] = field(default_factory=dict)
    numbers: dict[str, Any] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)


class Subjects(Protocol):
    """A model and the split that it looks at: `datasets.subjects.Subjects`."""

    run: Any
    what: str
    loaded: LoadedModel
    clouds: Any

    def batches(self, transform: Any = None, title: str = "") -> Iterable[Batch]:
        """The split, as the model takes it."""
        ...

    def items(self, wanted: list[str], count: int) -> "list[Item]":
        """Objects by index or name; without any the first of each class, up to ``count``."""
        ...

    def at(self, indices: list[int]) -> "list[Item]":
        """The objects of the split with these numbers."""
        ...


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """The model in evaluation mode without gradients; at the end every module is in the mode that it was in."""
    modes = {module: module.training for module in model.modules()}
    try:
        with torch.no_grad():
            yield model.eval()
    finally:
        for module, training in modes.items():
            module.training = training
