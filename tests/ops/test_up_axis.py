"""Which axis points up."""

import pytest
import torch

from pointewa.ops import turn_up


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_any_axis_can_be_turned_up(axis):
    points = torch.randn(2, 50, 3)
    turned = turn_up(points, "xyz"[axis])
    assert torch.equal(turned[..., 1], points[..., axis])
    matrix = turn_up(torch.eye(3), "xyz"[axis])
    assert torch.linalg.det(matrix) == pytest.approx(1)  # not mirrored
    with pytest.raises(ValueError, match="up must be one of"):
        turn_up(points, "w")


def test_z_up_is_turned_as_the_fields_data_sets_were():
    assert turn_up(torch.tensor([1.0, 2, 3]), "z").tolist() == [1, 3, -2]
    assert turn_up(torch.tensor([1.0, 2, 3]), "x").tolist() == [-2, 1, 3]
