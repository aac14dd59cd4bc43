"""Weights of the package torch-pointcloud: the same numbers from the same clouds, in its code and in ours."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pointewa import datasets
from pointewa.datasets.layouts import modelnet40, scanobjectnn
from pointewa.errors import CheckpointError
from pointewa.models import (
    PRESETS,
    TOKENIZERS,
    Architecture,
    DiscreteVAE,
    MaskedAutoencoder,
    PointTransformerClassifier,
    load_weights,
)
from pointewa.models.foreign.published import PUBLISHED
from pointewa.models.foreign.torch_pointcloud import is_theirs, to_ours, to_theirs

theirs = pytest.importorskip("torch_pointcloud.models")
transforms = pytest.importorskip("torch_pointcloud.transforms")

CLASSES = 7
SMALL = {"embed_dim": 24, "num_heads": 2, "num_groups": 16, "group_size": 8}
PATCH = {"local_channels": (8, 16), "global_channels": (32,)}
ARCH = Architecture(width=24, depth=3, heads=2, num_groups=16, group_size=8, patch_width=8, patch_out=24)
BERT = dataclasses.replace(ARCH, patch_out=16, head="point_bert")


def naive_group(pos, batch, num_groups, group_size, random_start=False, return_indices=False):
    """Its patches as it documents them, cloud by cloud; its own need operators (pyg-lib) that must be compiled."""
    assert not random_start
    patches, centers = [], []
    for number in range(int(batch.max()) + 1):
        points = pos[batch == number].double().numpy()
        picks = [0]
        while len(picks) < num_groups:
            picks.append(np.min([((points - points[pick]) ** 2).sum(1) for pick in picks], axis=0).argmax())
        nearest = [((points - points[pick]) ** 2).sum(1).argsort(kind="stable")[:group_size] for pick in picks]
        patches.append(points[nearest] - points[picks][:, None])
        centers.append(points[picks])
    return torch.from_numpy(np.array(patches)).float(), torch.from_numpy(np.array(centers)).float()


@pytest.fixture(autouse=True)
def _naive_patches(monkeypatch):
    for module in ("point_mae", "point_bert"):
        monkeypatch.setattr(f"torch_pointcloud.models.{module}.group", naive_group)


@pytest.fixture
def clouds(request):
    """Real clouds if there are any, else procedural ones."""
    try:
        found = datasets.load("modelnet40", str(request.getfixturevalue("real_data")), "test", 1024)
    except pytest.skip.Exception:
        found = datasets.load("shapes", "", "test", 1024)
    return found.take(torch.linspace(0, len(found) - 1, 4).long()).points[:, :1024].contiguous()


def randomized(model, seed=0):
    """All parameters and statistics, so that no two layers could be taken for each other."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            noise = torch.randn(value.shape, generator=generator)
            value.copy_(
                noise.abs() + 0.5 if name.endswith("running_var") else value + 0.3 * noise / value[0].numel() ** 0.5
            )
    return model.eval()


def mae_classifier(**changes):
    local = {f"encoder_{key}": value for key, value in PATCH.items()}
    return theirs.PointMAEClassification(0, CLASSES, **SMALL | local | {"depth": 3} | changes)


def bert_classifier(**changes):
    local = {f"token_{key}": value for key, value in PATCH.items()}
    return theirs.PointBERTClassification(0, CLASSES, encoder_dims=16, **SMALL | local | {"depth": 3} | changes)


def logits(model, clouds):
    with torch.no_grad():
        return model(None, clouds.flatten(0, 1), torch.arange(len(clouds)).repeat_interleave(clouds.shape[1]))


MODELS = {
    "point_mae": (mae_classifier, ARCH), "point_bert": (bert_classifier, BERT),
    "one layer as head": (lambda: bert_classifier(head_channels=None), dataclasses.replace(BERT, head="linear")),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_classifier_gives_the_same_logits(clouds, name):
    build, architecture = MODELS[name]
    source = randomized(build())
    target = PointTransformerClassifier(architecture, CLASSES).eval()
    report = load_weights(target, source.state_dict())
    assert (report.fresh, report.unused) == ([], [])
    expected = logits(source, clouds)
    assert expected.std() > 0.1
    torch.testing.assert_close(target(clouds), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["point-mae-base.modelnet40.yatian-pang", "point-bert-base.modelnet40.xumin-yu"])
@torch.no_grad()
def test_a_published_architecture_gives_the_same_logits(clouds, name):
    source = randomized(theirs.create_model(name))
    target = PointTransformerClassifier(PUBLISHED[name].architecture, 40).eval()
    assert load_weights(target, source.state_dict()).fresh == []
    expected = logits(source, clouds)
    assert expected.std() > 0.1
    torch.testing.assert_close(target(clouds), expected, rtol=0, atol=1e-5)


def pretraining():
    local = {f"encoder_{key}": value for key, value in PATCH.items()}
    sizes = SMALL | local | {"encoder_depth": 3, "decoder_depth": 2, "decoder_num_heads": 2}
    return randomized(theirs.PointMAEPretraining(0, **sizes))


@torch.no_grad()
def test_the_autoencoder_reconstructs_the_same(clouds, monkeypatch):
    source, target = pretraining(), MaskedAutoencoder(ARCH, 0.6, 2).eval()
    target.load_state_dict(to_ours(source.state_dict()))
    order = torch.rand(len(clouds), 16).argsort(1)
    order = torch.cat([part.sort(1).values for part in order.tensor_split([target.num_visible], 1)], 1)
    mask = torch.ones(len(clouds), 16, dtype=torch.bool).scatter_(1, order[:, : target.num_visible], False)
    monkeypatch.setattr(source.MAE_encoder, "mask_center_rand", lambda center: mask)
    predicted, true, _, _ = logits(source, clouds)
    found = target.reconstruct(clouds, order)
    shift = naive_group(clouds.flatten(0, 1), torch.arange(len(clouds)).repeat_interleave(1024), 16, 8)[1][mask]
    assert predicted.std() > 0.1
    predicted, true = (part.view(-1, 8, 3) + shift[:, None] for part in (predicted, true))
    torch.testing.assert_close(found.predicted.flatten(0, 1), predicted, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.true.flatten(0, 1), true, rtol=0, atol=1e-5)


@torch.no_grad()
def test_the_tokenizer_has_the_same_logits_and_decodes_the_same(clouds, monkeypatch):
    def nearest(x, y, k, batch_x, batch_y):
        place = torch.where(batch_x[:, None] == batch_y, torch.cdist(y.double(), x.double()), torch.inf)
        return torch.arange(len(y)).repeat_interleave(k), place.topk(k, largest=False).indices.flatten()

    monkeypatch.setattr("torch_pointcloud.models.point_bert.knn", nearest)
    source = theirs.create_model("point-bert-base.dvae.xumin-yu")
    source.codebook.data.normal_()  # fresh, it is 0
    source = randomized(source)
    target = DiscreteVAE(TOKENIZERS["point_bert"]).eval()
    assert load_weights(target, source.state_dict(), head=(), tokens=()).fresh == []
    batch = torch.arange(2).repeat_interleave(1024)
    # One code whatever the noise, as in our evaluation.
    monkeypatch.setattr(F, "gumbel_softmax", lambda logits, **_: F.one_hot(logits.argmax(2), logits.shape[2]).float())
    expected, found = source(None, clouds[:2].flatten(0, 1), batch, hard=True), target.autoencode(clouds[:2])
    assert expected["logits"].std() > 0.1
    for name in ("logits", "coarse", "fine"):
        scale = expected[name].abs().max().item()
        torch.testing.assert_close(getattr(found, name), expected[name], rtol=0, atol=2e-5 * scale)


@torch.no_grad()
def test_an_encoder_comes_from_either_pre_training(clouds):
    source, target = pretraining(), PointTransformerClassifier(ARCH, CLASSES).eval()
    report = load_weights(target, source.state_dict())
    assert {name.split(".")[0] for name in report.fresh} == {"cls_token", "cls_pos", "cls_head_finetune"}
    patches, centers = naive_group(clouds.flatten(0, 1), torch.arange(4).repeat_interleave(1024), 16, 8)
    encoder = source.MAE_encoder
    expected = encoder.norm(encoder.blocks(encoder.encoder(patches), encoder.pos_embed(centers)))
    target.cls_token = target.cls_pos = None  # which that pre-training does not have
    found = target.transform(target.embed(patches), centers)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)

    local = {f"token_{key}": value for key, value in PATCH.items()}
    source = randomized(theirs.PointBERTPretraining(0, encoder_dims=16, num_tokens=32, depth=3, **SMALL | local))
    target = PointTransformerClassifier(BERT, CLASSES).eval()
    report = load_weights(target, source.state_dict())
    assert {name.split(".")[0] for name in report.fresh} == {"cls_head_finetune"}
    token = target.transform(target.embed(patches), centers)[:, 0]
    torch.testing.assert_close(source.cls_head(token), logits(source, clouds)["cls_feature"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["point_mae", "point_bert"])
@torch.no_grad()
def test_our_weights_load_strictly_into_its_model(clouds, name):
    build, architecture = MODELS[name]
    source = randomized(PointTransformerClassifier(architecture, CLASSES))
    state = to_theirs(source.state_dict(), architecture)
    target = build().eval()
    target.load_state_dict(state, strict=True)
    torch.testing.assert_close(logits(target, clouds), source(clouds), rtol=0, atol=1e-5)
    again = to_ours(state)
    assert again.keys() == source.state_dict().keys()
    assert all(torch.equal(again[key], value) for key, value in source.state_dict().items())


@pytest.mark.parametrize(
    "changes",
    [{"head": "linear"}, {"head": "point_bert"}, {"patch_out": 16}, {"mlp_ratio": 2.0}],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_what_it_has_no_model_for_is_not_renamed(changes):
    with pytest.raises(CheckpointError, match="torch-pointcloud has "):
        to_theirs({}, dataclasses.replace(ARCH, **changes))


OTHERS = {
    "pointgpt-s.modelnet40.guangyan-chen": "PointGPT", "pointgpt-s.pretrain.guangyan-chen": "PointGPT",
    "point-mae-base.shapenetpart.yatian-pang": "a part segmentation",
    "pointnet.modelnet40": "another model",
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_its_other_models_are_refused_by_name(name):
    state = theirs.create_model(name).state_dict()
    assert is_theirs(state)
    with pytest.raises(
        CheckpointError, match=f"weights of {OTHERS[name]} by torch-pointcloud, which are not read here"
    ):
        load_weights(PointTransformerClassifier(ARCH, 40), state)


def test_weights_of_another_size_are_refused():
    with pytest.raises(CheckpointError, match="another architecture"):
        load_weights(PointTransformerClassifier(ARCH, CLASSES), mae_classifier(depth=4).state_dict())
    with pytest.raises(CheckpointError, match="another architecture"):  # with normals as a further input
        load_weights(
            PointTransformerClassifier(PRESETS["point_mae"], CLASSES),
            theirs.PointMAEClassification(3, CLASSES).state_dict(),
        )


def test_the_table_of_published_models_is_what_the_package_registers():
    registered = {
        name for pattern in ("point-mae-*", "point-bert-*") for name in theirs.list_models(pattern, pretrained=True)
    }
    assert registered - PUBLISHED.keys() == {"point-mae-base.shapenetpart.yatian-pang", "point-bert-base.dvae.xumin-yu"}
    assert PUBLISHED.keys() <= registered
    tags = {"obj_bg": "scanobjectnn-objbg", "obj_only": "scanobjectnn-objonly", "pb_t50_rs": "scanobjectnn-hardest"}
    for name, ours in PUBLISHED.items():
        info, arch = theirs.model_info(name), ours.architecture
        hparams = info["hparams"]
        assert (info["task"] == "classification") == (ours.kind == "classifier")
        assert info["weights"]["dataset"] == tags.get(ours.variant, ours.dataset)
        assert tuple(info["weights"].get("classes", ours.class_names)) == ours.class_names
        depth = hparams.get("depth", hparams.get("encoder_depth"))
        heads, groups = hparams["num_heads"], (hparams["num_groups"], hparams["group_size"])
        assert (arch.width, arch.depth, arch.heads) == (hparams["embed_dim"], depth, heads)
        assert (arch.num_groups, arch.group_size, arch.drop_path) == (*groups, hparams["drop_path"])
        assert arch.patch_out == hparams.get("encoder_dims", hparams["embed_dim"])
        steps = [step for step in getattr(info["transform"], "transforms", ())
                 if isinstance(step, transforms.Rescale | transforms.FarthestPointSample)]  # fmt: skip
        kinds = [type(step).__name__ for step in steps]
        if ours.kind == "classifier":
            expected = {
                "unit_sphere": ["Rescale", "FarthestPointSample"],
                "unit_sphere_of_sample": ["FarthestPointSample", "Rescale"],
                "none": ["FarthestPointSample"] if steps else [],
            }
            assert kinds == expected[ours.normalize]
            assert all(step.method == "centroid" for step in steps if hasattr(step, "method"))
            assert {step.num_samples for step in steps if hasattr(step, "num_samples")} <= {ours.num_points}


def test_class_names_are_those_of_our_data_sets():
    names = {one.dataset: one.class_names for one in PUBLISHED.values()}
    assert names["modelnet40"] == tuple(modelnet40.OFFICIAL)
    assert names["scanobjectnn"] == scanobjectnn.CLASSES
