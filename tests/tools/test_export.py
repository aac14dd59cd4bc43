"""Models for others: every format gives the folded model's logits, and what does not fit is refused."""

import json
import re
import sys
from dataclasses import replace

import numpy as np
import pytest
import safetensors.torch
import torch

import pointewa.ewa as ewa
from pointewa import datasets
from pointewa.datasets.layouts import shapes
from pointewa.errors import CheckpointError, ConfigError
from pointewa.inference import export
from pointewa.models import (
    Architecture,
    DiscreteVAE,
    MaskedAutoencoder,
    PointTransformerClassifier,
    TokenizerSizes,
    fuse_batch_norm,
)
from pointewa.models.foreign import classifier_state
from pointewa.models.patch_embed import make_patches
from pointewa.runs.description import LoadedModel
from pointewa.runs.weights import load_foreign, load_model, read_weights, save_model
from pointewa.tools import cli, evaluate, train
from pointewa.tools import export as tool

POINTS = 64
TINY = TokenizerSizes(8, 8, 8, 8, 16, 8, 4, 8, 8)
ONNX = ("onnx", "onnxscript", "onnxruntime")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A short EWA run, after which the classes differ by some units of logits."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shapes, "PER_CLASS", {"train": 8, "test": 4})
        small = ["model.width=24", "model.depth=2", "model.heads=2", "model.num_groups=8", "model.group_size=8"]
        recipe = ["train.epochs=30", "train.batch_size=68", "train.lr=5e-3", "train.device=cpu", "run.report=false"]
        train.main([*small, *recipe, f"data.num_points={POINTS}", f"run.dir={folder}", "run.name=a", "--json"])
    return folder / "a"


@pytest.fixture
def clouds(request):
    """200 real clouds if there are any, else 68 procedural ones."""
    try:
        found = datasets.load("modelnet40", str(request.getfixturevalue("real_data")), "test", POINTS)
    except pytest.skip.Exception:
        found = datasets.load("shapes", "", "test", POINTS)
    return found.take(torch.linspace(0, len(found) - 1, min(200, len(found))).long()).points[:, :POINTS].contiguous()


def read_back(path, kind, loaded):
    """A file's function from points to logits, by nothing of ours but for Point-MAE's layout."""
    if kind == "onnx":
        session = pytest.importorskip("onnxruntime").InferenceSession(str(path), providers=["CPUExecutionProvider"])
        return lambda points: torch.from_numpy(session.run(None, {"points": points.numpy()})[0])
    if kind == "torchscript":
        return torch.jit.load(str(path))
    if kind == "torch_export":
        return torch.export.load(path).module()
    if kind in ("safetensors", "torch_pointcloud"):
        return load_model(path).model
    return load_foreign(path, loaded.model.architecture, len(loaded.class_names))


def check_what_onnx_tells(path, run, fuse):
    model = pytest.importorskip("onnx").load(path)
    assert [(one.domain, one.version) for one in model.opset_import] == [("", 18)]
    kinds = [node.op_type for node in model.graph.node]
    assert kinds.count("Scan") == kinds.count("TopK") == 1  # FPS, kNN
    assert not (fuse and "BatchNormalization" in kinds)
    shape = [one.dim_param or one.dim_value for one in model.graph.input[0].type.tensor_type.shape.dim]
    assert shape == ["batch", POINTS, 3]
    described = json.loads(next(one.value for one in model.metadata_props if one.key == "description.json"))
    assert described == json.loads((run / "model.json").read_text()) | {"fused_batch_norm": fuse}
    assert b".py" not in path.read_bytes()  # no paths of this machine


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("fuse", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", export.SUFFIXES)
@torch.no_grad()
def test_every_format_gives_the_folded_model_s_logits(run, clouds, tmp_path, capsys, kind, fuse):
    if kind == "onnx":
        for package in ONNX:
            pytest.importorskip(package)
    if kind in ("point_mae", "torch_pointcloud") and fuse:
        pytest.skip("has batch norms of its own")
    path = tmp_path / f"model{export.SUFFIXES[kind]}"
    tool.main([str(run), str(path), "--format", kind, "--json", *["--fuse-batch-norm"] * fuse])
    figures = json.loads(capsys.readouterr().out)
    assert (figures["format"], figures["bytes"], figures.get("opset")) == (
        kind, path.stat().st_size, 18 if kind == "onnx" else None,
    )  # fmt: skip
    assert figures["difference"] < 1e-4
    loaded = load_model(run)
    expected = loaded.model(clouds)
    assert expected.std() > 0.5  # so that 1e-4 is small
    model = read_back(path, kind, loaded)
    found = torch.cat([model(part) for part in (clouds[:1], clouds[1:4], clouds[4:])])  # any batch
    assert (found - expected).abs().max() < 1e-4
    assert torch.equal(found.argmax(1), expected.argmax(1))
    if kind == "onnx":
        check_what_onnx_tells(path, run, fuse)
    left = {path.name} | ({"model.json"} if path.suffix == ".safetensors" else set())
    assert {one.name for one in tmp_path.iterdir()} == left


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "kind", ["torchscript", pytest.param("onnx", marks=pytest.mark.slow)]
)  # ONNX is made by way of torch.export
@pytest.mark.parametrize(
    ("changes", "points"),
    [
        ({"head": "point_bert", "patch_out": 16}, 5),  # fewer points than patches and neighbours: both start over
        ({"head": "linear", "num_groups": 1, "group_size": 1}, 12),
    ],
)
def test_other_architectures_and_few_points(tmp_path, kind, changes, points):
    if kind == "onnx":
        for package in ONNX:
            pytest.importorskip(package)
    small = replace(Architecture(24, 1, 2, 8, 8, patch_width=8, patch_out=24), **changes)
    model = PointTransformerClassifier(small, 3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    written = export.export(
        LoadedModel(model.eval(), ("a", "b", "c"), points, "shapes", "none"),
        tmp_path / f"m{export.SUFFIXES[kind]}",
        kind,
    )
    assert written.difference < 1e-5


def test_the_picks_are_the_operators_bit_for_bit(clouds):
    from pointewa.inference.portable import _gather, _neighbors, _sample_by_loop
    from pointewa.ops import farthest_point_sample, group, knn

    picks = _sample_by_loop(clouds, 32)
    assert torch.equal(picks, farthest_point_sample(clouds, 32, backend="torch"))
    centers = _gather(clouds, picks)
    assert torch.equal(centers, group(clouds, picks))
    ours, theirs = (
        _neighbors(centers, clouds, 8).sort(-1).values,
        knn(centers, clouds, 8, backend="torch").sort(-1).values,
    )
    assert (ours != theirs).any(-1).float().mean() < 1e-3  # where two are equally far, either may be taken


def test_point_mae_s_layout_key_for_key(run, tmp_path, capsys):
    path = tmp_path / "ckpt.pth"
    tool.main([str(run), str(path), "--format", "point_mae"])
    out = capsys.readouterr().out
    assert "trans_dim: 24, depth: 2, num_heads: 2, num_group: 8, group_size: 8" in out
    own = load_model(run).model.state_dict()
    state = torch.load(path, weights_only=True)
    assert list(state) == ["base_model"]
    assert list(state["base_model"]) == [f"module.{name}" for name in own]
    assert all(torch.equal(state["base_model"][f"module.{name}"], value) for name, value in own.items())
    assert not any("expert" in name for name in own)
    evaluate.main([str(run), "--json"])
    expected = json.loads(capsys.readouterr().out)
    small = ["model.width=24", "model.depth=2", "model.heads=2", "model.num_groups=8", "model.group_size=8"]
    evaluate.main([str(path), *small, f"data.num_points={POINTS}", "--json"])
    assert json.loads(capsys.readouterr().out) == expected


def test_torch_pointcloud_s_layout_loads_strictly(run, tmp_path, capsys, monkeypatch, clouds):
    """Into the model that the note says how to build; `tests/models/test_torch_pointcloud.py` compares more logits."""
    models = pytest.importorskip("torch_pointcloud.models")
    path = tmp_path / "model.safetensors"
    tool.main([str(run), str(path), "--format", "torch_pointcloud"])
    (call,) = re.findall(r"its model: (PointMAEClassification\(.*\))$", capsys.readouterr().out, re.M)
    model = eval(call, {"PointMAEClassification": models.PointMAEClassification}).eval()  # what the user would type
    model.load_state_dict(safetensors.torch.load_file(path), strict=True)

    def patches(points, batch, num_groups, group_size, random_start):
        cut = make_patches(points.unflatten(0, (-1, POINTS)), num_groups, group_size)
        return cut.patches, cut.centers

    monkeypatch.setattr("torch_pointcloud.models.point_mae.group", patches)  # its own needs pyg-lib
    with torch.no_grad():
        found = model(None, clouds.flatten(0, 1), torch.arange(len(clouds)).repeat_interleave(POINTS))
        torch.testing.assert_close(found, load_model(run).model(clouds), rtol=0, atol=1e-5)


def fails(arguments, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.run(lambda: tool.main([str(one) for one in arguments]))
    captured = capsys.readouterr()
    assert (exit_.value.code, captured.out, captured.err.count("\n")) == (2, "", 1)
    return captured.err


def test_what_is_refused(run, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    assert "ending in .onnx for onnx" in fails([run, out / "m.pt", "--format", "onnx"], capsys)
    for kind in ("point_mae", "torch_pointcloud"):
        arguments = [run, out / f"m{export.SUFFIXES[kind]}", "--format", kind, "--fuse-batch-norm"]
        assert f"{kind} has batch norms of its own" in fails(arguments, capsys)
    wide = PointTransformerClassifier(Architecture(24, 2, 2, 8, 8, patch_width=8, patch_out=16), 2).eval()
    save_model(tmp_path / "wide.safetensors", LoadedModel(wide, ("a", "b"), 32, "shapes", "none"))
    arguments = [tmp_path / "wide.safetensors", out / "m.safetensors", "--format", "torch_pointcloud"]
    assert "found head=point_mae, patch_out=16, width=24" in fails(arguments, capsys)

    small = Architecture(24, 2, 2, 8, 8, patch_width=8, patch_out=24)
    gated = ewa.to_moe(PointTransformerClassifier(small, 2), 2, "all", mixture=ewa.TopKMoE).eval()
    save_model(tmp_path / "gated.safetensors", LoadedModel(gated, ("a", "b"), 32, "shapes", "none"))
    for kind in ("torchscript", "torch_export", "onnx", "point_mae", "torch_pointcloud"):
        arguments = [tmp_path / "gated.safetensors", out / f"m{export.SUFFIXES[kind]}", "--format", kind]
        assert "gated experts (moe.router=top_k) cannot be folded" in fails(arguments, capsys)
    tool.main([str(tmp_path / "gated.safetensors"), str(tmp_path / "again.safetensors"), "--format", "safetensors"])
    assert "difference of logits 0.0e+00" in capsys.readouterr().out

    pretrained = LoadedModel(MaskedAutoencoder(small, 0.6, 1).eval(), (), 32, "shapes", "none")
    save_model(tmp_path / "p.safetensors", pretrained)
    arguments = [tmp_path / "p.safetensors", out / "m.onnx", "--format", "onnx"]
    assert "expected a classifier, found a masked_autoencoder" in fails(arguments, capsys)

    for kind, more in (("onnx", []), ("point_mae", ["--fuse-batch-norm"])):
        save_model(tmp_path / "t.safetensors", LoadedModel(DiscreteVAE(TINY).eval(), (), 32, "shapes", "none"))
        arguments = [tmp_path / "t.safetensors", out / f"m{export.SUFFIXES[kind]}", "--format", kind, *more]
        assert "expected a classifier, found a dvae, whose weights are written as safetensors" in fails(
            arguments, capsys
        )

    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert "pip install onnx onnxscript onnxruntime" in fails([run, out / "m.onnx", "--format", "onnx"], capsys)
    assert not out.exists() or not list(out.iterdir())


def test_a_tokenizer_is_written_whole(tmp_path, capsys):
    model = DiscreteVAE(TINY).eval()
    save_model(tmp_path / "t.safetensors", LoadedModel(model, (), 32, "shapes", "none", "tokenizer"))
    for kind in ("safetensors", "point_mae"):
        out = tmp_path / f"m{export.SUFFIXES[kind]}"
        tool.main([str(tmp_path / "t.safetensors"), str(out), "--format", kind])
        assert f"{len(model.state_dict())} tensors, all weights" in capsys.readouterr().out
        state = classifier_state(read_weights(out))
        assert state.keys() == model.state_dict().keys()
        assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("wrong", [1e-3, float("nan")])
def test_a_file_with_other_logits_is_removed(run, tmp_path, capsys, monkeypatch, wrong):
    path = tmp_path / "m.pt"
    path.write_text("the old one")
    original = export._WRITERS["torchscript"]

    def changed(loaded, path):
        read = original(loaded, path)
        return lambda points: read(points) + wrong

    monkeypatch.setitem(export._WRITERS, "torchscript", changed)
    message = fails([run, path, "--format", "torchscript"], capsys)
    assert "refused, nothing is written: its logits differ from the model's" in message
    assert [one.name for one in tmp_path.iterdir()] == ["m.pt"]
    assert path.read_text() == "the old one"

    def fused(model):
        model = fuse_batch_norm(model)
        model.cls_head_finetune[-1].bias.data += wrong
        return model

    monkeypatch.setattr(export, "fuse_batch_norm", fused)
    arguments = [run, tmp_path / "m.safetensors", "--format", "safetensors", "--fuse-batch-norm"]
    assert "refused" in fails(arguments, capsys)
    assert [one.name for one in tmp_path.iterdir()] == ["m.pt"]


def test_files_that_read_back_as_another_model_leave_those_that_were_there(run, tmp_path, capsys, monkeypatch):
    path = tmp_path / "m.safetensors"
    path.write_text("the old weights")
    path.with_suffix(".json").write_text("the old description")
    original = export.load_any

    def damaged(path):
        loaded = original(path)
        loaded.model.cls_head_finetune[-1].bias.data += 1e-3
        return loaded

    monkeypatch.setattr(export, "load_any", damaged)
    assert "refused, nothing is written" in fails([run, path, "--format", "safetensors"], capsys)
    assert path.read_text() == "the old weights"
    assert path.with_suffix(".json").read_text() == "the old description"
    assert sorted(one.name for one in tmp_path.iterdir()) == ["m.json", "m.safetensors"]
    monkeypatch.setattr(export, "load_any", original)
    tool.main([str(run), str(path), "--format", "safetensors"])
    assert sorted(one.name for one in tmp_path.iterdir()) == ["m.json", "m.safetensors"]
    assert path.read_bytes() == (run / "model.safetensors").read_bytes()


def test_check_clouds_have_a_batch_of_one_and_repeated_points():
    one, many = export.check_clouds(10)
    assert (one.shape, many.shape) == ((1, 10, 3), (4, 10, 3))
    assert len(np.unique(many[2].numpy(), axis=0)) == 5


def test_in_8_bits(run, tmp_path, capsys, monkeypatch):
    """Smaller, near, on clouds of the training split; and refused, with nothing written, where it is not near."""
    onnx, _ = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    capsys.readouterr()
    out = tmp_path / "int8.onnx"
    tool.main([str(run), str(out), "--format", "onnx", "--int8", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert 95 <= found["agreement"] <= 100
    assert 1e-3 < found["difference"] < 3
    model = onnx.load(out)
    products = {node.output[0]: node for node in model.graph.node if node.op_type in ("MatMul", "Gemm")}
    quantised = {node.input[0] for node in model.graph.node if node.op_type == "QuantizeLinear"}
    assert len(quantised) > 10  # activations of two blocks and of the patch encoder
    kinds = {one.data_type for one in model.graph.initializer if len(one.dims) == 2}
    assert onnx.TensorProto.INT8 in kinds
    assert onnx.TensorProto.FLOAT in kinds  # products with coordinates, and that of the logits
    assert products
    told = {one.key: one.value for one in model.metadata_props}
    assert json.loads(told["description.json"])["fused_batch_norm"]
    assert "int8" in told
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shapes, "PER_CLASS", {"train": 8, "test": 4})
        test = datasets.load("shapes", "", "test", POINTS)
    points, loaded = test.points[:, :POINTS].contiguous(), load_model(run)
    with torch.no_grad():
        same = read_back(out, "onnx", loaded)(points).argmax(1) == loaded.model(points).argmax(1)
    assert same.float().mean() > 0.9
    monkeypatch.setattr("pointewa.inference.int8.agreement", lambda *_: 94.9)
    kept = out.read_bytes()
    with pytest.raises(CheckpointError, match=r"in 8 bits 94\.9 % of its classes .* at least 95 % are expected"):
        tool.main([str(run), str(out), "--format", "onnx", "--int8"])
    assert out.read_bytes() == kept
    assert [path.name for path in tmp_path.iterdir()] == ["int8.onnx"]


def test_8_bits_are_for_onnx_and_data_for_8_bits(run, tmp_path):
    with pytest.raises(ConfigError, match=r"--int8: expected --format onnx .* found torchscript of a classifier"):
        tool.main([str(run), str(tmp_path / "a.pt"), "--format", "torchscript", "--int8"])
    with pytest.raises(ConfigError, match="--overrides: an export without --int8 does not use it"):
        tool.main([str(run), str(tmp_path / "a.onnx"), "--format", "onnx", "data.root=x"])
    assert not list(tmp_path.iterdir())
