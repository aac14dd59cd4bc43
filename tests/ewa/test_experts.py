"""`RandomPartitionMoE`: against a naive loop, its initialisation, and what it refuses."""

import copy
import io
import shutil

import pytest
import torch
import torch.nn.functional as F
from timm.layers import GluMlp, LayerNorm, Mlp, SwiGLU, SwiGLUPacked
from torch import nn
from torch.utils.checkpoint import checkpoint

import pointewa.ewa as ewa
from pointewa.ewa.partition import random_partition

D = 6


def glu():
    return GluMlp(D, 10, 5, act_layer=nn.SiLU)


FFNS = {
    "mlp": lambda: Mlp(D, 8, 5),
    "mlp_without_bias": lambda: Mlp(D, 8, 5, bias=False),
    "glu": glu,
    "swiglu_norm": lambda: SwiGLU(D, 8, 5, norm_layer=nn.LayerNorm),
    "swiglu_timm_norm": lambda: SwiGLU(D, 8, 5, norm_layer=LayerNorm),
    "norm_without_bias": lambda: nn.Sequential(nn.LayerNorm(D, eps=1e-2, bias=False), nn.Linear(D, 5)),
    "norm_without_affine": lambda: nn.Sequential(nn.LayerNorm(D, elementwise_affine=False), nn.Linear(D, 5)),
}


def make_moe(ffn, num_experts):
    """A float64 MoE in training mode whose experts differ in every parameter, norms and biases included."""
    moe = ewa.RandomPartitionMoE(ffn.double(), num_experts, init="copy").train()
    with torch.no_grad():
        for parameter in moe.parameters():
            parameter.add_(torch.randn_like(parameter))
    return moe


def expert_ffns(moe, ffn):
    """The experts as N separate dense FFNs."""
    ffns = [copy.deepcopy(ffn) for _ in range(moe.num_experts)]
    for i, expert in enumerate(ffns):
        expert.load_state_dict({name: stacked[i] for name, stacked in moe.experts.state_dict().items()})
    return ffns


def expert_of_token(num_tokens, num_experts):
    _, slot_of_token = random_partition(num_tokens, num_experts, "cpu")
    return slot_of_token // -(-num_tokens // num_experts)


def loop_forward(ffns, x):
    """The naive twin of the training forward: one token at a time."""
    tokens = x.reshape(-1, x.shape[-1])
    experts = expert_of_token(len(tokens), len(ffns)).tolist()
    outputs = [ffns[expert](token) for expert, token in zip(experts, tokens, strict=True)]
    return torch.stack(outputs).reshape(*x.shape[:-1], -1)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("ffn", FFNS)
@pytest.mark.parametrize(
    ("shape", "num_experts"),
    [((12, D), 4), ((2, 7, D), 4), ((2, 2, 3, D), 5), ((3, D), 4), ((1, 1, D), 2)],  # last two: fewer tokens than N
)
def test_training_forward_and_gradients_equal_a_loop_over_tokens(ffn, shape, num_experts):
    dense = FFNS[ffn]().double()
    moe = make_moe(dense, num_experts)
    ffns = expert_ffns(moe, dense)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    x_loop = x.detach().clone().requires_grad_()

    torch.manual_seed(1)
    out = moe(x)
    torch.manual_seed(1)
    expected = loop_forward(ffns, x_loop)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)

    weights = torch.randn_like(out)
    (out * weights).sum().backward()
    (expected * weights).sum().backward()
    # Token 0 also sits in the idle slots: its gradient, and theirs, must not know.
    torch.testing.assert_close(x.grad, x_loop.grad, rtol=0, atol=1e-12)
    for name, stacked in moe.experts.named_parameters():
        loop_grads = [f.get_parameter(name).grad for f in ffns]
        loop_grads = [torch.zeros_like(stacked[0]) if grad is None else grad for grad in loop_grads]
        torch.testing.assert_close(stacked.grad, torch.stack(loop_grads), rtol=0, atol=1e-12)


def test_second_derivatives_are_right():
    """Dispatch and combine have backward passes of their own; with idle slots too."""
    moe = make_moe(nn.Sequential(nn.Linear(D, 4), nn.Tanh()).double(), 3)

    def forward(x):
        torch.manual_seed(1)
        return moe(x)

    x = torch.randn(5, D, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(forward, x)
    assert torch.autograd.gradgradcheck(forward, x)


def test_a_layer_partitions_by_sample():
    moe = ewa.RandomPartitionMoE(nn.Sequential(nn.Linear(D, 1, bias=False)), 4, scope="sample").train()
    with torch.no_grad():
        moe.experts[0].weight.copy_(torch.arange(4.0).view(4, 1, 1).expand(4, 1, D) / D)  # says who has worked
    experts = moe(torch.ones(3, 8, D)).squeeze(-1).round().long()
    assert all(torch.bincount(sample, minlength=4).tolist() == [2, 2, 2, 2] for sample in experts)
    with pytest.raises(ValueError, match='scope must be "batch" or "sample"'):
        ewa.RandomPartitionMoE(nn.Sequential(nn.Linear(D, 1)), 4, scope="cloud")


def test_each_expert_s_share_has_dropout_of_its_own_rate():
    moe = ewa.RandomPartitionMoE(nn.Sequential(nn.Linear(1, 2)), 4, init="copy", dropout=0.6).train()
    with torch.no_grad():
        moe.experts[0].weight.copy_(torch.tensor([1.0, 0.0]).view(1, 2, 1))  # what the expert was given
        moe.experts[0].bias.copy_(torch.stack([torch.zeros(4), torch.arange(4.0)], 1))  # and who it is
    given, expert = moe(torch.ones(40_000, 1)).unbind(-1)
    for number, rate in enumerate([0, 0.2, 0.4, 0.6]):
        own = given[expert == number]
        assert own.unique().tolist() == pytest.approx([0, 1 / (1 - rate)] if rate else [1])
        assert (own == 0).float().mean().item() == pytest.approx(rate, abs=0.02)  # 4 standard deviations
    assert moe.eval()(torch.ones(5, 1))[:, 0].tolist() == [1] * 5
    with pytest.raises(ValueError, match="dropout must be from 0 to below 1, got 1"):
        ewa.RandomPartitionMoE(nn.Sequential(nn.Linear(D, 1)), 4, dropout=1)


def test_partition_is_fresh_at_every_forward_and_follows_the_seed():
    moe, x = make_moe(Mlp(D), 4), torch.randn(40, D, dtype=torch.float64)
    torch.manual_seed(1)
    first, second = moe(x), moe(x)
    assert not torch.allclose(first, second)
    torch.manual_seed(1)
    assert torch.equal(moe(x), first)


@pytest.mark.parametrize("ffn", FFNS)
def test_evaluation_is_the_mean_expert_without_randomness(ffn):
    dense = FFNS[ffn]().double()
    moe = make_moe(dense, 4).eval()
    mean = copy.deepcopy(dense).eval()
    mean.load_state_dict({name: stacked.mean(0) for name, stacked in moe.experts.state_dict().items()})
    x = torch.randn(2, 7, D, dtype=torch.float64)

    generator = torch.get_rng_state()
    out = moe(x)
    assert torch.equal(torch.get_rng_state(), generator)
    assert torch.equal(moe(x), out)
    torch.testing.assert_close(out, mean(x), rtol=0, atol=1e-12)

    fused = moe.fuse()
    assert type(fused) is type(dense)
    assert not fused.training
    torch.testing.assert_close(fused.state_dict(), mean.state_dict(), rtol=0, atol=1e-15)
    torch.testing.assert_close(fused(x), out, rtol=0, atol=1e-12)


def test_independent_experts_are_shuffles_of_the_given_one():
    ffn = Mlp(32, 64)
    moe = ewa.RandomPartitionMoE(ffn, 4, init="independent")
    for name, parameter in ffn.named_parameters():
        stacked = moe.experts.get_parameter(name).detach()
        assert torch.equal(stacked[0], parameter)
        flat = stacked.flatten(1)
        assert torch.equal(flat.sort().values, flat[:1].sort().values.expand_as(flat))
        correlation = torch.corrcoef(flat)[~torch.eye(4, dtype=bool)]
        assert correlation.abs().max() < 4.5 / flat.shape[1] ** 0.5
    # Not of whole rows or columns: with its neurons in another order an FFN is still the same function.
    weight = moe.experts.fc1.weight.detach()
    for sums in (weight.sum(1), weight.sum(2)):
        sums = sums.sort().values
        assert not any(torch.allclose(sums[i], sums[0], atol=1e-3) for i in (1, 2, 3))


@pytest.mark.parametrize("packed", [GluMlp, SwiGLUPacked], ids=["GluMlp", "SwiGLUPacked"])
def test_independent_experts_keep_the_gate_half_of_a_packed_glu_apart(packed):
    """timm starts it with weights of standard deviation 1e-6 and biases of 1, the other half as any linear layer."""
    ffn = packed(16, 64)
    ffn.init_weights()
    value, gate = slice(0, 32), slice(32, 64)
    experts = ewa.RandomPartitionMoE(ffn, 4, init="independent").experts
    weight, bias = experts.fc1.weight.detach(), experts.fc1.bias.detach()
    assert weight[:, gate].abs().max() < 6e-6
    assert (bias[:, gate] == 1).all()
    assert bias[:, value].abs().max() <= 16**-0.5  # torch's initialisation
    for half in (weight[:, gate], weight[:, value], bias[:, value]):  # and they are shuffled within their half
        flat = half.flatten(1)
        assert torch.equal(flat.sort().values, flat[:1].sort().values.expand_as(flat))
        correlation = torch.corrcoef(flat)[~torch.eye(4, dtype=bool)]
        assert correlation.abs().max() < 4.5 / flat.shape[1] ** 0.5


def test_independent_experts_keep_the_scale_of_each_group_of_units():
    """Also where units of both kinds alternate. Biases go with their units."""
    ffn = nn.Sequential(nn.Linear(64, 40))
    small = torch.arange(40) % 2 == 1
    with torch.no_grad():
        ffn[0].weight[small] *= 1e-4
        ffn[0].bias[small] = 3 + torch.randn(20)
    experts = ewa.RandomPartitionMoE(ffn, 3).experts[0]
    for of_units in (experts.weight.detach(), experts.bias.detach()):
        for units in (small, ~small):
            flat = of_units[:, units].flatten(1)
            assert torch.equal(flat.sort().values, flat[:1].sort().values.expand_as(flat))
            assert not torch.equal(flat[1], flat[0])


def test_independent_experts_keep_constants_where_they_are():
    ffn = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 12), nn.LayerNorm(12))
    with torch.no_grad():
        ffn[1].bias[:4] = 1.0
        ffn[1].bias[6:9] = 0.0
        ffn[2].weight.fill_(0.5)
    experts = ewa.RandomPartitionMoE(ffn, 4).experts
    for name, parameter in experts.named_parameters():
        if name != "1.weight":
            constant = slice(None) if name != "1.bias" else [0, 1, 2, 3, 6, 7, 8]
            assert torch.equal(parameter[:, constant], parameter[:1, constant].expand_as(parameter[:, constant])), name
    assert not torch.equal(experts[1].bias[1], experts[1].bias[0])


def test_the_outputs_of_independent_experts_are_not_correlated():
    """As they would be, by about 0.12, if every expert's units had the same sums of weights."""
    x = F.layer_norm(torch.randn(256, 64), (64,))
    outputs = []
    for _ in range(5):
        ffn = Mlp(64, 256)
        moe = ewa.RandomPartitionMoE(ffn, 5).requires_grad_(False)
        out = moe.experts(x.expand(5, -1, -1)) - moe.experts.fc2.bias.unsqueeze(1)
        outputs.append(torch.stack([F.cosine_similarity(out[0].flatten(), one.flatten(), 0) for one in out[1:]]))
    assert torch.cat(outputs).mean().abs() < 0.03


def test_copied_experts_are_all_the_given_one():
    ffn = Mlp(D, 8)
    moe = ewa.RandomPartitionMoE(ffn, 3, init="copy")
    for name, parameter in ffn.named_parameters():
        assert torch.equal(moe.experts.get_parameter(name), parameter.expand(3, *parameter.shape))


def test_the_given_ffn_is_not_changed_and_shares_no_memory():
    ffn = Mlp(D, 8)
    before = copy.deepcopy(ffn.state_dict())
    moe = ewa.RandomPartitionMoE(ffn, 3)
    with torch.no_grad():
        for parameter in (*moe.parameters(), *moe.fuse().parameters()):
            parameter.zero_()
    assert type(ffn.fc1) is nn.Linear
    torch.testing.assert_close(ffn.state_dict(), before, rtol=0, atol=0)


def test_dtype_and_mode_of_the_ffn_are_kept():
    moe = ewa.RandomPartitionMoE(Mlp(D).to(torch.bfloat16).eval(), 2)
    assert not any(module.training for module in moe.modules())
    assert {parameter.dtype for parameter in (*moe.parameters(), *moe.fuse().parameters())} == {torch.bfloat16}


@pytest.mark.parametrize("num_experts", [1, 0, -2])
def test_fewer_than_two_experts_are_refused(num_experts):
    with pytest.raises(ValueError, match=f"at least 2, got {num_experts}"):
        ewa.RandomPartitionMoE(Mlp(D), num_experts)


def test_an_unknown_init_is_refused():
    with pytest.raises(ValueError, match=r'"independent" or "copy".*copies'):
        ewa.RandomPartitionMoE(Mlp(D), 4, init="copies")


def test_activation_checkpointing_draws_the_same_partition_again():
    x = torch.randn(2, 7, D, dtype=torch.float64)
    plain = nn.Sequential(make_moe(Mlp(D, 8), 4), make_moe(Mlp(D, 8), 4))
    checkpointed = copy.deepcopy(plain)
    torch.manual_seed(1)
    plain(x).square().sum().backward()
    torch.manual_seed(1)
    checkpoint(checkpointed, x, use_reentrant=False).square().sum().backward()
    for a, b in zip(plain.parameters(), checkpointed.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


@pytest.mark.parametrize("training", [True, False])
def test_bfloat16_autocast_is_close_to_float32(training):
    moe = ewa.RandomPartitionMoE(SwiGLU(32, 64, norm_layer=nn.LayerNorm), 4).train(training)
    x = torch.randn(2, 9, 32)
    torch.manual_seed(1)
    expected = moe(x)
    torch.manual_seed(1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = moe(x)
    assert out.dtype == torch.bfloat16
    out.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in moe.parameters())
    # Three roundings to 8 bits in a row, of about 0.3 % each.
    assert (out.float() - expected).norm() < 0.02 * expected.norm()


def test_copies_and_state_dicts_compute_the_same():
    moe, x = make_moe(Mlp(D, 8), 3), torch.randn(10, D, dtype=torch.float64)
    file = io.BytesIO()
    torch.save(moe.state_dict(), file)
    file.seek(0)
    loaded = ewa.RandomPartitionMoE(Mlp(D, 8).double(), 3).train()
    loaded.load_state_dict(torch.load(file, weights_only=True))
    copied = copy.deepcopy(moe)

    outputs = []
    for model in (moe, loaded, copied):
        torch.manual_seed(1)
        outputs.append(model(x))
    assert torch.equal(outputs[1], outputs[0])
    assert torch.equal(outputs[2], outputs[0])
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    torch.manual_seed(1)
    assert torch.equal(moe(x), outputs[0])


def test_moe_layers_and_stacked_parameters_are_named_from_the_model():
    model = nn.ModuleDict({"first": nn.Linear(D, D), "second": ewa.RandomPartitionMoE(Mlp(D, 8), 3)})
    model["again"] = model["second"]  # a shared layer counts once
    assert list(ewa.moe_layers(model)) == ["second"]
    shapes = {name: tuple(p.shape) for name, p in ewa.stacked_parameters(model).items()}
    assert shapes == {
        "second.experts.fc1.weight": (3, 8, D),
        "second.experts.fc1.bias": (3, 8),
        "second.experts.fc2.weight": (3, D, 8),
        "second.experts.fc2.bias": (3, D),
    }


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on the CPU")
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_layer_computes_the_same(backend):
    ffn = Mlp(D, 8, 5)
    moe = ewa.RandomPartitionMoE(ffn, 3, init="copy").train()
    compiled = torch.compile(moe, fullgraph=True, backend=backend)
    x = torch.randn(2, 7, D)
    torch.testing.assert_close(compiled(x), ffn(x))  # whatever the partition: the experts are equal
    compiled(x).sum().backward()
    ffn(x).sum().backward()
    torch.testing.assert_close(moe.experts.fc1.weight.grad.sum(0), ffn.fc1.weight.grad)
