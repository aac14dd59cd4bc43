"""Checkpoints of Point-BERT and Point-MAE: files with exactly their keys load, others are refused."""

import re

import pytest
import torch

from pointewa.errors import CheckpointError
from pointewa.models import Architecture, PointTransformerClassifier, load_weights

DEPTH = 2
SIZES = {"width": 24, "depth": DEPTH, "heads": 2, "num_groups": 8, "group_size": 6, "patch_width": 8}
MAE = Architecture(**SIZES, patch_out=24, head="point_mae")
BERT = Architecture(**SIZES, patch_out=16, head="point_bert")

# The keys that the public codebases write, spelt out: what must be matched is theirs, not ours.
ENCODER = [
    f"encoder.{conv}.{layer}.{tensor}"
    for conv in ("first_conv", "second_conv")
    for layer, tensors in ((0, "wb"), (1, "wbmvn"), (3, "wb"))
    for tensor in (
        {"w": "weight", "b": "bias", "m": "running_mean", "v": "running_var", "n": "num_batches_tracked"}[t]
        for t in tensors
    )
]
POSITION = [f"pos_embed.{layer}.{tensor}" for layer in (0, 2) for tensor in ("weight", "bias")]


def blocks(prefix, depth):
    names = ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", "attn.qkv.weight", "attn.proj.weight")
    names += ("attn.proj.bias", "mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight", "mlp.fc2.bias")
    return [f"{prefix}.{index}.{name}" for index in range(depth) for name in names]


BACKBONE = [*ENCODER, *POSITION, *blocks("blocks.blocks", DEPTH), "norm.weight", "norm.bias"]
TOKENS = ["cls_token", "cls_pos"]
REDUCE = ["reduce_dim.weight", "reduce_dim.bias"]
BERT_HEAD = [f"cls_head_finetune.{i}.{t}" for i in (0, 3) for t in ("weight", "bias")]
NORMS = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
MAE_HEAD = [f"cls_head_finetune.{i}.{t}" for i in (0, 4, 8) for t in ("weight", "bias")]
MAE_HEAD += [f"cls_head_finetune.{i}.{t}" for i in (1, 5) for t in NORMS]


def model(architecture, classes=40, seed=0):
    torch.manual_seed(seed)
    return PointTransformerClassifier(architecture, classes).eval()


@pytest.mark.parametrize(
    ("architecture", "keys"),
    [(MAE, BACKBONE + TOKENS + MAE_HEAD), (BERT, BACKBONE + TOKENS + REDUCE + BERT_HEAD)],
    ids=["point_mae", "point_bert"],
)
def test_our_keys_are_exactly_those_of_the_classifiers(architecture, keys):
    assert set(model(architecture).state_dict()) == set(keys)


@pytest.mark.parametrize("container", ["base_model", "model", None])
@pytest.mark.parametrize("architecture", [MAE, BERT], ids=["point_mae", "point_bert"])
def test_classifiers_load_whole(architecture, container):
    source, target = model(architecture, seed=1), model(architecture, seed=2)
    state = {f"module.{key}": value for key, value in source.state_dict().items()}
    report = load_weights(target, {container: state, "epoch": 3} if container else state)
    points = torch.randn(2, 64, 3)
    assert torch.equal(source(points), target(points))
    assert (report.fresh, report.unused) == ([], [])


def test_a_head_of_another_size_stays_fresh():
    """Point-BERT's ScanObjectNN files have 40 outputs for 15 classes."""
    source, target = model(BERT, 40, seed=1), model(BERT, 15, seed=2)
    head = target.cls_head_finetune[3].weight.clone()
    report = load_weights(target, {"base_model": source.state_dict()})
    assert sorted(report.fresh) == sorted(report.unused) == sorted(BERT_HEAD)
    assert torch.equal(target.cls_head_finetune[3].weight, head)
    assert torch.equal(target.norm.weight, source.norm.weight)
    assert torch.equal(target.blocks.blocks[1].mlp.fc1.weight, source.blocks.blocks[1].mlp.fc1.weight)


def test_point_mae_pretraining_loads_the_encoder_only():
    source, target = model(MAE, seed=1), model(MAE, seed=2)
    token = target.cls_token.clone()
    state = source.state_dict()
    checkpoint = {f"module.MAE_encoder.{key}": state[key] for key in BACKBONE}
    junk = ["mask_token", "increase_dim.0.weight", "increase_dim.0.bias", "MAE_decoder.norm.weight"]
    junk += ["MAE_decoder.norm.bias", *(f"decoder_{key}" for key in POSITION), *blocks("MAE_decoder.blocks", 1)]
    checkpoint |= {f"module.{key}": torch.full((3,), 7.0) for key in junk}
    report = load_weights(target, {"base_model": checkpoint})
    assert sorted(report.loaded) == sorted(BACKBONE)
    assert sorted(report.fresh) == sorted(TOKENS + MAE_HEAD)
    assert torch.equal(target.cls_token, token)
    for key in BACKBONE:
        assert torch.equal(target.state_dict()[key], state[key]), key


def test_point_bert_pretraining_loads_the_query_encoder_only():
    source, target = model(BERT, seed=1), model(BERT, seed=2)
    wanted = BACKBONE + TOKENS + REDUCE
    checkpoint = {f"module.transformer_q.{key}": source.state_dict()[key] for key in wanted}
    junk = ["transformer_q.cls_head.0.weight", "transformer_q.lm_head.weight", "transformer_q.mask_token", "queue"]
    junk += [f"transformer_k.{key}" for key in wanted] + ["dvae.encoder.first_conv.0.weight", "queue_ptr"]
    checkpoint |= {f"module.{key}": torch.full((3,), 7.0) for key in junk}
    report = load_weights(target, {"base_model": checkpoint})
    assert sorted(report.loaded) == sorted(wanted)
    assert sorted(report.fresh) == sorted(BERT_HEAD)
    for key in wanted:
        assert torch.equal(target.state_dict()[key], source.state_dict()[key]), key


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (BERT, "another architecture"),
        (Architecture(**SIZES | {"depth": 3}, patch_out=24), "blocks.blocks.2.norm1.weight .*expected none"),
        (Architecture(**SIZES | {"depth": 1}, patch_out=24), "blocks.blocks.1.norm1.weight missing"),
        (Architecture(**SIZES | {"patch_width": 16}, patch_out=24), re.escape("[16, 3, 1], expected [8, 3, 1]")),
    ],
    ids=["point_bert", "deeper", "shallower", "wider patches"],
)
def test_another_architecture_is_refused_and_nothing_is_loaded(other, message):
    target = model(MAE, seed=2)
    before = {key: value.clone() for key, value in target.state_dict().items()}
    with pytest.raises(CheckpointError, match=message):
        load_weights(target, model(other, seed=1).state_dict())
    assert all(torch.equal(value, before[key]) for key, value in target.state_dict().items())


@pytest.mark.parametrize(
    "checkpoint", [{}, {"base_model": {}}, {"epoch": 3, "metrics": {"acc": 1.0}}, {"model": {1: torch.zeros(2)}}]
)
def test_a_file_without_named_tensors_is_refused(checkpoint):
    with pytest.raises(CheckpointError, match="no named tensors in"):
        load_weights(model(MAE), checkpoint)
