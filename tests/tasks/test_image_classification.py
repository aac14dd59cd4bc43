"""Classification of images: the same training, arms, resume and fold on a ViT of timm's."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from rich.console import Console

import pointewa
import pointewa.ewa as ewa
from pointewa.config import load_config
from pointewa.datasets.layouts import images
from pointewa.datasets.splits import training_data
from pointewa.errors import CheckpointError, ConfigError
from pointewa.models import timm_vit as timm_vits
from pointewa.models.timm_vit import TimmArchitecture
from pointewa.runs.folder import find_run
from pointewa.runs.weights import init_from, load_any
from pointewa.tasks import task_class
from pointewa.tools import compare, evaluate, fold, predict, svm, train, visualize
from pointewa.train.build import build_averaging, build_model
from pointewa.train.optimizer import build_optimizer, no_decay
from pointewa.train.trainer import Trainer

timm = pytest.importorskip("timm")
SMALL = ["model.width=24", "model.depth=6", "model.heads=2", "model.patch_size=16", "model.mlp_ratio=2",
         "train.epochs=2", "train.batch_size=16", "train.device=cpu", "train.precision=float32",
         "data.augment=[crop,flip]", "data.val_fraction=0.2"]  # fmt: skip


@pytest.fixture(autouse=True)
def few(monkeypatch):
    monkeypatch.setattr(images, "COUNT", {"train": 120, "test": 64})


@pytest.fixture
def make(tmp_path):
    def trainer(*overrides):
        config = load_config(["configs/images.yaml"], [*SMALL, f"run.dir={tmp_path}", *overrides])
        return Trainer(config, training_data(config), find_run(config), Console(quiet=True))

    return trainer


def stop():
    raise KeyboardInterrupt


def config_of(*overrides):
    return load_config(["configs/images.yaml"], [*SMALL, *overrides])


def test_it_resumes_bit_for_bit_and_folds(make):
    whole, recipe = make("run.name=whole"), ("run.name=part", "train.save_every=4")
    whole.fit()
    summary = whole.finish()
    part, step = make(*recipe), Trainer.train_step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "train_step", lambda self, batch: step(self, batch) if self.step < 9 else stop())
        with pytest.raises(KeyboardInterrupt):
            part.fit()
    resumed = make(*recipe)
    assert resumed.step == 8
    resumed.fit()
    for name, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name
    assert resumed.finish()["test"] == summary["test"]
    assert summary["largest_logit_difference"] < 1e-5
    epochs = [json.loads(line) for line in (whole.folder / "metrics.jsonl").read_text().splitlines()]
    assert {"train/oa", "val/oa", "ewa/share_rate"} <= epochs[-1].keys()

    # What is saved is timm's own model, by timm's names.
    dense = timm.create_model("vit_tiny_patch16_224", num_classes=8, img_size=32, patch_size=16, embed_dim=24, depth=6,
                              num_heads=2, mlp_ratio=2)  # fmt: skip
    shapes = {name: value.shape for name, value in dense.state_dict().items()}
    batch = next(iter(whole.data.test)).points
    expected = whole.model.eval()(batch)
    for path in (whole.folder, whole.folder / "last.ckpt"):
        loaded = load_any(path)
        assert type(loaded.model) is type(dense)
        assert {name: value.shape for name, value in loaded.model.state_dict().items()} == shapes
        torch.testing.assert_close(loaded.model(batch), expected)
        assert loaded.normalize == "minus_one_to_one"
    dense.load_state_dict(load_any(whole.folder).model.state_dict())
    torch.testing.assert_close(dense.eval()(batch), expected)


def test_the_fold_is_exact(make):
    trainer = make("run.name=exact")
    trainer.fit()
    model = trainer.model.double().eval()
    batch = next(iter(trainer.data.test)).points.double()
    assert (ewa.fold(model)(batch) - model(batch)).abs().max() < 1e-10


def test_every_other_block_has_experts():
    model, _ = build_model(task_class("image_classification")(config_of()), ("a", "b"))
    assert list(ewa.moe_layers(model)) == ["blocks.1.mlp", "blocks.3.mlp", "blocks.5.mlp"]
    assert {"pos_embed", "cls_token"} <= no_decay(model)  # timm's own rule
    assert "blocks.0.mlp.fc1.weight" not in no_decay(model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = build_optimizer(model, config_of().train).param_groups
    assert {names[id(one)] for group in groups if not group["weight_decay"] for one in group["params"]} == no_decay(
        model
    )


@pytest.mark.parametrize("arm", ["dense", "dense_ema", "rup", "moe", "moe_ewa", "moe_early"])
def test_every_arm_trains(make, arm):
    trainer = make(*(f"{group}.{key}={value}" for group, keys in ARMS[arm].items() for key, value in keys.items()),
                   f"run.name={arm}", "train.epochs=1")  # fmt: skip
    trainer.fit()
    summary = trainer.finish()
    assert (summary["test_before_folding"] is None) == (arm != "rup")
    batch = next(iter(trainer.data.test)).points
    for path in (trainer.folder, trainer.folder / "last.ckpt"):
        found = load_any(path)
        torch.testing.assert_close(found.model(batch), load_any(trainer.folder).model(batch))
        assert bool(ewa.moe_layers(found.model)) == arm.startswith("moe")


ARMS = {
    "dense": {"ewa": {"enabled": "false"}},
    "dense_ema": {"ewa": {"enabled": "false"}, "train": {"ema_decay": 0.9}},
    "rup": {"ewa": {"enabled": "false"}, "moe": {"router": "random"}},
    "moe": {"ewa": {"enabled": "false"}, "moe": {"router": "top_k"}},
    "moe_ewa": {"moe": {"router": "top_k"}},
    "moe_early": {"moe": {"router": "top_k"}, "ewa": {"until": 0.5}},
}


def test_a_dense_run_may_start_from_the_mean_of_the_experts_of_the_ewa_run_of_its_seed(make):
    experts = make("run.name=ewa", "train.seed=3")
    mean = make("run.name=mean", "train.seed=3", "ewa.enabled=false", "moe.init=mean")
    plain = make("run.name=dense", "train.seed=3", "ewa.enabled=false")
    expected = ewa.fold(experts.model).state_dict()
    found, fresh = mean.model.state_dict(), plain.model.state_dict()
    assert found.keys() == expected.keys() == fresh.keys()
    assert not ewa.moe_layers(mean.model)
    assert not mean.foldable
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-7)
    ratio = found["blocks.1.mlp.fc1.weight"].norm() / fresh["blocks.1.mlp.fc1.weight"].norm()
    assert ratio == pytest.approx(0.5, abs=0.03)
    assert torch.equal(found["blocks.0.mlp.fc1.weight"], fresh["blocks.0.mlp.fc1.weight"])
    for keys in (["moe.init=mean"], ["moe.init=mean", "ewa.enabled=false", "train.init_from=x"]):
        with pytest.raises(ConfigError, match=r"moe\.init: mean starts a dense model from scratch: set ewa.enabled"):
            config_of(*keys)


def test_the_share_rate_may_rise_over_a_part_of_the_training():
    config = config_of("ewa.rise=0.25")
    model, _ = build_model(task_class("image_classification")(config), ("a", "b"))
    averaging = build_averaging(config, model, torch.optim.SGD(model.parameters()), 100)
    rates = []
    for averaging.steps in (0, 12, 24, 99):
        rates.append(averaging.share_rate)
    assert rates == pytest.approx([0, 0.15, 0.3, 0.3])


def test_it_starts_from_another_run_with_experts_as_copies(make):
    first = make("run.name=first", "ewa.enabled=false", "train.epochs=1")
    first.fit()
    first.finish()
    second = make("run.name=second", f"train.init_from={first.folder}")
    torch.testing.assert_close(ewa.fold(second.model).state_dict(), first.model.state_dict())
    assert all((p == p[:1]).all() for p in ewa.stacked_parameters(second.model).values())
    with pytest.raises(CheckpointError, match="of another architecture: pos_embed"):
        make("run.name=third", f"train.init_from={first.folder}", "model.patch_size=8")
    task = task_class("image_classification")(config_of())
    report = init_from(task.build_model(("a", "b")), str(first.folder), head=("head.",), tokens=())
    assert report.fresh == ["head.weight", "head.bias"]
    head = make("run.name=probe", f"train.init_from={first.folder}", "train.freeze_backbone=true", "ewa.enabled=false")
    trained = [name for name, parameter in head.model.named_parameters() if parameter.requires_grad]
    assert trained == ["head.weight", "head.bias"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.preset=tiny"], "model.preset: image_classification expects a ViT of timm's, .*, found 'tiny'"),
        (["model.preset=timm:resnet18"], "expected a ViT of timm's .*, found 'resnet18'"),
        (["model.preset=timm:hf_hub:a/b"], "expected that of a ViT of timm's"),
        (["model.heads=5"], "embed_dim: expected a multiple of num_heads, found 24 and 5"),
        (["model.patch_size=5"], "img_size: expected a multiple of patch_size, found 32 and 5"),
        (["model.depth=0"], "depth: expected more than 0, at most 1000, found 0"),
        (["model.drop_path=1.5"], "drop_path_rate: expected 0 to 1, found 1.5"),
    ],
)
def test_what_timm_cannot_build_is_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        task_class("image_classification")(config_of(*overrides)).build_model(("a", "b"))


def test_without_timm_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr(timm_vits.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs timm, which is not installed: pip install timm"):
        task_class("image_classification")(config_of())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "name: expected that of a ViT"),
        ({"name": "vit_tiny_patch16_224", "depth": 10**9}, "depth: expected"),
        ({"name": "vit_tiny_patch16_224", "depth": True}, "depth: expected a number, found bool"),
        ({"name": "vit_tiny_patch16_224", "pretrained": True}, "unknown keys 'pretrained'"),
        ({"name": "local-dir:/tmp"}, "name: expected"),
        ({"name": "vit_tiny_patch16_224", "mlp_ratio": float("nan")}, "mlp_ratio: expected"),
    ],
)
def test_what_a_file_says_of_a_model_is_checked(values, message):
    with pytest.raises(ValueError, match=message):
        TimmArchitecture.of(values)


def call(tool, capsys, *arguments):
    tool.main(list(map(str, arguments)))
    return capsys.readouterr().out


def test_the_command_lines_take_images_or_say_that_they_do_not(tmp_path, capsys):
    folder = tmp_path / "x"
    recipe = ["--config=configs/images.yaml", *SMALL, f"run.dir={tmp_path}", "run.name=x"]
    summary = json.loads(call(train, capsys, *recipe, "--json"))
    assert summary["task"] == "image_classification"
    assert summary["model"] == "timm:vit_tiny_patch16_224"
    headings = re.findall("<h2>(.*?)</h2>", (folder / "report.html").read_text())
    assert headings[:5] == ["Result", "Training", "Experts", "Classes", "Confusion matrix"]
    assert "most confident of" in headings[5]
    shutil.copytree(folder, tmp_path / "twin")
    compared = json.loads(call(compare, capsys, folder, tmp_path / "twin", "--json"))
    assert compared["runs"][0]["oa"] == pytest.approx(summary["test"]["oa"], abs=1e-3)
    assert compared["comparisons"][0]["test"] == {"only_first": 0, "only_second": 0, "p": 1.0}
    evaluated = json.loads(call(evaluate, capsys, folder, "--json"))
    assert evaluated["oa"] == pytest.approx(summary["test"]["oa"], abs=1e-3)
    assert "folded" in call(fold, capsys, folder, tmp_path / "dense.safetensors")

    model = pointewa.load(tmp_path / "dense.safetensors", "cpu")
    source = images.source("gratings", "test", 1)
    seen = np.stack([one.points for one in source.clouds(1)])
    names, probabilities = model.predict(seen)
    right = [name == source.class_names[label] for name, label in zip(names, source.labels, strict=True)]
    assert 100 * np.mean(right) == pytest.approx(summary["test"]["oa"], abs=1e-3)
    one, alone = model.predict(seen[0])
    assert one == names[0]
    np.testing.assert_allclose(alone, probabilities[0], atol=1e-6)
    model.save_pretrained(tmp_path / "pretrained")
    again = pointewa.Predictor.from_pretrained(tmp_path / "pretrained", "cpu")
    assert torch.equal(again.logits(seen), model.logits(seen))
    for wrong, message in ((seen.astype(np.float32), "type torch.uint8"), (seen[0, 0], "expected images")):
        with pytest.raises(ValueError, match=message):
            model.predict(wrong)

    from PIL import Image

    Image.fromarray(seen[0]).save(tmp_path / "a.png")
    (said,) = json.loads(call(predict, capsys, folder, tmp_path / "a.png", "--json", "--device=cpu"))["predictions"]
    assert (said["class"], said["height"], said["width"]) == (names[0], 32, 32)
    for tool, arguments, message in (
        (evaluate, [folder, "--votes", 2], "--votes, --corrupt: works on clouds"),
        (evaluate, [folder, "--config=configs/shapes.yaml"], "the model of .* expects images, found point clouds"),
        (visualize, ["saliency", "--run", folder], "saliency: works on clouds"),
        (visualize, ["cloud", "--config=configs/images.yaml"], "cloud: works on clouds, and data.name=images is of"),
        (svm, [folder], "svm: works on clouds"),
        (predict, [folder, tmp_path / "a.png", "--up=z"], "--up: for point clouds"),
    ):
        with pytest.raises(ConfigError, match=message):
            tool.main(list(map(str, arguments)))
