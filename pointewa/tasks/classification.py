"""Classification of objects."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pointewa.config import Config, build_architecture
from pointewa.errors import DataError, counted
from pointewa.models import LoadReport, PointTransformerClassifier
from pointewa.models.layers import at_least_float32
from pointewa.models.parts import Parts
from pointewa.runs.weights import init_from
from pointewa.tasks import register
from pointewa.tasks.base import TRANSFORMER, Batch, Metric, Outputs, Shown, Subjects, Task, evaluating


@dataclass(frozen=True)
class Evaluation:
    """A model's logits ``[N, C]`` and the labels ``[N]`` of a set, on the CPU, and the metrics that follow.

    If the set has other classes than the model, only `restricted` is meaningful.
    """

    logits: Tensor
    labels: Tensor

    @property
    def confusion(self) -> Tensor:
        """int64 ``[C, C]``: objects of the row's class that were predicted to be of the column's."""
        classes = self.logits.shape[1]
        pairs = self.labels * classes + self.logits.argmax(1)
        return torch.bincount(pairs, minlength=classes**2).view(classes, classes)

    @property
    def per_class(self) -> Tensor:
        """Accuracy of each class, float64 ``[C]``; NaN for a class without objects."""
        return self.confusion.diagonal().double() / self.confusion.sum(1)

    @property
    def accuracy(self) -> float:
        """Overall accuracy in percent."""
        return 100 * (self.logits.argmax(1) == self.labels).double().mean().item()

    @property
    def mean_class_accuracy(self) -> float:
        """Mean of the classes' accuracies in percent."""
        return 100 * self.per_class.nanmean().item()

    def restricted(self, groups: Sequence[tuple[Sequence[int], Sequence[int]]]) -> "Evaluation":
        """For classes that two sets share: their objects, and the model's logits of those classes only.

        Args:
            groups: for each shared class, the model's classes and the labels' classes that belong to it.
        """
        shared = torch.full((int(self.labels.max()) + 1,), -1)
        for number, (_, labels) in enumerate(groups):
            shared[[label for label in labels if label < len(shared)]] = number
        kept = shared[self.labels] >= 0
        logits = torch.stack([self.logits[kept][:, list(classes)].amax(1) for classes, _ in groups], 1)
        return Evaluation(logits, shared[self.labels][kept])

    @property
    def weighted_f1(self) -> float:
        """Mean of the classes' F1 in percent, weighted by their objects: scikit-learn's ``average="weighted"``."""
        counts = self.confusion.double()
        objects, correct = counts.sum(1), counts.diagonal()
        f1 = 2 * correct / (objects + counts.sum(0)).clamp(min=1)  # 0 for a class that is never there nor predicted
        return 100 * ((objects * f1).sum() / objects.sum()).item()

    @property
    def metrics(self) -> dict[str, float]:
        """Both accuracies, the weighted F1, and the mean cross-entropy."""
        loss = F.cross_entropy(self.logits, self.labels).item()
        return {"oa": self.accuracy, "macc": self.mean_class_accuracy, "f1": self.weighted_f1, "loss": loss}


@register
class Classification(Task):
    """Cross-entropy; accuracy over all objects, and its mean over the classes."""

    name = "classification"
    metrics: ClassVar = {
        "oa": Metric("overall accuracy", ".2f", "%", "acc", digits=4),
        "macc": Metric("mean-class accuracy", ".2f", "%", digits=4),
        "loss": Metric("loss", ".4f", higher_is_better=False, headline=False),
    }
    further: ClassVar = {"f1": Metric("weighted F1", ".2f", "%", digits=4)}
    train_metrics = ("oa",)
    reads = (*TRANSFORMER, "model.head", "train.label_smoothing")
    predicts_classes = True

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        build_architecture(config.model)

    def build_model(self, class_names: tuple[str, ...], parts: Parts | None = None) -> nn.Module:
        """Point-MAE's or Point-BERT's classifier.

        Raises:
            DataError: fewer than two classes.
        """
        if len(class_names) < 2:
            raise DataError(
                f"{self.config.data.root}: expected at least two classes to tell apart, found {len(class_names)} "
                f"({', '.join(class_names)}): add folders of other classes, or point DATA_ROOT at the folder above"
            )
        return PointTransformerClassifier(build_architecture(self.config.model), len(class_names))

    def load_initial(self, model: nn.Module, path: str) -> LoadReport:
        """From a classifier or a pre-training, ours, Point-MAE's or Point-BERT's."""
        return init_from(model, path)

    def trained_head(self, model: nn.Module) -> nn.Module:
        """The classification head."""
        return model.cls_head_finetune

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy with ``train.label_smoothing``; the accuracy in percent, summed over the objects."""
        output = model(batch.points)
        logits = at_least_float32(output)
        loss = F.cross_entropy(logits, batch.labels, label_smoothing=self.config.train.label_smoothing)
        return loss, {"oa": 100 * (logits.argmax(1) == batch.labels).sum()}

    def outputs(self, model: nn.Module, batches: Iterable[Batch]) -> Outputs:
        """Logits ``[N, C]`` and labels ``[N]``."""
        return _outputs(model, batches)

    def measure(self, outputs: Outputs) -> dict[str, float]:
        """Accuracies in percent, and the mean cross-entropy without smoothing."""
        return Evaluation(**outputs).metrics

    def compare(self, before: Outputs, after: Outputs) -> dict[str, float]:
        """The largest difference of logits."""
        return {"largest_logit_difference": (after["logits"] - before["logits"]).abs().max().item()}

    def show(self, subjects: Subjects, count: int) -> Shown:
        """Confusion matrix, the most confident mistakes, saliency."""
        from pointewa.viz import drawings
        from pointewa.viz.confusion import confusion_figure
        from pointewa.viz.html import clouds_html
        from pointewa.viz.report import section_html

        names, result = subjects.loaded.class_names, evaluate(subjects.loaded.model, subjects.batches())
        what, chosen = f"{subjects.what}, {counted(len(result.labels), 'object')}", [0, len(result.labels) // 2]
        sections = class_sections(result, names, what)
        numbers = {}
        if result.accuracy < 100:
            wrong = drawings.mistakes(result.logits, result.labels, names, subjects.at, count, model=str(subjects.run))
            sections.append(section_html(wrong.picture.heading, clouds_html(wrong.picture)))
            numbers["mistakes"] = wrong.numbers["mistakes"]
            chosen = [wrong.numbers["shown"][0]["index"], *chosen]
        drawn = drawings.saliencies(subjects.loaded.model, names, subjects.at(list(dict.fromkeys(chosen))))
        sections.append(section_html("What predictions rest on", clouds_html(drawn.picture)))
        figures = {"confusion matrix": confusion_figure(result.confusion, names, subjects.what)}
        return Shown(sections, result.metrics, numbers, figures)


_CLASS_COLUMNS = ("class", "objects", "correct", "accuracy", "most often taken for")


def class_sections(result: Evaluation, names: Sequence[str], what: str) -> list[str]:
    """The parts of a run's page about its classes: a table, and the confusion matrix."""
    from pointewa.viz.report import confusion_html, section_html, table_html

    return [
        section_html("Classes", table_html(_by_class(result, names), _CLASS_COLUMNS)),
        section_html("Confusion matrix", confusion_html(result.confusion, names, what)),
    ]


def _by_class(result: Evaluation, names: Sequence[str]) -> list[list[str]]:
    """A row for each class: its objects, how many are correct, and what the others are most often taken for."""
    rows = []
    for number, (name, counts) in enumerate(zip(names, result.confusion.tolist(), strict=True)):
        objects, correct = sum(counts), counts[number]
        counts[number] = 0
        wrong = max(counts)
        taken = f"{names[counts.index(wrong)]} ({wrong})" if wrong else "-"
        accuracy = f"{100 * correct / objects:.1f} %" if objects else "no objects"
        rows.append([name, str(objects), str(correct), accuracy, taken])
    return rows


def evaluate(model: nn.Module, batches: Iterable[Batch]) -> Evaluation:
    """Run a classifier in evaluation mode, in float32, over all batches; afterwards every module has its former mode.

    Args:
        model: ``points [B, P, 3] -> logits [B, C]``.
        batches: with labels.
    """
    with evaluating(model):
        return Evaluation(**_outputs(model, batches))


def _outputs(model: nn.Module, batches: Iterable[Batch]) -> Outputs:
    results = [(model(batch.points), batch.labels) for batch in batches]
    logits, labels = (torch.cat(parts).cpu() for parts in zip(*results, strict=True))
    return {"logits": logits.float(), "labels": labels}
