"""Accuracies."""

import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import f1_score
from torch import nn

from pointewa.errors import CheckpointError
from pointewa.tasks import task_of
from pointewa.tasks.base import Batch
from pointewa.tasks.classification import Evaluation, evaluate


def test_accuracies_by_hand():
    labels = torch.tensor([0, 0, 0, 1, 1, 3])
    logits = F.one_hot(torch.tensor([0, 0, 1, 1, 0, 3]), 4).float()
    result = Evaluation(logits, labels)
    assert result.accuracy == pytest.approx(100 * 4 / 6)
    assert result.per_class[:2].tolist() == pytest.approx([2 / 3, 1 / 2])
    assert result.per_class[2].isnan()  # no object of that class: not part of the mean
    assert result.mean_class_accuracy == pytest.approx(100 * (2 / 3 + 1 / 2 + 1) / 3)
    assert result.metrics["loss"] == pytest.approx(F.cross_entropy(logits, labels).item())


def test_the_weighted_f1_is_scikit_learns():
    generator = torch.Generator().manual_seed(0)
    for classes in (2, 5, 14):
        labels = torch.randint(0, classes - 1, (50,), generator=generator)  # the last class has no object
        logits = torch.randn(50, classes, generator=generator) + F.one_hot(labels, classes)
        expected = f1_score(labels, logits.argmax(1), average="weighted", zero_division=0)
        assert Evaluation(logits, labels).metrics["f1"] == pytest.approx(100 * expected)


def test_the_weighted_f1_by_hand():
    """Class 0: 2 of 3 found, one wrong one: 2/3; class 1: 1 of 2, one wrong one: 1/2; class 2: never predicted."""
    result = Evaluation(F.one_hot(torch.tensor([0, 0, 1, 1, 0]), 4).float(), torch.tensor([0, 0, 0, 1, 1]))
    assert result.weighted_f1 == pytest.approx(100 * (3 * 2 / 3 + 2 * 1 / 2) / 5)


def test_a_data_set_may_report_further_metrics():
    """They come first, are demanded of its runs, and disturb no other run."""
    plain = {"task": "classification", "test": {"oa": 1.0, "macc": 1.0, "loss": 1.0}, "test_before_folding": None}
    assert list(task_of(plain).metrics) == ["oa", "macc", "loss"]
    assert list(task_of(plain | {"reported": 3}).metrics) == ["oa", "macc", "loss"]
    with pytest.raises(CheckpointError, match="'f1' is missing"):
        task_of(plain | {"reported": ["f1"]})
    found = task_of(plain | {"test": plain["test"] | {"f1": 98.765}, "reported": ["f1", "x", []]})
    assert (found.primary(), found.name, list(found.metrics)) == ("f1", "classification", ["f1", "oa", "macc", "loss"])
    assert found.metrics["f1"].text(98.765) == "98.77 %"


def test_every_object_counts_once_and_the_mode_is_kept():
    class Mean(nn.Module):
        def forward(self, points):
            assert not self.training
            return points.mean(1)

    model = Mean().train()
    points, labels = torch.randn(10, 7, 3), torch.arange(10) % 3
    result = evaluate(model, map(Batch, points.split(4), labels.split(4)))
    assert torch.equal(result.logits, points.mean(1))
    assert torch.equal(result.labels, labels)
    assert model.training


def test_confusion_has_the_truth_in_its_rows():
    logits = torch.eye(3)[torch.tensor([0, 1, 1, 2, 0])]
    result = Evaluation(logits, torch.tensor([0, 1, 0, 0, 2]))
    assert result.confusion.tolist() == [[1, 1, 1], [0, 1, 0], [1, 0, 0]]


def test_restriction_keeps_the_objects_and_the_logits_of_shared_classes():
    """The model knows a, b, c, d; the set p, q, r; p is a or c, r is d; q and b have no counterpart."""
    logits = torch.tensor([
        [1.0, 9.0, 2.0, 0.0],  # p: b is not asked for, so c of p
        [1.0, 9.0, 2.0, 3.0],  # p: taken for d
        [5.0, 0.0, 0.0, 6.0],  # r
        [0.0, 0.0, 0.0, 0.0],  # q: left out
        [7.0, 0.0, 0.0, 6.0],  # r: taken for a
    ])  # fmt: skip
    result = Evaluation(logits, torch.tensor([0, 0, 2, 1, 2])).restricted([((0, 2), (0,)), ((3,), (2, 5))])
    assert result.logits.tolist() == [[2, 0], [2, 3], [5, 6], [7, 6]]
    assert result.labels.tolist() == [0, 0, 1, 1]
    assert result.accuracy == 50
