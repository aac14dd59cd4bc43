"""The interface of a task: its model, the loss of a batch, the metrics of a split, and how they are shown.

The training loop, studies, reports and tools use nothing else of a task.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol, Self

import torch
from torch import Tensor, nn

from pointewa.config import Config
from pointewa.errors import CheckpointError, ConfigError
from pointewa.models import LoadReport
from pointewa.models.parts import Parts
from pointewa.runs.description import LoadedModel

if TYPE_CHECKING:
    from pointewa.viz.drawings import Item


class Batch(NamedTuple):
    """Clouds or images from the loaders, on the training device.

    Args:
        points: float32 ``[B, P, 3]``; of images their pixels ``[B, 3, S, S]`` in [-1, 1].
        labels: int64 ``[B]``, of the objects.
        point_labels: int64 ``[B, P]``, of their points, in the same order; None if the data set has none.
    """

    points: Tensor
    labels: Tensor
    point_labels: Tensor | None = None

    def chunk(self, parts: int) -> Iterator["Batch"]:
        """The batch in parts of about equal size."""
        columns = [[None] * parts if one is None else one.chunk(parts) for one in self]
        return (Batch(*rows) for rows in zip(*columns, strict=True))


@dataclass(frozen=True)
class Metric:
    """How a metric of a split is shown.

    Args:
        label: its name, for people.
        form: format of its value, as in f-strings.
        unit: such as "%".
        short: its name in a line of progress.
        digits: decimals that summaries keep.
        higher_is_better: otherwise lower is.
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
        """A value with its unit; "-" without a value."""
        return "-" if value is None else f"{value:{self.form}} {self.unit}".rstrip()

    @property
    def axis(self) -> str:
        """The label with the unit."""
        return f"{self.label}, {self.unit}" if self.unit else self.label


Outputs = dict[str, Tensor]
# The keys of a point transformer, for `Task.reads`.
TRANSFORMER = ("model.width", "model.depth", "model.heads", "model.mlp_ratio", "model.num_groups", "model.group_size",
               "model.patch_out", "model.drop_path")  # fmt: skip


class Task(ABC):
    """What is learned. A task has no weights and no state, only the configuration.

    Args:
        config: the whole configuration.

    Raises:
        ConfigError: keys that do not go with the task.

    Attributes:
        name: its name in ``train.task``.
        metrics: of a split, by their keys in summaries; the first is the primary one.
        further: metrics that are recorded too, and shown only where a data set asks for them, see `reporting`.
        train_metrics: those that `loss` returns sums of.
        reads: the configuration's keys that it reads, of the groups ``model`` (but for ``preset``) and ``task``, and of
            ``train.label_smoothing`` and ``data.img_size``; a new training refuses others of them.
        model_file: the file of the trained dense model in the run folder.
        needs_labels: it learns from labels; else clouds in a folder without classes will do.
        of_points: the model sees clouds, so that votes, corruptions, exports and drawings of points apply; else images.
        point_labels: the points of the clouds have to be labelled by their parts (`pointewa.models.parts`).
        predicts_classes: the model returns logits ``[B, C]``, so that votes, corruptions and confusion matrices apply.
        changes: what `compare` returns, as the table of a result shows it.
    """

    name: ClassVar[str]
    metrics: ClassVar[Mapping[str, Metric]]
    further: ClassVar[Mapping[str, Metric]] = {}
    train_metrics: ClassVar[tuple[str, ...]] = ()
    reads: ClassVar[tuple[str, ...]] = ()
    model_file: ClassVar[str] = "model.safetensors"
    needs_labels: ClassVar[bool] = True
    of_points: ClassVar[bool] = True
    point_labels: ClassVar[bool] = False
    predicts_classes: ClassVar[bool] = False
    changes: ClassVar[Mapping[str, Metric]] = {
        "largest_logit_difference": Metric("largest difference of logits", ".1e")
    }

    def __init__(self, config: Config) -> None:
        self.config = config

    @abstractmethod
    def build_model(self, class_names: tuple[str, ...], parts: Parts | None = None) -> nn.Module:
        """The dense model with fresh weights, of a class in `pointewa.models.registry`, so that it can be loaded.

        Args:
            class_names: of the data set.
            parts: of its objects, where it has labelled points.

        Raises:
            ConfigError: values that do not go together.
        """

    def rebuild_model(self, class_names: tuple[str, ...], parts: Parts | None, saved: nn.Module) -> nn.Module:
        """As `build_model`, for a training that resumes: its weights will be those of its checkpoint.

        A task whose model is built on further files takes their part from ``saved``, since they may be gone.

        Args:
            class_names, parts: see `build_model`.
            saved: the model of the checkpoint, with its experts.
        """
        return self.build_model(class_names, parts)

    def check_data(self, normalize: str) -> None:  # noqa: B027  optional
        """Called before a training from the start: refuse data that do not go with what the task builds on.

        Args:
            normalize: what was done to the clouds, see `pointewa.runs.description.LoadedModel`.

        Raises:
            ConfigError: they do not.
        """

    def load_initial(self, model: nn.Module, path: str) -> LoadReport:
        """Load the weights of ``train.init_from`` into a fresh model.

        Raises:
            ConfigError: the task starts from scratch only.
            CheckpointError: missing, damaged, or of another architecture.
        """
        raise ConfigError(f"train.init_from: {self.name} starts from scratch: leave it out")

    def trained_head(self, model: nn.Module) -> nn.Module:
        """The part of the model that is still trained with ``train.freeze_backbone``.

        Raises:
            ConfigError: the task has no such part.
        """
        raise ConfigError(f"train.freeze_backbone: {self.name} trains the whole model: leave it out")

    def inputs(self, batch: Batch) -> tuple[Tensor, ...]:
        """What the model is called with; the clouds or images by default."""
        return (batch.points,)

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean loss ``[]`` of a batch, and for each of `train_metrics` its sum ``[]`` over the objects.

        Called under autocast; cast to float32 where that is needed.
        """

    def before_step(self, model: nn.Module, progress: float) -> None:  # noqa: B027  optional
        """Called before each step of a training, for what changes on a schedule; nothing by default.

        Since a training resumes by its step, and evaluations come at any time, what is set here must follow from
        ``progress`` alone.

        Args:
            model: the model in training, not its wrapper for several processes or for compilation.
            progress: the fraction of the training's steps that are done, from 0 to below 1.
        """

    def after_step(self, model: nn.Module, gather: Callable[[Tensor], Tensor]) -> None:  # noqa: B027  optional
        """Called after each optimizer step, unless that was skipped as non-finite; nothing by default.

        For what follows the weights, such as a momentum encoder; it belongs to the model's parameters or buffers, so
        that checkpoints have it. A task that defines it makes the device wait at each step.

        Args:
            model: the model in training.
            gather: from rows ``[B, ...]`` of this process to those of all processes, by rank, the same on each.
        """

    @abstractmethod
    def outputs(self, model: nn.Module, batches: Iterable[Batch]) -> Outputs:
        """What `measure` needs of a split: tensors on the CPU with a row per object. The model is in evaluation mode.

        With several processes each has a part of the split, and their rows are concatenated.
        """

    @abstractmethod
    def measure(self, outputs: Outputs) -> dict[str, float]:
        """The `metrics` of a split."""

    def compare(self, before: Outputs, after: Outputs) -> dict[str, float]:
        """How much folding changed, for the summary; nothing by default."""
        return {}

    def detail(self, outputs: Outputs, class_names: tuple[str, ...]) -> dict[str, Any]:
        """Further entries of the summary; nothing by default."""
        return {}

    def input_classes(self, class_names: tuple[str, ...]) -> tuple[str, ...]:
        """The classes that the model knows: those of the data set by default."""
        return class_names

    # How results are shown.

    @classmethod
    def reporting(cls, keys: Any) -> "type[Self]":
        """The task with those of its `further` metrics first that a data set's protocol reports.

        Args:
            keys: of metrics; others than those of `further`, and what is no list, are passed over.
        """
        wanted = (
            {key: cls.further[key] for key in keys if isinstance(key, str) and key in cls.further}
            if isinstance(keys, list | tuple)
            else {}
        )
        if not wanted:
            return cls
        further = {key: one for key, one in cls.further.items() if key not in wanted}
        return type(cls.__name__, (cls,), {"metrics": wanted | dict(cls.metrics), "further": further})

    @classmethod
    def primary(cls) -> str:
        """The key of the primary metric."""
        return next(iter(cls.metrics))

    @classmethod
    def result(cls, summary: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
        """The result of a finished run as a table: headings and rows."""
        before, after = summary["test_before_folding"], summary["test"]
        # Version 0.1 recorded only whether there were experts; those that do not fold have a router.
        scheme = summary.get("scheme", "moe" if summary.get("ewa") and not before else "dense")
        kind = "folded (dense)" if before else "gated MoE" if scheme.startswith("moe") else "dense"
        rows = [
            [one.label, one.text((before or after)[key]), one.text(after[key])]
            for key, one in cls.metrics.items()
            if one.headline
        ]
        rows.append(["parameters", f"{summary['parameters_in_training']:,}", f"{summary['parameters']:,}"])
        for key, one in cls.changes.items():
            if before and isinstance(change := summary.get(key), float):
                rows.append([one.label, "", one.text(change)])
        rows.append(["seconds of training", f"{summary['seconds']:.0f}", "" if before else f"{summary['seconds']:.0f}"])
        for label, value in _memory(summary):
            rows.append([label, value, "" if before else value])
        if before:
            return ["", "in training (MoE)", kind], rows
        return ["", kind], [[label, value] for label, _, value in rows]

    @classmethod
    def check_summary(cls, summary: Mapping[str, Any], source: str) -> None:
        """Refuse a run's summary that lacks a metric.

        Raises:
            CheckpointError: naming ``source`` and the metric.
        """
        for part in (summary["test"], summary["test_before_folding"] or summary["test"]):
            if missing := [key for key in cls.metrics if key not in part]:
                raise CheckpointError(f"{source}: damaged ({missing[0]!r} is missing): remove it, and the same command "
                                      "makes it again")  # fmt: skip

    def show(self, subjects: "Subjects", count: int) -> "Shown":
        """The task's part of a finished run's page; nothing by default.

        Args:
            subjects: the model and its test split.
            count: the most objects in a picture.
        """
        return Shown([])


@dataclass
class Shown:
    """A task's part of a run's page.

    Args:
        sections: parts of the page, each with a heading.
        metrics: measured again for the page.
        numbers: further entries of the JSON output.
        figures: matplotlib figures for TensorBoard, by tag.
    """

    sections: list[str]
    metrics: dict[str, float] = field(default_factory=dict)
    numbers: dict[str, Any] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)


class Subjects(Protocol):
    """A model and a split: `pointewa.datasets.subjects.Subjects`."""

    run: Any
    what: str
    loaded: LoadedModel
    clouds: Any

    def batches(self, transform: Any = None, title: str = "") -> Iterable[Batch]:
        """The split, as input of the model."""
        ...

    def items(self, wanted: list[str], count: int) -> "list[Item]":
        """Objects by index or name; by default the first of each class, up to ``count``."""
        ...

    def at(self, indices: list[int]) -> "list[Item]":
        """The objects of the split with these numbers."""
        ...


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """The model in evaluation mode, without gradients; afterwards every module has its former mode."""
    modes = {module: module.training for module in model.modules()}
    try:
        with torch.no_grad():
            yield model.eval()
    finally:
        for module, training in modes.items():
            module.training = training


def _memory(summary: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Rows of a run that compressed something: what it needed, and what it would have needed."""
    found = summary.get("compression")
    for key, label in (("kept_mb", "kept for the backward pass, MB"), ("sent_mb_a_step", "sent in a step, MB")):
        pair = [found.get(name) for name in (key, f"{key}_without")] if isinstance(found, dict) else [None]
        if all(type(one) in (int, float) for one in pair):
            yield label, f"{pair[0]:.1f} ({pair[1]:.1f} uncompressed)"
    if found and type(peak := summary.get("peak_memory_mb")) is int:
        yield "peak memory of the process, MB", f"{peak:,}"
