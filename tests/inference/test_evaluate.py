"""Ways of evaluating a classifier, on a model that anyone can compute by hand."""

import pytest
import torch
from torch import nn

from pointewa.errors import DataError
from pointewa.inference.corruptions import CORRUPTIONS
from pointewa.inference.evaluate import Evaluator
from pointewa.runs.description import LoadedModel
from pointewa.tasks.base import Batch


class Farthest(nn.Module):
    """The class is the size of the cloud: its largest norm, which normalising would make 1."""

    def __init__(self):
        super().__init__()
        self.sizes = nn.Parameter(torch.arange(10.0))

    def forward(self, points):
        return -(points.norm(dim=-1).amax(1, keepdim=True) - self.sizes).abs()


NAMES = tuple("abcdefghij")


def evaluator(normalize="none", **kwargs):
    """Ten clouds of radius 0 to 9, of which the model knows the radius; pools of 72 points, 64 of which it is given."""
    half = torch.randn(10, 40, 3)
    directions = nn.functional.normalize(torch.cat([half[:, :32], -half[:, :32], half[:, 32:]], 1), dim=-1)
    clouds, labels = directions * torch.arange(10.0)[:, None, None], torch.arange(10)

    def batches(transform=None, title=""):
        for points, some in zip(clouds.split(4), labels.split(4), strict=True):
            yield Batch(transform(points) if transform else points[:, :64], some)

    loaded = LoadedModel(Farthest(), NAMES, 64, "shapes", normalize)
    return Evaluator(loaded, batches, "shapes", kwargs.pop("class_names", NAMES), 64, **kwargs)


def test_on_raw_clouds_corruptions_of_no_strength_change_nothing(monkeypatch):
    for name in CORRUPTIONS:
        monkeypatch.setitem(CORRUPTIONS, name, lambda points, severity, generator: points)
    for normalized in (False, True):
        judge = evaluator(normalized=normalized)
        assert judge.plain().accuracy == 100
        assert judge.corrupted() == {name: [0.0] * 5 for name in CORRUPTIONS}


def test_raw_clouds_stay_raw_under_real_corruptions():
    errors = evaluator(normalized=False).corrupted()
    assert errors["dropout_global"] == [0.0] * 5  # what is left has the radius that it had
    assert errors["rotation"] == [0.0] * 5
    assert errors["scale"][4] > 20


def test_votes_are_the_mean_of_the_logits():
    judge, plain = evaluator(), evaluator().plain()
    halves = iter((1.0, 1.0, 1.0, 0.0, 0.0, 0.0))  # three batches a vote: one vote as it is, one of points at 0
    found = judge.voted(2, lambda pool, generator: pool[:, :64] * next(halves))
    zeros = -judge.model.sizes.detach().expand(10, -1)
    torch.testing.assert_close(found.logits, (plain.logits + zeros) / 2)
    first = evaluator().voted(1, lambda pool, generator: pool + torch.rand(1, generator=generator), seed=3)
    torch.manual_seed(0)  # the clouds' seed, not the votes'
    again = evaluator().voted(1, lambda pool, generator: pool + torch.rand(1, generator=generator), seed=3)
    assert first.logits.shape == again.logits.shape == (10, 10)


def test_on_other_classes_the_shared_ones_are_evaluated():
    judge = evaluator(class_names=("b", "x", *"cdefghij"))
    assert judge.class_names == ("b", "c", "d", "e", "f", "g", "h", "i", "j")
    result = judge.plain()
    assert len(result.labels) == 9
    assert result.labels.tolist() == list(range(9))
    assert result.accuracy == 100  # the cloud of radius 0, now a "b", is nearest to b among the classes that are left


def test_a_split_without_an_object_of_the_shared_classes_is_refused():
    judge = evaluator(class_names=(*"0123456789", "a", "b"))
    with pytest.raises(DataError, match=r"none of the 10 objects is of a class .* too \(a, b, \.\.\.\)"):
        judge.plain()


def test_a_bar_is_shown_for_what_takes_long():
    shown = []

    def progress(items, title):
        shown.append((title, len(items)))
        return items

    judge = evaluator(progress=progress)
    judge.voted(2, lambda pool, generator: pool)
    judge.corrupted()
    assert shown == [("voting", 2), ("corrupting", 45)]
