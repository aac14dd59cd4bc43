"""The Chamfer distance without squares against a double loop, and its gradient where points coincide."""

import math

import pytest
import torch

from pointewa.ops import chamfer_l1


def naive(x, y):
    """Of one cloud, by the definition."""
    rows = [torch.stack([(a - b).norm() for b in y]) for a in x]
    return (torch.stack([row.min() for row in rows]).mean() + torch.stack(rows).min(0).values.mean()) / 2


def test_it_equals_the_naive_twin_forward_and_backward():
    pair = [torch.randn(3, count, 3, dtype=torch.float64, requires_grad=True) for count in (7, 5)]
    value, expected = chamfer_l1(*pair), torch.stack([naive(x, y) for x, y in zip(*pair, strict=True)])
    assert (value.shape, value.dtype) == ((3,), torch.float64)
    torch.testing.assert_close(value, expected, rtol=0, atol=1e-13)
    weights = torch.randn(3, dtype=torch.float64)
    grads = [torch.autograd.grad((out * weights).sum(), pair) for out in (value, expected)]
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-13)


def test_a_value_worked_out_by_hand():
    x, y = torch.tensor([[[0.0, 0, 0], [1, 0, 0]]]), torch.tensor([[[0.0, 0, 2]]])
    assert chamfer_l1(x, y).item() == pytest.approx(((2 + math.sqrt(5)) / 2 + 2) / 2)


def test_points_that_coincide_have_no_gradient():
    x = torch.tensor([[[0.0, 0, 0], [3, 0, 0]]], requires_grad=True)
    value = chamfer_l1(x, torch.tensor([[[0.0, 0, 0], [3, 4, 0]]]))
    value.sum().backward()
    # (0 + 3) / 2 from x, the nearest to its second point being the first of y; (0 + 4) / 2 from y
    assert value.item() == (1.5 + 2) / 2
    assert x.grad.tolist() == [[[0, 0, 0], [0.25, -0.25, 0]]]


def test_half_precision_is_worked_out_in_float32_also_within_autocast():
    x, y = torch.randn(2, 9, 3).bfloat16().requires_grad_(), torch.randn(2, 6, 3)
    expected = chamfer_l1(x.float(), y)
    with torch.autocast("cpu", torch.bfloat16):
        value = chamfer_l1(x, y)
    assert value.dtype == torch.float32
    assert torch.equal(value, expected)


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [((2, 4, 2), (2, 4, 3), r"x must be of shape"), ((2, 4, 3), (2, 0, 3), "y has no points"),
     ((2, 4, 3), (3, 4, 3), "same batch size, got 2 and 3")],
)  # fmt: skip
def test_wrong_shapes_are_refused(x, y, message):
    with pytest.raises(ValueError, match=message):
        chamfer_l1(torch.zeros(x), torch.zeros(y))
