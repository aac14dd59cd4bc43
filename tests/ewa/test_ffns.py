"""Which modules are FFNs: over other people's models, and by cases that names, or shapes alone, would get wrong."""

import functools
import sys

import pytest
import timm
import torch
from timm.layers import Mlp
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

import pointewa.ewa as ewa
from benchmarks import ffn_table
from benchmarks.ffn_table import FAMILIES

D, PAGE = 16, ffn_table.PAGE.read_text()

# Other people's models


def naive_groups(pos, batch, num_groups, group_size, random_start=False):
    """What torch-pointcloud's `group` returns, of other centres: its own needs pyg-lib."""
    pos = pos.view(int(batch.max()) + 1, -1, 3)
    center = pos[:, :num_groups]
    near = torch.cdist(center, pos).topk(group_size, largest=False).indices
    points = pos[:, None].expand(-1, num_groups, -1, -1).gather(2, near[..., None].expand(-1, -1, -1, 3))
    return points - center[:, :, None], center


@torch.no_grad()
def output(model, inputs):
    torch.manual_seed(0)
    out = model(**inputs) if isinstance(inputs, dict) else model(*inputs)
    return out if isinstance(out, torch.Tensor) else out[0]


def in_double(inputs):
    if isinstance(inputs, dict):
        return dict(zip(inputs, in_double(inputs.values()), strict=True))
    return [one.double() if one is not None and one.is_floating_point() else one for one in inputs]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_a_family_folds_exactly_or_is_refused(family, monkeypatch):
    with torch.device("meta"):
        dense = family.build()
    assert ffn_table.row(family, dense) in PAGE, "run python -m benchmarks.ffn_table --write"
    if not (found := ewa.find_ffns(dense)):
        with pytest.raises(ValueError, match="no FFN found: looked for"):
            ewa.to_moe(dense)
        return
    torch.manual_seed(0)
    dense = family.build().double().eval()
    assert [*ewa.find_ffns(dense)] == [*found]
    for name, module in list(sys.modules.items()):
        if name.startswith("torch_pointcloud.models") and hasattr(module, "group"):
            monkeypatch.setattr(module, "group", naive_groups)
    with torch.no_grad():
        for parameter in dense.parameters():  # many start so that blocks change nothing
            parameter.add_(0.1 * torch.randn_like(parameter))
    inputs = in_double(family.inputs())
    expected = output(dense, inputs)
    scale = expected.abs().max()
    copies = ewa.to_moe(dense, 2, "all", init="copy")
    torch.testing.assert_close(output(copies, inputs), expected, rtol=0, atol=1e-10 * scale)

    moe = ewa.to_moe(dense, 3, "all")
    found = output(moe, inputs)
    assert (found - expected).abs().max() > 1e-3 * scale  # the FFNs are in use, and the experts differ
    folded = ewa.fold(moe)
    torch.testing.assert_close(output(folded, inputs), found, rtol=0, atol=1e-10 * scale)
    shapes = {name: value.shape for name, value in dense.state_dict().items()}
    assert {name: value.shape for name, value in folded.state_dict().items()} == shapes
    assert [*map(type, folded.modules())] == [*map(type, dense.modules())]
    assert output(moe.train(), inputs).isfinite().all()


def test_the_table_in_the_docs_has_no_other_rows():
    _, _, rest = PAGE.partition(ffn_table.START)
    assert rest.partition(ffn_table.END)[0].count("\n| ") == len(FAMILIES) + 1


def test_a_model_on_the_meta_device_has_the_same_ffns_and_finding_them_draws_no_numbers():
    models = []
    for device in ("cpu", "meta"):
        with torch.device(device):
            models.append(timm.create_model("eva02_tiny_patch14_224", img_size=28, depth=3))
    torch.manual_seed(0)
    before = torch.get_rng_state()
    assert [*ewa.find_ffns(models[0])] == [*ewa.find_ffns(models[1])] == [f"blocks.{block}.mlp" for block in range(3)]
    with torch.device("meta"), torch.no_grad():
        assert len(ewa.find_ffns(models[1])) == 3
    assert torch.equal(torch.get_rng_state(), before)


# Cases


class Attention(nn.Module):
    """Projections of an FFN's shapes: three of width D alone, or packed to 2D."""

    def __init__(self, packed=False):
        super().__init__()
        self.queries_and_keys, self.values = nn.Linear(D, 2 * D), nn.Linear(D, D)
        if not packed:
            self.queries_and_keys, self.keys = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x):
        both = self.queries_and_keys(x)
        queries, keys = both.chunk(2, -1) if both.shape[-1] == 2 * D else (both, self.keys(x))
        return (queries @ keys.mT).softmax(-1) @ self.values(x)


class FeedForward(nn.Module):
    """lucidrains' form."""

    def __init__(self, hidden=32, width=D):
        super().__init__()
        self.net = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, hidden), nn.GELU(), nn.Dropout(0.1), nn.Linear(hidden, width)
        )

    def forward(self, x):
        return self.net(x)


class LlamaMlp(nn.Module):
    """Meta's own order of the three."""

    def __init__(self):
        super().__init__()
        self.w1, self.w2, self.w3 = nn.Linear(D, 24), nn.Linear(24, D), nn.Linear(D, 24)

    def forward(self, x):
        return self.w2(nn.functional.silu(self.w1(x)) * self.w3(x))


class Packed(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(D, 48), nn.RMSNorm(24), nn.Linear(24, D)

    def forward(self, x):
        gate, value = self.up(x).chunk(2, -1)
        return self.down(self.norm(gate.sigmoid() * value))


class Block(nn.Module):
    """A transformer block; the layer scale lies beside the FFN."""

    def __init__(self, ffn, attention=Attention):
        super().__init__()
        self.scale, self.mixer, self.ffn = nn.Parameter(torch.ones(D)), attention(), ffn

    def forward(self, x):
        x = x + self.mixer(x)
        return x + self.scale * self.ffn(x)


class Loose(nn.Module):
    """The layers of the FFN lie in the block itself."""

    def __init__(self):
        super().__init__()
        self.mixer, self.fc1, self.fc2 = Attention(), nn.Linear(D, 32), nn.Linear(32, D)

    def forward(self, x):
        x = x + self.mixer(x)
        return x + self.fc2(self.fc1(x).relu())


class Scaled(nn.Module):
    """The layer scale lies within the FFN."""

    def __init__(self):
        super().__init__()
        self.up, self.down, self.gamma = nn.Linear(D, 32), nn.Linear(32, D), nn.Parameter(torch.ones(D))

    def forward(self, x):
        return self.gamma * self.down(self.up(x).relu())


def model(*blocks, **others):
    return nn.ModuleDict({"stem": nn.Linear(3, D), "blocks": nn.ModuleList(blocks), **others})


CASES = {
    "lucidrains": (lambda: model(Block(FeedForward()), Block(FeedForward())), ["blocks.0.ffn.net", "blocks.1.ffn.net"]),
    "hidden as wide as the tokens": (
        lambda: model(Block(FeedForward(D)), Block(FeedForward(D))),
        ["blocks.0.ffn.net", "blocks.1.ffn.net"],
    ),
    "attention of two layers": (
        lambda: model(*(Block(Mlp(D), functools.partial(Attention, packed=True)) for _ in range(2))),
        ["blocks.0.ffn", "blocks.1.ffn"],
    ),
    "gated": (lambda: model(Block(LlamaMlp()), Block(Packed())), ["blocks.0.ffn", "blocks.1.ffn"]),
    "one block, and a head of the tokens' width": (
        lambda: model(Block(Mlp(D)), head=Mlp(D, 4 * D, D)),
        ["blocks.0.ffn"],
    ),
    "blocks, and two heads": (
        lambda: model(Block(Mlp(D)), Block(Mlp(D)), heads=nn.ModuleList([Mlp(D), Mlp(D)])),
        ["blocks.0.ffn", "blocks.1.ffn"],
    ),
    "shared blocks": (lambda: model(*[Block(Mlp(D))] * 3), ["blocks.0.ffn"]),
    "a stack without attention": (lambda: nn.Sequential(nn.Linear(3, D), Mlp(D), Mlp(D)), ["1", "2"]),
    "a head alone": (lambda: nn.Sequential(nn.Linear(3, D), Mlp(D)), []),
    "loose layers": (lambda: model(Loose(), Loose()), []),
    "a layer scale within": (lambda: model(Block(Scaled()), Block(Scaled())), []),
    "convolutions": (lambda: model(*(Block(Mlp(D, use_conv=True)) for _ in range(2))), []),
    "batch norm": (lambda: model(*(Block(Mlp(D, norm_layer=nn.BatchNorm1d)) for _ in range(2))), []),
}


@pytest.mark.parametrize(("build", "expected"), CASES.values(), ids=CASES)
def test_what_counts_as_an_ffn(build, expected):
    dense = build()
    assert [*ewa.find_ffns(dense)] == expected
    if not expected:
        with pytest.raises(ValueError, match=r"no FFN found: looked for .*predicate=lambda"):
            ewa.to_moe(dense)
        return
    moe = ewa.to_moe(dense, layers="all")
    assert [*ewa.find_ffns(moe)] == [*ewa.moe_layers(moe)] == expected
    assert ewa.moe_numbers(moe) == [*range(len(expected))]
    assert [*ewa.find_ffns(ewa.fold(moe))] == expected


class RelativePosition(nn.Module):
    """An attention with an MLP from two coordinates to as many heads: an FFN by its form."""

    def __init__(self):
        super().__init__()
        self.qkv, self.proj, self.tau = nn.Linear(D, 3 * D), nn.Linear(D, D), nn.Parameter(torch.ones(2))
        self.meta_mlp = Mlp(2, 32, 2)


def test_the_mlp_of_relative_positions_is_none_even_with_two_heads():
    dense = model(*(Block(Mlp(D), RelativePosition) for _ in range(2)))
    assert ewa.is_ffn("", RelativePosition().meta_mlp)
    assert [*ewa.find_ffns(dense)] == ["blocks.0.ffn", "blocks.1.ffn"]


class MixerBlock(nn.Module):
    def __init__(self, tokens):
        super().__init__()
        self.norm, self.tokens, self.channels = nn.LayerNorm(D), Mlp(tokens, 32), Mlp(D, 32)


def test_of_a_mixer_the_channels_count_and_as_many_tokens_as_channels_are_refused():
    assert [*ewa.find_ffns(model(MixerBlock(9), MixerBlock(9)))] == ["blocks.0.channels", "blocks.1.channels"]
    dense = model(MixerBlock(D), MixerBlock(D))
    with pytest.raises(
        ValueError, match=r"blocks\.0\.tokens and blocks\.0\.channels are FFNs of one width.*predicate="
    ):
        ewa.to_moe(dense)
    moe = ewa.to_moe(dense, layers="all", predicate=lambda name, _: name.endswith("channels"))
    assert [*ewa.moe_layers(moe)] == ["blocks.0.channels", "blocks.1.channels"]


def test_a_predicate_can_build_on_the_form():
    dense = model(Block(Mlp(D)), Block(Mlp(D)), decoder=nn.ModuleList([Block(Mlp(D)), Block(Mlp(D))]))
    moe = ewa.to_moe(dense, 2, "all", predicate=lambda name, one: name.startswith("decoder") and ewa.is_ffn(name, one))
    assert [*ewa.moe_layers(moe)] == ["decoder.0.ffn", "decoder.1.ffn"]
    assert ewa.moe_numbers(moe) == [2, 3]


def test_a_model_whose_moe_layers_have_no_ffns_form_still_numbers_them():
    long = nn.Sequential(nn.Linear(D, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, D))
    moe = ewa.to_moe(model(Block(Mlp(D)), Block(long), Block(Mlp(D))), 2, [0], predicate=lambda _, one: one is long)
    assert ewa.moe_numbers(moe) == [1]
    assert [*ewa.find_ffns(moe)] == ["blocks.0.ffn", "blocks.1.ffn", "blocks.2.ffn"]


def test_every_other_hits_the_blocks_it_says():
    """The MLPs of the positions and of the pooling counted among the FFNs: other blocks were converted."""
    small = {"img_size": 32, "depth": 4, "embed_dim": 48, "num_heads": 3}
    for name in ("vit_relpos_small_patch16_224", "vit_base_patch16_siglip_224"):
        moe = ewa.to_moe(timm.create_model(name, **small))
        assert [*ewa.moe_layers(moe)] == ["blocks.1.mlp", "blocks.3.mlp"]


def test_hooks_are_not_run_by_the_search():
    dense, calls = model(Block(FeedForward()), Block(FeedForward())), []
    dense["blocks"][0].ffn.net[1].register_forward_hook(lambda *_: calls.append(1))
    assert len(ewa.find_ffns(dense)) == 2
    assert not calls


# What cannot become experts


def tie_to_the_stem(dense):
    dense["decode"] = nn.Linear(D, 32)
    dense["decode"].weight = dense["blocks"][1].ffn.fc1.weight


def tie_within(dense):
    ffn = dense["blocks"][1].ffn
    ffn.fc1, ffn.fc2 = nn.Linear(D, D), nn.Linear(D, D)
    ffn.fc2.weight = ffn.fc1.weight


def share_a_layer(dense):
    dense["blocks"][1].ffn.fc2 = dense["blocks"][0].ffn.fc2


SHARED = {
    "a weight of another module": (tie_to_the_stem, r"blocks\.1\.ffn\.fc1\.weight is also decode\.weight"),
    "one weight twice": (tie_within, r"blocks\.1\.ffn\.fc1\.weight is also blocks\.1\.ffn\.fc2\.weight"),
    "a layer": (share_a_layer, r"blocks\.1\.ffn\.fc2\.weight is also blocks\.0\.ffn\.fc2\.weight"),
}


@pytest.mark.parametrize(("tie", "named"), SHARED.values(), ids=SHARED)
def test_an_ffn_that_shares_parameters_is_refused_by_name_and_others_are_not(tie, named):
    dense = model(*(Block(Mlp(D, 32)) for _ in range(4)))
    tie(dense)
    before = [*map(id, dense.modules())]
    with pytest.raises(ValueError, match=rf"cannot make experts of blocks\.1\.ffn: {named}.*own"):
        ewa.to_moe(dense, inplace=True)
    assert [*map(id, dense.modules())] == before
    assert [*ewa.moe_layers(ewa.to_moe(dense, layers=[2, 3]))] == ["blocks.2.ffn", "blocks.3.ffn"]


def test_the_loose_layers_of_torchs_blocks_are_checked_too():
    dense = nn.TransformerEncoder(nn.TransformerEncoderLayer(D, 2, D, batch_first=True), 2, enable_nested_tensor=False)
    dense.layers[1].linear1.weight = dense.layers[1].self_attn.out_proj.weight
    with pytest.raises(ValueError, match=r"experts of layers\.1: layers\.1\.\S*weight is also layers\.1\.\S*weight"):
        ewa.to_moe(dense)
    dense = nn.TransformerEncoder(nn.TransformerEncoderLayer(D, 2, D, batch_first=True), 2, enable_nested_tensor=False)
    parametrizations.weight_norm(dense.layers[1].linear2)
    with pytest.raises(ValueError, match=r"experts of layers\.1: the weights of linear2 are computed from others"):
        ewa.to_moe(dense)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
@pytest.mark.parametrize(
    "put",
    [
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        weight_norm,
        spectral_norm,
        functools.partial(prune.l1_unstructured, name="weight", amount=0.3),
    ],
    ids=["weight_norm", "spectral_norm", "old weight_norm", "old spectral_norm", "prune"],
)
def test_a_reparametrised_ffn_counts_but_is_refused_by_name(put):
    dense = model(*(Block(Mlp(D, 32)) for _ in range(4)))
    put(dense["blocks"][1].ffn.fc2)
    dense["blocks"][1].ffn(torch.randn(3, D))
    assert len(ewa.find_ffns(dense)) == 4
    with pytest.raises(
        ValueError, match=r"experts of blocks\.1\.ffn: the weights of fc2 are computed.*remove that first"
    ):
        ewa.to_moe(dense)
    moe = ewa.to_moe(dense, layers=[0, 3], inplace=True)  # a copy of the old weight_norm, torch does not make
    assert [*ewa.moe_layers(moe)] == ["blocks.0.ffn", "blocks.3.ffn"]
