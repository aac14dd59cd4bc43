"""Point-BERT's tokenizer: its published form, a twin that is written as the published layers are, and its losses."""

import dataclasses
import math
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pointewa.errors import CheckpointError
from pointewa.models import PRESETS, TOKENIZERS, DiscreteVAE, TokenizerSizes
from pointewa.models.dvae import divergence_from_uniform
from pointewa.models.patch_embed import make_patches
from pointewa.models.registry import KINDS
from pointewa.runs.description import LoadedModel, described_model

SMALL = TokenizerSizes(num_groups=9, group_size=8, patch_width=4, patch_out=12, codebook_size=20, codebook_width=10,
                       graph_width=6, feature_width=8, folding_width=14)  # fmt: skip


class PlainGraphNetwork(nn.Module):
    """Convolutions on concatenated edges ``[B, C, G, k]``."""

    def __init__(self, channels, width, out):
        super().__init__()
        self.input_trans = nn.Conv1d(channels, width, 1)
        widths = ((2, 2), (4, 4), (8, 4), (8, 8))
        for number, (inside, outside) in enumerate(widths, 1):
            self.add_module(f"layer{number}", nn.Sequential(
                nn.Conv2d(inside * width, outside * width, 1, bias=False), nn.GroupNorm(4, outside * width),
                nn.LeakyReLU(0.2)))  # fmt: skip
        self.layer5 = nn.Sequential(nn.Conv1d(18 * width, out, 1, bias=False), nn.GroupNorm(4, out), nn.LeakyReLU(0.2))

    def forward(self, x, centers):
        x, levels = self.input_trans(x.mT), []
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            edges = []
            for cloud, places in zip(x, centers, strict=True):
                nearest = ((places[:, None] - places) ** 2).sum(-1).argsort(1)[:, :4]
                own = cloud.unsqueeze(2).expand(-1, -1, 4)
                edges.append(torch.cat([cloud[:, nearest] - own, own]))
            x = layer(torch.stack(edges)).max(3).values
            levels.append(x)
        return self.layer5(torch.cat(levels, 1)).mT


class PlainDecoder(nn.Module):
    """Feature, grid and coarse point of every fine point, concatenated."""

    def __init__(self, channels, width, group_size):
        super().__init__()
        self.coarse = group_size // 4
        self.mlp = nn.Sequential(nn.Linear(channels, 2 * width), nn.ReLU(), nn.Linear(2 * width, 2 * width), nn.ReLU(),
                                 nn.Linear(2 * width, 3 * self.coarse))  # fmt: skip
        self.final_conv = nn.Sequential(
            nn.Conv1d(channels + 5, width, 1), nn.BatchNorm1d(width), nn.ReLU(),
            nn.Conv1d(width, width, 1), nn.BatchNorm1d(width), nn.ReLU(), nn.Conv1d(width, 3, 1))  # fmt: skip

    def forward(self, features):
        batch, groups, _ = features.shape
        features = features.flatten(0, 1)
        coarse, rows = self.mlp(features).view(batch * groups, self.coarse, 3), []
        for feature, points in zip(features, coarse, strict=True):
            grid = [(-0.05, -0.05), (0.05, -0.05), (-0.05, 0.05), (0.05, 0.05)]
            rows.append(torch.stack([torch.cat([feature, feature.new_tensor(at), point])
                                     for point in points for at in grid], 1))  # fmt: skip
        fine = self.final_conv(torch.stack(rows)).mT + coarse.repeat_interleave(4, 1)
        return coarse.unflatten(0, (batch, groups)), fine.unflatten(0, (batch, groups))


class PlainTokenizer(nn.Module):
    def __init__(self, model):
        super().__init__()
        sizes = model.sizes
        self.codebook = nn.Parameter(torch.empty(sizes.codebook_size, sizes.codebook_width))
        self.encoder = deepcopy(model.encoder)  # tested in test_patch_embed.py
        self.dgcnn_1 = PlainGraphNetwork(sizes.patch_out, sizes.graph_width, sizes.codebook_size)
        self.dgcnn_2 = PlainGraphNetwork(sizes.codebook_width, sizes.graph_width, sizes.feature_width)
        self.decoder = PlainDecoder(sizes.feature_width, sizes.folding_width, sizes.group_size)
        self.double().load_state_dict(model.state_dict())

    def forward(self, patches, centers, temperature):
        logits = self.dgcnn_1(self.encoder(patches), centers)
        if self.training:
            shares = F.gumbel_softmax(logits, temperature, dim=2)
        else:
            shares = F.one_hot(logits.argmax(2), len(self.codebook)).double()
        coarse, fine = self.decoder(self.dgcnn_2(torch.einsum("bgn,nc->bgc", shares, self.codebook), centers))
        return logits, coarse, fine


def chamfer(x, y):
    distances = torch.tensor([[(a - b).norm().item() for b in y] for a in x], dtype=torch.float64)
    return (distances.min(1).values.mean() + distances.min(0).values.mean()).item() / 2


def plain_losses(patches, logits, coarse, fine):
    """Of each term the mean over a batch, as the published code has it."""
    uniform = torch.full_like(logits[:, 0], 1 / logits.shape[2]).log()
    mean = logits.softmax(2).mean(1).log()
    divergence = F.kl_div(mean, uniform, reduction="batchmean", log_target=True)
    distances = []
    for points in (coarse, fine):
        distance = torch.cdist(points.flatten(0, 1), patches.flatten(0, 1))
        distances.append((distance.amin(2).mean() + distance.amin(1).mean()) / 2)
    return *distances, divergence


@pytest.fixture
def model():
    made = DiscreteVAE(SMALL).double()
    for name, value in made.named_parameters():
        if name.endswith(("1.weight", "1.bias", "4.bias")):  # of norms, else 1 and 0
            nn.init.normal_(value)
    made.temperature, made.kl_weight = 0.7, 0.3
    return made


@pytest.mark.parametrize("training", [True, False])
def test_it_equals_the_published_form_in_output_loss_and_gradient(model, training):
    points = torch.randn(3, 60, 3, dtype=torch.float64)
    cut = make_patches(points, 9, 8)
    plain = PlainTokenizer(model).train(training)
    model.train(training)
    torch.manual_seed(1)
    logits, coarse, fine = plain(cut.patches, cut.centers, 0.7)
    torch.manual_seed(1)
    found = model.autoencode(points)
    for mine, expected in ((found.logits, logits), (found.coarse, coarse), (found.fine, fine)):
        torch.testing.assert_close(mine, expected, rtol=0, atol=1e-11)
    terms = plain_losses(cut.patches, logits, coarse, fine)
    model.load_state_dict(plain.state_dict())  # the statistics of batch norms that have seen the batch once
    torch.manual_seed(1)
    losses = model(points)
    for name, expected in zip(("coarse", "fine", "divergence"), terms, strict=True):
        torch.testing.assert_close(getattr(losses, name), expected, rtol=0, atol=1e-11, msg=name)
    total = terms[0] + terms[1] + 0.3 * terms[2]
    torch.testing.assert_close(losses.total, total, rtol=0, atol=1e-11)
    total.backward()
    losses.total.backward()
    mine = dict(model.named_parameters())
    for name, value in plain.named_parameters():
        torch.testing.assert_close(mine[name].grad, value.grad, rtol=0, atol=1e-10, msg=name)


def test_the_reconstruction_is_measured_point_by_point(model):
    model.eval()
    points = torch.randn(2, 60, 3, dtype=torch.float64)
    found = model.autoencode(points)
    expected = [chamfer(*pair) for pair in zip(found.fine.flatten(0, 1), found.patches.flatten(0, 1), strict=True)]
    assert model(points).fine.item() == pytest.approx(sum(expected) / len(expected), abs=1e-12)


def test_the_published_size_has_the_published_parameters_and_names():
    with torch.device("meta"):
        model = DiscreteVAE(TOKENIZERS["point_bert"])
    counts = {name: sum(value.numel() for value in part.parameters()) for name, part in model.named_children()}
    assert counts == {"encoder": 428_800, "dgcnn_1": 20_828_800, "dgcnn_2": 2_528_384, "decoder": 1_737_755}
    assert sum(value.numel() for value in model.parameters()) == 27_620_891
    batch_norms, names = ("encoder.first_conv.1", "encoder.second_conv.1", "decoder.final_conv.1",
                          "decoder.final_conv.4"), {"codebook"}  # fmt: skip
    for graph in ("dgcnn_1", "dgcnn_2"):
        names |= {f"{graph}.input_trans.weight", f"{graph}.input_trans.bias"}
        names |= {f"{graph}.layer{n}.{key}" for n in range(1, 6) for key in ("0.weight", "1.weight", "1.bias")}
    layers = [f"encoder.{part}.{n}" for part in ("first_conv", "second_conv") for n in (0, 1, 3)]
    layers += [f"decoder.mlp.{n}" for n in (0, 2, 4)] + [f"decoder.final_conv.{n}" for n in (0, 1, 3, 4, 6)]
    names |= {f"{layer}.{key}" for layer in layers for key in ("weight", "bias")}
    names |= {
        f"{layer}.{key}" for layer in batch_norms for key in ("running_mean", "running_var", "num_batches_tracked")
    }
    assert set(model.state_dict()) == names
    shapes = {"codebook": [8192, 256], "dgcnn_1.layer4.0.weight": [1024, 1024, 1, 1],
              "dgcnn_1.layer5.0.weight": [8192, 2304, 1], "decoder.mlp.4.weight": [24, 1024],
              "decoder.final_conv.0.weight": [512, 261, 1]}  # fmt: skip
    assert {name: list(model.state_dict()[name].shape) for name in shapes} == shapes


@pytest.mark.parametrize("name", ["tiny", "small", "point_bert"])
def test_a_point_transformer_of_the_same_preset_can_start_from_its_patch_encoder(name):
    sizes, arch = TOKENIZERS[name], PRESETS[name]
    assert all(getattr(sizes, key) == getattr(arch, key) for key in ("num_groups", "group_size", "patch_width"))
    assert sizes.patch_out == arch.patch_out


def test_tokens_are_those_of_the_largest_logits_and_need_no_noise(model):
    cut = make_patches(torch.randn(2, 60, 3, dtype=torch.float64), 9, 8)
    model.eval()
    state = torch.get_rng_state()
    tokens = model.tokens(cut.patches, cut.centers)
    assert (tokens.shape, tokens.dtype) == ((2, 9), torch.int64)
    assert torch.equal(tokens, model.logits(cut.patches, cut.centers).max(2).indices)
    assert torch.equal(torch.get_rng_state(), state)
    model.train()
    again = [model.autoencode(torch.ones(1, 8, 3).double()).fine for _ in range(2)]
    assert not torch.equal(*again)


def test_the_divergence_is_0_for_codes_used_alike_and_log_n_more_for_fewer():
    uniform = torch.eye(8, dtype=torch.float64).repeat(3, 2, 1) * 1e4  # 16 patches, each code twice
    torch.testing.assert_close(
        divergence_from_uniform(uniform), torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-12
    )
    one = torch.zeros(1, 16, 8, dtype=torch.float64)
    one[..., 0] = 2.0
    p = math.exp(2) / (math.exp(2) + 7), 1 / (math.exp(2) + 7)
    expected = sum(math.log(1 / 8 / value) / 8 for value in (p[0], *[p[1]] * 7))
    assert divergence_from_uniform(one).item() == pytest.approx(expected, abs=1e-12)
    assert divergence_from_uniform(one.float() * 500).item() == pytest.approx(7 / 8 * 1000 - math.log(8), rel=1e-5)


def test_pictures_have_all_patches_as_they_are_and_as_predicted(model):
    model.eval()
    points = torch.randn(2, 60, 3, dtype=torch.float64)
    found, cut = model.reconstruct(points), make_patches(points, 9, 8)
    assert found.visible.shape == (2, 0, 8, 3)
    torch.testing.assert_close(
        found.true, torch.stack([cloud[rows] for cloud, rows in zip(points, cut.members, strict=True)])
    )
    assert found.predicted.shape == (2, 9, 8, 3)
    torch.testing.assert_close(found.predicted - cut.centers.unsqueeze(2), model.autoencode(points).fine)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [("group_size", 6, "group_size must be a multiple of 4, got 6"),
     ("codebook_size", 0, "codebook_size must be 1 to 262144, got 0"),
     ("graph_width", 7, "graph_width must be a multiple of 2, got 7"),
     ("feature_width", -4, "feature_width must be 1 to 16384, got -4"),
     ("num_groups", 2**18, "num_groups x group_size must be at most 1048576, got 262144 x 8")],
)  # fmt: skip
def test_sizes_that_cannot_be_are_refused(field, value, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **{field: value})


def test_it_is_built_again_from_its_description(tmp_path):
    description = LoadedModel(DiscreteVAE(SMALL), (), 60, "shapes", "unit_sphere", "tokenizer").description()
    assert {key: description[key] for key in dataclasses.asdict(SMALL)} == dataclasses.asdict(SMALL)
    assert described_model(description, {}, tmp_path).model.sizes == SMALL
    for key, value in (("codebook_size", 2**18 + 4), ("graph_width", 2**14 + 2), ("num_groups", 2**18),
                       ("codebook_width", 2**20), ("group_size", "8"), ("patch_out", None)):  # fmt: skip
        with pytest.raises(CheckpointError, match="its description of the model is not valid"):
            described_model(description | {key: value}, {}, tmp_path)
    assert "dvae" in KINDS
