"""Which direction points up."""

import pytest
import torch

from pointewa.ops import UP_AXES, UP_WORDS, turn_up, up_word


@pytest.mark.parametrize("up", UP_AXES)
def test_any_axis_can_be_turned_up(up):
    points, sign, axis = torch.randn(2, 50, 3), -1 if up[0] == "-" else 1, "xyz".index(up[-1])
    turned = turn_up(points, up)
    assert torch.equal(turned[..., 1], sign * points[..., axis])
    matrix = turn_up(torch.eye(3), up)
    assert torch.linalg.det(matrix) == pytest.approx(1)  # not mirrored
    assert torch.equal(matrix @ matrix.T, torch.eye(3))
    assert UP_WORDS[up_word(up)] == up
    with pytest.raises(ValueError, match="up must be one of x, y, z, -x, -y, -z, got 'w'"):
        turn_up(points, "w")


def test_z_up_is_turned_as_the_fields_data_sets_were():
    assert turn_up(torch.tensor([1.0, 2, 3]), "z").tolist() == [1, 3, -2]
    assert turn_up(torch.tensor([1.0, 2, 3]), "x").tolist() == [-2, 1, 3]


def test_a_tree_scanned_with_z_down_stands_upright_and_keeps_its_handedness():
    """A trunk from the ground (z = 0) to 3 m (z = -3), a branch to the east (x) at 2 m, one to the south (y) at 1 m."""
    tree = torch.tensor([[0.0, 0, 0], [0, 0, -3], [1, 0, -2], [0, 1, -1]])
    ground, top, east, south = turn_up(tree, "-z")
    assert (top - ground).tolist() == [0, 3, 0]
    assert east.tolist() == [1, 2, 0]
    assert south[1] == 1
    # Seen from above, south lies to the right of east in the files and after the turn: x, y and down are right-handed.
    across = torch.linalg.cross(east - torch.tensor([0.0, 2, 0]), south - torch.tensor([0.0, 1, 0]))
    assert across.tolist() == [0, -1, 0]  # down, as z, which is x cross y, is in the files
