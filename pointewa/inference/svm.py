"""A linear support vector machine on the features of a frozen model."""

from collections.abc import Iterable
from typing import Protocol, Self

import torch
from torch import Tensor

from pointewa.errors import DataError
from pointewa.tasks.base import Batch
from pointewa.tasks.classification import Evaluation


class Model(Protocol):
    """An `nn.Module` that gives features of clouds, such as a classifier or one of the pre-trainings."""

    def features(self, points: Tensor) -> Tensor:
        """``[B, P, 3] -> [B, F]``."""
        ...

    def eval(self) -> Self:
        """Go into evaluation mode."""
        ...


@torch.no_grad()
def features(model: Model, batches: Iterable[Batch]) -> tuple[Tensor, Tensor]:
    """Features ``[N, F]`` and labels ``[N]`` of all clouds, on the CPU; the model is left in evaluation mode."""
    model.eval()
    found = [(model.features(batch.points).float().cpu(), batch.labels.cpu()) for batch in batches]
    return torch.cat([one for one, _ in found]), torch.cat([labels for _, labels in found])


def fit(train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], num_classes: int, c: float = 0.01) -> Evaluation:
    """Fit on one split, evaluate on another. Features are scaled to mean 0 and variance 1.

    Args:
        train: features ``[N, F]`` and labels ``[N]``.
        test: features and labels.
        num_classes: C.
        c: inverse strength of the regularisation.

    Returns:
        The decision values in place of logits, -inf for classes that do not occur in ``train``.

    Raises:
        DataError: ``train`` has objects of one class only.
    """
    if len(train[1].unique()) < 2:
        raise DataError("svm: expected objects of at least two classes to train on, found one: choose a set with more")
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import LinearSVC

    (x, y), (unseen, labels) = train, test
    svm = make_pipeline(StandardScaler(), LinearSVC(C=c, random_state=0)).fit(x.numpy(), y.numpy())
    decision = torch.as_tensor(svm.decision_function(unseen.numpy()))
    if decision.ndim == 1:  # for two classes scikit-learn gives one column
        decision = torch.stack([-decision, decision], 1)
    logits = torch.full((len(unseen), num_classes), -torch.inf)
    logits[:, torch.as_tensor(svm.classes_)] = decision.float()
    return Evaluation(logits, labels)
