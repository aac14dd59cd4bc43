"""The exchange of gradients, in one process; two of them are in tests/train/test_distributed.py."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pointewa.compression import GradientExchange
from pointewa.compression.quantize import dequantize, quantize


@pytest.fixture(scope="module", autouse=True)
def alone(tmp_path_factory):
    store = dist.FileStore(str(tmp_path_factory.mktemp("store") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def trained(exchange, bucket_mb=25.0, seed=0):
    """A model with the hook, and a function from a seed to its gradients, as they are and as they come out."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(20, 300), nn.Tanh(), nn.Linear(300, 7))
    ddp = DistributedDataParallel(model, bucket_cap_mb=bucket_mb)
    exchange.attach(ddp)

    def gradients(seed, factor=1.0):
        x = torch.randn(16, 20, generator=torch.Generator().manual_seed(seed))
        exact = torch.autograd.grad(factor * model(x).square().sum(), list(model.parameters()))
        ddp.zero_grad()
        (factor * ddp(x).square().sum()).backward()
        return exact, [one.grad.clone() for one in model.parameters()]

    return gradients


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("bucket_mb", [25.0, 0.001])
def test_it_is_quantised_parameter_by_parameter_whatever_the_buckets(bits, bucket_mb):
    gradients = trained(GradientExchange(bits), bucket_mb)
    for seed in range(3):  # DDP makes new buckets after the first step
        for exact, found in zip(*gradients(seed), strict=True):
            assert torch.allclose(found, dequantize(quantize(exact, bits)), rtol=1e-5, atol=1e-7)
            assert not torch.equal(found, exact)


def test_with_error_feedback_nothing_is_lost_for_good():
    exchange = GradientExchange(4, error_feedback=True)
    gradients = trained(exchange)
    true, sent, last = 0, 0, None
    for seed in range(10):
        exact, found = gradients(seed)
        true, sent = true + exact[0], sent + found[0]
        last = exact[0]
    left = exchange.state_dict()["0.weight"]
    assert torch.allclose(sent + left, true, atol=1e-4 * float(true.abs().max()))
    assert left.norm() < 0.2 * last.norm()
    other = GradientExchange(4, error_feedback=True)
    again = trained(other)
    other.load_state_dict(exchange.state_dict())
    assert all(map(torch.equal, again(11)[1], gradients(11)[1]))


def test_a_failed_step_is_noticed_and_does_not_spoil_the_next():
    gradients = trained(GradientExchange(8, error_feedback=True))
    assert not all(one.isfinite().all() for one in gradients(0, float("inf"))[1])
    exact, found = gradients(1)
    assert all((a - b).norm() < 0.05 * a.norm() for a, b in zip(exact, found, strict=True))


def test_what_does_not_go_is_refused():
    with pytest.raises(ValueError, match="bits: expected 4 or 8, found 2"):
        GradientExchange(2)
    with pytest.raises(ValueError, match="block: expected a multiple of 8, found 4"):
        GradientExchange(8, block=4)
