"""The mistakes that a model is surest of."""

from dataclasses import dataclass

from pointewa.tasks.classification import Evaluation


@dataclass(frozen=True)
class Mistake:
    """An object that was taken for something else.

    Args:
        index: of the object in the set.
        truth: its class.
        said: the class that the model took it for.
        confidence: the probability that the model gave to that class.
        of_truth: and to the true one.
    """

    index: int
    truth: int
    said: int
    confidence: float
    of_truth: float


def confident_mistakes(result: Evaluation, count: int | None = None) -> list[Mistake]:
    """The mistakes of an evaluation, the surest first, equally sure ones in the order of the set.

    Args:
        result: of `pointewa.tasks.classification`, on a set with the model's own classes.
        count: at most as many; None for all.
    """
    probabilities = result.logits.double().softmax(1)
    confidence, said = probabilities.max(1)
    wrong = (said != result.labels).nonzero().squeeze(1)
    order = wrong[confidence[wrong].argsort(descending=True, stable=True)][:count]
    return [
        Mistake(index, int(result.labels[index]), int(said[index]), confidence[index].item(),
                probabilities[index, result.labels[index]].item())
        for index in order.tolist()
    ]  # fmt: skip


def mistake_title(mistake: Mistake, names: tuple[str, ...]) -> str:
    """Truth and prediction, for under the picture of the object."""
    return (
        f"truth: {names[mistake.truth]}, {100 * mistake.of_truth:.1f} %\n"
        f"predicted: {names[mistake.said]}, {100 * mistake.confidence:.1f} %"
    )
