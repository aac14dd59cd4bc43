"""Accuracy on a set."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pointewa.tasks.base import Batch
from pointewa.train.distributed import ALONE, World


@dataclass(frozen=True)
class Evaluation:
    """A model's logits ``[N, C]`` and the labels ``[N]`` of a set, on the CPU, and the figures that follow.

    Where the set has other classes than the model, only `restricted` tells something.
    """

    logits: Tensor
    labels: Tensor

    @property
    def confusion(self) -> Tensor:
        """int64 ``[C, C]``: objects of the class of the row that were taken for the class of the column."""
        classes = self.logits.shape[1]
        pairs = self.labels * classes + self.logits.argmax(1)
        return torch.bincount(pairs, minlength=classes**2).view(classes, classes)

    @property
    def per_class(self) -> Tensor:
        """Accuracy of each class ``[C]``; NaN for a class without objects."""
        return self.confusion.diagonal().double() / self.confusion.sum(1)

    @property
    def oa(self) -> float:
        """Overall accuracy in percent."""
        return 100 * (self.logits.argmax(1) == self.labels).double().mean().item()

    @property
    def macc(self) -> float:
        """Mean of the classes' accuracies in percent."""
        return 100 * self.per_class.nanmean().item()

    @property
    def accuracy(self) -> float:
        """Overall accuracy in percent."""
        return self.oa

    @property
    def mean_class_accuracy(self) -> float:
        """Mean of the classes' accuracies in percent."""
        return self.macc

    @property
    def metrics(self) -> dict[str, float]:
        """The metrics by the names that they have in files."""
        return {"oa": self.oa, "macc": self.macc, "loss": self.loss}

    def restricted(self, groups: Sequence[tuple[Sequence[int], Sequence[int]]]) -> "Evaluation":
        """For classes that two sets share: the objects of those classes, and what the model takes them for among them.

        Args:
            groups: of each shared class, the classes of the model and the classes of the labels that are it.
        """
        shared = torch.full((int(self.labels.max()) + 1,), -1)
        for number, (_, labels) in enumerate(groups):
            shared[[label for label in labels if label < len(shared)]] = number
        kept = shared[self.labels] >= 0
        logits = torch.stack([self.logits[kept][:, list(classes)].amax(1) for classes, _ in groups], 1)
        return Evaluation(logits, shared[self.labels][kept])

    @property
    def loss(self) -> float:
        """Mean cross-entropy."""
        return F.cross_entropy(self.logits, self.labels).item()


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable[Batch], world: World = ALONE) -> Evaluation:
    """Run a model in evaluation mode, in float32, over all batches; leaves it in the mode it was in.

    Args:
        model: ``points [B, P, 3] -> logits [B, C]``.
        batches: with several processes this one's, of objects that no other one has.
        world: the processes. Each gets the evaluation of the whole set.
    """
    was_training = model.training
    model.eval()
    results = [(model(batch.points), batch.labels) for batch in batches]
    model.train(was_training)
    logits, labels = (world.concatenate(torch.cat(parts).cpu()) for parts in zip(*results, strict=True))
    return Evaluation(logits.float(), labels)
