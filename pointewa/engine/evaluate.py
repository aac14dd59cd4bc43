"""Accuracy on a set."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Evaluation:
    """A model's logits ``[N, C]`` and the labels ``[N]`` of a set, on the CPU, and the figures that follow."""

    logits: Tensor
    labels: Tensor

    @property
    def per_class(self) -> Tensor:
        """Accuracy of each class ``[C]``; NaN for a class without objects."""
        hits = (self.logits.argmax(1) == self.labels).double()
        classes = F.one_hot(self.labels, self.logits.shape[1]).double()
        return hits @ classes / classes.sum(0)

    @property
    def oa(self) -> float:
        """Overall accuracy in percent."""
        return 100 * (self.logits.argmax(1) == self.labels).double().mean().item()

    @property
    def macc(self) -> float:
        """Mean of the classes' accuracies in percent."""
        return 100 * self.per_class.nanmean().item()

    @property
    def loss(self) -> float:
        """Mean cross-entropy."""
        return F.cross_entropy(self.logits, self.labels).item()


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> Evaluation:
    """Run a model in evaluation mode, in float32, over all batches; leaves it in the mode it was in.

    Args:
        model: ``points [B, P, 3] -> logits [B, C]``.
        batches: points and labels ``[B]``.
    """
    was_training = model.training
    model.eval()
    results = [(model(points), labels) for points, labels in batches]
    model.train(was_training)
    logits, labels = (torch.cat(parts).cpu() for parts in zip(*results, strict=True))
    return Evaluation(logits.float(), labels)
