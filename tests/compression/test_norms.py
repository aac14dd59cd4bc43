"""Norms whose gradients are computed some rows at a time, against torch's own."""

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from pointewa import compression

NORMS = {
    "layer": (nn.LayerNorm(24), (40, 6, 24)),
    "layer, several dimensions": (nn.LayerNorm((6, 24)), (40, 6, 24)),
    "layer, all dimensions": (nn.LayerNorm((40, 6, 24)), (40, 6, 24)),
    "layer, one dimension": (nn.LayerNorm(5760), (5760,)),
    "layer, no weights": (nn.LayerNorm(24, elementwise_affine=False), (40, 6, 24)),
    "layer, no bias": (nn.LayerNorm(24, bias=False), (40, 6, 24)),
    "root mean square": (nn.RMSNorm(24), (40, 6, 24)),
    "batch, two dimensions": (nn.BatchNorm1d(24), (240, 24)),
    "batch, three": (nn.BatchNorm1d(6), (40, 6, 24)),
    "batch, four": (nn.BatchNorm2d(6), (40, 6, 4, 6)),
    "batch, no weights": (nn.BatchNorm1d(6, affine=False), (40, 6, 24)),
    "group, three dimensions": (nn.GroupNorm(3, 6), (40, 6, 24)),
    "group, four": (nn.GroupNorm(3, 6), (40, 6, 4, 6)),
    "instance": (nn.InstanceNorm1d(6, affine=True), (40, 6, 24)),
}


def gradients(norm, x, grad, context=None):
    x = x.clone().requires_grad_()
    if context is None:
        out = norm(x)
    else:
        with context:
            out = norm(x)
    return out, torch.autograd.grad(out, [x, *norm.parameters()], grad)


@pytest.mark.parametrize("values", [100, 2**18])
@pytest.mark.parametrize("kind", NORMS)
def test_rows_at_a_time_it_is_the_gradient_of_all(kind, values, monkeypatch):
    for place in ("quantize", "kept"):
        monkeypatch.setattr(f"pointewa.compression.{place}.at_once", lambda device: values)
    (norm, shape), drawn = NORMS[kind], torch.Generator().manual_seed(0)
    norm = norm.double()
    with torch.no_grad():
        for one in norm.parameters():
            one.copy_(torch.randn(one.shape, generator=drawn))
    x = 3 + 2 * torch.randn(shape, generator=drawn, dtype=torch.float64)
    grad = torch.randn(shape, generator=drawn, dtype=torch.float64)
    grad = grad.transpose(0, -1).contiguous().transpose(0, -1)  # in another order in memory
    out, theirs = gradients(norm, x, grad)
    same, mine = gradients(norm, x, grad, compression.activations(norm, 32))
    assert torch.equal(out, same)
    assert len(mine) == len(theirs)
    for a, b in zip(mine, theirs, strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("layers", [(nn.BatchNorm1d(64),), (nn.BatchNorm1d(64), nn.ReLU()), (nn.LayerNorm(512),)])
def test_the_backward_pass_needs_little_beside_the_gradients(layers):
    """What is there at once is the gradient of the input, and not also what was kept in few bits, in float32."""
    model = nn.Sequential(*layers)
    x = torch.randn(256, 64, 512).requires_grad_()  # 34 MB
    with compression.activations(model):
        out = model(x)
    grad = torch.randn_like(out)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        torch.autograd.grad(out, [x, *model.parameters()], grad)
    events = [one for one in found.profiler.kineto_results.events() if one.name() == "[memory]"]
    now = most = 0
    for one in sorted(events, key=lambda event: event.start_ns()):
        most = max(most, now := now + one.nbytes())
    assert x.nbytes <= most < (1.3 if len(layers) == 1 else 2.3) * x.nbytes  # one for each layer
