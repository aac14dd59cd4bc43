"""Point-BERT's pre-training model: its published form, masks and mixtures, the queue, and loops over clouds as twin."""

import copy
import math
from collections import deque
from dataclasses import replace

import pytest
import torch

from pointewa import ewa
from pointewa.errors import CheckpointError
from pointewa.models import (
    PRESETS,
    TOKENIZERS,
    Architecture,
    DiscreteVAE,
    Parts,
    PointTransformerClassifier,
    PointTransformerSegmenter,
    TokenizerSizes,
    load_weights,
)
from pointewa.models import point_bert as module
from pointewa.models.patch_embed import make_patches
from pointewa.models.point_bert import PointBert, block_mask, mix, random_mask
from pointewa.models.registry import model_ffns

ARCH = Architecture(width=24, depth=3, heads=2, num_groups=8, group_size=8, patch_width=8, patch_out=16, drop_path=0.0)
SIZES = TokenizerSizes(8, 8, 8, 16, 16, codebook_width=8, graph_width=4, feature_width=8, folding_width=8)


def build(queue_size=7, seed=0, **options):
    torch.manual_seed(seed)
    return PointBert(ARCH, DiscreteVAE(SIZES), queue_size, **options)


def clouds(count=5):
    return torch.randn(count, 40, 3, dtype=torch.float64)


def test_the_published_model_has_411_tensors_and_trains_25472896_parameters():
    with torch.device("meta"):
        model = PointBert(PRESETS["point_bert"], DiscreteVAE(TOKENIZERS["point_bert"]))
    counts = [sum(one.numel() for one in model.parameters() if one.requires_grad == trained) for trained in (1, 0)]
    assert counts[0] == 25_472_896
    assert sum(counts) == 78_566_683
    state = model.state_dict()
    assert len(state) == 411
    assert [list(state[name].shape) for name in ("queue", "queue_ptr")] == [[512, 16384], [1]]
    student = {name.removeprefix("transformer_q.") for name in state if name.startswith("transformer_q.")}
    twin = {name.removeprefix("transformer_k.") for name in state if name.startswith("transformer_k.")}
    with torch.device("meta"):
        trunk = {name for name in PointTransformerClassifier(PRESETS["point_bert"], 40).state_dict()
                 if not name.startswith("cls_head_finetune.")}  # fmt: skip
    heads = {f"{name}.{part}" for name in ("lm_head", "cls_head.0", "cls_head.2") for part in ("weight", "bias")}
    assert student == twin == trunk | heads | {"mask_token"}
    assert {"cls_token", "cls_pos", "reduce_dim.weight"} <= student
    rest = {name.split(".")[0] for name in state} - {"transformer_q", "transformer_k"}
    assert rest == {"dvae", "queue", "queue_ptr"}
    assert sum(name.startswith("dvae.") for name in state) == 75


def test_the_student_starts_from_the_tokenizer_s_patch_encoder_and_the_twin_from_the_student():
    model = build()
    for name, value in model.dvae.encoder.state_dict().items():
        assert torch.equal(model.transformer_q.encoder.state_dict()[name], value)
    for name, value in model.transformer_q.state_dict().items():
        assert torch.equal(model.transformer_k.state_dict()[name], value)
    torch.testing.assert_close(model.queue.norm(dim=0), torch.ones(7))


@pytest.mark.parametrize("groups", [64, 20, 3])
def test_a_block_mask_is_a_group_and_the_nearest_groups(groups):
    centers = torch.randn(2000, groups, 3)
    mask = block_mask(centers, 0.25, 0.45)
    counts = mask.sum(1)
    assert counts.unique().tolist() == list(range(max(1, groups // 4), max(2, math.ceil(0.45 * groups))))
    order = torch.cdist(centers, centers).argsort(-1)  # (B, G, G)
    nearest = torch.arange(groups) < counts.view(-1, 1, 1)  # (B, 1, G), in that order
    blocks = torch.zeros(2000, groups, groups, dtype=torch.bool).scatter_(2, order, nearest.expand(-1, groups, -1))
    assert (blocks == mask.unsqueeze(1)).all(-1).any(-1).all()


def test_the_size_of_a_block_is_drawn_for_each_cloud():
    counts = block_mask(torch.randn(20000, 64, 3), 0.25, 0.45).sum(1)
    assert counts.unique().tolist() == list(range(16, 29))
    shares = counts.bincount()[16:29] / 20000  # 12.8 values of a uniform draw: each 1 in 12.8, the last 0.8 of that
    torch.testing.assert_close(shares, torch.tensor([1.0] * 12 + [0.8]) / 12.8, atol=0.008, rtol=0)
    assert block_mask(torch.randn(50, 20, 3), 0.45, 0.45).sum(1).unique().tolist() == [9]


def test_a_random_mask_has_one_ratio_for_a_batch():
    ratios = torch.stack([random_mask(torch.zeros(64, 64, 3), 0.25, 0.45).float().mean() for _ in range(200)])
    assert 0.24 < ratios.min() < 0.27
    assert 0.43 < ratios.max() < 0.46
    mask = random_mask(torch.zeros(4000, 64, 3), 0.3, 0.3)
    spread = mask.float().mean(1).std()
    assert spread == pytest.approx((0.3 * 0.7 / 64) ** 0.5, rel=0.05)  # of 64 independent draws
    assert random_mask(torch.zeros(500, 2, 3), 0.01, 0.01).any(1).all()


def test_mixing_takes_patches_with_their_centres_and_tokens_from_the_partner():
    batch, groups = 401, 64
    number = torch.arange(batch * groups).view(batch, groups)
    patches, centers = number[..., None, None].expand(-1, -1, 2, 3).double(), number[..., None].expand(-1, -1, 3)
    mixed = mix(patches, centers + 0.5, number)
    own, partner = mixed.tokens == number, mixed.tokens == number.flip(0)
    assert (own | partner).all()
    assert torch.equal(mixed.patches[:, :, 0, 0].long(), mixed.tokens)
    assert torch.equal(mixed.centers[..., 2] - 0.5, mixed.tokens.float())
    apart = torch.arange(batch) != batch // 2  # the one in the middle is its own partner
    share = own[apart].double().mean(1)
    deviation = (share - mixed.ratio[apart]) / (mixed.ratio[apart] * (1 - mixed.ratio[apart]) / groups).sqrt()
    assert deviation.std() == pytest.approx(1, abs=0.15)
    assert mixed.ratio.mean() == pytest.approx(0.5, abs=0.06)
    assert mixed.ratio.std() == pytest.approx(12**-0.5, abs=0.03)


@pytest.mark.parametrize("sizes", [[2, 2, 2, 2, 2], [7, 7], [3, 1, 5, 2], [9, 4]])
def test_the_queue_keeps_the_last_keys_in_order_over_its_end(sizes):
    model = build()
    naive, place = deque(model.queue.T.tolist(), maxlen=7), 0
    for size in sizes:
        keys = torch.randn(size, 512)
        model._keys = list(keys.split(2))  # as of parts of a batch
        model.follow()
        naive.extend(keys.tolist())
        place = (place + size) % 7
        assert model.queue_ptr.tolist() == [place]
        assert torch.equal(model.queue.T.roll(-place, 0), torch.tensor(list(naive)))
    assert not model._keys


def test_what_is_gathered_from_the_processes_goes_into_the_queue():
    model = build()
    model._keys = [torch.ones(2, 512)]
    model.follow(lambda rows: torch.cat([rows, 2 * rows]))
    assert model.queue[:, :4].T.tolist() == [[value] * 512 for value in (1, 1, 2, 2)]
    assert model.queue_ptr.item() == 4


def test_the_momentum_encoder_follows_the_parameters_and_keeps_its_own_statistics():
    model = build(momentum=0.9).double().train()
    model(clouds())
    before, statistics = copy.deepcopy(model.transformer_k.state_dict()), "encoder.first_conv.1.running_mean"
    assert not torch.equal(before[statistics], model.transformer_q.state_dict()[statistics])  # two passes against one
    assert not torch.equal(before[statistics], model.dvae.state_dict()[statistics])
    with torch.no_grad():
        for parameter in model.transformer_q.parameters():
            parameter += torch.randn_like(parameter)
    model.follow()
    trained = dict(model.transformer_q.named_parameters())
    for name, value in model.transformer_k.state_dict().items():
        expected = 0.9 * before[name] + 0.1 * trained[name] if name in trained else before[name]
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-14, msg=name)


def naive(model, points, masks, own, ratio):
    """The losses, cloud by cloud and patch by patch."""
    student, twin, sizes = model.transformer_q, model.transformer_k, model.dvae.sizes
    cut = make_patches(points, ARCH.num_groups, ARCH.group_size)
    batch = [(cut.patches[i], cut.centers[i]) for i in range(len(points))]
    tokens = [[model.dvae.dgcnn_1(model.dvae.encoder(patches[None]), module_graph(centers))[0, g].argmax().item()
               for g in range(sizes.num_groups)] for patches, centers in batch]  # fmt: skip

    def passed(net, patches, centers, mask):
        embedded = net.embed(patches[None])[0]
        rows = [net.mask_token[0, 0] if mask[g] else embedded[g] for g in range(len(mask))]
        return net.transform(torch.stack(rows)[None], centers[None])[0]

    def unit(net, x):
        feature = net.cls_head(x[0])
        return feature / feature.square().sum().sqrt()

    def token_loss(patches_of, targets_of, masks):
        terms = []
        for (patches, centers), targets, mask in zip(patches_of, targets_of, masks, strict=True):
            x = passed(student, patches, centers, mask)
            logits = student.lm_head(x[1:])
            terms += [logits[g].exp().sum().log() - logits[g, targets[g]] for g in range(len(mask)) if mask[g]]
        return sum(terms) / len(terms)

    mixed, mixed_tokens = [], []
    for i, (patches, centers) in enumerate(batch):
        other, theirs = batch[-1 - i], tokens[-1 - i]
        pick = [own[i, g].item() for g in range(sizes.num_groups)]
        mixed.append((torch.stack([patches[g] if pick[g] else other[0][g] for g in range(len(pick))]),
                      torch.stack([centers[g] if pick[g] else other[1][g] for g in range(len(pick))])))  # fmt: skip
        mixed_tokens.append([tokens[i][g] if pick[g] else theirs[g] for g in range(len(pick))])
    keys = [unit(twin, passed(twin, *one, mask)).detach() for one, mask in zip(batch, masks[2], strict=True)]

    def contrast(features, targets):
        total = 0.0
        for i, feature in enumerate(features):
            candidates = [*(keys if targets else [keys[i]]), *model.queue.T]
            scores = torch.stack([feature @ key for key in candidates]) / model.temperature
            log = scores - scores.exp().sum().log()
            total -= ratio[i] * log[i] + (1 - ratio[i]) * log[-1 - i - model.queue.shape[1]] if targets else log[0]
        return total / len(features)

    features = [unit(student, passed(student, *one, mask)) for one, mask in zip(batch, masks[0], strict=True)]
    mixed_features = [unit(student, passed(student, *one, mask)) for one, mask in zip(mixed, masks[1], strict=True)]
    return (token_loss(batch, tokens, masks[0]), token_loss(mixed, mixed_tokens, masks[1]),
            contrast(mixed_features, True), contrast(features, False))  # fmt: skip


def module_graph(centers):
    return torch.cdist(centers, centers).topk(4, largest=False).indices[None]


def test_losses_and_gradients_are_those_of_a_loop_over_clouds_and_patches(monkeypatch):
    model = build(plain_contrast=True).double().eval()
    with torch.no_grad():
        for one in (*model.transformer_q.parameters(), *model.transformer_k.parameters()):
            one += 0.1 * torch.randn_like(one)
    points, groups = clouds(), ARCH.num_groups
    masks = [block_mask(torch.randn(5, groups, 3), 0.3, 0.6) for _ in range(3)]
    own, ratio, todo = torch.rand(5, groups) < 0.5, torch.rand(5, dtype=torch.float64), list(masks)

    def given(patches, centers, tokens):
        parts = [torch.where(own.view(*own.shape, *[1] * (one.ndim - 2)), one, one.flip(0))
                 for one in (patches, centers, tokens)]  # fmt: skip
        return module.Mixed(*parts, ratio)

    monkeypatch.setattr(module, "mix", given)
    monkeypatch.setattr(PointBert, "draw_mask", lambda self, centers: todo.pop(0))
    found = model(points)
    expected = naive(model, points, masks, own, ratio)
    for name, ours, theirs in zip(found._fields, found, expected, strict=False):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=0, msg=name)
    trained = {name: one for name, one in model.named_parameters() if one.requires_grad}
    assert all(name.startswith("transformer_q.") for name in trained)
    ours, theirs = (torch.autograd.grad(sum(one[:4]), trained.values()) for one in (found, expected))
    for name, one, other in zip(trained, ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-11, msg=name)
    assert not model._keys  # not in evaluation


def test_the_tokenizer_stays_frozen_and_in_evaluation():
    model = build().train()
    before = copy.deepcopy(model.dvae.state_dict())
    found = model(clouds().float())
    sum(found[:4]).backward()
    assert found.plain == 0
    assert not any(one.training for one in model.dvae.modules())
    assert all(torch.equal(before[name], value) for name, value in model.dvae.state_dict().items())
    frozen = [*model.dvae.parameters(), *model.transformer_k.parameters()]
    assert all(one.grad is None for one in frozen)
    assert all(one.grad is not None for one in model.transformer_q.parameters())
    assert model._keys[0].shape == (5, 512)


def test_predictions_are_counted_by_cloud(monkeypatch):
    model = build().double().eval()
    mask = block_mask(torch.randn(5, 8, 3), 0.3, 0.6)
    monkeypatch.setattr(PointBert, "draw_mask", lambda self, centers: mask)
    points = clouds()
    losses, correct, masked = model.predict(points)
    assert torch.equal(masked, mask.sum(1))
    cut = make_patches(points, 8, 8)
    tokens = model.dvae.tokens(cut.patches, cut.centers)
    for i in range(5):
        x = model.transformer_q.masked(cut.patches[i : i + 1], cut.centers[i : i + 1], mask[i : i + 1])
        logits = model.transformer_q.lm_head(x[0, 1:])[mask[i]]
        target = tokens[i][mask[i]]
        loss = -logits.log_softmax(-1)[torch.arange(len(target)), target].sum()
        torch.testing.assert_close(losses[i], loss, rtol=1e-10, atol=0)
        assert correct[i] == (logits.argmax(-1) == target).sum()


def test_features_are_those_of_a_classifier_on_the_trunk():
    model = build().eval()
    classifier = PointTransformerClassifier(ARCH, 5).eval()
    state = {f"module.{name}": value for name, value in model.state_dict().items()}
    report = load_weights(classifier, {"base_model": state, "epoch": 3})
    assert all(name.startswith("cls_head_finetune.") for name in report.fresh)
    points = clouds().float()
    torch.testing.assert_close(model.features(points), classifier.features(points), rtol=0, atol=1e-6)
    segmenter = PointTransformerSegmenter(ARCH, Parts(("leg", "seat"), (0, 0)), 1)
    report = load_weights(segmenter, state)
    trunk = [name for name in segmenter.state_dict() if name in model.transformer_q.state_dict()]
    assert {"encoder.first_conv.0.weight", "reduce_dim.weight", "norm.bias"} < set(trunk) == set(report.loaded)
    assert set(report.unused) == {"cls_token", "cls_pos"}
    with pytest.raises(CheckpointError, match="another architecture"):
        load_weights(PointTransformerClassifier(replace(ARCH, depth=2), 5), state)


def test_what_is_reconstructed_are_the_decoded_tokens_of_a_block():
    model = build().eval()
    points = clouds(3).float()
    found = model.reconstruct(points)
    assert found.predicted.shape == found.true.shape == (3, 2, 8, 3)  # (0.25 + 0.45) / 2 of 8
    assert found.visible.shape == (3, 6, 8, 3)
    cut = make_patches(points, 8, 8)
    whole = (cut.patches + cut.centers.unsqueeze(2)).flatten(2)
    for i in range(3):
        rows = torch.cat([found.visible[i], found.true[i]]).flatten(1)
        assert sorted(rows.tolist()) == sorted(whole[i].tolist())
    tokens = model.dvae.tokens(cut.patches, cut.centers)
    decoded = model.dvae.decode(tokens, cut.centers)
    torch.testing.assert_close(decoded, model.dvae.autoencode(points).fine)


@pytest.mark.parametrize("depth", [3, 4])
def test_experts_are_the_student_s_and_the_momentum_encoder_follows_their_mean(depth):
    torch.manual_seed(0)
    arch = replace(ARCH, depth=depth, width=512, heads=8)  # the contrast's head has the form of an FFN of this width
    dense = PointBert(arch, DiscreteVAE(SIZES), 7, momentum=0.75)
    model = ewa.to_moe(dense, 3, "every_other", predicate=model_ffns(dense)).double()
    moes = ewa.moe_layers(model)
    assert list(moes) == [f"transformer_q.blocks.blocks.{number}.mlp" for number in range(1, depth, 2)]
    before = copy.deepcopy(dict(model.transformer_k.named_parameters()))
    assert before.keys() == dict(dense.transformer_k.named_parameters()).keys()
    model._keys = [torch.ones(1, 512, dtype=torch.float64)]
    model.follow()
    name = "blocks.blocks.1.mlp.fc1.weight"
    mean = moes["transformer_q.blocks.blocks.1.mlp"].experts.fc1.weight.mean(0)
    assert not torch.equal(mean, before[name].double())
    torch.testing.assert_close(model.transformer_k.get_parameter(name), 0.75 * before[name] + 0.25 * mean)
    folded = ewa.fold(model)
    assert folded.state_dict().keys() == dense.state_dict().keys()
    points = clouds()
    torch.testing.assert_close(folded.eval().features(points), model.eval().features(points), rtol=0, atol=1e-10)
    for ours, theirs in zip(*(follow_of(one) for one in (folded, model)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-14)


def follow_of(model):
    """The momentum encoder after a further step."""
    model._keys = [torch.ones(1, 512, dtype=torch.float64)]
    model.follow()
    return [one.detach() for one in model.transformer_k.parameters()]


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"num_groups": 9}, {}, "num_groups must be the tokenizer's 8, got 9"),
        ({"group_size": 9}, {}, "group_size must be the tokenizer's 8, got 9"),
        ({"patch_out": 24}, {}, r"patch_out must be such .*'s widths \[8, 16, 32, 16\], .* got \[8, 16, 32, 24\]"),
        ({"patch_width": 4}, {}, "patch_width must be such"),
        ({}, {"mask_ratio": (0.5, 0.4)}, "mask_ratio must rise"),
        ({}, {"mask_ratio": (0.0, 0.4)}, "mask_ratio must rise"),
        ({}, {"mask_ratio": (0.5, 1.0)}, "mask_ratio must rise"),
        ({}, {"queue_size": 0}, "queue_size must be at least 1, got 0"),
        ({}, {"temperature": 0.0}, "temperature must be above 0"),
        ({}, {"momentum": 1.5}, "momentum from 0 to 1"),
    ],
)
def test_what_does_not_fit_is_refused(change, options, message):
    with pytest.raises(ValueError, match=message):
        PointBert(replace(ARCH, **change), DiscreteVAE(SIZES), **{"queue_size": 7} | options)
