"""Gradients with activations in few bits: exact at 32, near at fewer, whatever the model saves."""

import gc
from contextlib import nullcontext

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import pointewa.ewa as ewa
from pointewa import compression
from pointewa.models import Architecture, PointTransformerClassifier

ARCH = Architecture(
    width=48, depth=2, heads=2, num_groups=16, group_size=8, drop_path=0.2, patch_width=16, patch_out=32
)


def classifier(head="point_mae"):
    torch.manual_seed(0)
    model = PointTransformerClassifier(Architecture(**{**vars(ARCH), "head": head}), 5)
    points, labels = torch.randn(12, 128, 3), torch.arange(12) % 5
    return model.train(), lambda: F.cross_entropy(model(points), labels)


def with_experts():
    model, _ = classifier()
    ewa.to_moe(model, 3, inplace=True)
    points, labels = torch.randn(12, 128, 3), torch.arange(12) % 5
    return model.train(), lambda: F.cross_entropy(model(points), labels)


def gated():
    model, _ = classifier()
    ewa.to_moe(model, 3, inplace=True, mixture=ewa.TopKMoE)
    points, labels = torch.randn(12, 128, 3), torch.arange(12) % 5
    return model.train(), lambda: F.cross_entropy(model(points), labels) + 0.01 * ewa.balance_loss(model)


def of_timm():
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, embed_dim=48, num_heads=2,
                              num_classes=5, proj_drop_rate=0.1)  # fmt: skip
    images, labels = torch.randn(12, 3, 32, 32), torch.arange(12) % 5
    return model.train(), lambda: F.cross_entropy(model(images), labels)


def of_torch():
    torch.manual_seed(0)
    model = nn.Sequential(nn.TransformerEncoderLayer(48, 2, 96, batch_first=True, activation="gelu"), nn.Linear(48, 5))
    tokens, labels = torch.randn(12, 20, 48), torch.arange(12) % 5
    return model.train(), lambda: F.cross_entropy(model(tokens).amax(1), labels)


def convolutions():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.SiLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8),
                          nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))  # fmt: skip
    images, labels = torch.randn(12, 3, 12, 12), torch.arange(12) % 5
    return model, lambda: F.cross_entropy(model(images), labels)


MODELS = {one.__name__: one for one in (classifier, with_experts, gated, of_timm, of_torch, convolutions)}


@pytest.fixture(autouse=True)
def everything_is_large(monkeypatch):
    """So that small models are compressed too."""
    monkeypatch.setattr("pointewa.compression.hooks.SMALL", 64)


def gradients(model, run, context=None, seed=3):
    for buffer in model.modules():
        if hasattr(buffer, "reset_running_stats"):
            buffer.reset_running_stats()
    torch.manual_seed(seed)
    if context is None:
        loss = run()
    else:
        with context:
            loss = run()
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return loss.detach(), [one for one in found if one is not None]


def distance(mine, theirs):
    error = sum((a - b).detach().double().square().sum() for a, b in zip(mine, theirs, strict=True))
    return float((error / sum(b.detach().double().square().sum() for b in theirs)).sqrt())


@pytest.fixture
def a_few_rows_at_a_time(monkeypatch):
    """So that small tensors are cut as large ones are."""
    for place in ("quantize", "kept"):
        monkeypatch.setattr(f"pointewa.compression.{place}.at_once", lambda device: 256)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", ["float64", "float32", "bfloat16"])
@pytest.mark.usefixtures("a_few_rows_at_a_time")
def test_at_32_bits_the_gradients_are_exact(name, kind):
    model, run = MODELS[name]()
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "bfloat16"):
        if kind == "float64":
            torch.set_default_dtype(torch.float64)
        try:
            model, run = MODELS[name]() if kind == "float64" else (model, run)
            loss, exact = gradients(model, run)
            same, found = gradients(model, run, compression.activations(model, 32, 32))
        finally:
            torch.set_default_dtype(torch.float32)
    assert torch.equal(loss, same)
    assert len(found) == len(exact)
    assert distance(found, exact) < {"float64": 1e-14, "float32": 1e-5, "bfloat16": 1e-2}[kind]


@pytest.mark.parametrize("name", MODELS)
def test_fewer_bits_give_larger_errors_and_less_to_keep(name):
    model, run = MODELS[name]()
    _, exact = gradients(model, run)
    errors, kept = [], []
    for bits in (32, 16, 8, 4):
        compressed = compression.activations(model, bits, max(bits, 8))
        torch.manual_seed(3)
        with compressed:
            loss = run()
        kept.append(compressed.nbytes)
        del loss
        for moe in ewa.moe_layers(model).values():
            moe.balance = None  # of a gated one, which is a part of the graph
        gc.collect()
        assert compressed.nbytes == 0  # nothing outlives the graph
        errors.append(distance(gradients(model, run, compressed)[1], exact))
    assert errors == sorted(errors)
    assert errors[1] < 0.01
    assert errors[2] < 0.02
    assert errors[3] < 0.3
    assert kept == sorted(kept, reverse=True)
    assert kept[0] <= compression.kept_bytes(model, run)


def test_what_is_kept_in_bytes():
    """A norm keeps its input, a GELU too; the linear layers behind them nothing."""
    model = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
    x = torch.randn(50, 64, requires_grad=True)
    with compression.activations(model, 8) as compressed:
        out = model(x).sum()
    assert compressed.nbytes == 50 * (64 + 256) * (1 + 4 / 128) + 50 * 4  # and the scale of each row's norm
    assert compression.kept_bytes(model, lambda: model(x).sum()) > 4 * 50 * (64 + 64 + 256 + 256)
    out.backward()


@pytest.mark.parametrize(
    ("norm", "groups"),
    [(nn.LayerNorm(32, 1e-12), 6), (nn.RMSNorm(32, 1e-12), 6), (nn.BatchNorm1d(6, 1e-12), 6),
     (nn.GroupNorm(3, 6, 1e-12), 3), (nn.InstanceNorm1d(6, 1e-12, affine=True), 6)],
)  # fmt: skip
def test_a_norm_of_values_of_very_different_size(norm, groups):
    """Rows or channels that share a scale with others a thousand times as large, around a mean as large."""
    torch.manual_seed(0)
    size = torch.logspace(-3, 0, groups).repeat_interleave(192 // groups).view(6, 32)
    x, grad = ((torch.randn(40, 6, 32) + 3) * size).requires_grad_(), torch.randn(40, 6, 32)
    for one in norm.parameters():
        nn.init.normal_(one)
    wanted = [x, *norm.parameters()]
    exact = torch.autograd.grad((norm(x) * grad).sum(), wanted)
    for bits, most in ((32, 1e-5), (8, 0.02), (4, 0.2)):
        with compression.activations(norm, bits):
            loss = (norm(x) * grad).sum()
        found = torch.autograd.grad(loss, wanted)
        assert distance([found[0] * size], [exact[0] * size]) < most  # so that all rows or channels count alike
        assert distance(found[1:], exact[1:]) < most


def test_a_maximum_finds_its_place_and_equal_ones_share():
    x = torch.tensor([[1.0, 3.0, 3.0, 2.0] * 40] * 3, requires_grad=True)
    for keepdim in (False, True):
        plain = torch.autograd.grad(x.amax(1, keepdim).sum(), x)[0]
        with compression.activations(nn.Identity(), 4):
            loss = x.amax(1, keepdim).sum()
        assert torch.equal(torch.autograd.grad(loss, x)[0], plain)


@pytest.mark.parametrize(
    "function", [torch.sqrt, torch.log, torch.rsqrt, torch.reciprocal, lambda x: 1 / x, lambda x: x**0.5]
)
def test_what_would_be_divided_by_is_kept_exactly(function):
    x = (torch.rand(40, 128, generator=torch.Generator().manual_seed(0)) * 1e-3 + 1e-6).requires_grad_()
    plain = torch.autograd.grad(function(x).sum(), x)[0]
    with compression.activations(nn.Identity(), 2):
        loss = function(x).sum()
    assert torch.equal(torch.autograd.grad(loss, x)[0], plain)


class Inverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return 1 / x

    @staticmethod
    def backward(ctx, grad):
        return -grad / ctx.saved_tensors[0].square()


class Square(torch.autograd.Function):
    linear_in_saved = True

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad * ctx.saved_tensors[0]


@pytest.mark.parametrize("divide", [lambda y, x: y / x, lambda y, x: y * Inverse.apply(x)], ids=["torch", "own"])
def test_what_is_divided_by_is_exact_even_if_it_is_kept_in_few_bits_for_something_else(divide):
    torch.manual_seed(0)
    linear, x = nn.Linear(64, 64), torch.rand(256, 64) ** 4 + 1e-3

    def gradient(run):
        start = x.clone().requires_grad_()
        with run:
            y = start * 1.0
            loss = divide(linear(y), y).sum()
        return torch.autograd.grad(loss, start)[0]

    plain = gradient(nullcontext())
    compressed = compression.activations(linear, 8)
    assert distance([gradient(compressed)], [plain]) < 0.1
    assert compressed.sizes  # the linear layer's input


def test_what_an_own_function_saves_is_exact_unless_it_says_otherwise():
    x = torch.rand(40, 128, requires_grad=True)
    for function, exact in ((Inverse, True), (Square, False)):
        plain = torch.autograd.grad(function.apply(x * 1.0).sum(), x)[0]
        with compression.activations(nn.Identity(), 4):
            loss = function.apply(x * 1.0).sum()
        found = torch.autograd.grad(loss, x)[0]
        assert torch.equal(found, plain) is exact
        assert distance([found], [plain]) < 0.1


@pytest.mark.parametrize("autocast", [False, True])
def test_weights_are_never_compressed(autocast):
    """The gradient of the input, which needs the weights alone, is exact at any bits."""
    model = nn.Sequential(nn.Linear(64, 128), nn.Linear(128, 32, bias=False))
    x = torch.randn(50, 64, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        plain = torch.autograd.grad(model(x).float().square().sum() * 0 + model(x).float().sum(), x)[0]
        with compression.activations(model, 2):
            loss = model(x).float().sum() + F.linear(x, model[1].weight @ model[0].weight).sum() * 0
    assert torch.equal(torch.autograd.grad(loss, x)[0], plain)


def test_written_to_after_it_was_saved():
    """A buffer that is overwritten between two uses is kept in both its states."""
    weight = torch.randn(64, 64, requires_grad=True)
    x = torch.randn(50, 64)
    first, second = x.clone(), torch.randn(50, 64)

    def run():
        x.copy_(first)
        a = (x @ weight).sum()
        x.copy_(second)
        return a + (x @ weight).square().sum()

    with compression.activations(nn.Identity(), 8):
        loss = run()
    exact = first.sum(0).unsqueeze(1) + 2 * second.T @ (second @ weight)
    assert distance([torch.autograd.grad(loss, weight)[0]], [exact]) < 0.02


@pytest.mark.parametrize(
    "layer", [nn.Linear(64, 64), nn.LayerNorm(64), nn.PReLU(64)], ids=lambda one: type(one).__name__
)
def test_a_weight_that_is_written_to_before_the_backward_pass_is_refused(layer):
    """As by torch, whose own check is off where hooks have taken over."""
    x = torch.randn(50, 64, requires_grad=True)
    for context in (nullcontext(), compression.activations(layer, 8)):
        with context:
            loss = layer(x).square().sum()
        with torch.no_grad():
            layer.weight.add_(1)
        with pytest.raises(RuntimeError, match="modified"):
            loss.backward()


def test_copies_of_weights_in_bfloat16_are_made_again():
    model = nn.Linear(256, 128, bias=False)
    x = torch.randn(64, 256, dtype=torch.bfloat16, requires_grad=True)

    def run():
        with torch.autocast("cpu", torch.bfloat16):
            return (model(x) + F.linear(x[:, 3:80], model.weight[:, 3:80])).square().sum()  # whole, and a part

    exact = torch.autograd.grad(run(), [x, model.weight])
    with compression.activations(model, 32) as compressed:
        loss = run()
    assert compressed.nbytes == 2 * 64 * 256 + 2 * 64 * 128  # the inputs, and the sums that are squared
    assert all(map(torch.equal, torch.autograd.grad(loss, [x, model.weight]), exact))


def test_an_einsum_under_autocast_has_the_type_it_has_without():
    layer, x = nn.Linear(256, 256, bias=False), torch.randn(256, 256, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        for formula in ("bd,d->bd", "bd,d->b"):
            exact = torch.einsum(formula, F.gelu(x), layer.weight[0])
            with compression.activations(layer, 8):
                found = torch.einsum(formula, F.gelu(x), layer.weight[0])
            assert found.dtype == exact.dtype
            assert torch.equal(found, exact)


def test_inside_a_checkpoint_it_keeps_out():
    model, run = classifier()
    _, exact = gradients(model, run)
    model.blocks.activation_checkpointing = True
    compressed = compression.activations(model, 32, 32)
    _, found = gradients(model, run, compressed)
    assert distance(found, exact) < 1e-5
    layer, x = nn.Sequential(nn.LayerNorm(64), nn.GELU()), torch.randn(50, 64, requires_grad=True)
    plain = torch.autograd.grad(layer(x).sum(), x)[0]
    with compression.activations(layer, 4) as compressed:
        loss = checkpoint(layer, x, use_reentrant=False).sum()
    assert compressed.nbytes == x.nbytes  # what it starts again from
    assert torch.equal(torch.autograd.grad(loss, x)[0], plain)


def test_rounding_at_random_goes_on_from_its_state():
    model, run = classifier("linear")
    first = compression.activations(model, 4, stochastic=True, seed=1)
    gradients(model, run, first)
    state = first.state_dict()
    expected = gradients(model, run, first)[1]
    other = compression.activations(model, 4, stochastic=True, seed=9)
    other.load_state_dict(state)
    assert distance(gradients(model, run, other)[1], expected) == 0
    assert distance(gradients(model, run, first)[1], expected) > 0


def test_compiled_models_are_refused():
    model = nn.Linear(4, 4)
    for compiled in (torch.compile(model), nn.Sequential(torch.compile(model))):
        with pytest.raises(RuntimeError, match=r"leave torch\.compile out"), compression.activations(compiled):
            pass
    model.compile()
    with pytest.raises(RuntimeError, match=r"leave torch\.compile out"), compression.activations(model):
        pass


def test_entered_twice_and_bits_that_are_not():
    model = nn.Linear(4, 4)
    with pytest.raises(ValueError, match="bits: expected one of"):
        compression.activations(model, 5)
    with pytest.raises(ValueError, match="bits: expected one of"):
        compression.activations(model, attention_bits=0)
    with compression.activations(model) as one, pytest.raises(RuntimeError, match="entered already"), one:
        pass


def test_an_error_inside_leaves_nothing_behind():
    model, run = classifier()
    _, exact = gradients(model, run)
    with pytest.raises(KeyError), compression.activations(model, 2):
        raise KeyError
    assert distance(gradients(model, run)[1], exact) < 1e-6


def test_bits_by_sensitivity():
    from pointewa.compression.adaptive import allocate, sensitivities

    assert allocate([1.0, 1.0], [10, 10], 2) == {0: 2, 1: 2}
    assert allocate([1.0, 1.0], [10, 10], 8) == {0: 8, 1: 8}
    chosen = allocate([100.0, 1.0, 1e-3], [10, 10, 10], 4)
    assert chosen[0] >= chosen[1] >= chosen[2]
    assert sum(chosen.values()) / 3 <= 4
    model, run = classifier()
    compressed = compression.activations(model, 4)
    before = [buffer.clone() for buffer in model.buffers()]
    torch.manual_seed(7)
    chosen = compression.adapt(compressed, run, 4.0)
    assert torch.equal(torch.rand(3), (torch.manual_seed(7), torch.rand(3))[1])  # torch's random state is as it was
    assert all(map(torch.equal, before, model.buffers()))
    errors, sizes = sensitivities(compressed, run)
    assert sum(chosen[number] * size for number, size in enumerate(sizes)) <= 4 * sum(sizes)
    assert compressed.chosen == chosen
    _, exact = gradients(model, run)
    adapted = distance(gradients(model, run, compressed)[1], exact)
    assert adapted < distance(gradients(model, run, compression.activations(model, 4, 4))[1], exact)
    assert max(errors) > 10 * min(errors)
    with pytest.raises(ValueError, match="average_bits: expected at least 2"):
        compression.adapt(compressed, run, 1.5)
