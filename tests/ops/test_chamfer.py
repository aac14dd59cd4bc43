"""The Chamfer distance against a double loop, both backends, and what it refuses."""

import sys

import pytest
import torch

from pointewa.ops import backend, chamfer_distance
from pointewa.ops.backend import BACKENDS

AVAILABLE = [name for name in BACKENDS if name == "torch" or backend() == "pytorch3d"]


def naive_chamfer(x, y):
    """By the definition, one pair of points at a time."""

    def one_way(a, b):
        nearest = [min(((p - q) ** 2).sum() for q in other) for one, other in zip(a, b, strict=True) for p in one]
        return torch.stack(nearest).mean()

    return one_way(x, y) + one_way(y, x)


@pytest.fixture
def pair():
    """Clouds of different sizes, in float64."""
    return [torch.randn(3, count, 3, dtype=torch.float64, requires_grad=True) for count in (7, 5)]


def gradients(value, inputs):
    return torch.autograd.grad(value, inputs)


@pytest.mark.parametrize(("name", "atol"), [("torch", 1e-13), ("pytorch3d", 1e-6)])
def test_it_equals_the_naive_twin_forward_and_backward(pair, name, atol):
    if name not in AVAILABLE:
        pytest.skip("needs pytorch3d")
    value, expected = chamfer_distance(*pair, backend=name), naive_chamfer(*pair)
    assert value.shape == ()
    assert value.dtype == (torch.float64 if name == "torch" else torch.float32)
    torch.testing.assert_close(value.double(), expected, rtol=0, atol=atol)
    for mine, theirs in zip(gradients(value, pair), gradients(expected, pair), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=atol)


def test_gradients_are_those_of_finite_differences(pair):
    assert torch.autograd.gradcheck(lambda x, y: chamfer_distance(x, y, backend="torch"), pair)


def test_a_value_worked_out_by_hand():
    x = torch.tensor([[[0.0, 0, 0], [1, 0, 0]]])
    y = torch.tensor([[[0.0, 0, 2]]])
    assert chamfer_distance(x, y, backend="torch").item() == (4 + 5) / 2 + 4
    assert chamfer_distance(x, x, backend="torch").item() == 0


@pytest.mark.skipif("pytorch3d" not in AVAILABLE, reason="needs pytorch3d")
def test_the_backends_agree(monkeypatch):
    x, y = torch.randn(40, 32, 3, requires_grad=True), torch.randn(40, 16, 3, requires_grad=True)
    ours, theirs = (chamfer_distance(x, y, backend=name) for name in BACKENDS)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    for a, b in zip(gradients(ours, (x, y)), gradients(theirs, (x, y)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)
    # Without a wish torch works on a CPU, unless POINTEWA_OPS says otherwise.
    module, taken = sys.modules["pointewa.ops.chamfer"], []
    original = module._nearest
    monkeypatch.setattr(module, "_nearest", lambda *args: taken.append(1) or original(*args))
    chamfer_distance(x, y)
    assert taken == [1]
    monkeypatch.setenv("POINTEWA_OPS", "pytorch3d")
    chamfer_distance(x, y)
    assert taken == [1]


def test_many_clouds_are_worked_through_in_parts(monkeypatch, pair):
    whole = chamfer_distance(*pair, backend="torch")
    monkeypatch.setattr(sys.modules["pointewa.ops.chamfer"], "_CHUNK", 1)
    assert torch.equal(chamfer_distance(*pair, backend="torch"), whole)


@pytest.mark.parametrize("name", AVAILABLE)
def test_half_precision_is_worked_out_in_float32_also_within_autocast(name):
    x, y = torch.randn(2, 9, 3).bfloat16().requires_grad_(), torch.randn(2, 6, 3)
    expected = chamfer_distance(x.float(), y, backend=name)
    with torch.autocast("cpu", torch.bfloat16):
        value = chamfer_distance(x, y, backend=name)
    assert value.dtype == torch.float32
    assert torch.equal(value, expected)
    value.backward()
    assert x.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("name", AVAILABLE)
def test_points_are_told_apart_far_from_the_origin(name):
    """The matrix-product form of the distance cancels the digits that matter here."""
    x = torch.tensor([[[100.0, 0, 0], [100, 0.001, 0], [100, 0.003, 0]]])
    y = x + torch.tensor([0, 0, 2**-13])
    assert chamfer_distance(x, y, backend=name).item() == pytest.approx(2 * 2**-26, rel=1e-6)


@pytest.mark.parametrize("name", AVAILABLE)
@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        ((2, 4, 2), (2, 4, 3), r"x must be of shape \[B, N, 3\], got \[2, 4, 2\]"),
        ((2, 4, 3), (4, 3), r"y must be of shape \[B, N, 3\], got \[4, 3\]"),
        ((2, 0, 3), (2, 4, 3), "x has no points"),
        ((2, 4, 3), (2, 0, 3), "y has no points"),
        ((2, 4, 3), (3, 4, 3), "same batch size, got 2 and 3"),
    ],
)
def test_wrong_shapes_are_refused(name, x, y, message):
    with pytest.raises(ValueError, match=message):
        chamfer_distance(torch.zeros(x), torch.zeros(y), backend=name)
