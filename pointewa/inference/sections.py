"""What the page of a run shows of its task, a function a task."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from pointewa.inference.result import Label, Labels
from pointewa.models import MaskedAutoencoder
from pointewa.runs.description import LoadedModel
from pointewa.tasks.classification import Evaluation
from pointewa.viz import drawings
from pointewa.viz.clouds import clouds_figure
from pointewa.viz.confusion import confusion_figure
from pointewa.viz.drawings import Item
from pointewa.viz.html import clouds_html
from pointewa.viz.report import confusion_html, section_html


class Clouds(Protocol):
    """What is asked of the clouds of a split."""

    labels: Tensor
    class_names: tuple[str, ...]

    def __len__(self) -> int: ...


class Subjects(Protocol):
    """A model and the split that it looks at: `datasets.subjects.Subjects`."""

    run: Any
    what: str
    loaded: LoadedModel
    clouds: Clouds
    evaluation: Evaluation

    def items(self, wanted: list[str], count: int) -> list[Item]:
        """Objects by index or name; without any the first of each class, up to ``count``."""
        ...

    def at(self, indices: list[int]) -> list[Item]:
        """The objects of the split with these numbers."""
        ...

    def features(self) -> Tensor:
        """Of the whole split, ``[N, F]``."""
        ...


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


def show_classification(subjects: Subjects, count: int) -> Shown:
    """Confusion matrix, the most confident mistakes (at most ``count``), what predictions rest on."""
    names, result = subjects.loaded.class_names, subjects.evaluation
    what, chosen = f"{subjects.what}, {len(result.labels)} objects", [0, len(result.labels) // 2]
    sections = [section_html("Confusion matrix", confusion_html(result.confusion, names, what))]
    numbers: dict[str, Any] = {}
    if result.accuracy < 100:
        wrong = drawings.mistakes(result.logits, result.labels, names, subjects.at, count, model=str(subjects.run))
        sections.append(section_html(wrong.picture.heading, clouds_html(wrong.picture)))
        numbers["mistakes"] = wrong.numbers["mistakes"]
        chosen = [wrong.numbers["shown"][0]["index"], *chosen]
    drawn = drawings.saliencies(subjects.loaded.model, names, subjects.at(chosen))
    sections.append(section_html("What predictions rest on", clouds_html(drawn.picture)))
    figures = {"confusion matrix": confusion_figure(result.confusion, names, subjects.what)}
    return Shown(sections, result.metrics, numbers, figures)


def show_reconstructions(subjects: Subjects, count: int) -> Shown:
    """Reconstructions of at most ``count`` objects."""
    picture = drawings.reconstructions(subjects.loaded.model, subjects.items([], count)).picture
    sections = [section_html("Reconstructions", clouds_html(picture))]
    return Shown(sections, figures={"reconstruction": clouds_figure(picture)})


class TaskPage(NamedTuple):
    """What a task adds to the page of a run.

    Args:
        labels: of its metrics.
        show: from the model with its split, and how many objects are shown at most, to what is shown.
    """

    labels: Labels
    show: Callable[[Subjects, int], Shown]


CLASSIFICATION = TaskPage(
    {
        "oa": Label("overall accuracy", "{:.2f} %"),
        "macc": Label("mean-class accuracy", "{:.2f} %"),
        "loss": Label("loss", "{:.4f}"),
    },
    show_classification,
)
MASKED_AUTOENCODING = TaskPage({"loss": Label("Chamfer distance of masked patches", "{:.3e}")}, show_reconstructions)


def page_of(model: nn.Module) -> TaskPage:
    """That of the task that a model was trained for."""
    return MASKED_AUTOENCODING if isinstance(model, MaskedAutoencoder) else CLASSIFICATION
