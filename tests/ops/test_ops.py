"""The operators against naive twins, both backends, and what they refuse."""

import sys

import pytest
import torch

from pointewa.ops import backend, farthest_point_sample, group, knn
from pointewa.ops.backend import BACKENDS

AVAILABLE = [name for name in BACKENDS if name == "torch" or backend() == "pytorch3d"]


def naive_fps(cloud, k):
    """One pick at a time by the definition: the first point of the largest distance to the nearest pick."""
    picks = [0]
    while len(picks) < k:
        left = [i for i in range(len(cloud)) if i not in picks]
        picks.append(max(left, key=lambda i: (min(((cloud[i] - cloud[p]) ** 2).sum().item() for p in picks), -i)))
    return picks


@pytest.fixture(params=AVAILABLE)
def ops(request):
    return {"backend": request.param}


@pytest.fixture
def clouds():
    return torch.randn(3, 40, 3, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("k", [1, 7, 40])
def test_fps_equals_the_naive_twin(ops, clouds, k):
    picks = farthest_point_sample(clouds, k, **ops)
    assert picks.dtype == torch.int64
    assert picks.tolist() == [naive_fps(cloud, k) for cloud in clouds]


def test_fps_is_nested(ops, clouds):
    whole = farthest_point_sample(clouds, 40, **ops)
    assert torch.equal(farthest_point_sample(clouds, 13, **ops), whole[:, :13])


def test_fps_names_every_point_once_also_where_points_coincide(ops):
    clouds = torch.zeros(2, 9, 3)
    clouds[1, 4:] = torch.tensor([1.0, 0, 0])
    picks = farthest_point_sample(clouds, 9, **ops)
    assert picks.sort(1).values.tolist() == [list(range(9))] * 2
    assert picks[1, :2].tolist() == [0, 4]


def test_fps_starts_over_beyond_the_last_point(ops, clouds):
    whole = farthest_point_sample(clouds, 40, **ops)
    assert torch.equal(farthest_point_sample(clouds, 50, **ops), torch.cat([whole, whole[:, :10]], 1))


@pytest.mark.parametrize("k", [1, 5, 40])
def test_knn_equals_sorting_all_distances(ops, clouds, k):
    queries = clouds[:, :6] + 0.01
    distance = ((queries.unsqueeze(2) - clouds.unsqueeze(1)) ** 2).sum(-1)
    assert torch.equal(knn(queries, clouds, k, **ops), distance.argsort(-1)[..., :k])


def test_knn_works_through_many_clouds_in_parts(monkeypatch, clouds):
    whole = knn(clouds[:, :6], clouds, 5, backend="torch")
    monkeypatch.setattr(sys.modules["pointewa.ops.knn"], "_CHUNK", 1)
    assert torch.equal(knn(clouds[:, :6], clouds, 5, backend="torch"), whole)


def test_knn_starts_over_beyond_the_last_point(ops, clouds):
    few = clouds[:, :4]
    neighbors = knn(few, few, 6, **ops)
    assert torch.equal(neighbors[..., 4:], neighbors[..., :2])
    assert torch.equal(neighbors[..., 0], torch.arange(4).expand(3, 4))


def test_knn_tells_points_apart_far_from_the_origin(ops):
    """The matrix-product form of the distance cancels the digits that matter here."""
    cloud = torch.tensor([[[100.0, 0, 0], [100.0, 0.001, 0], [100.0, 0.003, 0], [100.0, 0.006, 0]]])
    assert knn(cloud[:, :1], cloud, 4, **ops).tolist() == [[[0, 1, 2, 3]]]


def test_selection_is_in_float32_within_autocast_and_for_half_precision(ops, clouds):
    expected, of_half = (farthest_point_sample(x, 20, **ops) for x in (clouds, clouds.bfloat16().float()))
    neighbors = knn(clouds[:, :3], clouds, 9, **ops)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(farthest_point_sample(clouds, 20, **ops), expected)
        assert torch.equal(farthest_point_sample(clouds.bfloat16(), 20, **ops), of_half)
        assert torch.equal(knn(clouds[:, :3], clouds, 9, **ops), neighbors)
        assert torch.equal(knn(clouds[:, :3].double(), clouds.double(), 9, **ops), neighbors)


@pytest.mark.skipif("pytorch3d" not in AVAILABLE, reason="needs pytorch3d")
def test_without_a_wish_the_faster_backend_is_taken(monkeypatch):
    """On a CPU torch for neighbours and for large batches; where one is asked for, that one."""
    taken = []
    for name in ("fps", "knn"):
        module = sys.modules[f"pointewa.ops.{name}"]
        original = module._torch
        monkeypatch.setattr(module, "_torch", lambda *args, n=name, f=original: taken.append(n) or f(*args))
    large = torch.randn(32, 1024, 3)
    for backend_asked, expected in (
        (None, ["fps", "knn", "knn"]),
        ("pytorch3d", []),
        ("torch", ["fps", "fps", "knn", "knn"]),
    ):
        taken.clear()
        for points in (large, large[:2]):
            farthest_point_sample(points, 4, backend=backend_asked)
            knn(points[:, :3], points, 4, backend=backend_asked)
        assert sorted(taken) == expected
    monkeypatch.setenv("POINTEWA_OPS", "pytorch3d")
    taken.clear()
    knn(large[:, :3], large, 4)
    assert not taken


def test_group_gathers_with_gradients():
    points = torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True)
    index = torch.tensor([[[0, 1], [4, 4], [2, 0]], [[3, 3], [1, 0], [2, 4]]])
    gathered = group(points, index)
    assert gathered.shape == (2, 3, 2, 4)
    assert all(
        torch.equal(gathered[b, g, k], points[b, index[b, g, k]]) for b in range(2) for g in range(3) for k in range(2)
    )
    gathered.sum().backward()
    assert points.grad[0, :, 0].tolist() == [2, 1, 1, 0, 2]


@pytest.mark.parametrize(
    ("points", "message"),
    [
        (torch.zeros(2, 0, 3), "has no points"),
        (torch.zeros(2, 8, 2), r"\[B, N, 3\]"),
        (torch.zeros(8, 3), r"\[B, N, 3\]"),
        (torch.full((2, 8, 3), torch.nan), r"non-finite values in cloud\(s\) \[0, 1\]"),
        (torch.cat([torch.zeros(1, 8, 3), torch.full((1, 8, 3), torch.inf)]), r"non-finite values in cloud\(s\) \[1\]"),
    ],
)
def test_bad_clouds_are_refused(ops, points, message):
    with pytest.raises(ValueError, match=message):
        farthest_point_sample(points, 4, **ops)
    with pytest.raises(ValueError, match=message):
        knn(torch.zeros(len(points), 2, 3), points, 4, **ops)


def test_bad_counts_are_refused(ops, clouds):
    with pytest.raises(ValueError, match="num_samples must be at least 1"):
        farthest_point_sample(clouds, 0, **ops)
    with pytest.raises(ValueError, match="num_neighbors must be at least 1"):
        knn(clouds, clouds, 0, **ops)
    with pytest.raises(ValueError, match="same batch size"):
        knn(clouds[:1], clouds, 3, **ops)
    with pytest.raises(ValueError, match="same batch size"):
        group(clouds[:1], torch.zeros(3, 2, dtype=torch.int64))


def test_an_unknown_backend_is_refused(monkeypatch):
    monkeypatch.setenv("POINTEWA_OPS", "cuda")
    backend.cache_clear()
    with pytest.raises(ValueError, match="POINTEWA_OPS must be one of pytorch3d, torch"):
        backend()
    monkeypatch.setenv("POINTEWA_OPS", "torch")
    assert backend() == "torch"
    backend.cache_clear()
