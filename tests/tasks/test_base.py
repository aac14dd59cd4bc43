"""What tasks share: the table of a result, batches in parts, evaluation that leaves no trace, finding a task."""

from typing import ClassVar

import pytest
import torch
from torch import nn

from pointewa import tasks
from pointewa.errors import CheckpointError, ConfigError
from pointewa.tasks.base import Batch, Metric, Task, evaluating

COSTS = {"parameters_in_training": 5000, "parameters": 2000, "seconds": 61.4}


class Height(Task):
    name = "height"
    metrics: ClassVar = {
        "height": Metric("mean error of the height", ".1f", "cm"),
        "loss": Metric("loss", ".3f"),
        "hidden": Metric("hidden", headline=False),
    }


def test_a_folded_run_has_two_columns():
    summary = COSTS | {"scheme": "ewa", "test": {"height": 3.14, "loss": 0.5, "hidden": 1},
                       "test_before_folding": {"height": 3.16, "loss": 0.25, "hidden": 1},
                       "largest_logit_difference": 1.234e-6}  # fmt: skip
    columns, rows = Height.result(summary)
    assert columns == ["", "in training (MoE)", "folded (dense)"]
    assert rows == [
        ["mean error of the height", "3.2 cm", "3.1 cm"],
        ["loss", "0.250", "0.500"],
        ["parameters", "5,000", "2,000"],
        ["largest difference of logits", "", "1.2e-06"],
        ["seconds of training", "61", ""],
    ]


@pytest.mark.parametrize(
    ("said", "heading"),
    [
        ({"scheme": "dense"}, "dense"), ({"scheme": "moe"}, "gated MoE"), ({"scheme": "moe_ewa"}, "gated MoE"),
        ({"ewa": True}, "gated MoE"), ({"ewa": False}, "dense"),  # version 0.1
    ],
)  # fmt: skip
def test_a_run_that_is_not_folded_says_what_it_is(said, heading):
    summary = COSTS | said | {"test": {"height": 3.0, "loss": 0.5}, "test_before_folding": None,
                              "largest_logit_difference": 0.0}  # fmt: skip
    assert Height.result(summary) == (
        ["", heading],
        [
            ["mean error of the height", "3.0 cm"],
            ["loss", "0.500"],
            ["parameters", "2,000"],
            ["seconds of training", "61"],
        ],
    )


@pytest.mark.parametrize("difference", [None, "0.5", [1]])
def test_a_difference_that_is_no_number_is_left_out(difference):
    metrics = {"height": 1.0, "loss": 2.0, "hidden": 3.0}
    summary = COSTS | {"test": metrics, "test_before_folding": metrics, "largest_logit_difference": difference}
    assert "largest difference of logits" not in [row[0] for row in Height.result(summary)[1]]


def test_a_summary_that_lacks_a_metric_is_refused():
    summary = COSTS | {"task": "classification", "test": {"oa": 1.0, "macc": 1.0}, "test_before_folding": None}
    with pytest.raises(CheckpointError, match=r"runs/x/summary\.json: damaged \('loss' is missing\)"):
        tasks.task_of(summary, "runs/x/summary.json")
    summary["test"]["loss"] = 1.0
    assert tasks.task_of(summary).name == "classification"
    assert tasks.task_of({key: value for key, value in summary.items() if key != "task"}).name == "classification"
    with pytest.raises(CheckpointError, match=r"train\.task: expected one of .*, found 'height'"):
        tasks.task_of(summary | {"task": "height"})


def test_metrics_as_people_read_them():
    assert Metric("accuracy", ".2f", "%").axis == "accuracy, %"
    assert Metric("loss", ".2f").axis == "loss"
    assert Metric("accuracy", ".2f", "%").text(12.345) == "12.35 %"
    assert Metric("loss", ".2e").text(None) == "-"
    assert Height.primary() == "height"


def test_tasks_are_found_by_their_names():
    assert tasks.names() == [
        "classification", "image_classification", "masked_autoencoding", "masked_point_modeling", "part_segmentation",
        "tokenizer",
    ]  # fmt: skip
    with pytest.raises(
        ConfigError,
        match=r"train\.task: expected one of classification, image_classification, masked_autoencoding, "
        r"masked_point_modeling, part_segmentation, tokenizer, found 'x'",
    ):
        tasks.task_class("x")


def test_a_batch_is_cut_into_parts_in_step():
    points, labels = torch.arange(30.0).view(5, 2, 3), torch.arange(5)
    parts = list(Batch(points, labels, labels[:, None].expand(-1, 2)).chunk(2))
    assert [len(part.labels) for part in parts] == [3, 2]
    assert torch.equal(torch.cat([part.points for part in parts]), points)
    assert all(torch.equal(part.point_labels[:, 0], part.labels) for part in parts)
    assert [part.point_labels for part in Batch(points, labels).chunk(2)] == [None, None]


def test_every_module_keeps_the_mode_it_was_in():
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Dropout(), nn.BatchNorm1d(2)))
    model[1][1].eval()
    with evaluating(model) as inside:
        assert inside is model
        assert not any(module.training for module in model.modules())
        assert not model[0](torch.ones(1, 2)).requires_grad
    assert [module.training for module in model.modules()] == [True, True, True, True, False]
    with pytest.raises(ValueError, match="planted"), evaluating(model):
        raise ValueError("planted")
    assert model.training
    assert not model[1][1].training
