"""The table of a run's result."""

import pytest
from pointewa.inference.result import Label, result_table

LABELS = {"height": Label("mean error of the height", "{:.1f} cm"), "loss": Label("loss", "{:.3f}")}
COSTS = {"parameters_in_training": 5000, "parameters": 2000, "seconds": 61.4}


def test_a_folded_run_has_two_columns():
    summary = COSTS | {"ewa": True, "test": {"height": 3.14, "loss": 0.5, "other": 1},
                       "test_before_folding": {"height": 3.16, "loss": 0.25, "other": 1},
                       "largest_logit_difference": 1.234e-6}  # fmt: skip
    columns, rows = result_table(summary, LABELS)
    assert columns == ("in training (MoE)", "folded (dense)")
    assert rows == [
        ("mean error of the height", "3.2 cm", "3.1 cm"),
        ("loss", "0.250", "0.500"),
        ("parameters", "5,000", "2,000"),
        ("largest difference of logits", "", "1.2e-06"),
        ("seconds of training", "61", ""),
    ]


@pytest.mark.parametrize(("experts", "heading"), [(True, "gated MoE"), (False, "dense")])
def test_a_run_that_is_not_folded_says_what_it_is(experts, heading):
    summary = COSTS | {"ewa": experts, "test": {"loss": 0.5}, "test_before_folding": None,
                       "largest_logit_difference": 0.0}  # fmt: skip
    assert result_table(summary, LABELS) == (
        (heading,), [("loss", "0.500"), ("parameters", "2,000"), ("seconds of training", "61")],
    )  # fmt: skip


@pytest.mark.parametrize("value", [None, "0.5", [1]])
def test_what_is_no_number_is_left_out(value):
    summary = COSTS | {"ewa": False, "test": {"height": 1.0, "loss": value}, "test_before_folding": None}
    assert [row[0] for row in result_table(summary, LABELS).rows[:2]] == ["mean error of the height", "parameters"]


def test_axes_have_units():
    assert Label("accuracy", "{:.2f} %").axis == "accuracy, %"
    assert Label("loss", "{:.2f}").axis == "loss"
