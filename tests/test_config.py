"""The configuration: precedence, types, and errors that name the key."""

import re
import shutil
from pathlib import Path

import pytest

from pointewa.config import Config, DataConfig, build_architecture, differences, find_config, load_config, to_yaml
from pointewa.errors import ConfigError
from pointewa.models import PRESETS
from pointewa.study.definition import load_study
from pointewa.tasks import task_class

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
OVERLAYS = [path for folder in ("arm", "task") for path in sorted((ROOT / "configs" / folder).glob("*.yaml"))]


def test_later_layers_win(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("train:\n  epochs: 5\n  lr: 1e-3\nmoe:\n  layers: [1, 3]\n")
    base = {"train": {"epochs": 4, "seed": 9}}
    config = load_config([file], ["train.lr=2e-3", "run.name=x"], base)
    assert (config.train.seed, config.train.epochs, config.train.lr) == (9, 5, 2e-3)
    assert (config.moe.layers, config.run.name, config.train.batch_size) == ([1, 3], "x", 32)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_committed_configurations_load_and_name_their_data_set(path):
    config = load_config([path])
    assert config.data.name in (path.stem, path.stem.partition("_")[0])
    task_class(config.train.task)(config)  # refuses what does not fit


@pytest.mark.parametrize("path", OVERLAYS, ids=lambda path: path.name)
def test_committed_overlays_load_on_top_of_a_data_set(path):
    config = load_config([CONFIGS[0], path])
    build_architecture(config.model)
    assert config.train.freeze_backbone == path.stem.endswith("_probe")


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, marks=pytest.mark.slow if path.name == "ablation.yaml" else [], id=path.name)  # many runs
        for path in sorted((ROOT / "configs" / "study").glob("*.yaml"))
    ],
)
def test_committed_studies_are_valid(path, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    study = load_study(path, [f"run.dir={tmp_path}"])
    assert len(study.runs) == sum(map(len, study.seeds.values())) * len(study.folds)


def test_yaml_reads_back(tmp_path):
    config = load_config(overrides=["train.init_from=a/b", "moe.layers=[1]", "model.width=96"])
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    again = load_config([tmp_path / "config.yaml"])
    assert again == config
    again.train.epochs = 7
    assert differences(config, again) == ["train.epochs: 300 -> 7"]
    assert differences(config, again, ignore=["train.epochs"]) == []


@pytest.mark.parametrize(
    ("written", "meant"),
    [("rotate_up", ["rotate_up"]), ("none", []), ("[]", []), ("[dropout,scale_shift]", ["dropout", "scale_shift"])],
)
def test_augmentations_are_a_list_however_they_are_written(tmp_path, written, meant):
    config = load_config(overrides=[f"data.augment={written}"])
    assert config.data.augment == meant
    (tmp_path / "old.yaml").write_text(f"data:\n  augment: {written}\n")  # as in the folder of an older run
    old = load_config([tmp_path / "old.yaml"])
    assert differences(old, config) == []
    assert load_config(base={"data": {"augment": written}}, files=[tmp_path / "old.yaml"]) == config
    (tmp_path / "new.yaml").write_text(to_yaml(config))
    assert load_config([tmp_path / "new.yaml"]) == config
    assert load_config().data.augment == ["scale_shift"]
    assert Config(data=DataConfig(augment="none")).data.augment == []


@pytest.mark.parametrize("written", ["off", "'off'", "OFF"])
def test_the_layout_off_is_no_boolean(tmp_path, written):
    """As YAML 1.1 has it, off is false."""
    (tmp_path / "c.yaml").write_text(f"data: {{variant: {written}}}")
    for config in (load_config(overrides=[f"data.variant={written}"]), load_config([tmp_path / "c.yaml"])):
        assert config.data.variant == "off"
        (tmp_path / "again.yaml").write_text(to_yaml(config))
        assert load_config([tmp_path / "again.yaml"]).data.variant == "off"


def test_presets_with_overrides():
    assert build_architecture(load_config(overrides=["model.preset=point_bert"]).model) == PRESETS["point_bert"]
    wide = build_architecture(load_config(overrides=["model.width=96", "model.depth=2"]).model)
    assert (wide.width, wide.patch_out, wide.depth, wide.heads) == (96, 96, 2, 3)
    bert = build_architecture(load_config(overrides=["model.preset=point_bert", "model.width=192"]).model)
    assert (bert.width, bert.patch_out) == (192, 256)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.epoch=3", "unknown key train.epoch: did you mean train.epochs?"),
        ("trian.epochs=3", "unknown key trian: did you mean train?"),
        ("ewa.share_ratio=0.1", "unknown key ewa.share_ratio: did you mean ewa.share_rate?"),
        ("train.epochs=many", "train.epochs: Value 'many' of type 'str' could not be converted to Integer"),
        ("train.epochs=null", "train.epochs"),
        ("train=3", "train: expected a group of keys, found 3"),
        ("epochs", "'epochs': expected key=value"),
        ("train.lr=[1", "train.lr: the value '[1' is not valid YAML"),
        ("train.epochs=0", "train.epochs: expected at least 1, found 0"),
        ("train.lr=-1", "train.lr: expected at least 0, found -1"),
        ("train.lr=nan", "train.lr: expected a finite number, found nan"),
        ("train.betas=[0.9]", "train.betas: expected two numbers"),
        ("train.betas=[0.9,1]", "train.betas: expected less than 1, found 1"),
        ("train.seed=9223372036854775808", "train.seed: expected less than"),
        ("moe.router=none", "moe.router: a dense model has no experts to average"),
        ("train.accumulate=5", "train.accumulate: expected a divisor of train.batch_size 32, found 5"),
        ("train.steps_per_batch=3", "train.steps_per_batch: Invalid value '3', expected one of [1, 2]"),
        ("train.warmup_epochs=301", "train.warmup_epochs: expected at most train.epochs, found 301"),
        ("train.precision=fp16", "train.precision: Invalid value 'fp16', expected one of ['auto', 'bfloat16', "),
        ("ewa.schedule=cosine", "ewa.schedule: Invalid value 'cosine', expected one of ['constant', 'linear']"),
        ("data.train_fraction=0", "data.train_fraction: expected more than 0, found 0"),
        ("data.val_fraction=1", "data.val_fraction: expected less than 1, found 1"),
        ("data.augment=3", "data.augment: expected a list of names, such as [scale_shift, jitter], found 3"),
        ("data.augment=[1]", "data.augment: expected a list of names, such as [scale_shift, jitter], found [1]"),
        ("data.background=blur", "data.background: Invalid value 'blur', expected one of ['drop', 'keep']"),
        ("model.preset=big", "model.preset: expected one of point_bert, point_mae, small, tiny, found 'big'"),
        ("model.heads=5", "model.width must be a multiple of heads, got 192 and 5"),
    ],
)
def test_errors_name_the_key(override, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        build_architecture(load_config(overrides=[override]).model)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: [", "not valid YAML"),
        ("- 1\n- 2\n", "expected a mapping of groups"),
        ("train:\n  epoch: 3\n", "unknown key"),
    ],
)
def test_errors_name_the_file(tmp_path, content, message):
    file = tmp_path / "a.yaml"
    file.write_text(content)
    with pytest.raises(ConfigError, match=message) as error:
        load_config([file])
    assert str(file) in str(error.value)


def test_a_missing_file():
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: no such file: expected one of"):
        load_config(["nowhere.yaml"])


@pytest.mark.parametrize(
    ("overrides", "router", "scheme"),
    [
        ((), "random", "ewa"),
        (("ewa.enabled=false",), "none", "dense"),
        (("ewa.enabled=false", "moe.router=random"), "random", "rup"),
        (("moe.router=top_k",), "top_k", "moe_ewa"),
        (("ewa.enabled=false", "moe.router=top_k"), "top_k", "moe"),
    ],
)
def test_the_scheme_follows_from_router_and_averaging(overrides, router, scheme):
    config = load_config(overrides=overrides)
    assert (config.router, config.scheme) == (router, scheme)


def test_the_architecture_takes_every_key_of_its_own():
    keys = ["model.preset=point_bert", "model.mlp_ratio=2", "model.patch_out=128", "model.width=192", "model.heads=3"]
    arch = build_architecture(load_config(overrides=keys).model)
    assert (arch.mlp_ratio, arch.patch_out, arch.width) == (2, 128, 192)
    assert build_architecture(load_config(overrides=["model.patch_out=100"]).model).patch_out == 100


@pytest.mark.parametrize(
    "name", ["quick", "finetune", "ablation", "images", "labeled_psb", "sydney", "pretraining", "compression"]
)
def test_committed_runs_are_those_of_todays_studies(name, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    recorded = sorted((ROOT / "results" / name / "runs").glob("*/config.yaml"))
    for path in recorded:
        (tmp_path / name / path.parent.name).mkdir(parents=True)
        shutil.copy(path, tmp_path / name / path.parent.name)
    study = load_study(f"configs/study/{name}.yaml", [f"run.dir={tmp_path}"])  # it refuses another configuration
    known = {run.name for run in study.runs}
    assert {path.parent.name for path in recorded} <= known


def test_a_configuration_that_comes_with_the_package_is_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    expected = load_config(overrides=["data.name=modelnet40", "model.preset=point_mae", "ewa.enabled=false"])
    for name in ("configs/modelnet40.yaml", "modelnet40.yaml", "modelnet40"):
        assert load_config([name, "arm/dense"]) == expected
    Path("modelnet40").write_text("data: {name: shapes}\n")  # a file of one's own comes first
    assert load_config(["modelnet40"]).data.name == "shapes"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("shapez", "shapez: no such file: expected one of folder, images, labeled_psb, .*, found 'shapez'"),
        ("configs/arm/exa.yaml", "exa.yaml: no such file: expected one of arm/dense, arm/dense_ema, arm/ewa,"),
        ("/nowhere/x.yaml", "x.yaml: no such file$"),
    ],
)
def test_a_configuration_that_is_nowhere(name, message):
    with pytest.raises(ConfigError, match=message):
        find_config(name)
