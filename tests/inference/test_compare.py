"""Runs side by side: the tests against naive ones, and what cannot be compared."""

from math import comb
from types import SimpleNamespace

import pytest
import torch

from pointewa.config import load_config
from pointewa.errors import ConfigError, DataError
from pointewa.inference import compare
from pointewa.inference.compare import Run, mcnemar
from pointewa.tasks.classification import Classification, Evaluation
from pointewa.tasks.masked_autoencoding import MaskedAutoencoding

NAMES = ("a", "b", "c", "none")
LABELS = torch.arange(30) % 3


def run(name, predicted, /, objects=None, labels=LABELS, class_names=NAMES, task=Classification, **data):
    config = load_config(overrides=[f"data.{key}={value}" for key, value in data.items()])
    logits = torch.nn.functional.one_hot(torch.as_tensor(predicted), len(class_names)).float()
    objects = tuple(f"o{i}" for i in range(len(labels))) if objects is None else tuple(objects)
    clouds = SimpleNamespace(object_names=objects, class_names=class_names, labels=labels)
    subjects = SimpleNamespace(config=config, clouds=clouds, evaluation=Evaluation(logits, labels))
    summary = {"test": subjects.evaluation.metrics, "parameters": 7, "epochs": 3, "seconds": 2.0}
    epochs = [{"epoch": epoch, "train/loss": 3.0 - epoch, "train/oa": 10.0 * epoch} for epoch in range(3)]
    return Run(name, task, summary, epochs, config, subjects)


def wrong(*numbers):
    """Predictions that are wrong at these objects."""
    predicted = LABELS.clone()
    predicted[list(numbers)] = (predicted[list(numbers)] + 1) % 3
    return predicted


def naive(b, c):
    """Two tails of a fair coin: all counts that are at most as probable."""
    n = b + c
    return sum(comb(n, k) for k in range(n + 1) if comb(n, k) <= comb(n, b)) / 2**n


@pytest.mark.parametrize(("b", "c"), [(0, 1), (1, 1), (5, 0), (9, 2), (3, 17), (40, 41)])
def test_mcnemar_is_the_exact_binomial_test(b, c):
    first = [True] * b + [False] * c + [True] * 13 + [False] * 4
    second = [False] * b + [True] * c + [True] * 13 + [False] * 4
    found = mcnemar(first, second)
    assert (found.only_first, found.only_second) == (b, c)
    assert found.p == pytest.approx(naive(b, c), rel=1e-12)
    assert mcnemar(second, first).p == found.p


def test_equal_models_do_not_differ():
    assert mcnemar([True, False], [True, False]).p == 1
    with pytest.raises(ValueError, match="longer"):
        mcnemar([True], [True, False])


def test_objects_are_paired_by_their_names():
    """Whatever their order in each run's data."""
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    first = run("x", wrong(0, 1, 2, 3, 4, 5))
    mixed = run("y", wrong(0, 7)[order], [f"o{i}" for i in order.tolist()], LABELS[order])
    (found,) = compare.compare([first, mixed])
    assert (found.test.only_first, found.test.only_second) == (1, 5)
    assert found.test.p == found.corrected == pytest.approx(naive(1, 5))
    assert found.difference == pytest.approx(400 / 30)
    # of a (0, 3, 6, ...) two more are correct, of b (1, 4, 7, ...) two more and one less, of c two more
    assert found.per_class == {"a": pytest.approx(10), "b": pytest.approx(10), "c": pytest.approx(20), "none": None}


def test_more_than_two_are_corrected():
    runs = [run("x", wrong(*range(12))), run("y", wrong()), run("z", wrong(*range(10)))]
    second, third = compare.compare(runs)
    assert second.test.p == pytest.approx(2 / 2**12)
    assert third.test.p == pytest.approx(2 / 2**2)
    assert (second.corrected, third.corrected) == (2 * second.test.p, third.test.p)
    header, rows = compare.test_rows(runs, [second, third])
    assert header[-1] == "p, Holm"
    assert rows == [["y", "+40.00", "0", "12", "< 0.001", "< 0.001"], ["z", "+6.67", "0", "2", "0.500", "0.500"]]


@pytest.mark.parametrize(
    ("other", "error", "message"),
    [
        ({"name": "modelnet40"}, ConfigError, "x and y: data.name is shapes and modelnet40: compare runs that have"),
        ({"variant": "hardest"}, ConfigError, "data.variant is None and hardest"),
        ({"background": "drop"}, ConfigError, "data.background is keep and drop"),
        ({"task": MaskedAutoencoding}, ConfigError, "task is classification and masked_autoencoding"),
        ({"objects": [f"p{i}" for i in range(30)]}, DataError, r"test objects are not the same \(30 and 30\): say by"),
        ({"objects": ["o0"] * 30}, DataError, "not the same"),
        ({"labels": (LABELS + 1) % 3}, DataError, "not the same"),
        ({"class_names": ("a", "b", "d", "none")}, DataError, "not the same"),
    ],
)
def test_what_cannot_be_compared(other, error, message):
    with pytest.raises(error, match=message):
        compare.compare([run("x", wrong()), run("y", wrong(), **other)])


def test_fewer_objects_are_others():
    some = run("y", wrong()[:20], labels=LABELS[:20])
    for pair in ([run("x", wrong()), some], [some, run("x", wrong())]):
        with pytest.raises(DataError, match="not the same"):
            compare.compare(pair)


def test_names_that_occur_twice_are_paired_by_their_places():
    runs = [run("x", wrong(1), ["o"] * 30), run("y", wrong(), ["o"] * 30)]
    assert compare.compare(runs)[0].test.only_second == 1


def test_other_figures_than_recorded_and_other_places_are_pointed_out():
    first, second = run("x", wrong(), root="here"), run("y", wrong(1, 2), root="there")
    assert compare.notes([first, first]) == []
    second.summary["test"] = {"oa": 100.0}
    places, figures = compare.notes([first, second])
    assert places == "the test objects are paired by their names, and come from here and there"
    assert figures.startswith("y: overall accuracy is 93.33 % now, and was 100.00 % after its training")


def test_runs_of_a_task_without_classes_have_metrics_only(tmp_path):
    runs = [run(name, wrong(), task=MaskedAutoencoding) for name in "xy"]
    runs[1].summary["test"] = {"loss": runs[0].summary["test"]["loss"] + 1}
    (found,) = compare.compare(runs)
    assert (found.test, found.corrected, found.per_class) == (None, None, {})
    assert found.difference == pytest.approx(1)
    compare.save(tmp_path / "x.html", runs, [found])
    assert "McNemar" not in (tmp_path / "x.html").read_text()


def test_a_page_with_a_curve_of_each_run(tmp_path):
    runs = [run(f"<{name}>", wrong(number)) for number, name in enumerate("abcdefgh")]
    found = compare.compare(runs)
    compare.save(tmp_path / "x.html", runs, found)
    text = (tmp_path / "x.html").read_text()
    assert "<a>" not in text
    assert "&lt;h&gt;" in text
    for heading in ("Results", "Differences", "Training", "Classes"):
        assert f"<h2>{heading}</h2>" in text
    figure = compare.curves_figure(compare._merged(runs), compare._diagrams(runs))
    loss, accuracy = (axes for axes in figure.axes if axes.get_ylabel())
    assert (loss.get_ylabel(), accuracy.get_ylabel()) == ("loss, training", "overall accuracy, %, training")
    assert [line.get_label() for line in loss.lines] == [one.name for one in runs]
    del runs[0].epochs[0]["train/oa"], runs[0].epochs[1]["train/oa"], runs[0].epochs[2]["train/oa"]
    fewer = compare.curves_figure(compare._merged(runs), compare._diagrams(runs)).axes[1]
    assert [line.get_color() for line in fewer.lines] == [line.get_color() for line in loss.lines[1:]]
    assert len({line.get_color() for line in loss.lines}) == 8
