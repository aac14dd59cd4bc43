"""Published models by name, from the cache that torch-pointcloud keeps: what is known of them, and what is refused."""

import dataclasses
import json
import sys

import h5py
import numpy as np
import pytest
import safetensors.torch
import torch

import pointewa
from pointewa.datasets.layouts import shapes
from pointewa.datasets.subjects import Subjects
from pointewa.errors import CheckpointError
from pointewa.models import Architecture, PointTransformerClassifier
from pointewa.models.foreign.published import PUBLISHED
from pointewa.models.foreign.torch_pointcloud import to_ours, to_theirs
from pointewa.ops import canonical_order, farthest_point_sample, group, unit_sphere
from pointewa.runs.weights import init_from, load_any, load_model
from pointewa.tools import cli, evaluate, train

models = pytest.importorskip("torch_pointcloud.models")
registry = pytest.importorskip("torch_pointcloud.models._registry")

MAE, BERT = "point-mae-base.modelnet40.yatian-pang", "point-bert-base.modelnet40.xumin-yu"
SCANS, PRETRAINED = "point-bert-base.scanobjectnn-objonly.xumin-yu", "point-mae-base.pretrain.yatian-pang"
SMALL = {"width": 24, "depth": 2, "heads": 2, "num_groups": 16, "group_size": 8}
SIZES = ["model.preset=point_mae", "model.patch_out=24", *(f"model.{key}={value}" for key, value in SMALL.items())]


def architecture(name):
    bert = "bert" in name
    return Architecture(**SMALL, patch_out=16 if bert else 24, head="point_bert" if bert else "point_mae")


def randomized(model):
    for key, value in model.state_dict().items():
        if value.is_floating_point():
            noise = torch.randn_like(value)
            value.copy_(noise.abs() + 0.5 if key.endswith("running_var") else value + 0.2 * noise)
    return model.eval()


def cached(folder, name, state):
    """A file where torch-pointcloud has it after a download."""
    path = registry.cache_path(registry.model_info(name)["weights"]["url"])
    assert path.is_relative_to(folder)
    path.parent.mkdir(parents=True)
    safetensors.torch.save_file(state, path)
    return path


@pytest.fixture(autouse=True)
def hub(tmp_path, monkeypatch):
    """A cache of its own, no network, and small models in place of the published ones."""

    def offline(url, *_, **__):
        raise OSError(f"<urlopen error [Errno -2] Name or service not known: {url}>")

    monkeypatch.setattr(registry, "MODELS_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(registry, "download_url", offline)
    for name in PUBLISHED:
        small = dataclasses.replace(PUBLISHED[name], architecture=architecture(name))
        monkeypatch.setitem(PUBLISHED, name, small)
    return tmp_path / "cache"


def classifier(hub, name, classes):
    model = randomized(PointTransformerClassifier(architecture(name), classes))
    return model, cached(hub, name, to_theirs(model.state_dict(), architecture(name)))


@pytest.mark.parametrize("name", [MAE, BERT])
@torch.no_grad()
def test_a_cloud_is_prepared_as_its_transform_says(hub, name):
    """Point-BERT's clouds were scaled by all points, Point-MAE's by those that are left after sampling."""
    model, _ = classifier(hub, name, 40)
    found = pointewa.load(f"hub:{name}", "cpu")
    assert (found.num_points, found.class_names[0], found.class_names[-1]) == (1024, "airplane", "xbox")
    cloud = torch.rand(1, 1500, 3) ** 3 * 4 + 2
    cloud = group(cloud, canonical_order(cloud))
    sample = group(cloud, farthest_point_sample(cloud, 1024))
    by_sample, by_all = unit_sphere(sample), group(unit_sphere(cloud), farthest_point_sample(cloud, 1024))
    assert (by_sample - by_all).abs().max() > 0.01
    expected = model(by_sample if name == MAE else by_all)
    torch.testing.assert_close(found.logits(cloud), expected, rtol=0, atol=1e-4)
    assert (found.logits(cloud) - model(by_all if name == MAE else by_sample)).abs().max() > 1e-3


def test_the_40_outputs_for_15_classes(hub):
    """Point-BERT's ScanObjectNN files: the outputs beyond the set's classes are left out, with a word."""
    model, _ = classifier(hub, SCANS, 40)
    with pytest.warns(UserWarning, match="40 outputs for the 15 classes of scanobjectnn"):
        found = pointewa.load(f"hub:{SCANS}", "cpu")
    assert (found.num_points, found.class_names[0], found.class_names[-1]) == (1024, "bag", "toilet")
    cloud = torch.randn(1, 1024, 3)
    cloud = group(cloud, canonical_order(cloud))
    torch.testing.assert_close(found.logits(cloud), model(cloud)[:, :15])


def test_the_autoencoder(hub):
    sizes = {"embed_dim": 24, "encoder_depth": 2, "num_heads": 2, "decoder_num_heads": 2}
    source = randomized(models.PointMAEPretraining(0, num_groups=16, group_size=8, **sizes))
    cached(hub, PRETRAINED, source.state_dict())
    loaded = load_any(f"hub:{PRETRAINED}")
    assert (loaded.task, loaded.dataset, loaded.class_names) == ("masked_autoencoding", "shapenet55", ())
    assert (loaded.model.mask_ratio, len(loaded.model.MAE_decoder.blocks)) == (0.6, 4)
    for key, value in to_ours(source.state_dict()).items():
        assert torch.equal(loaded.model.state_dict()[key], value)
    with pytest.raises(CheckpointError, match="expected a classifier, found a masked_autoencoder"):
        pointewa.load(f"hub:{PRETRAINED}")


@pytest.fixture
def scans(tmp_path):
    """The variants differ in their clouds."""
    for number, (folder, name) in enumerate([("main_split_nobg", ""), ("main_split", "_augmentedrot_scale75")]):
        (tmp_path / "scans" / folder).mkdir(parents=True)
        with h5py.File(tmp_path / "scans" / folder / f"test_objectdataset{name}.h5", "w") as h5:
            h5["data"] = np.random.default_rng(number).normal(size=(30, 1100, 3)).astype(np.float32)
            h5["label"] = np.arange(30) % 15
    return tmp_path / "scans"


@pytest.mark.filterwarnings("ignore:.*40 outputs")
def test_it_is_evaluated_on_its_own_variant(hub, scans, capsys):
    classifier(hub, SCANS, 40)
    own = Subjects(f"hub:{SCANS}", overrides=[f"data.root={scans}", "train.device=cpu"])
    assert (own.config.data.name, own.config.data.variant, own.num_points) == ("scanobjectnn", "obj_only", 1024)
    with h5py.File(scans / "main_split_nobg" / "test_objectdataset.h5") as h5:
        cloud = {tuple(point) for point in h5["data"][0].tolist()}
    (batch,) = own.batches()
    assert {tuple(point) for point in batch.points[0].tolist()} < cloud  # as it comes, only fewer points
    other = Subjects(f"hub:{SCANS}", overrides=[f"data.root={scans}", "data.variant=pb_t50_rs", "train.device=cpu"])
    assert other.config.data.variant == "pb_t50_rs"
    evaluate.main([f"hub:{SCANS}", f"data.root={scans}", "train.device=cpu", "--json"])
    result = json.loads(capsys.readouterr().out)
    assert (result["dataset"], result["objects"], result["restricted"]) == ("scanobjectnn", 30, False)


def write_modelnet40(path):
    with h5py.File(path, "w") as h5:
        h5.attrs["shape_names"] = list(PUBLISHED[MAE].class_names)
        h5["test/data"] = np.random.default_rng(0).random(size=(40, 1500, 3)).astype(np.float32) ** 3
        h5["test/label"], h5["test/name"] = np.arange(40), [str(i) for i in range(40)]


@torch.no_grad()
def test_its_evaluation_sees_what_pointewa_load_sees(hub, tmp_path):
    model, _ = classifier(hub, MAE, 40)
    write_modelnet40(tmp_path / "modelnet40.h5")
    subjects = Subjects(f"hub:{MAE}", overrides=[f"data.root={tmp_path}", "train.device=cpu"])
    (batch,) = subjects.batches()
    torch.testing.assert_close(batch.points.mean(1), torch.zeros(40, 3), rtol=0, atol=1e-5)
    assert batch.points.shape == (40, 1024, 3)
    found = subjects.evaluator.plain().logits
    torch.testing.assert_close(found, model(batch.points))
    expected = pointewa.load(f"hub:{MAE}", "cpu").logits(batch.points)
    assert (found.argmax(1) == expected.argmax(1)).float().mean() > 0.8  # FPS starts elsewhere
    points = subjects.items(["3"], 1)[0].points
    torch.testing.assert_close(points, batch.points[3])


def test_a_file_in_a_folder_of_its_name_needs_no_package(hub, tmp_path, monkeypatch):
    _, path = classifier(hub, MAE, 40)
    monkeypatch.setitem(sys.modules, "torch_pointcloud.models", None)
    for place in (f"{MAE}/model.safetensors", f"x/{MAE}.safetensors",
                  f"models--torch-pointcloud--{MAE}/snapshots/5e6a/model.safetensors"):  # fmt: skip
        copy = tmp_path / "by hand" / place
        copy.parent.mkdir(parents=True)
        copy.write_bytes(path.read_bytes())
        assert load_model(copy).normalize == "unit_sphere_of_sample"
    assert load_model(tmp_path / "by hand" / MAE).num_points == 1024  # the folder itself
    with pytest.raises(CheckpointError, match=r"package that is missing.*pip install torch-pointcloud==0\.0\.18"):
        pointewa.load(f"hub:{MAE}")


def test_a_file_of_no_known_name_is_evaluated_by_a_configuration(hub, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(shapes, "PER_CLASS", {"train": 8, "test": 4})
    model = randomized(PointTransformerClassifier(architecture(BERT), 17))
    path = tmp_path / "mine.safetensors"
    state = to_theirs(model.state_dict(), architecture(BERT))
    safetensors.torch.save_file(state, path)
    with pytest.raises(CheckpointError, match=r"mine\.safetensors: .*do not say their heads, patches, points, classes"):
        pointewa.load(path)
    keys = [*SIZES, "model.head=point_bert", "model.patch_out=16", "data.num_points=64"]
    keys = [*keys, "data.name=shapes", "train.device=cpu"]
    evaluate.main([str(path), *keys, "--json"])
    found = json.loads(capsys.readouterr().out)
    torch.save({"base_model": model.state_dict()}, tmp_path / "mine.pth")
    evaluate.main([str(tmp_path / "mine.pth"), *keys, "--json"])
    assert json.loads(capsys.readouterr().out) == found


def test_a_training_starts_from_it(hub, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shapes, "PER_CLASS", {"train": 4, "test": 2})
    model, _ = classifier(hub, MAE, 40)
    keys = [*SIZES, "data.num_points=64", "train.device=cpu", "train.epochs=1", "train.lr=1e-12"]
    train.main([*keys, f"train.init_from=hub:{MAE}", f"run.dir={tmp_path}", "run.name=a", "run.report=false",
                "ewa.enabled=false", "train.warmup_epochs=0", "train.min_lr=0", "--json"])  # fmt: skip
    found = load_model(tmp_path / "a").model
    torch.testing.assert_close(found.blocks.blocks[1].mlp.fc1.weight, model.blocks.blocks[1].mlp.fc1.weight)
    target = PointTransformerClassifier(architecture(MAE), 40)
    assert init_from(target, f"hub:{MAE}").fresh == []
    assert torch.equal(target.cls_head_finetune[8].weight, model.cls_head_finetune[8].weight)


def fails(capsys, *arguments):
    with pytest.raises(SystemExit) as exit_:
        cli.run(lambda: evaluate.main([*arguments]))
    captured = capsys.readouterr()
    assert (exit_.value.code, captured.out, captured.err.count("\n")) == (2, "", 1)
    return captured.err


def test_what_is_refused(hub, capsys):
    message = fails(capsys, f"hub:{MAE}")
    assert "Could not download weights" in message
    assert str(hub) in message  # where to place the file
    for name in ("pointgpt-s.modelnet40.guangyan-chen", "point-mae-base.shapenetpart.yatian-pang", ""):
        assert f"hub:{name}: expected hub: and one of point-bert-base.modelnet40-4k.xumin-yu, " in fails(
            capsys, f"hub:{name}"
        )
    path = cached(hub, BERT, {"encoder.local_mlp.lins.0.weight": torch.ones(2, 2), "blocks.sos": torch.ones(2)})
    assert "weights of PointGPT by torch-pointcloud, which are not read here" in fails(capsys, f"hub:{BERT}")
    path.write_bytes(path.read_bytes()[:50])
    assert "the file is damaged" in fails(capsys, f"hub:{BERT}")
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 88431234\n")
    assert "Git LFS pointer" in fails(capsys, f"hub:{BERT}")


def test_of_point_bert_s_pre_training_only_the_encoder_is_used(hub):
    name = "point-bert-base.pretrain.xumin-yu"
    sizes = {"embed_dim": 24, "depth": 2, "num_heads": 2, "encoder_dims": 16, "num_tokens": 9}
    source = randomized(models.PointBERTPretraining(0, **sizes))
    cached(hub, name, source.state_dict())
    with pytest.raises(CheckpointError, match=r"a pre-training of Point-BERT.*train\.init_from="):
        load_any(f"hub:{name}")
    target = PointTransformerClassifier(architecture(name), 5)
    assert {key.split(".")[0] for key in init_from(target, f"hub:{name}").fresh} == {"cls_head_finetune"}
    assert torch.equal(target.norm.weight, source.norm.weight)
