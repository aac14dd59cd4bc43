"""The mistakes that a classifier is most confident of."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Mistake:
    """An object that was taken for something else.

    Args:
        index: of the object in the set.
        truth: its class.
        predicted: the class that the model took it for.
        confidence: the probability that the model gave to that class.
        of_truth: and to the true one.
    """

    index: int
    truth: int
    predicted: int
    confidence: float
    of_truth: float


def confident_mistakes(logits: Tensor, labels: Tensor, count: int | None = None) -> list[Mistake]:
    """The mistakes on a set, the most confident first, equally confident ones in the order of the set.

    Args:
        logits: ``[N, C]``.
        labels: int64 ``[N]``, of the same classes.
        count: at most as many; None for all.
    """
    probabilities = logits.double().softmax(1)
    confidence, predicted = probabilities.max(1)
    wrong = (predicted != labels).nonzero().squeeze(1)
    order = wrong[confidence[wrong].argsort(descending=True, stable=True)][:count]
    return [
        Mistake(index, int(labels[index]), int(predicted[index]), confidence[index].item(),
                probabilities[index, labels[index]].item())
        for index in order.tolist()
    ]  # fmt: skip


def mistake_title(mistake: Mistake, names: Sequence[str]) -> str:
    """Truth and prediction, for under the picture of the object."""
    return (
        f"truth: {names[mistake.truth]}, {100 * mistake.of_truth:.1f} %\n"
        f"predicted: {names[mistake.predicted]}, {100 * mistake.confidence:.1f} %"
    )
