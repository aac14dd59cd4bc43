"""Keys that a training would not read, and those that would have no effect beside others, are refused at its start."""

from pathlib import Path

import pytest

from pointewa.config import load_config, to_yaml
from pointewa.errors import ConfigError
from pointewa.study import definition
from pointewa.tools import study
from pointewa.train.build import task_of_run

CONFIGS = Path(__file__).parents[2] / "configs"
OF_TASK = {"masked_autoencoding": ["ewa.enabled=false"], "tokenizer": ["ewa.enabled=false"], "classification": [],
           "masked_point_modeling": ["task.tokenizer=t", "task.queue_size=64"], "part_segmentation": [],
           "image_classification": ["model.preset=timm:vit_tiny_patch16_224"]}  # fmt: skip


def start(folder, task, *overrides):
    task_of_run(load_config(overrides=[f"train.task={task}", *OF_TASK[task], *overrides]), folder)


@pytest.mark.parametrize(
    ("task", "override", "message"),
    [
        ("classification", "model.mask_ratio=0.7", r"model\.mask_ratio: classification does not read it, found 0\.7: "),
        ("classification", "model.decoder_depth=2", "model.decoder_depth: classification does not read it, found 2: "),
        ("classification", "model.codebook_size=16", "model.codebook_size: classification does not read it, found 16"),
        ("classification", "model.decoder=light", "model.decoder: classification does not read it, found 'light'"),
        ("classification", "model.patch_size=8", "model.patch_size: classification does not read it"),
        ("classification", "data.img_size=64", "data.img_size: classification does not read it"),
        ("classification", "task.tokenizer=runs/t", "task.tokenizer: classification does not read it"),
        ("part_segmentation", "model.head=linear", "model.head: part_segmentation does not read it"),
        ("part_segmentation", "model.decoder_depth=2", "model.decoder_depth: part_segmentation does not read it"),
        ("masked_autoencoding", "train.label_smoothing=0.1", "label_smoothing: masked_autoencoding does not read"),
        ("masked_autoencoding", "task.mask_ratio=[0.3,0.4]", "found .0.3, 0.4.: set model.mask_ratio instead"),
        ("masked_point_modeling", "model.mask_ratio=0.5", r"found 0\.5: set task\.mask_ratio instead"),
        ("tokenizer", "model.width=8", "model.width: tokenizer does not read it, found 8"),
        ("tokenizer", "train.label_smoothing=0.2", "train.label_smoothing: tokenizer does not read it"),
        ("image_classification", "data.num_points=512", "data.num_points: image_classification does not read it"),
        ("classification", "moe.top_k=2", "moe.top_k: moe.router=random does not read it, found 2: leave it out"),
        ("image_classification", "model.num_groups=8", "model.num_groups: image_classification does not read it"),
    ],
)  # fmt: skip
def test_a_key_of_other_tasks_is_refused_by_name(tmp_path, task, override, message):
    with pytest.raises(ConfigError, match=message):
        start(tmp_path, task, override)


@pytest.mark.parametrize(
    ("task", "overrides"),
    [
        ("classification", ["train.label_smoothing=0.2", "model.head=linear", "model.patch_out=24"]),
        ("part_segmentation", ["train.label_smoothing=0.2", "model.decoder=light", "model.mlp_ratio=2"]),
        ("masked_autoencoding", ["model.mask_ratio=0.5", "model.decoder_depth=2", "model.drop_path=0.3"]),
        ("masked_point_modeling", ["task.mask_ratio=[0.3,0.4]", "task.mask_rand=true", "task.moco_loss=true"]),
        ("masked_point_modeling", ["task.temperature=0.1", "task.momentum=0.99", "model.depth=2"]),
        ("tokenizer", ["model.codebook_size=16", "model.num_groups=8", "model.group_size=8", "model.patch_out=24"]),
        ("classification", ["data.num_points=64"]),
        ("tokenizer", ["data.num_points=64"]),
        ("classification", ["model.mask_ratio=0.6", "task.queue_size=16384"]),  # the defaults
        ("image_classification", ["model.patch_size=8", "data.img_size=64", "model.width=96"]),
        ("image_classification", ["train.label_smoothing=0.1"]),
    ],
)  # fmt: skip
def test_a_task_takes_its_own_keys(tmp_path, task, overrides):
    start(tmp_path, task, *overrides)


def test_what_ships_goes_together(tmp_path, monkeypatch):
    monkeypatch.setattr(definition, "_seeds", lambda seeds, arms, path: dict.fromkeys(arms, (0,)))
    sets = [one.stem for one in CONFIGS.glob("*.yaml") if one.stem != "images"]
    for recipe in (CONFIGS / "task").glob("*.yaml"):
        for name in sets:
            own = ["task.tokenizer=t"] if recipe.stem == "point_bert" else []
            task_of_run(load_config([name, f"task/{recipe.stem}"], own), tmp_path)
    for name in ("images", *sets):
        task_of_run(load_config([name]), tmp_path)
    for file in (CONFIGS / "study").glob("*.yaml"):
        for run in definition.load_study(file, [f"run.dir={tmp_path}"]).runs:
            task_of_run(run.config, run.folder)


def test_of_two_warm_ups_one_is_to_be_left_out(tmp_path):
    with pytest.raises(ConfigError, match=r"train\.warmup_fraction: train.warmup_epochs=5 decides, found 0\.1 too"):
        start(tmp_path, "classification", "train.warmup_epochs=5", "train.warmup_fraction=0.1")
    with pytest.raises(ConfigError, match=r"train\.warmup_fraction: train.warmup_epochs=10 decides"):
        task_of_run(load_config(["shapes", "task/few_shot"], ["train.warmup_fraction=0.1"]), tmp_path)
    for one in ("train.warmup_epochs=5", "train.warmup_fraction=0.1"):
        start(tmp_path, "classification", one)


def test_a_run_that_has_such_a_key_resumes(tmp_path):
    with pytest.raises(ConfigError, match=r"train\.label_smoothing: masked_autoencoding does not read it"):
        start(tmp_path, "masked_autoencoding", "train.label_smoothing=0.1")
    (tmp_path / "config.yaml").write_text(to_yaml(load_config(overrides=["train.label_smoothing=0.1"])))
    start(tmp_path, "masked_autoencoding", "train.label_smoothing=0.1")
    with pytest.raises(ConfigError, match=r"train\.label_smoothing: masked_autoencoding does not read it"):
        start(tmp_path, "masked_autoencoding", "train.label_smoothing=0.1", "run.overwrite=true")


def test_a_study_is_refused_before_its_first_training(tmp_path):
    file = tmp_path / "s.yaml"
    file.write_text("arms: {a: , b: {model: {mask_ratio: 0.5}}}\nseeds: [0]\n")
    with pytest.raises(ConfigError, match=r"b-seed0: model\.mask_ratio: classification does not read it"):
        study.main([str(file), f"run.dir={tmp_path / 'runs'}"])
    assert not (tmp_path / "runs").exists()
