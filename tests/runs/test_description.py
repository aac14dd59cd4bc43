"""What is wrong with a description, and what is wrong with the code of the model that it describes."""

import json

import pytest
import torch

from pointewa.errors import CheckpointError
from pointewa.models import Architecture, PointTransformerClassifier, registry
from pointewa.runs.description import LoadedModel
from pointewa.runs.recorded import config_of
from pointewa.runs.weights import load_model, save_model

SMALL = Architecture(8, 2, 2, 4, 4, patch_width=8, patch_out=8)


@pytest.fixture
def path(tmp_path):
    """A model that was saved."""
    model = PointTransformerClassifier(SMALL, 3)
    save_model(tmp_path / "model.safetensors", LoadedModel(model, ("a", "b", "c"), 64, "shapes", "none"))
    return tmp_path / "model.safetensors"


@pytest.mark.parametrize("kind", [AttributeError, TypeError, RuntimeError, OverflowError, KeyError])
def test_a_bug_in_the_constructor_of_a_model_is_not_taken_for_a_bad_file(path, monkeypatch, kind):
    class Planted(PointTransformerClassifier):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            raise kind("planted")

    monkeypatch.setattr(registry, "PointTransformerClassifier", Planted)
    with pytest.raises(kind, match="planted") as error:
        load_model(path)
    assert error.traceback[-1].name == "__init__"


@pytest.mark.parametrize("kind", [AttributeError, TypeError, RuntimeError])
def test_a_bug_in_loading_the_weights_is_not_taken_for_a_bad_file(path, monkeypatch, kind):
    def planted(*arguments, **options):
        raise kind("planted")

    monkeypatch.setattr(PointTransformerClassifier, "load_state_dict", planted)
    with pytest.raises(kind, match="planted"):
        load_model(path)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"architecture": {"width": 10**12, "heads": 1}}, "width is out of range"),
        ({"architecture": {"mlp_ratio": 10**400}}, "mlp_ratio is out of range"),
        ({"architecture": {"mlp_ratio": float("nan")}}, "mlp_ratio is out of range"),
        ({"architecture": {"mlp_ratio": -1.0}}, "mlp_ratio must be above 0 and at most 100, got -1.0"),
        ({"architecture": {"size": 3}}, "architecture: unknown keys 'size'"),
        ({"architecture": None}, "architecture: expected dict, found NoneType"),
        ({"dataset": None}, "dataset: expected str, found NoneType"),
        ({"fused_batch_norm": [1]}, "fused_batch_norm: expected bool, found list"),
        ({"experts": []}, "experts: expected dict, found list"),
        ({"experts": {"num_experts": 10**12, "top_k": 1, "layers": [1]}}, "num_experts is out of range"),
        ({"experts": {"num_experts": 2, "top_k": 1, "layers": ["1"]}}, "layers: expected int, found str"),
        ({"experts": {"num_experts": 2, "top_k": 1, "layers": [7]}}, "selects [7] of the model's 2 FFNs"),
        ({"experts": {"num_experts": 2, "layers": [1]}}, "top_k: expected int, found NoneType"),
        ({"masked": {"mask_ratio": 0.6, "decoder_depth": 10**9}}, "decoder_depth is out of range"),
        ({"masked": {"mask_ratio": 0.0, "decoder_depth": 1}}, "mask_ratio must leave both"),
    ],
)
def test_values_that_no_model_can_have(path, change, says):
    description = json.loads(path.with_suffix(".json").read_text())
    if isinstance(change.get("architecture"), dict):
        change = {"architecture": description["architecture"] | change["architecture"]}
    if "masked" in change:  # as version 0.1 said it
        description = {key: value for key, value in description.items() if key not in ("model", "task")}
    path.with_suffix(".json").write_text(json.dumps(description | change))
    with pytest.raises(CheckpointError) as error:
        load_model(path)
    assert says in str(error.value)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda weights: weights.pop("cls_pos"), "Missing: 'cls_pos'"),
        (lambda weights: weights.update(more=torch.ones(1)), "unknown: 'more'"),
        (lambda weights: weights.update(cls_pos=torch.ones(1, 1, 9)), "cls_pos: expected .*8.*, found .*9"),
        (lambda weights: weights.update(cls_pos=torch.ones(1, 1, 8).double()), "expected torch.float32, .*float64"),
    ],
)
def test_weights_that_do_not_fit(path, change, says):
    from safetensors.torch import load_file, save_file

    weights = load_file(path)
    change(weights)
    save_file(weights, path)
    with pytest.raises(CheckpointError, match=f"of another architecture than described.*{says}"):
        load_model(path)


def read(run, dataset, normalize, *overrides):
    return config_of(LoadedModel(torch.nn.Module(), ("a", "b"), 64, dataset, normalize), run, [], overrides).data


@pytest.mark.parametrize("normalize", ["unit_sphere", "center", "none"])
def test_a_models_own_set_is_normalised_as_in_its_training(tmp_path, normalize):
    """Whatever is usual for the set, with the configuration of the run beside it and without."""
    for recorded in (None, "normalize: auto", f"normalize: {normalize}"):
        if recorded:
            (tmp_path / "config.yaml").write_text(f"data:\n  name: folder\n  root: mine\n  {recorded}\n")
        found = read(tmp_path, "folder", normalize)
        assert (found.name, found.normalize, found.num_points) == ("folder", normalize, 64)
        assert found.root == ("mine" if recorded else "data")
        assert read(tmp_path, "folder", normalize, "data.normalize=auto").normalize == "auto"
        other = read(tmp_path, "folder", normalize, "data.name=scanobjectnn")
        assert other.normalize == ("center" if normalize == "center" else "auto")


@pytest.mark.parametrize("normalize", ["unit_sphere_of_sample", "minus_one_to_one"])
def test_what_no_key_says_is_left_to_the_evaluation(tmp_path, normalize):
    assert read(tmp_path, "modelnet40", normalize).normalize == "auto"
