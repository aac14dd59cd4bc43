"""A segmenter for others: programs of points and categories give the model's logits."""

import json

import pytest
import torch

from pointewa import datasets
from pointewa.inference.export import SUFFIXES, export
from pointewa.models import Architecture, PointTransformerSegmenter
from pointewa.runs.description import LoadedModel

SMALL = Architecture(24, 3, 2, 8, 8, patch_width=8, patch_out=24)
POINTS = 64


@pytest.fixture(scope="module")
def clouds(request):
    """Real clouds with their parts if there are any, else procedural ones."""
    try:
        root = request.getfixturevalue("real_data")
        found = datasets.load("labeled_psb", str(root), "test", POINTS, parts=True)
    except pytest.skip.Exception:
        found = datasets.load("shapes", "", "test", POINTS, parts=True)
    return found.take(range(0, len(found), 4))


def segmenter(decoder, clouds):
    """With weights large enough that points are told apart, and batch norms that have seen some."""
    torch.manual_seed(0)
    model = PointTransformerSegmenter(SMALL, clouds.parts, len(clouds.class_names), decoder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        model.head[-1].weight.mul_(10)
        for part in range(3):
            model.train()(clouds.points[part::3, :POINTS], clouds.labels[part::3])
    described = (POINTS, "shapes", "unit_sphere", "part_segmentation")
    return LoadedModel(model.eval(), clouds.class_names, *described)


def read_back(path, kind):
    if kind == "onnx":
        session = pytest.importorskip("onnxruntime").InferenceSession(str(path), providers=["CPUExecutionProvider"])
        return lambda points, labels: torch.from_numpy(
            session.run(None, {"points": points.numpy(), "labels": labels.numpy()})[0]
        )
    return torch.jit.load(str(path)) if kind == "torchscript" else torch.export.load(path).module()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("decoder", ["light", pytest.param("point_mae", marks=pytest.mark.slow), "point_bert"])
@pytest.mark.parametrize("kind", ["torchscript", pytest.param("torch_export", marks=pytest.mark.slow), "onnx"])
@torch.no_grad()
def test_a_program_gives_the_segmenter_s_logits(clouds, tmp_path, kind, decoder):
    if kind == "onnx":
        for package in ("onnx", "onnxscript", "onnxruntime"):
            pytest.importorskip(package)
    loaded, path = segmenter(decoder, clouds), tmp_path / f"model{SUFFIXES[kind]}"
    written = export(loaded, path, kind)
    assert written.difference < 1e-4
    points, labels = clouds.points[:, :POINTS].contiguous(), clouds.labels
    expected = loaded.model(points, labels)
    assert expected.std((0, 1)).max() > 0.5  # so that 1e-4 is small
    program = read_back(path, kind)
    found = torch.cat([program(points[part], labels[part]) for part in (slice(1), slice(1, 4), slice(4, None))])
    assert (found - expected).abs().max() < 1e-4
    assert not torch.equal(program(points[:1], (labels[:1] + 1) % len(clouds.class_names)), found[:1])
    for unknown in (-1, len(clouds.class_names)):
        with pytest.raises(Exception, match=r"(?i)index|indices|bound"):  # each program's own error
            program(points[:1], torch.tensor([unknown]))
    if kind == "onnx":
        model = pytest.importorskip("onnx").load(path)
        assert [one.name for one in model.graph.input] == ["points", "labels"]
        described = json.loads(next(one.value for one in model.metadata_props if one.key == "description.json"))
        assert described["parts"]["names"] == list(clouds.parts.names)


@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_the_batch_norms_of_the_category_can_be_fused(clouds, tmp_path):
    loaded = segmenter("light", clouds)
    assert export(loaded, tmp_path / "fused.pt", "torchscript", fuse=True).difference < 1e-4
