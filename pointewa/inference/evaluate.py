"""Evaluation of a classifier: on clouds as they are, by votes, under corruptions, on another data set's classes."""

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import Generator, Tensor

from pointewa.errors import DataError
from pointewa.inference.corruptions import CORRUPTIONS, SEVERITIES, corrupt
from pointewa.inference.shared_classes import shared_classes
from pointewa.runs.description import LoadedModel
from pointewa.tasks.base import Batch
from pointewa.tasks.classification import Evaluation, evaluate

Transform = Callable[[Tensor], Tensor]
Draw = Callable[[Tensor, Generator], Tensor]


class Batches(Protocol):
    """The batches of a split, as often as they are wanted."""

    def __call__(self, transform: Transform | None = None, title: str = "") -> Iterable[Batch]:
        """Clouds scaled as the model's were in training.

        Args:
            transform: from a pool of points ``[B, P', 3]``, in farthest-point order, to those that the model is given,
                ``[B, P, 3]``; None: the first P.
            title: of a progress bar; none without.
        """
        ...


def _silent(items: Iterable[Any], title: str) -> Iterable[Any]:
    return items


class Evaluator:
    """Evaluates a classifier on a split in several ways.

    Args:
        loaded: the model, on the device of the batches.
        batches: of the split, such as `pointewa.datasets.subjects.Subjects.batches`.
        dataset: name of the split's data set.
        class_names: its classes.
        num_points: points of a cloud that the model is given.
        normalized: the clouds of ``batches`` are centred and scaled to largest norm 1, so that corrupted ones are too.
        progress: shows a bar with a title while the items of an iterable are worked through.

    Attributes:
        shared: where the classes of the split are not the model's, those that they share, which then are all that is
            evaluated; else None.
        class_names: the classes that are evaluated.

    Raises:
        DataError: fewer than two classes are shared.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        batches: Batches,
        dataset: str,
        class_names: tuple[str, ...],
        num_points: int,
        normalized: bool = True,
        progress: Callable[[Iterable[Any], str], Iterable[Any]] = _silent,
    ) -> None:
        self.model, self.batches, self.num_points = loaded.model, batches, num_points
        self.normalized, self.progress = normalized, progress
        self.class_names, self.shared = class_names, None
        if loaded.class_names != class_names:
            self.shared = shared_classes(loaded.dataset, loaded.class_names, dataset, class_names)
            self.class_names = tuple(one.name for one in self.shared)

    def plain(self) -> Evaluation:
        """On each cloud's farthest-point sample."""
        return self._restricted(self._run(title="evaluating"))

    def voted(self, votes: int, draw: Draw, seed: int = 0) -> Evaluation:
        """By the mean logits over random samples of each cloud.

        Args:
            votes: how many.
            draw: from a pool ``[B, P', 3]`` and a generator to a sample ``[B, P, 3]``, such as
                `pointewa.datasets.subjects.Subjects.draw`.
            seed: of the generator.
        """
        generator = Generator(self._device).manual_seed(seed)
        results = [self._run(lambda pool: draw(pool, generator)) for _ in self.progress(range(votes), "voting")]
        return self._restricted(Evaluation(torch.stack([one.logits for one in results]).mean(0), results[0].labels))

    def corrupted(self) -> dict[str, list[float]]:
        """Overall error in percent for each corruption, by severity. The draws are the same for every model."""
        errors: dict[str, list[float]] = {name: [] for name in CORRUPTIONS}
        cases = [(name, severity) for name in CORRUPTIONS for severity in SEVERITIES]
        for number, (name, severity) in enumerate(self.progress(cases, "corrupting")):
            generator = Generator(self._device).manual_seed(number)

            def corrupted(pool: Tensor, n: str = name, s: int = severity, g: Generator = generator) -> Tensor:
                return corrupt(pool[:, : self.num_points], n, s, g, self.normalized)

            errors[name].append(100 - self._restricted(self._run(corrupted)).accuracy)
        return errors

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def _run(self, transform: Transform | None = None, title: str = "") -> Evaluation:
        return evaluate(self.model, self.batches(transform, title))

    def _restricted(self, result: Evaluation) -> Evaluation:
        if not self.shared:
            return result
        restricted = result.restricted([(one.model, one.data) for one in self.shared])
        if not len(restricted.labels):
            raise DataError(f"none of the {len(result.labels)} objects is of a class that the model knows too "
                            f"({', '.join(self.class_names[:3])}, ...): choose another split or data set")  # fmt: skip
        return restricted
