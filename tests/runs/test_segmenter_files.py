"""Segmenters in files: their description, published files there and back, starts from other models, refusals."""

import dataclasses
import json

import pytest
import torch

from pointewa import ewa
from pointewa.errors import CheckpointError
from pointewa.inference.export import export
from pointewa.models import (
    Architecture,
    MaskedAutoencoder,
    Parts,
    PointTransformerClassifier,
    PointTransformerSegmenter,
    fuse_batch_norm,
)
from pointewa.models.decoders import DECODERS
from pointewa.runs.description import LoadedModel
from pointewa.runs.weights import init_from, load_any, load_foreign, load_model, save_model
from pointewa.tools import cli
from pointewa.tools import export as export_tool

SIZES = {"width": 24, "depth": 2, "heads": 2, "num_groups": 8, "group_size": 6, "patch_width": 8}
MAE, BERT = Architecture(**SIZES, patch_out=24), Architecture(**SIZES, patch_out=16, head="point_bert")
ARCH = {"point_mae": MAE, "point_bert": BERT, "light": MAE}
PARTS, NAMES = Parts(("wing", "body", "leg", "seat", "back"), (0, 0, 1, 1, 1)), ("plane", "chair")
ALL = pytest.mark.parametrize("decoder", DECODERS)
POINTS, LABELS = torch.randn(2, 40, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1])


def segmenter(decoder, seed=0, parts=PARTS, classes=2):
    torch.manual_seed(seed)
    return PointTransformerSegmenter(ARCH[decoder], parts, classes, decoder).eval()


def classifier(arch, seed=0):
    torch.manual_seed(seed)
    return PointTransformerClassifier(arch, 5).eval()


def described(model):
    return LoadedModel(model, NAMES, 40, "shapes", "unit_sphere", "classification")


@ALL
@pytest.mark.parametrize("form", ["plain", "fused", "gated"])
@torch.no_grad()
def test_it_is_rebuilt_from_its_description(tmp_path, decoder, form):
    model = segmenter(decoder)
    if form == "fused":
        model = fuse_batch_norm(model)
    if form == "gated":
        model = ewa.to_moe(model, 2, mixture=ewa.TopKMoE).eval()
    save_model(tmp_path / "model.safetensors", described(model))
    description = json.loads((tmp_path / "model.json").read_text())
    assert (description["model"], description["decoder"]) == ("segmenter", decoder)
    assert description["parts"] == {"names": list(PARTS.names), "classes": list(PARTS.classes)}
    loaded = load_any(tmp_path)
    assert (loaded.model.parts, loaded.model.num_classes, loaded.class_names) == (PARTS, 2, NAMES)
    assert loaded.model.architecture == ARCH[decoder]
    assert torch.equal(loaded.model(POINTS, LABELS), model(POINTS, LABELS))
    with pytest.raises(CheckpointError, match=r"found a segmenter: it tells parts apart: pointewa\.load and make "):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"decoder": "mlp"}, "decoder must be one of point_mae, point_bert, light, got 'mlp'"),
        ({"decoder": None}, "decoder: expected str, found NoneType"),
        ({"parts": [1]}, "parts: expected dict, found list"),
        ({"parts": {}}, "parts: expected names, at most 4096, each of type str"),
        ({"parts": {"names": [], "classes": []}}, "parts: expected a category for each, found 0 names and 0"),
        ({"parts": {"names": ["a"], "classes": [0, 1]}}, "found 1 names and 2 categories"),
        ({"parts": {"names": ["a", 7], "classes": [0, 1]}}, "parts: expected names, at most 4096, each of type str"),
        ({"parts": {"names": "ab", "classes": [0, 1]}}, "parts: expected names"),
        ({"parts": {"names": ["a"] * 5000, "classes": [0] * 5000}}, "parts: expected names, at most 4096"),
        (
            {"parts": {"names": ["a", "b"], "classes": [0, True]}},
            "parts: expected classes, at most 4096, each of type int",
        ),
        ({"parts": {"names": ["a", "b"], "classes": [0, 1.0]}}, "parts: expected classes"),
        ({"parts": {"names": ["a", "b"], "classes": [0, 2]}}, "parts: expected categories below 2, found 2"),
        ({"parts": {"names": ["a", "b"], "classes": [0, 10**400]}}, "parts: expected categories below 2, found 1000"),
        ({"parts": {"names": ["a", "b"], "classes": [0, -2]}}, "found -2"),
        (
            {"parts": {"names": ["a", "b"], "classes": [1, 1]}},
            "parts: expected some of every category, found none of 0",
        ),
        ({"class_names": []}, "parts: expected categories below 0"),
        ({"parts": {"names": ["a", "b"], "classes": [0, 1]}}, "convs3.weight: expected"),  # other than the weights
        ({"decoder": "point_bert"}, "Missing: "),
    ],
)
def test_descriptions_that_no_segmenter_can_have(tmp_path, change, says):
    save_model(tmp_path / "model.safetensors", described(segmenter("light")))
    path = tmp_path / "model.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError) as error:
        load_any(tmp_path)
    assert says in str(error.value)
    assert len(str(error.value)) < 1000
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("prefix", ["", "module."])
@ALL
@torch.no_grad()
def test_a_published_file_loads(tmp_path, decoder, prefix):
    """As their training writes it, with what else is there."""
    source, path = segmenter(decoder, seed=1), tmp_path / "best_model.pth"
    state = {f"{prefix}{key}": value for key, value in source.state_dict().items()}
    others = {"epoch": 7, "train_acc": 0.9, "class_avg_iou": 0.8, "inctance_avg_iou": 0.8}
    torch.save({"model_state_dict": state, "optimizer_state_dict": {"state": {}}, **others}, path)
    model = load_foreign(path, ARCH[decoder], 2, PARTS, decoder)
    assert not model.training
    assert torch.equal(model(POINTS, LABELS), source(POINTS, LABELS))
    other = segmenter(decoder, seed=2)
    report = init_from(other, str(path))
    assert (report.fresh, report.unused, report.misfit) == ([], [], "")
    assert torch.equal(other(POINTS, LABELS), source(POINTS, LABELS))


@pytest.mark.parametrize(
    ("classes", "parts", "decoder", "says"),
    [
        (2, Parts(("a", "b", "c"), (0, 1, 1)), "point_mae",
         "no segmenter of 2 categories and 3 parts with the decoder point_mae: "
         "convs3.bias [5], expected [3]; train it with train.init_from first"),
        (3, Parts(("a", "b", "c"), (0, 1, 2)), "point_mae", "convs3.bias [5], expected [3]"),
        (3, Parts(("a", "b", "c", "d", "e"), (0, 1, 2, 2, 2)), "point_mae",
         "label_conv.0.weight [64, 2, 1], expected [64, 3, 1]"),
        (2, PARTS, "light", "bns1.bias [512], expected [256]"),
    ],
)  # fmt: skip
def test_a_file_of_other_parts_categories_or_decoder_is_refused(tmp_path, classes, parts, decoder, says):
    path = tmp_path / "best_model.pth"
    torch.save({"model_state_dict": segmenter("point_mae").state_dict()}, path)
    with pytest.raises(CheckpointError) as error:
        load_foreign(path, MAE, classes, parts, decoder)
    assert says in str(error.value)


def test_a_classifier_is_no_segmenter_and_a_segmenter_no_classifier(tmp_path):
    torch.save({"base_model": classifier(MAE).state_dict()}, tmp_path / "c.pth")
    torch.save({"model_state_dict": segmenter("point_mae").state_dict()}, tmp_path / "s.pth")
    with pytest.raises(CheckpointError) as error:
        load_foreign(tmp_path / "c.pth", MAE, 2, PARTS)
    assert "no segmenter of 2 categories and 5 parts with the decoder point_mae: label_conv.0.weight" in str(
        error.value
    )
    assert "are missing or of another size; there are cls_head_finetune.0.bias" in str(error.value)
    with pytest.raises(CheckpointError) as error:
        load_foreign(tmp_path / "s.pth", MAE, 5)
    assert "no classifier of 5 classes: cls_token, cls_pos, " in str(error.value)
    assert "there are bns1.bias" in str(error.value)
    for arch, file in ((dataclasses.replace(MAE, depth=3), "s.pth"), (BERT, "c.pth")):
        with pytest.raises(CheckpointError, match="the checkpoint is of another architecture"):
            load_foreign(tmp_path / file, arch, 2, PARTS)


def trunk_of(model):
    return {key: value for key, value in model.state_dict().items() if key.split(".")[0] in TRUNK}


TRUNK = {"encoder", "reduce_dim", "pos_embed", "blocks", "norm"}
TOKENS = {"cls_token", "cls_pos"}


def starts(model, path):
    """Loads, and checks that all but the trunk, and the class token where it was loaded, is as it was."""
    before = {key: value.clone() for key, value in model.state_dict().items()}
    report = init_from(model, str(path))
    after = model.state_dict()
    assert set(report.loaded) | set(report.fresh) == after.keys()
    assert all(torch.equal(after[key], before[key]) for key in report.fresh)
    return report


@ALL
def test_it_starts_from_pre_trainings_and_classifiers(tmp_path, decoder):
    arch, file = ARCH[decoder], tmp_path / "w.pth"
    has_token = decoder == "point_bert"
    torch.manual_seed(3)
    autoencoder = MaskedAutoencoder(arch, decoder_depth=1)
    other = classifier(arch, seed=4)
    masked = {f"module.{key}": value for key, value in autoencoder.state_dict().items()}
    contrast = {f"module.transformer_q.{key}": value for key, value in trunk_of(other).items()}
    contrast |= {f"module.transformer_q.{key}": getattr(other, key).data for key in TOKENS}
    contrast |= {"module.transformer_q.lm_head.weight": torch.ones(3), "module.queue": torch.ones(3)}
    head = {key for key in other.state_dict() if key.startswith("cls_head_finetune.")}
    for state, source, has, left_out in (
        (masked, autoencoder.MAE_encoder, False, set()),
        (contrast, other, True, set()),
        (other.state_dict(), other, True, head),
    ):
        torch.save({"base_model": state}, file)
        model = segmenter(decoder, seed=5)
        report = starts(model, file)
        assert all(torch.equal(value, source.state_dict()[key]) for key, value in trunk_of(model).items())
        tokens = TOKENS if has_token and has else set()
        assert set(report.loaded) == trunk_of(model).keys() | tokens
        assert set(report.unused) == left_out | (TOKENS if has and not has_token else set())
        if tokens:
            assert torch.equal(model.cls_pos, other.cls_pos)


@ALL
def test_a_classifier_starts_from_its_trunk_and_a_segmenter_of_other_parts_too(tmp_path, decoder):
    source = segmenter(decoder, seed=6)
    save_model(tmp_path / "model.safetensors", described(source))
    decoders = set(source.state_dict()) - trunk_of(source).keys() - TOKENS
    model = classifier(ARCH[decoder])
    report = starts(model, tmp_path / "model.safetensors")
    assert set(report.unused) == decoders
    assert {key.split(".")[0] for key in report.fresh} == {"cls_head_finetune"} | (
        set() if decoder == "point_bert" else TOKENS
    )
    model = segmenter(decoder, parts=Parts(("a", "b"), (0, 1)))
    report = starts(model, tmp_path / "model.safetensors")
    assert set(report.unused) == set(report.fresh) == decoders
    assert report.misfit


@ALL
@torch.no_grad()
def test_it_is_exported_in_the_published_layout(tmp_path, capsys, decoder):
    model = segmenter(decoder, seed=7)
    save_model(tmp_path / "model.safetensors", described(model))
    path = tmp_path / "ckpt.pth"
    export_tool.main([str(tmp_path / "model.safetensors"), str(path), "--format", "point_mae"])
    out = capsys.readouterr().out
    assert "largest difference of logits 0.0e+00" in out
    says = {"point_mae": "pt.py of Point-MAE, with 5 parts", "point_bert": "Point-BERT's segmentation, with 5 parts",
            "light": "has no such decoder (model.decoder=light)"}  # fmt: skip
    assert says[decoder] in out
    assert ("2 categories (16 there)" in out) == (decoder != "light")
    file = torch.load(path, weights_only=True)
    assert list(file) == ["model_state_dict"]
    assert list(file["model_state_dict"]) == list(model.state_dict())
    assert torch.equal(load_foreign(path, ARCH[decoder], 2, PARTS, decoder)(POINTS, LABELS), model(POINTS, LABELS))
    again = export(described(model), tmp_path / "again.safetensors", "safetensors", fuse=True)
    assert again.difference < 1e-4
    assert load_any(tmp_path / "again.safetensors").model.parts == PARTS


def test_the_layout_of_torch_pointcloud_is_refused(tmp_path, capsys):
    save_model(tmp_path / "model.safetensors", described(segmenter("light")))
    out = tmp_path / "out" / "m.safetensors"
    with pytest.raises(SystemExit) as error:
        cli.run(
            lambda: export_tool.main([str(tmp_path / "model.safetensors"), str(out), "--format", "torch_pointcloud"])
        )
    assert error.value.code == 2
    assert "a part segmentation is not written in torch-pointcloud's layout" in capsys.readouterr().err
    assert not out.parent.exists()
