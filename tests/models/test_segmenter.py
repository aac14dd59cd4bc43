"""Part segmentation: the published form, and plain twins of Point-MAE's and Point-BERT's code."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import twin
from pointewa import ewa
from pointewa.models import (
    PRESETS,
    Architecture,
    Parts,
    PointTransformerClassifier,
    PointTransformerSegmenter,
    fuse_batch_norm,
)
from pointewa.models.decoders import DECODERS, PRESET_DECODERS

SIZES = {"width": 24, "depth": 4, "heads": 2, "num_groups": 16, "group_size": 6, "patch_width": 8, "drop_path": 0.0}
ARCH = {
    "point_mae": Architecture(**SIZES, patch_out=24),
    "point_bert": Architecture(**SIZES, patch_out=16, head="point_bert"),
    "light": Architecture(**SIZES, patch_out=24),
}
PARTS = Parts(("wing", "body", "leg", "seat", "back", "dirt", "handle"), (0, 0, 1, 1, 1, 2, 2))
SHAPENET = Parts(
    tuple(map(str, range(50))), (0,) * 4 + (1,) * 2 + (2,) * 2 + (3,) * 4 + tuple(range(4, 16)) * 3 + (4, 5)
)
ALL = pytest.mark.parametrize("decoder", DECODERS)


def build(decoder, seed=0, **changes):
    torch.manual_seed(seed)
    return PointTransformerSegmenter(dataclasses.replace(ARCH[decoder], **changes), PARTS, 3, decoder)


def clouds(batch=3, num_points=600, dtype=torch.float32):
    return torch.randn(batch, num_points, 3, dtype=dtype, generator=torch.Generator().manual_seed(1))


def count(modules):
    return sum(parameter.numel() for parameter in modules.parameters())


@pytest.mark.parametrize(
    ("preset", "total", "decoder"),
    [
        ("point_mae", 27_063_730, {"label_conv": 1152, "propagation_0": 3_354_624, "convs1": 1_737_216,
                                   "convs2": 131_328, "convs3": 12_850, "bns1": 1024, "bns2": 512, "dp1": 0}),
        ("point_bert", 27_085_874, {"propagation_2": 1_190_016, "propagation_1": 1_190_016,
                                    "propagation_0": 1_214_592, "dgcnn_pro_1": 788_224, "dgcnn_pro_2": 788_224,
                                    "conv1": 49_280, "bn1": 256, "conv2": 6450, "drop1": 0}),
    ],
)  # fmt: skip
def test_parameter_counts_are_the_published_ones(preset, total, decoder):
    model = PointTransformerSegmenter(PRESETS[preset], SHAPENET, 16, PRESET_DECODERS[preset])
    assert count(model) == total
    assert {name: count(model.get_submodule(name)) for name in decoder} == decoder
    assert count(model.head) == sum(decoder.values())
    assert [block.drop_path.rate for block in model.blocks.blocks][::11] == pytest.approx([0, 0.1])
    assert model._taken == [3, 7, 11]


@pytest.mark.parametrize("preset", ["tiny", "small"])
def test_the_light_decoder_is_light(preset):
    model = PointTransformerSegmenter(PRESETS[preset], SHAPENET, 16, PRESET_DECODERS[preset])
    width = PRESETS[preset].width
    propagation = (3 + width) * width + width * width + 2 * 3 * width
    head = (3 * width + 64) * 256 + 256 * 128 + 128 * 50 + 3 * 256 + 3 * 128 + 50
    assert count(model.head) == 16 * 64 + 2 * 64 + propagation + head < 400_000


@pytest.mark.parametrize(("depth", "blocks"), [(1, [0, 0, 0]), (2, [0, 1, 1]), (3, [0, 1, 2]), (6, [1, 3, 5]),
                                               (8, [2, 5, 7]), (12, [3, 7, 11])])  # fmt: skip
def test_three_blocks_evenly_spaced_up_to_the_last(depth, blocks):
    model = build("light", depth=depth).eval()
    assert model._taken == blocks
    tokens, centers = torch.randn(2, 16, 24), torch.randn(2, 16, 3)
    levels = model.levels(tokens, centers, blocks)
    assert torch.equal(levels[-1], model.transform(tokens, centers))
    for level, number in zip(levels, blocks, strict=True):
        x = tokens
        for block in model.blocks.blocks[: number + 1]:
            x = block(x + model.pos_embed(centers))
        assert torch.equal(level, model.norm(x))


NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
LAYER = ("weight", "bias")


def shapes_of(decoder):
    """The published keys and shapes after the blocks (FACTS of their code), with our sizes put in."""
    width, parts, classes = 24, 7, 3
    layers = {}

    def propagation(name, into, hidden, out):
        layers[f"{name}.mlp_convs.0"], layers[f"{name}.mlp_convs.1"] = [hidden, into, 1], [out, hidden, 1]
        layers[f"{name}.mlp_bns.0"], layers[f"{name}.mlp_bns.1"] = [hidden], [out]

    if decoder == "point_bert":
        for number, own in ((2, 3), (1, 3), (0, 3 + classes)):
            propagation(f"propagation_{number}", own + width, 4 * width, width)
        for number in (1, 2):
            layers[f"dgcnn_pro_{number}.layer1.0"] = [512, 2 * width, 1, 1]
            layers[f"dgcnn_pro_{number}.layer2.0"] = [width, 1024, 1, 1]
            layers[f"dgcnn_pro_{number}.layer1.1"], layers[f"dgcnn_pro_{number}.layer2.1"] = [512], [width]
        layers |= {"conv1": [128, width, 1], "bn1": [128], "conv2": [parts, 128, 1]}
    else:
        layers |= {"label_conv.0": [64, classes, 1], "label_conv.1": [64]}
        propagation("propagation_0", 3 + 3 * width, 4 * width, 1024)
        layers |= {"convs1": [512, 1024 + 6 * width + 64, 1], "bns1": [512], "convs2": [256, 512, 1], "bns2": [256]}
        layers["convs3"] = [parts, 256, 1]
    expected = {}
    for name, shape in layers.items():
        bias_free = name == "label_conv.0" or (name.startswith("dgcnn") and name.endswith(".0"))
        group_norm = name.startswith("dgcnn") and name.endswith(".1")
        names = ("weight",) if bias_free else NORM if len(shape) == 1 and not group_norm else LAYER
        for one in names:
            expected[f"{name}.{one}"] = shape if one == "weight" else [] if "num_batches" in one else [shape[0]]
    return expected


@pytest.mark.parametrize("decoder", ["point_mae", "point_bert"])
def test_keys_and_shapes_are_the_published_ones(decoder):
    model = build(decoder)
    found = {name: list(value.shape) for name, value in model.state_dict().items()}
    trunk = PointTransformerClassifier(ARCH[decoder], 3).state_dict()
    trunk = {name: list(value.shape) for name, value in trunk.items() if not name.startswith("cls_head_finetune.")}
    if decoder == "point_mae":
        del trunk["cls_token"], trunk["cls_pos"]
    assert found == trunk | shapes_of(decoder)


class PlainPropagation(nn.Module):
    """Feature propagation as published, channels first."""

    def __init__(self, into, hidden, out):
        super().__init__()
        self.mlp_convs = nn.ModuleList([nn.Conv1d(into, hidden, 1), nn.Conv1d(hidden, out, 1)])
        self.mlp_bns = nn.ModuleList([nn.BatchNorm1d(hidden), nn.BatchNorm1d(out)])

    def forward(self, points, centers, own, features):
        """[B, P, 3], [B, G, 3], [B, S, P], [B, C, G] -> [B, out, P]."""
        distance, index = ((points.unsqueeze(2) - centers.unsqueeze(1)) ** 2).sum(-1).sort(-1)
        weights = 1 / (distance[..., :3] + 1e-8)
        weights = weights / weights.sum(-1, keepdim=True)
        found = (twin.gather(features.transpose(1, 2), index[..., :3]) * weights.unsqueeze(-1)).sum(2)
        x = torch.cat([own, found.transpose(1, 2)], 1)
        for conv, norm in zip(self.mlp_convs, self.mlp_bns, strict=True):
            x = F.relu(norm(conv(x)))
        return x


class PlainGraph(nn.Module):
    """Two edge convolutions, on the edges written out."""

    def __init__(self, width):
        super().__init__()
        for name, into, out in (("layer1", 2 * width, 512), ("layer2", 1024, width)):
            layers = nn.Conv2d(into, out, 1, bias=False), nn.GroupNorm(4, out), nn.LeakyReLU(0.2)
            self.add_module(name, nn.Sequential(*layers))

    @staticmethod
    def edges(queries, of_queries, points, of_points):
        index = twin.knn(queries, points, 4)
        neighbors = twin.gather(of_points.transpose(1, 2), index).permute(0, 3, 1, 2)  # (B, C, Q, 4)
        own = of_queries.unsqueeze(-1).expand_as(neighbors)
        return torch.cat([neighbors - own, own], 1)

    def forward(self, coarse, of_coarse, points, of_points):
        x = self.layer1(self.edges(points, of_points, coarse, of_coarse)).max(-1)[0]
        return self.layer2(self.edges(points, x, points, x)).max(-1)[0]


class Twin(nn.Module):
    """Both published models, in plain steps and channels first, with their parameter names."""

    def __init__(self, decoder, arch):
        super().__init__()
        self.decoder, self.arch, width = decoder, arch, arch.width
        self.encoder = twin.PatchEncoder(arch.patch_width, arch.patch_out)
        self.pos_embed = nn.Sequential(nn.Linear(3, 128), nn.GELU(), nn.Linear(128, width))
        self.blocks, self.norm = twin.Encoder(arch), nn.LayerNorm(width)
        self.drop = nn.Dropout(0.0)
        if decoder == "point_bert":
            self.reduce_dim = nn.Linear(arch.patch_out, width)
            self.cls_token, self.cls_pos = (
                nn.Parameter(torch.empty(1, 1, width)),
                nn.Parameter(torch.empty(1, 1, width)),
            )
            for number, own in ((2, 3), (1, 3), (0, 6)):
                self.add_module(f"propagation_{number}", PlainPropagation(width + own, 4 * width, width))
            self.dgcnn_pro_1, self.dgcnn_pro_2 = PlainGraph(width), PlainGraph(width)
            self.conv1, self.bn1, self.conv2 = nn.Conv1d(width, 128, 1), nn.BatchNorm1d(128), nn.Conv1d(128, 7, 1)
        else:
            self.label_conv = nn.Sequential(nn.Conv1d(3, 64, 1, bias=False), nn.BatchNorm1d(64), nn.LeakyReLU(0.2))
            self.propagation_0 = PlainPropagation(3 + 3 * width, 4 * width, 1024)
            self.convs1, self.bns1 = nn.Conv1d(1024 + 6 * width + 64, 512, 1), nn.BatchNorm1d(512)
            self.convs2, self.bns2 = nn.Conv1d(512, 256, 1), nn.BatchNorm1d(256)
            self.convs3 = nn.Conv1d(256, 7, 1)

    def forward(self, points, labels):
        """[B, P, 3], [B] -> log-probabilities [B, P, 7]."""
        centers = twin.gather(points, twin.farthest_point_sample(points, self.arch.num_groups))
        patches = twin.gather(points, twin.knn(centers, points, self.arch.group_size)) - centers.unsqueeze(2)
        x, position = self.encoder(patches), self.pos_embed(centers)
        if self.decoder == "point_bert":
            x = torch.cat([self.cls_token.expand(len(x), -1, -1), self.reduce_dim(x)], 1)
            position = torch.cat([self.cls_pos.expand(len(x), -1, -1), position], 1)
        levels = []
        for number, block in enumerate(self.blocks.blocks):
            x = block(x + position)
            if number in (1, 2, 3):  # of 4; of 12: 3, 7, 11
                levels.append(self.norm(x)[:, len(x[0]) - self.arch.num_groups :].transpose(1, 2))  # no class token
        category = torch.eye(3, dtype=points.dtype)[labels].unsqueeze(-1)  # (B, 3, 1)
        decode = self.bert if self.decoder == "point_bert" else self.mae
        return F.log_softmax(decode(points, centers, levels, category), 1).transpose(1, 2)

    def mae(self, points, centers, levels, category):
        x, size = torch.cat(levels, 1), points.shape[1]
        overall = [x.max(2)[0], x.mean(2), self.label_conv(category).squeeze(-1)]
        overall = torch.cat([one.unsqueeze(-1).repeat(1, 1, size) for one in overall], 1)
        x = torch.cat([self.propagation_0(points, centers, points.transpose(1, 2), x), overall], 1)
        x = self.drop(F.relu(self.bns1(self.convs1(x))))
        return self.convs3(F.relu(self.bns2(self.convs2(x))))

    def bert(self, points, centers, levels, category):
        own = [torch.cat([category.repeat(1, 1, points.shape[1]), points.transpose(1, 2)], 1)]
        at = [points]
        for number in (512, 256):
            at.append(twin.gather(points, twin.farthest_point_sample(points, number)))
            own.append(at[-1].transpose(1, 2))
        of_2 = self.propagation_2(at[2], centers, own[2], levels[1])
        of_1 = self.propagation_1(at[1], centers, own[1], levels[0])
        of_2 = self.dgcnn_pro_2(centers, levels[2], at[2], of_2)
        of_1 = self.dgcnn_pro_1(at[2], of_2, at[1], of_1)
        of_0 = self.propagation_0(points, at[1], own[0], of_1)
        return self.conv2(self.drop(F.relu(self.bn1(self.conv1(of_0)))))


@pytest.mark.parametrize("decoder", ["point_mae", "point_bert"])
def test_a_training_step_is_that_of_the_plain_twin(decoder):
    """Loss and all gradients in float64, dropout off; then the logits in evaluation mode."""
    model = build(decoder).double()
    model.dp1 = model.drop1 = nn.Identity()
    with torch.no_grad():
        for parameter in model.parameters():  # biases are 0 at first, and norms 1
            parameter += 0.1 * torch.randn_like(parameter)
    plain = Twin(decoder, ARCH[decoder]).double()
    plain.load_state_dict(model.state_dict(), strict=True)
    points, labels, target = clouds(dtype=torch.float64), torch.tensor([2, 0, 1]), torch.randint(0, 7, (3, 600))
    logits = model(points, labels)
    assert logits.shape == (3, 600, 7)
    loss = F.cross_entropy(logits.flatten(0, 1), target.flatten())
    expected = F.nll_loss(plain(points, labels).flatten(0, 1), target.flatten())
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    loss.backward()
    expected.backward()
    gradients = {name: one.grad for name, one in plain.named_parameters()}
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-8, atol=1e-11, msg=name)
    assert all(gradient.abs().max() > 0 for gradient in gradients.values())
    for (name, value), other in zip(model.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(value, other, rtol=1e-10, atol=1e-12, msg=name)
    with torch.no_grad():
        found = model.eval()(points, labels).log_softmax(-1)
        torch.testing.assert_close(found, plain.eval()(points, labels), rtol=1e-10, atol=1e-10)


@ALL
def test_points_in_another_order_get_the_same_logits(decoder):
    """With the first point kept in its place, where farthest point sampling starts."""
    model, points, labels = build(decoder).double().eval(), clouds(dtype=torch.float64), torch.tensor([0, 1, 2])
    order = torch.cat([torch.zeros(1, dtype=torch.int64), 1 + torch.randperm(599)])
    torch.testing.assert_close(model(points[:, order], labels), model(points, labels)[:, order])


@ALL
@pytest.mark.parametrize("num_points", [1, 2, 3, 10, 600])
@pytest.mark.parametrize("training", [False, True])
def test_any_number_of_points(decoder, num_points, training):
    model = build(decoder).train(training)
    logits = model(clouds(num_points=num_points), torch.tensor([0, 1, 2]))
    assert logits.shape == (3, num_points, 7)
    assert logits.isfinite().all()
    logits.square().mean().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@ALL
def test_the_category_matters_and_a_cloud_only_for_itself(decoder):
    model, points = build(decoder).eval(), clouds()
    together = model(points, torch.tensor([0, 1, 2]))
    for number in range(3):
        alone = model(points[number : number + 1], torch.tensor([number]))[0]
        torch.testing.assert_close(alone, together[number], rtol=1e-4, atol=1e-6)
        other = model(points[number : number + 1], torch.tensor([(number + 1) % 3]))[0]
        assert (other - alone).abs().amax() > 1e-4


@ALL
def test_what_is_refused(decoder):
    model, points = build(decoder).eval(), clouds(num_points=20)
    for labels in (torch.zeros(2).long(), torch.zeros(3), torch.zeros(3, 1).long()):
        with pytest.raises(ValueError, match=r"labels must be int64 of shape \[B\] for points \[B, P, 3\]"):
            model(points, labels)
    for labels in ([0, 1, 3], [0, -1, 2]):
        with pytest.raises(ValueError, match="labels must be from 0 to 2, got"):
            model(points, torch.tensor(labels))
    labels = torch.tensor([0, 1, 2])
    with pytest.raises(ValueError, match="points has no points"):
        model(points[:, :0], labels)
    with pytest.raises(ValueError, match=r"points must be of shape \[B, N, 3\], got \[3, 20, 2\]"):
        model(points[..., :2], labels)
    points[1, 4] = math.inf
    with pytest.raises(ValueError, match=r"non-finite values in cloud\(s\) \[1\] of 3"):
        model(points, labels)


@pytest.mark.parametrize(
    ("parts", "classes", "decoder", "message"),
    [
        (PARTS, 2, "light", "parts: expected categories below 2, found 2"),
        (PARTS, 4, "light", "parts: expected some of every category, found none of 3"),
        (PARTS, 3, "mlp", "decoder must be one of point_mae, point_bert, light, got 'mlp'"),
    ],
)
def test_models_that_cannot_be(parts, classes, decoder, message):
    with pytest.raises(ValueError, match=message):
        PointTransformerSegmenter(ARCH["light"], parts, classes, decoder)


def test_a_width_that_the_graph_convolutions_cannot_take():
    arch = Architecture(**SIZES | {"width": 26}, patch_out=26)
    with pytest.raises(ValueError, match="width must be a multiple of 4 for the decoder's edge convolutions, got 26"):
        PointTransformerSegmenter(arch, PARTS, 3, "point_bert")


@ALL
def test_experts_are_put_in_its_blocks_and_fold_exactly(decoder):
    dense, labels = build(decoder).double().eval(), torch.tensor([0, 1, 2])
    points = clouds(num_points=50, dtype=torch.float64)
    assert list(ewa.find_ffns(dense)) == [f"blocks.blocks.{number}.mlp" for number in range(4)]
    model = ewa.to_moe(dense, 3).eval()
    folded = ewa.fold(model)
    assert type(folded) is PointTransformerSegmenter
    assert {name: one.shape for name, one in folded.state_dict().items()} == {
        name: one.shape for name, one in dense.state_dict().items()
    }
    found = folded(points, labels)
    torch.testing.assert_close(found, model(points, labels), rtol=0, atol=1e-10)
    assert (found - dense(points, labels)).abs().max() > 1e-6
    copies = ewa.fold(ewa.to_moe(dense, 3, "all", "copy"))
    torch.testing.assert_close(copies.eval()(points, labels), dense(points, labels), rtol=0, atol=1e-10)


@ALL
def test_fused_batch_norms_give_the_same_logits(decoder):
    model, points, labels = build(decoder).double(), clouds(dtype=torch.float64), torch.tensor([0, 1, 2])
    model(points, labels)  # statistics
    fused = fuse_batch_norm(model.eval())
    torch.testing.assert_close(fused(points, labels), model(points, labels), rtol=0, atol=1e-10)
    assert len(fused.state_dict()) < len(model.state_dict())


@ALL
def test_autocast_and_activation_checkpointing(decoder):
    model, points, labels = build(decoder), clouds(), torch.tensor([0, 1, 2])
    model.dp1 = model.drop1 = nn.Identity()
    expected = model(points, labels)
    expected.square().mean().backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    model.blocks.activation_checkpointing = True
    again = model(points, labels)
    assert torch.equal(again, expected)
    again.square().mean().backward()
    assert all(torch.equal(one.grad, other) for one, other in zip(model.parameters(), gradients, strict=True))
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(points, labels)
    rough.float().square().mean().backward()
    assert (rough - expected).abs().max() < 0.1 * expected.abs().max()
