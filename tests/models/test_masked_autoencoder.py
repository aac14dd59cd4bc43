"""Point-MAE's pre-training model: its published form, what the encoder may know, and a loop over clouds as twin."""

import sys
from itertools import combinations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pointewa import ewa
from pointewa.models import PRESETS, Architecture, MaskedAutoencoder, PointTransformerClassifier, load_weights
from pointewa.models.masked_autoencoder import random_order
from pointewa.models.patch_embed import Patches, make_patches
from pointewa.ops import chamfer_distance

SIZES = {"width": 24, "depth": 3, "heads": 2, "num_groups": 8, "group_size": 6, "patch_width": 8, "drop_path": 0.0}
MAE, BERT = Architecture(**SIZES, patch_out=24), Architecture(**SIZES, patch_out=16, head="point_bert")
BOTH = pytest.mark.parametrize("architecture", [MAE, BERT], ids=["point_mae", "point_bert"])
MODULE = sys.modules[MaskedAutoencoder.__module__]


def build(architecture=MAE, **options):
    return MaskedAutoencoder(architecture, decoder_depth=2, **options)


def clouds(batch=3, num_points=64):
    return torch.randn(batch, num_points, 3)


def test_the_parameter_count_is_the_published_one():
    """That of Point-MAE's classifier less its head and class token, plus what FACTS.md's keys of the decoder hold."""
    head = 768 * 256 + 256 + 2 * 256 + 256 * 256 + 256 + 2 * 256 + 256 * 40 + 40
    block = 2 * 2 * 384 + 3 * 384 * 384 + (384 * 384 + 384) + (384 * 1536 + 1536) + (1536 * 384 + 384)
    decoder = 4 * block + 2 * 384 + 384 + (3 * 128 + 128 + 128 * 384 + 384) + (384 * 96 + 96)
    model = MaskedAutoencoder(PRESETS["point_mae"])
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == 22_099_752 - head - 2 * 384 + decoder == 29_006_432
    assert (model.num_visible, model.num_masked) == (26, 38)
    assert [block.drop_path.rate for block in model.MAE_decoder.blocks] == pytest.approx([0, 0.1 / 3, 0.2 / 3, 0.1])


def keys(prefix, names):
    return {f"{prefix}{name}" for name in names}


@BOTH
def test_keys_are_exactly_those_of_the_published_checkpoint(architecture):
    layer = ("weight", "bias")
    norm = (*layer, "running_mean", "running_var", "num_batches_tracked")
    block = keys("norm1.", layer) | keys("norm2.", layer) | {"attn.qkv.weight"} | keys("attn.proj.", layer)
    block |= keys("mlp.fc1.", layer) | keys("mlp.fc2.", layer)
    expected = {"mask_token"} | keys("MAE_encoder.norm.", layer) | keys("MAE_decoder.norm.", layer)
    for conv in ("first_conv", "second_conv"):
        for number, names in ((0, layer), (1, norm), (3, layer)):
            expected |= keys(f"MAE_encoder.encoder.{conv}.{number}.", names)
    for number in (0, 2):
        expected |= keys(f"MAE_encoder.pos_embed.{number}.", layer) | keys(f"decoder_pos_embed.{number}.", layer)
    for number in range(3):
        expected |= keys(f"MAE_encoder.blocks.blocks.{number}.", block)
    for number in range(2):
        expected |= keys(f"MAE_decoder.blocks.{number}.", block)
    expected |= keys("increase_dim.0.", layer)
    if architecture is BERT:
        expected |= keys("MAE_encoder.reduce_dim.", layer)
    model = build(architecture)
    assert set(model.state_dict()) == expected
    assert model.increase_dim[0].weight.shape == (18, 24, 1)


@pytest.mark.parametrize(("ratio", "masked"), [(0.6, 4), (0.13, 1), (0.99, 7), (0.875, 7)])
def test_so_many_patches_are_masked_in_every_cloud(ratio, masked):
    model, seen = build(mask_ratio=ratio), []
    model.MAE_encoder.blocks.register_forward_hook(lambda module, inputs, out: seen.append(tuple(out.shape)))
    model.MAE_decoder.register_forward_hook(lambda module, inputs, out: seen.append(tuple(out.shape)))
    assert model(clouds()).shape == ()
    assert seen == [(3, 8 - masked, 24), (3, masked, 24)]


@pytest.mark.parametrize("ratio", [0, 1, -0.5, 1.5, 0.12, float("nan")])
def test_ratios_that_leave_nothing_masked_or_visible_are_refused(ratio):
    with pytest.raises(ValueError, match=r"must leave both masked and visible patches, got .* of 8 patches"):
        build(mask_ratio=ratio)
    with pytest.raises(ValueError, match="decoder_depth must be at least 1, got 0"):
        MaskedAutoencoder(MAE, decoder_depth=0)


def test_all_sets_of_patches_are_equally_likely():
    """Each patch, each pair, and each set is masked as often as it should be, within 5 standard deviations."""
    draws = 20_000
    order = random_order(draws, 6, "cpu")
    assert torch.equal(order.sort(1).values, torch.arange(6).expand(draws, -1))
    masked = torch.zeros(draws, 6).scatter_(1, order[:, 3:], 1.0)
    for size, probability in ((1, 3 / 6), (2, 3 * 2 / (6 * 5)), (3, 1 / 20)):
        tolerance = 5 * (probability * (1 - probability) / draws) ** 0.5
        for members in combinations(range(6), size):
            share = masked[:, members].prod(1).mean().item()
            assert share == pytest.approx(probability, abs=tolerance), members
    torch.manual_seed(1)
    first = random_order(4, 6, "cpu")
    assert not torch.equal(first, random_order(4, 6, "cpu"))
    torch.manual_seed(1)
    assert torch.equal(first, random_order(4, 6, "cpu"))


@pytest.mark.parametrize("training", [True, False])
def test_the_prediction_knows_nothing_of_the_masked_patches(monkeypatch, training):
    """Bit for bit, also in training, where a batch norm over all patches would tell of them; but the loss does."""
    model, points, order = build().train(training), clouds(), random_order(3, 8, "cpu")
    patches, centers, members = make_patches(points, 8, 6)
    patches.requires_grad_()
    monkeypatch.setattr(MODULE, "make_patches", lambda *args, **options: Patches(patches, centers, members))
    _, predicted, true, _ = model._predict(points, order)
    masked = torch.zeros(3, 8, dtype=torch.bool).scatter_(1, order[:, 4:], True)
    gradient = torch.autograd.grad(predicted.square().sum(), patches)[0].flatten(2).abs().sum(2)
    assert not gradient[masked].any()
    assert gradient[~masked].all()
    torch.testing.assert_close(true, torch.stack([patches[b, order[b, 4:]] for b in range(3)]), rtol=0, atol=0)
    before = model.reconstruct(points, order)
    patches = torch.where(masked[..., None, None], torch.randn_like(patches), patches).detach()
    after = model.reconstruct(points, order)
    assert torch.equal(before.predicted, after.predicted)
    assert torch.equal(before.visible, after.visible)
    assert not (before.true == after.true).all(-1).any()


def plain_block(block, x):
    q, k, v = (part.unflatten(-1, (block.attn.heads, -1)).transpose(0, 1)
               for part in block.attn.qkv(block.norm1(x)).chunk(3, -1))  # fmt: skip
    weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
    x = x + block.attn.proj((weights @ v).transpose(0, 1).flatten(1))
    return x + block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(x))))


def naive_loss(model, points, order):
    """One cloud at a time, in the published form, on boolean masks; patch by patch where the patch is encoded, too."""
    encoder, losses = model.MAE_encoder, []
    arch = model.architecture
    cut = make_patches(points, arch.num_groups, arch.group_size)
    for patches, centers, row in zip(cut.patches, cut.centers, order, strict=True):
        masked = torch.zeros(len(row), dtype=torch.bool)
        masked[row[model.num_visible :]] = True
        tokens = []
        for patch in patches[~masked]:
            x = encoder.encoder.first_conv(patch.T.unsqueeze(0))
            x = torch.cat([x.amax(2, keepdim=True).expand_as(x), x], 1)
            tokens.append(encoder.reduce_dim(encoder.encoder.second_conv(x).amax(2).squeeze(0)))
        x = torch.stack(tokens)
        for block in encoder.blocks.blocks:
            x = plain_block(block, x + encoder.pos_embed(centers[~masked]))
        x = torch.cat([encoder.norm(x), model.mask_token[0].expand(model.num_masked, -1)])
        position = torch.cat([model.decoder_pos_embed(centers[~masked]), model.decoder_pos_embed(centers[masked])])
        for block in model.MAE_decoder.blocks:
            x = plain_block(block, x + position)
        x = model.MAE_decoder.norm(x[model.num_visible :])
        predicted = model.increase_dim(x.T.unsqueeze(0))[0].T.reshape(model.num_masked, -1, 3)
        for mine, true in zip(predicted, patches[masked], strict=True):
            distance = ((mine.unsqueeze(1) - true.unsqueeze(0)) ** 2).sum(-1)
            losses.append(distance.amin(0).mean() + distance.amin(1).mean())
    return torch.stack(losses).mean()


@BOTH
def test_it_equals_a_loop_over_clouds_forward_and_backward(architecture):
    model = build(architecture).double().eval()
    for module in model.modules():  # statistics and weights that a mistake would show in
        if isinstance(module, nn.BatchNorm1d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
        elif isinstance(module, nn.Linear | nn.Conv1d):
            nn.init.normal_(module.weight, std=0.2)
    points = clouds().double()
    torch.manual_seed(5)
    loss = model(points)
    torch.manual_seed(5)
    expected = naive_loss(model, points, random_order(3, 8, "cpu"))
    assert loss.dtype == torch.float64
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-12)
    parameters = dict(model.named_parameters())
    gradients, theirs = (torch.autograd.grad(value, list(parameters.values())) for value in (loss, expected))
    for name, a, b in zip(parameters, gradients, theirs, strict=True):
        assert a.abs().max() > 0, name
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11, msg=name)


def test_a_reconstruction_is_in_the_coordinates_of_the_cloud():
    model, points = build().eval(), clouds()
    torch.manual_seed(2)
    loss = model(points)
    torch.manual_seed(2)
    result = model.reconstruct(points)
    assert (result.visible.shape, result.predicted.shape, result.true.shape) == ((3, 4, 6, 3),) * 3
    torch.testing.assert_close(chamfer_distance(result.predicted.flatten(0, 1), result.true.flatten(0, 1)), loss)
    for part in (result.visible, result.true):  # they are the cloud's own points
        distance = torch.cdist(part.flatten(1, 2), points, compute_mode="donot_use_mm_for_euclid_dist")
        assert distance.amin(2).max() < 1e-6
    whole, (patches, centers, _) = torch.cat([result.visible, result.true], 1), make_patches(points, 8, 6)
    expected = (patches + centers.unsqueeze(2)).flatten(1).sort(1).values  # every patch once
    torch.testing.assert_close(whole.flatten(1).sort(1).values, expected)
    assert not result.predicted.requires_grad


@BOTH
def test_its_encoder_loads_into_the_classifier(architecture):
    model, classifier = build(architecture).eval(), PointTransformerClassifier(architecture, 5).eval()
    report = load_weights(classifier, {"base_model": model.state_dict()})
    assert all(key.startswith("cls_") for key in report.fresh)
    assert {"cls_token", "cls_pos"} < set(report.fresh)
    assert len(report.loaded) == sum(key.startswith("MAE_encoder.") for key in model.state_dict())
    patches, centers, _ = make_patches(clouds(), 8, 6)
    tokens = classifier.reduce_dim(classifier.encoder(patches))
    out = classifier.norm(classifier.blocks(tokens, classifier.pos_embed(centers)))
    assert torch.equal(out, model.MAE_encoder(patches, centers))


def test_experts_are_put_on_and_folded_away():
    model = build(BERT)
    moe = ewa.to_moe(model, 2)
    assert list(ewa.moe_layers(moe)) == ["MAE_encoder.blocks.blocks.1.mlp", "MAE_decoder.blocks.0.mlp"]
    moe(clouds()).backward()
    assert all(parameter.grad is not None for parameter in moe.parameters())
    dense = ewa.fold(moe.eval())
    shapes = [{key: value.shape for key, value in one.state_dict().items()} for one in (model, dense)]
    assert shapes[0] == shapes[1]
    points, order = clouds(), random_order(3, 8, "cpu")
    torch.testing.assert_close(
        dense.reconstruct(points, order).predicted, moe.reconstruct(points, order).predicted, rtol=0, atol=1e-6
    )


def test_activation_checkpointing_reaches_encoder_and_decoder_and_changes_nothing(monkeypatch):
    points, found, calls = clouds(), [], []
    layers = sys.modules["pointewa.models.layers"]
    original = layers.checkpoint
    monkeypatch.setattr(layers, "checkpoint", lambda *args, **kw: calls.append(args[0]) or original(*args, **kw))
    model = MaskedAutoencoder(Architecture(**SIZES | {"drop_path": 0.3}, patch_out=24), decoder_depth=2)
    for active in (False, True):
        model.blocks.activation_checkpointing = active
        torch.manual_seed(0)
        found.append(torch.autograd.grad(model(points), list(model.parameters())))
    assert calls == [*model.MAE_encoder.blocks.blocks, *model.MAE_decoder.blocks]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_the_loss_is_in_float32_within_autocast():
    model, points = build().eval(), clouds()
    torch.manual_seed(0)
    expected = model(points)
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(points)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=0.01)


def test_bad_clouds_are_refused():
    model = build().eval()
    with pytest.raises(ValueError, match=r"\[B, N, 3\]"):
        model(torch.zeros(2, 64, 2))
    with pytest.raises(ValueError, match=r"non-finite values in cloud\(s\) \[0\] of 1"):
        model(torch.full((1, 64, 3), torch.nan))


def test_it_learns_four_clouds():
    """Planes of different slopes: the loss falls to a quarter in 150 steps, on masks that are new at each, and what is
    predicted for a patch fits that cloud's patches and not the next one's."""
    points = torch.rand(4, 64, 3)
    points[..., 2] = (points[..., :2] * torch.randn(4, 1, 2)).sum(-1)
    architecture = Architecture(**SIZES | {"width": 48, "group_size": 16}, patch_out=48)
    model, losses = MaskedAutoencoder(architecture, decoder_depth=1), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):
        losses.append(model(points))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    losses = torch.stack(losses).detach()
    assert losses[-10:].mean() < losses[0] / 4
    _, predicted, true, _ = model.eval()._predict(points, random_order(4, 8, "cpu"))
    own, other = (chamfer_distance(predicted.flatten(0, 1), one.flatten(0, 1)) for one in (true, true.roll(1, 0)))
    assert own < other / 2
