"""`from_pretrained`, `save_pretrained`, `push_to_hub`: what comes back is the model that was saved, bit for bit."""

import json
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch

import pointewa
import pointewa.ewa as ewa
from pointewa.errors import CheckpointError, ConfigError, UserError
from pointewa.models import Architecture, MaskedAutoencoder, PointTransformerClassifier
from pointewa.runs.description import LoadedModel
from pointewa.runs.pretrained import from_pretrained, save_pretrained
from pointewa.runs.weights import save_model

SMALL = Architecture(24, 4, 2, 8, 8, patch_width=8, patch_out=24)
NAMES = ("ball", "box", "ring")


def folded():
    """A classifier that was a mixture of experts in training."""
    model = ewa.to_moe(PointTransformerClassifier(SMALL, len(NAMES)), 3, "every_other")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        for _ in range(3):
            model.train()(torch.randn(16, 64, 3))
    return pointewa.Predictor(LoadedModel(ewa.fold(model).eval(), NAMES, 64, "shapes", "unit_sphere"))


@pytest.fixture
def saved(tmp_path):
    model = folded()
    assert model.save_pretrained(tmp_path / "a") is None
    return model, tmp_path / "a"


def test_a_folded_model_comes_back_bit_for_bit(saved):
    model, folder = saved
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    clouds = torch.randn(5, 200, 3)
    expected = model.logits(clouds)
    assert expected.std() > 0.1
    for found in (pointewa.Predictor.from_pretrained(folder, "cpu"), pointewa.load(folder, "cpu"),
                  pointewa.Predictor.from_pretrained(str(folder), device="cpu")):  # fmt: skip
        assert torch.equal(found.logits(clouds), expected)
        assert type(found.model) is PointTransformerClassifier
        assert (found.class_names, found.num_points) == (NAMES, 64)
    assert json.loads((folder / "config.json").read_text()) == model.loaded.description()


def test_saving_again_keeps_the_card(saved):
    _, folder = saved
    (folder / "README.md").write_text("mine")
    other = folded()
    other.save_pretrained(folder)
    assert (folder / "README.md").read_text() == "mine"
    cloud = torch.randn(100, 3)
    assert torch.equal(pointewa.Predictor.from_pretrained(folder, "cpu").logits(cloud), other.logits(cloud))


def test_an_autoencoder_too(tmp_path):
    model = MaskedAutoencoder(SMALL, 0.6, 1).eval()
    save_pretrained(LoadedModel(model, (), 64, "shapes", "none", "masked_autoencoding"), tmp_path)
    found, clouds, order = from_pretrained(tmp_path).model, torch.randn(2, 64, 3), torch.rand(2, 8).argsort(1)
    assert torch.equal(found.reconstruct(clouds, order).predicted, model.reconstruct(clouds, order).predicted)
    with pytest.raises(CheckpointError, match="expected a classifier, found a masked_autoencoder"):
        pointewa.Predictor.from_pretrained(tmp_path)


def no_config(folder):
    (folder / "config.json").unlink()


def of_transformers(folder):
    (folder / "config.json").write_text('{"architectures": ["ViTModel"], "model_type": "vit", "hidden_size": 768}')


DAMAGE = {
    "no config": (no_config, "missing: it says of which architecture"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "expected a run folder with"),
    "another library's": (of_transformers, "its description of the model is not valid"),
    "a list": (lambda folder: (folder / "config.json").write_text("[]"), "its description of the model is not valid"),
    "no JSON": (lambda folder: (folder / "config.json").write_text("{"), "not readable as JSON"),
    "cut off": (lambda folder: (folder / "model.safetensors").write_bytes(b"\x10\0\0"), "the file is damaged"),
    "empty": (shutil.rmtree, "no such folder"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_what_is_no_model_of_ours_is_one_line(saved, name):
    _, folder = saved
    damage, message = DAMAGE[name]
    damage(folder)
    with pytest.raises(UserError, match=message) as raised:
        pointewa.Predictor.from_pretrained(folder)
    assert str(folder) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_run_s_folder_is_not_overwritten(tmp_path):
    model = folded()
    save_model(tmp_path / "model.safetensors", model.loaded)
    before = (tmp_path / "model.safetensors").read_bytes()
    with pytest.raises(ConfigError, match="found a run's: name another one"):
        folded().save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_the_network_s_part(saved, tmp_path, monkeypatch):
    """huggingface_hub is given what it expects, and its errors are one line."""
    hub = pytest.importorskip("huggingface_hub")
    model, _ = saved
    asked = []

    class Api:
        def __init__(self, token):
            asked.append(token)

        def create_repo(self, repo_id, *, private, exist_ok):
            asked.append((repo_id, private, exist_ok))
            return SimpleNamespace(repo_id=f"me/{repo_id}")

        def upload_folder(self, *, repo_id, folder_path, commit_message, revision, create_pr):
            shutil.copytree(folder_path, tmp_path / repo_id)
            return f"https://hub/{repo_id}"

    monkeypatch.setattr(hub, "HfApi", Api)
    assert model.save_pretrained(tmp_path / "b", push_to_hub=True, private=True, token="t") == "https://hub/me/b"
    assert asked == ["t", ("b", True, True)]
    assert sorted(path.name for path in (tmp_path / "me" / "b").iterdir()) == [
        "README.md", "config.json", "model.safetensors",
    ]  # fmt: skip

    def download(name, *, allow_patterns, **options):
        assert (name, options["revision"]) == ("me/b", "main")
        return str(tmp_path / "me" / "b")

    monkeypatch.setattr(hub, "snapshot_download", download)
    cloud = torch.randn(100, 3)
    found = pointewa.Predictor.from_pretrained("me/b", "cpu", revision="main")
    assert torch.equal(found.logits(cloud), model.logits(cloud))

    def offline(*_, **__):
        raise hub.errors.LocalEntryNotFoundError("no connection\nand more")

    monkeypatch.setattr(hub, "snapshot_download", offline)
    monkeypatch.setattr(Api, "create_repo", offline)
    for use in (lambda: pointewa.Predictor.from_pretrained("me/b"), lambda: model.push_to_hub("me/b")):
        with pytest.raises(CheckpointError, match="no connection") as raised:
            use()
        assert "\n" not in str(raised.value)


def test_local_folders_need_no_huggingface_hub(saved, monkeypatch):
    model, folder = saved
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert pointewa.Predictor.from_pretrained(folder, "cpu").class_names == NAMES
    for use in (lambda: pointewa.Predictor.from_pretrained("me/b"), lambda: model.push_to_hub("me/b")):
        with pytest.raises(ConfigError, match="pip install huggingface_hub"):
            use()
    for name in ("./nowhere", "nowhere", "a/b/c"):
        with pytest.raises(CheckpointError, match="no such folder"):
            pointewa.Predictor.from_pretrained(name)
