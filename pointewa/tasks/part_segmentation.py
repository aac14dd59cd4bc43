"""Segmentation of objects into the parts of their category."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pointewa.config import Config, build_architecture, decoder_of, model_error
from pointewa.errors import ConfigError
from pointewa.models import LoadReport, PointTransformerSegmenter
from pointewa.models.layers import at_least_float32
from pointewa.models.parts import Parts, predicted_parts
from pointewa.runs.weights import init_from
from pointewa.tasks import register
from pointewa.tasks.base import TRANSFORMER, Batch, Metric, Outputs, Shown, Subjects, Task, evaluating

if TYPE_CHECKING:
    from pointewa.viz.drawings import Drawing, Item

Predict = Callable[[nn.Module, Batch], Tensor]  # logits [B, P, M]


@lru_cache(maxsize=8)
def part_mask(parts: Parts, num_classes: int, device: torch.device) -> Tensor:
    """`Parts.mask` on a device: which parts a category has, bool ``[num_classes, M]``."""
    return parts.mask(num_classes).to(device)


def overlaps(predicted: Tensor, truth: Tensor, num_parts: int) -> tuple[Tensor, Tensor]:
    """For each object and part the number of points in the intersection of prediction and truth, and in their union.

    Args:
        predicted: int64 ``[B, P]``.
        truth: int64 ``[B, P]``.
        num_parts: M.

    Returns:
        Two int64 ``[B, M]``.
    """

    def counts(parts: Tensor, weights: Tensor) -> Tensor:
        found = torch.zeros(len(parts), num_parts, dtype=torch.int64, device=parts.device)
        return found.scatter_add_(1, parts, weights.long())

    every = torch.ones_like(truth)
    intersection = counts(truth, predicted == truth)
    return intersection, counts(predicted, every) + counts(truth, every) - intersection


@dataclass(frozen=True)
class Segmentation:
    """What was predicted for the points of N objects, counted, on the CPU, and the metrics that follow.

    Args:
        labels: categories, int64 ``[N]``.
        belongs: which of the M parts an object's category has, bool ``[N, M]``.
        intersection: points where prediction and truth are a part, int64 ``[N, M]``.
        union: points where either is, int64 ``[N, M]``.
        points: points that were predicted, int64 ``[N]``.
        correct: those of them that were predicted correctly, int64 ``[N]``.
        loss: mean cross-entropy, float32 ``[N]``.
        predicted: the predicted parts, int16 ``[N, P]``; empty if the objects differ in size.
    """

    labels: Tensor
    belongs: Tensor
    intersection: Tensor
    union: Tensor
    points: Tensor
    correct: Tensor
    loss: Tensor
    predicted: Tensor

    @property
    def ious(self) -> Tensor:
        """Mean IoU of each object in percent, float64 ``[N]``: over all parts of its category, where a part that is
        neither predicted nor there counts 100."""
        iou = torch.where(self.union == 0, 1.0, self.intersection.double() / self.union)
        return 100 * (iou * self.belongs).sum(1) / self.belongs.sum(1)

    def by_class(self, num_classes: int | None = None) -> Tensor:
        """Mean of `ious` for each category, float64 ``[C]``; NaN for one without objects.

        Args:
            num_classes: C; None: up to the last one that there is.
        """
        count = num_classes or int(self.labels.max()) + 1
        sums = torch.zeros(count, dtype=torch.float64).index_add_(0, self.labels, self.ious)
        return sums / self.labels.bincount(minlength=count)

    @property
    def metrics(self) -> dict[str, float]:
        """Mean IoU over the objects, that over the categories that occur, point accuracy, and loss."""
        return {
            "miou": self.ious.mean().item(),
            "class_miou": self.by_class().nanmean().item(),
            "accuracy": 100 * (self.correct / self.points).double().mean().item(),
            "loss": self.loss.double().mean().item(),
        }


def plain(model: nn.Module, batch: Batch) -> Tensor:
    """The logits of a batch as it is."""
    return model(batch.points, batch.labels)


def measured(
    model: PointTransformerSegmenter, batch: Batch, logits: Tensor, every_part: bool = False
) -> dict[str, Tensor]:
    """The fields of `Segmentation` for a batch with point labels.

    Args:
        model: says which parts there are.
        batch: whose ``points`` are not looked at.
        logits: of its points, ``[B, P, M]``.
        every_part: predict any part, not only those of the true category.

    Raises:
        ConfigError: the points have no labels.
    """
    truth, logits = _truth(batch), logits.float()
    belongs = part_mask(model.parts, model.num_classes, logits.device)[batch.labels]
    predicted = predicted_parts(logits, None if every_part else belongs)
    intersection, union = overlaps(predicted, truth, len(model.parts))
    found = {
        "labels": batch.labels,
        "belongs": belongs,
        "intersection": intersection,
        "union": union,
        "points": torch.full_like(batch.labels, truth.shape[1]),
        "correct": (predicted == truth).sum(1),
        "loss": F.cross_entropy(logits.transpose(1, 2), truth, reduction="none").mean(1),
        "predicted": predicted.short(),
    }
    return {name: value.cpu() for name, value in found.items()}


def segment(
    model: PointTransformerSegmenter, batches: Iterable[Batch], predict: Predict = plain, every_part: bool = False
) -> Segmentation:
    """Run a segmenter in evaluation mode, in float32, over all batches; afterwards every module has its former mode.

    Args:
        model: the segmenter.
        batches: with point labels.
        predict: from the model and a batch to the logits of its points.
        every_part: as in `measured`.
    """
    with evaluating(model):
        return Segmentation(**_outputs(model, batches, predict, every_part))


def _outputs(
    model: PointTransformerSegmenter, batches: Iterable[Batch], predict: Predict = plain, every_part: bool = False
) -> Outputs:
    rows = [measured(model, batch, predict(model, batch), every_part) for batch in batches]
    return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}


def _truth(batch: Batch) -> Tensor:
    if batch.point_labels is None:
        raise ConfigError("data.name: part_segmentation learns from labelled points, and those of this set have none")
    return batch.point_labels


@register
class PartSegmentation(Task):
    """Cross-entropy over all parts; mean IoU of the objects, and its mean over the categories."""

    name = "part_segmentation"
    metrics: ClassVar = {
        "miou": Metric("instance mIoU", ".2f", "%", "mIoU", digits=4),
        "class_miou": Metric("class mIoU", ".2f", "%", digits=4),
        "accuracy": Metric("point accuracy", ".2f", "%", "acc", digits=4),
        "loss": Metric("loss", ".4f", higher_is_better=False, headline=False),
    }
    train_metrics = ("accuracy",)
    reads = (*TRANSFORMER, "model.decoder", "train.label_smoothing")
    point_labels = True
    changes: ClassVar = {"points_changed_by_folding": Metric("points predicted otherwise", ".3f", "%")}

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        build_architecture(config.model)

    def build_model(self, class_names: tuple[str, ...], parts: Parts | None = None) -> nn.Module:
        """Point-MAE's or Point-BERT's segmenter, or one with a lighter decoder.

        Raises:
            ConfigError: a set without parts, or values that do not go together.
        """
        data, model = self.config.data, self.config.model
        if parts is None:
            raise ConfigError(
                f"data.name: part_segmentation learns from points that are labelled by parts, and {data.name} at "
                f"{data.root} has none: set another one, such as shapes or shapenetpart"
            )
        try:
            return PointTransformerSegmenter(build_architecture(model), parts, len(class_names), decoder_of(model))
        except ValueError as error:
            raise model_error(error) from error

    def load_initial(self, model: nn.Module, path: str) -> LoadReport:
        """From a pre-training, a classifier or a segmenter, ours, Point-MAE's or Point-BERT's."""
        return init_from(model, path)

    def trained_head(self, model: nn.Module) -> nn.Module:
        """The decoder."""
        return model.head

    def inputs(self, batch: Batch) -> tuple[Tensor, ...]:
        """The clouds and their categories."""
        return batch.points, batch.labels

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy over all parts with ``train.label_smoothing``; the share of points in percent whose most
        probable part, of those of their category, is theirs, summed over the objects."""
        output, truth = model(batch.points, batch.labels), _truth(batch)
        logits = at_least_float32(output)
        smoothing = self.config.train.label_smoothing
        loss = F.cross_entropy(logits.flatten(0, 1), truth.flatten(), label_smoothing=smoothing)
        inner = getattr(model, "module", model)  # in DistributedDataParallel
        allowed = part_mask(inner.parts, inner.num_classes, logits.device)[batch.labels]
        correct = predicted_parts(logits.detach(), allowed) == truth
        return loss, {"accuracy": 100 * correct.float().mean(1).sum()}

    def outputs(self, model: nn.Module, batches: Iterable[Batch]) -> Outputs:
        """The fields of `Segmentation`: counts and predictions, not the logits, which would take M times the memory."""
        return _outputs(model, batches)

    def measure(self, outputs: Outputs) -> dict[str, float]:
        """Mean IoUs and point accuracy in percent, and the mean cross-entropy without smoothing."""
        return Segmentation(**outputs).metrics

    def compare(self, before: Outputs, after: Outputs) -> dict[str, float]:
        """The share of points in percent that are predicted to be of another part."""
        changed = (before["predicted"] != after["predicted"]).double().mean()
        return {"points_changed_by_folding": 100 * changed.item()}

    def detail(self, outputs: Outputs, class_names: Sequence[str]) -> dict[str, Any]:
        """The mean IoU of each category in percent; None for one without objects."""
        values = Segmentation(**outputs).by_class(len(class_names)).tolist()
        return {"miou_by_class": {name: round(value, 4) if value == value else None
                                  for name, value in zip(class_names, values, strict=True)}}  # fmt: skip

    def show(self, subjects: Subjects, count: int) -> Shown:
        """A table of the categories; truth, prediction and errors of the objects with the lowest IoU, and of the first
        of each category."""
        from pointewa.viz.clouds import clouds_figure
        from pointewa.viz.html import clouds_html
        from pointewa.viz.report import section_html, table_html

        loaded, result = subjects.loaded, segment(subjects.loaded.model, subjects.batches())
        names, each = loaded.class_names, max(1, count // 2)
        sections = [section_html("Categories", table_html(class_rows(result, loaded.model, names), CLASS_COLUMNS))]
        lowest = draw(loaded.model, names, subjects.at(result.ious.argsort()[:each].tolist()))
        first = draw(loaded.model, names, subjects.items([], each))
        for heading, drawn in (("Lowest IoU", lowest), ("Parts", first)):
            sections.append(section_html(heading, clouds_html(drawn.picture)))
        return Shown(sections, result.metrics, {"lowest": lowest.numbers["objects"]},
                     {"parts": clouds_figure(first.picture)})  # fmt: skip


def draw(
    model: PointTransformerSegmenter, class_names: Sequence[str], items: "Sequence[Item]", heading: str = ""
) -> "Drawing":
    """True parts, predicted parts and errors, a row an object.

    Args:
        model: in evaluation mode.
        class_names: its categories.
        items: with their class, and the parts of their points.
        heading: above.

    Raises:
        ConfigError: an object whose category or parts are not known, as of a file.
    """
    from pointewa.viz.drawings import Drawing
    from pointewa.viz.parts import SegmentedCloud, parts_picture

    clouds, numbers = [], []
    for item in items:
        if item.class_name is None or item.point_labels is None:
            raise ConfigError(f"--object: the category and the parts of {item.name} are not known: make predict "
                              "writes what is predicted for a file")  # fmt: skip
        label = torch.tensor([class_names.index(item.class_name)], device=item.points.device)
        batch = Batch(item.points[None], label, item.point_labels[None])
        with evaluating(model):
            found = measured(model, batch, plain(model, batch))
        predicted, iou = found["predicted"][0].long(), Segmentation(**found).ious.item()
        clouds.append(SegmentedCloud(item.points, predicted, item.point_labels, f"{item.title}: IoU {iou:.1f} %"))
        wrong = int((predicted != item.point_labels.cpu()).sum())
        numbers.append({"object": item.name, "category": item.class_name, "iou": iou, "wrong": wrong})
    return Drawing(parts_picture(clouds, model.parts, class_names, heading), {"objects": numbers})


CLASS_COLUMNS = ("category", "objects", "parts", "mIoU")


def class_rows(result: Segmentation, model: PointTransformerSegmenter, names: Sequence[str]) -> list[list[str]]:
    """A row for each category: its objects, its parts and their mean IoU."""
    counts, mask = result.labels.bincount(minlength=len(names)).tolist(), model.parts.mask(len(names))
    rows = []
    for number, (name, value) in enumerate(zip(names, result.by_class(len(names)).tolist(), strict=True)):
        mine = ", ".join(model.parts.names[part] for part in mask[number].nonzero().squeeze(1).tolist())
        rows.append([name, str(counts[number]), mine, f"{value:.2f} %" if counts[number] else "no objects"])
    return rows
