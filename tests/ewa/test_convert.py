"""Dense -> MoE -> dense, on other people's transformers: the fold contract, the choice of layers, the diagnostics."""

import copy
import functools

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import Mlp
from timm.utils import reparameterize_model
from torch import nn
from torchvision.models import VisionTransformer
from torchvision.models.vision_transformer import MLPBlock

import pointewa.ewa as ewa

D, TOKENS = 16, 9


def timm_vit():
    return timm.create_model("vit_tiny_patch16_224", img_size=32, depth=4, num_classes=7)


def torchvision_vit():
    model = VisionTransformer(32, 16, 3, 2, D, 32, num_classes=7)
    model.heads.head.reset_parameters()  # it starts at zero, and so would every output
    return model


def encoder(activation="relu", norm_first=False, num_layers=4):
    layer = nn.TransformerEncoderLayer(D, 2, 32, activation=activation, batch_first=True, norm_first=norm_first)
    model = nn.TransformerEncoder(layer, num_layers)
    with torch.no_grad():
        for parameter in model.parameters():  # torch starts all layers alike
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


class UpDown(nn.Module):
    """An FFN of no known form."""

    def __init__(self):
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(D, 32), nn.LayerNorm(32, eps=1e-3), nn.Linear(32, D, bias=False)

    def forward(self, x):
        return x + self.down(self.norm(self.up(x).relu()))


def image(size):
    return functools.partial(torch.randn, 3, 3, size, size)


tokens = functools.partial(torch.randn, 3, TOKENS, D)

# name: (dense model, one batch, arguments of to_moe)
CASES = {
    "timm_vit": (timm_vit, image(32), {}),
    "timm_swiglu": (
        lambda: timm.create_model("eva02_tiny_patch14_224", img_size=28, depth=3, num_classes=7),
        image(28),
        {"layers": "all", "num_experts": 3},
    ),
    "torchvision": (torchvision_vit, image(32), {}),
    "encoder_relu": (encoder, tokens, {}),
    "encoder_relu_norm_first": (lambda: encoder(norm_first=True), tokens, {"num_experts": 2}),
    "encoder_gelu": (lambda: encoder(F.gelu), tokens, {"layers": [0, 3]}),
    "encoder_gelu_norm_first": (lambda: encoder(F.gelu, norm_first=True), tokens, {}),
    "encoder_module_activation": (lambda: encoder(nn.SiLU()), tokens, {"layers": "all"}),
    "encoder_layer": (
        lambda: nn.TransformerEncoderLayer(D, 2, 32, batch_first=True, bias=False),
        tokens,
        {"layers": "all"},
    ),
    "own_ffn": (
        lambda: nn.Sequential(nn.Linear(D, D), UpDown(), UpDown()),
        tokens,
        {"predicate": lambda name, module: isinstance(module, UpDown)},
    ),
}


def dense_and_moe(case, dtype=torch.float32):
    """A dense model, the MoE model made of it and trained for some steps with averaging, and a batch."""
    make_dense, make_batch, arguments = CASES[case]
    torch.manual_seed(0)
    dense, x = make_dense().to(dtype), make_batch(dtype=dtype)
    moe = ewa.to_moe(dense, **arguments).train()
    optimizer = torch.optim.AdamW(moe.parameters(), lr=1e-3)
    ewa.ExpertAveraging(moe, ewa.linear(0.2, 3)).attach(optimizer)
    for _ in range(3):
        optimizer.zero_grad()
        moe(x + 0.1 * torch.randn_like(x)).square().mean().backward()
        optimizer.step()
    return dense, moe, x


def classes(model):
    return {name: type(module) for name, module in model.named_modules()}


def shapes(model):
    return [(name, tensor.shape, tensor.dtype) for name, tensor in model.state_dict().items()]


def assert_bitwise(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


# The fold contract


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("case", CASES)
def test_the_folded_model_is_the_dense_one_and_computes_what_the_moe_does(case, dtype, tolerance):
    dense, moe, x = dense_and_moe(case, dtype)
    assert min(ewa.disagreement(moe).values()) > 0.5  # the experts do differ: folding is no trivial matter
    folded = ewa.fold(moe.eval())

    assert shapes(folded) == shapes(dense)
    assert classes(folded) == classes(dense)
    assert str(folded) == str(dense)
    expected = moe(x)
    scale = expected.abs().max().item()
    torch.testing.assert_close(folded(x), expected, rtol=0, atol=tolerance * scale)
    assert (dense.eval()(x) - expected).abs().max() > 1e-3 * scale  # and the training did something

    fresh = CASES[case][0]().to(dtype).eval()
    fresh.load_state_dict(folded.state_dict(), strict=True)
    assert_bitwise(fresh(x), folded(x))


@pytest.mark.parametrize("case", CASES)
def test_each_expert_of_a_copy_computes_what_the_dense_model_does(case):
    """In training mode too: the FFN's own forward code is what the experts run."""
    make_dense, make_batch, arguments = CASES[case]
    torch.manual_seed(0)
    dense, x = make_dense().double(), make_batch(dtype=torch.float64)
    for module in dense.modules():  # dropout draws other numbers for other shapes
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
    moe = ewa.to_moe(dense, init="copy", **arguments)
    torch.testing.assert_close(moe.train()(x), dense.train()(x), rtol=0, atol=1e-11)
    torch.testing.assert_close(moe.eval()(x), dense.eval()(x), rtol=0, atol=1e-11)


@pytest.mark.parametrize("case", CASES)
def test_to_moe_and_fold_work_on_a_copy_unless_told_otherwise(case):
    make_dense, make_batch, arguments = CASES[case]
    torch.manual_seed(0)
    dense, x = make_dense().double().eval(), make_batch(dtype=torch.float64)
    before = copy.deepcopy(dense.state_dict()), classes(dense), dense(x)

    moe = ewa.to_moe(dense, **arguments)
    assert moe is not dense
    assert classes(dense) == before[1]
    assert_bitwise(dense.state_dict(), before[0])
    moe_before = copy.deepcopy(moe.state_dict()), classes(moe), moe(x)
    folded = ewa.fold(moe)
    assert folded is not moe
    assert classes(moe) == moe_before[1]
    with torch.no_grad():
        for parameter in (*folded.parameters(), *dense.parameters()):  # nor is memory shared
            parameter.zero_()
    assert_bitwise(moe.state_dict(), moe_before[0])
    assert_bitwise(moe(x), moe_before[2])

    dense.load_state_dict(before[0])
    assert_bitwise(dense(x), before[2])
    assert ewa.to_moe(dense, inplace=True, **arguments) is dense
    assert classes(dense) == moe_before[1]
    assert ewa.fold(dense, inplace=True) is dense
    assert classes(dense) == before[1]


def test_fold_keeps_training_and_evaluation_mode():
    moe = ewa.to_moe(encoder(F.gelu).train())
    assert all(module.training for module in ewa.fold(moe).modules())
    assert not any(module.training for module in ewa.fold(moe.eval()).modules())


def test_timm_reparameterisation_folds_to_the_same_weights():
    _, moe, _ = dense_and_moe("timm_vit")
    folded, reparameterised = ewa.fold(moe), reparameterize_model(moe)
    assert classes(reparameterised) == classes(folded)
    assert list(reparameterised.state_dict()) == list(folded.state_dict())
    assert_bitwise(reparameterised.state_dict(), folded.state_dict())


class Block(nn.Module):
    def __init__(self, mlp):
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(D), mlp

    def forward(self, x):
        return x + self.mlp(self.norm(x))


def test_a_module_used_in_two_places_stays_shared():
    mlp, block = Mlp(D, 32), Block(Mlp(D, 32))
    dense = nn.Sequential(block, Block(mlp), Block(mlp), block).double()
    moe = ewa.to_moe(dense, layers="all")
    assert list(ewa.moe_layers(moe)) == ["0.mlp", "1.mlp"]
    with pytest.raises(ValueError, match="2 FFNs"):
        ewa.to_moe(dense, layers=[2])
    folded = ewa.fold(moe)
    for model, kind in ((moe, ewa.RandomPartitionMoE), (folded, Mlp)):
        assert model[0] is model[3]
        assert model[1].mlp is model[2].mlp
        assert model[1] is not model[2]
        assert type(model[0].mlp) is type(model[1].mlp) is kind
    assert shapes(folded) == shapes(dense)
    assert len(list(folded.parameters())) == len(list(dense.parameters()))
    x = torch.randn(2, 3, D, dtype=torch.float64)
    torch.testing.assert_close(folded.eval()(x), moe.eval()(x), rtol=0, atol=1e-12)


def test_a_frozen_ffn_stays_frozen():
    dense = timm_vit()
    dense.blocks[1].mlp.requires_grad_(False)
    dense.blocks[3].mlp.fc1.bias.requires_grad_(False)
    moe = ewa.to_moe(dense)
    stacked = {name: p.requires_grad for name, p in ewa.stacked_parameters(moe).items()}
    assert [name for name, trainable in stacked.items() if not trainable] == [
        "blocks.1.mlp.experts.fc1.weight",
        "blocks.1.mlp.experts.fc1.bias",
        "blocks.1.mlp.experts.fc2.weight",
        "blocks.1.mlp.experts.fc2.bias",
        "blocks.3.mlp.experts.fc1.bias",
    ]
    assert {n: p.requires_grad for n, p in ewa.fold(moe).named_parameters()} == {
        n: p.requires_grad for n, p in dense.named_parameters()
    }


# Which layers


@pytest.mark.parametrize(
    ("layers", "chosen"),
    [("every_other", [1, 3, 5]), ("all", [0, 1, 2, 3, 4, 5]), ([4, 0], [0, 4]), (range(2), [0, 1])],
)
def test_layers_are_counted_in_module_order(layers, chosen):
    dense = nn.Sequential(*(Block(Mlp(D, 32)) for _ in range(6)))
    assert list(ewa.moe_layers(ewa.to_moe(dense, layers=layers))) == [f"{i}.mlp" for i in chosen]
    dense = encoder(num_layers=6)
    assert list(ewa.moe_layers(ewa.to_moe(dense, layers=layers))) == [f"layers.{i}.linear1" for i in chosen]


@pytest.mark.parametrize("layers", [[4], [-1], [0, 7], [], "evry_other"])
def test_layers_that_are_not_there_are_refused(layers):
    dense = encoder(num_layers=4)
    with pytest.raises(ValueError, match=r'"every_other", "all" or numbers' if layers == "evry_other" else "4 FFNs"):
        ewa.to_moe(dense, layers=layers)


def test_every_other_of_a_single_ffn_is_refused():
    with pytest.raises(ValueError, match=r"every_other.*1 FFNs"):
        ewa.to_moe(nn.Sequential(Mlp(D)), predicate=ewa.is_ffn)


def test_known_forms_and_the_callers_predicate():
    assert ewa.is_ffn("mlp", Mlp(D))
    assert ewa.is_ffn("mlp", MLPBlock(D, 32, 0.0))
    assert ewa.is_ffn("0", nn.TransformerEncoderLayer(D, 2))
    assert ewa.is_ffn("up_down", UpDown())
    assert not ewa.is_ffn("block", Block(Mlp(D)))  # its FFN is within
    assert not ewa.is_ffn("attn", nn.MultiheadAttention(D, 2))
    assert not ewa.is_ffn("se", timm.layers.SEModule(D))  # fc1 and fc2 too, but convolutions

    seen = []

    def named_ffn(name, module):
        seen.append(name)
        return name.endswith("ffn")

    dense = nn.ModuleDict({"a": nn.ModuleDict({"ffn": UpDown(), "other": nn.Linear(D, D)}), "ffn": UpDown()})
    moe = ewa.to_moe(dense, layers="all", predicate=named_ffn)
    assert list(ewa.moe_layers(moe)) == ["a.ffn", "ffn"]
    assert seen == ["", "a", "a.ffn", "a.other", "ffn"]  # from the outside in, and not into what was found


def test_models_that_cannot_be_converted_are_refused():
    with pytest.raises(ValueError, match=r"no FFN found: looked for modules of two linear layers.*predicate="):
        ewa.to_moe(nn.Sequential(UpDown()))  # neither repeated nor beside an attention
    moe = ewa.to_moe(encoder())
    with pytest.raises(ValueError, match="MoE layers already"):
        ewa.to_moe(moe)
    with pytest.raises(ValueError, match=r"nothing to fold.*no MoE layers"):
        ewa.fold(encoder())
    with pytest.raises(ValueError, match="at least 2, got 1"):
        ewa.to_moe(encoder(), num_experts=1)
    with pytest.raises(ValueError, match="Conv1d"):
        ewa.to_moe(nn.Sequential(nn.Conv1d(D, D, 1)), layers=[0], predicate=lambda _, module: type(module) is nn.Conv1d)


@pytest.mark.parametrize("make_dense", [timm_vit, lambda: encoder(num_layers=12)])
def test_a_seed_fixes_the_experts(make_dense):
    dense, states = make_dense(), []
    for _ in range(4):
        torch.manual_seed(1)
        states.append(ewa.to_moe(dense, layers="all"))
    for other in states[1:]:
        assert_bitwise(other.state_dict(), states[0].state_dict())


def test_a_refused_conversion_in_place_leaves_the_model_as_it_was():
    model = nn.Sequential(encoder(), Mlp(D, 8, norm_layer=nn.BatchNorm1d))
    before = classes(model)
    with pytest.raises(ValueError, match="BatchNorm1d"):
        ewa.to_moe(
            model,
            layers="all",
            inplace=True,
            predicate=lambda _, one: isinstance(one, (Mlp, nn.TransformerEncoderLayer)),
        )
    assert classes(model) == before


@pytest.mark.parametrize("mixture", [ewa.RandomPartitionMoE, ewa.TopKMoE])
@pytest.mark.parametrize("layers", [[0], [1, 2], [0, 3]])
def test_the_numbers_of_the_moe_layers_are_those_that_were_chosen(layers, mixture):
    class Ffn(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.fc2 = torch.nn.Linear(4, 8), torch.nn.Linear(8, 4)

        def forward(self, x):
            return self.fc2(self.fc1(x).relu())

    flat, nested = (torch.nn.Sequential(*(Ffn() for _ in range(2))) for _ in range(2))
    model = ewa.to_moe(torch.nn.Sequential(flat, torch.nn.Linear(4, 4), nested), 2, layers, mixture=mixture)
    assert ewa.moe_numbers(model) == layers
