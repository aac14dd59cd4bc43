"""Masked point modelling in the common loop, and what comes of it."""

import copy
import json

import pytest
import torch

import pointewa.ewa as ewa
from pointewa import datasets
from pointewa.errors import CheckpointError, ConfigError
from pointewa.inference import svm
from pointewa.inference.export import export
from pointewa.models import TOKENIZERS, Architecture, DiscreteVAE, PointTransformerClassifier, TokenizerSizes
from pointewa.models.patch_embed import make_patches
from pointewa.runs.description import LoadedModel
from pointewa.runs.weights import TOKENIZER, load_any, load_foreign, load_model, save_model
from pointewa.safe.torch_files import read_state
from pointewa.train.optimizer import no_decay

SIZES = {"num_groups": 8, "group_size": 8, "patch_width": 64, "patch_out": 24, "codebook_size": 16,
         "codebook_width": 8, "graph_width": 4, "feature_width": 8, "folding_width": 8}  # fmt: skip


def write_tokenizer(folder, points=128, normalize="unit_sphere", **change):
    """A tokenizer's run, whose codes are those of fresh weights."""
    torch.manual_seed(1)
    dvae = DiscreteVAE(TokenizerSizes(**SIZES | change)).eval()
    with torch.no_grad():  # each code's logits are made alike, so that all codes occur
        cut = make_patches(datasets.load("shapes", "", "test").points[::5, :points], 8, 8)
        found, norm = [], dvae.dgcnn_1.layer5[1]
        with norm.register_forward_hook(lambda *call: found.append(call[-1].transpose(1, -1).flatten(0, 1))):
            dvae.logits(cut.patches, cut.centers)
        norm.weight /= found[0].std(0)
        norm.bias.copy_((norm.bias - found[0].mean(0)) / found[0].std(0))
    folder.mkdir()
    save_model(folder / TOKENIZER, LoadedModel(dvae, (), points, "shapes", normalize, "tokenizer"))
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tok")


@pytest.fixture
def pretraining(make_trainer, tokenizer):
    recipe = ["train.task=masked_point_modeling", f"task.tokenizer={tokenizer}", "task.queue_size=50", "run.name=p"]
    return lambda *overrides: make_trainer(*recipe, "ewa.enabled=false", "train.clip_norm=0", *overrides)


def outputs(trainer, model):
    return trainer.task.measure(trainer.evaluate(model, trainer.data.test))


def assert_same(one, other):
    for name, value in one.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name


@pytest.mark.parametrize("experts", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_pretraining_learns_and_leaves_what_a_classifier_starts_from(pretraining, make_trainer, experts):
    trainer = pretraining("train.epochs=8", f"ewa.enabled={experts}", "data.val_fraction=0.2", "train.lr=3e-3")
    trainer.fit()
    summary = trainer.finish()
    lines = [json.loads(line) for line in (trainer.folder / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["val/loss"] < 0.92 * lines[0]["val/loss"]
    assert lines[-1]["train/loss"] < lines[0]["train/loss"] - 0.3
    assert 0 < lines[-1]["train/accuracy"] < 100
    assert (summary["test_before_folding"] is not None) == experts
    if experts:
        assert summary["test"]["loss"] == pytest.approx(summary["test_before_folding"]["loss"], rel=1e-4)
        assert all(name.startswith("transformer_q.") for name in ewa.moe_layers(trainer.model))
    loaded = load_any(trainer.folder)
    assert (loaded.task, loaded.class_names) == ("masked_point_modeling", ())
    assert not ewa.moe_layers(loaded.model)
    assert outputs(trainer, loaded.model)["loss"] == pytest.approx(summary["test"]["loss"], rel=1e-5)
    assert outputs(trainer, load_any(trainer.folder / "last.ckpt").model)["loss"] == pytest.approx(
        summary["test"]["loss"], rel=1e-5
    )
    tuned = make_trainer("ewa.enabled=false", f"train.init_from={trainer.folder}", "run.name=t")
    trunk = loaded.model.transformer_q.state_dict()
    loads = [name for name in tuned.model.state_dict() if not name.startswith("cls_head_finetune.")]
    assert {"cls_token", "cls_pos", "encoder.first_conv.1.running_mean", "norm.bias"} <= set(loads)
    for name in loads:
        assert torch.equal(tuned.model.state_dict()[name], trunk[name]), name
    with pytest.raises(CheckpointError, match=r"found a point_bert: train a classifier from it with train"):
        load_model(trainer.folder)
    assert svm.features(loaded.model, trainer.data.test)[0].shape == (60, 48)


def test_the_masks_of_a_set_are_the_same_each_time_and_draw_nothing(pretraining):
    trainer = pretraining()
    state = torch.get_rng_state()
    found = [trainer.evaluate(trainer.model, trainer.data.test) for _ in range(2)]
    for name, value in found[0].items():
        assert torch.equal(found[1][name], value)
    assert torch.equal(torch.get_rng_state(), state)
    metrics = trainer.task.measure(found[0])
    assert metrics["accuracy"] == pytest.approx(100 * found[0]["correct"].sum().item() / found[0]["masked"].sum())
    assert found[0]["masked"].unique().tolist() == [2, 3]


def test_only_the_student_is_trained_and_a_step_moves_twin_and_queue(pretraining):
    trainer = pretraining("train.accumulate=2")
    held = {id(one) for group in trainer.optimizer.param_groups for one in group["params"]}
    assert held == {id(one) for one in trainer.model.transformer_q.parameters()}
    assert {"transformer_q.cls_token", "transformer_q.mask_token"} <= no_decay(trainer.model)
    assert "transformer_q.cls_pos" not in no_decay(trainer.model)
    before = copy.deepcopy(trainer.model)
    batch = next(trainer.data.train.epoch(0))
    trainer.train_step(batch)
    assert trainer.model.queue_ptr.item() == 16
    assert torch.equal(trainer.model.queue[:, 16:], before.queue[:, 16:])
    assert not torch.equal(trainer.model.queue[:, :16], before.queue[:, :16])
    name = "blocks.blocks.1.mlp.fc1.weight"
    old, new, trained = (one.get_parameter(name) for one in (before.transformer_k, trainer.model.transformer_k,
                                                             trainer.model.transformer_q))  # fmt: skip
    torch.testing.assert_close(new, 0.999 * old + 0.001 * trained)
    assert not torch.equal(new, old)
    assert_same(before.dvae, trainer.model.dvae)


def test_a_skipped_step_leaves_everything_as_it_was(pretraining):
    trainer = pretraining()
    batch = next(trainer.data.train.epoch(0))
    trainer.train_step(batch)
    before = copy.deepcopy(trainer.model)
    trainer.train_step(batch._replace(points=batch.points * torch.nan))
    assert trainer.take_skipped() == [1]
    counted = [name for name in before.state_dict() if name.endswith("num_batches_tracked")]  # of no effect
    for name, value in before.state_dict().items():
        assert name in counted or torch.equal(trainer.model.state_dict()[name], value), name
    trainer.train_step(batch)
    assert trainer.model.queue_ptr.item() == 32
    assert trainer.model.queue.isfinite().all()


def test_bfloat16_changes_no_token_and_losses_are_in_float32(pretraining, monkeypatch):
    trainer = pretraining("train.precision=bfloat16")
    model, batch = trainer.model, next(trainer.data.train.epoch(0))
    tokens = model._tokenized(batch.points)[1]
    with torch.autocast("cpu", torch.bfloat16):
        found = model(batch.points)
        assert torch.equal(model._tokenized(batch.points)[1], tokens)
        assert {one.dtype for one in found} == {torch.float32}
        cut = model._cut(batch.points)
        results = model.transformer_q(cut.patches, cut.centers, model.draw_mask(cut.centers))
        assert {one.dtype for one in results} == {torch.float32}
    trainer.train_step(batch)
    assert trainer.take_skipped() == []


@pytest.mark.parametrize("experts", [False, True])
def test_an_interrupted_pretraining_goes_on_exactly_also_without_its_tokenizer(
    pretraining, interrupt, tmp_path, experts
):
    tokenizer = write_tokenizer(tmp_path / "tok")
    recipe = [f"ewa.enabled={experts}", "model.drop_path=0.2", "model.depth=3", f"task.tokenizer={tokenizer}"]
    whole = pretraining("run.name=whole", *recipe)
    whole.fit()
    part = pretraining("run.name=part", "train.save_every=7", *recipe)
    interrupt(part, 13)
    tokenizer.rename(tmp_path / "elsewhere")
    resumed = pretraining("run.name=part", "train.save_every=7", *recipe)
    assert (resumed.step, resumed.model.queue_ptr.item()) == (10, 160 % 50)
    resumed.fit()
    assert whole.model.queue_ptr.item() == 320 % 50
    assert_same(whole.model, resumed.model)


def test_a_checkpoint_of_another_model_is_not_resumed_from(pretraining, make_trainer, interrupt):
    part = pretraining("train.save_every=1")
    interrupt(part, 2)
    part.lock.release()
    other = make_trainer("run.name=c", "ewa.enabled=false", "train.save_every=1")
    interrupt(other, 2)
    (other.folder / "last.ckpt").replace(part.folder / "last.ckpt")
    with pytest.raises(CheckpointError, match="checkpoint is not of masked_point_modeling, but of a classifier: start"):
        pretraining("train.save_every=1")


def test_the_page_shows_decoded_tokens(pretraining, tokenizer, tmp_path, monkeypatch, capsys):
    from pointewa.datasets.layouts import shapes
    from pointewa.tools import export as tool
    from pointewa.tools import report, train
    from pointewa.tools import svm as svm_tool

    monkeypatch.setattr(shapes, "PER_CLASS", {"train": 4, "test": 2})
    small = ["model.width=24", "model.depth=2", "model.heads=2", "model.num_groups=8", "model.group_size=8",
             "data.num_points=128", "train.epochs=1", "train.device=cpu", "train.batch_size=16"]  # fmt: skip
    config = ["--config", "configs/shapes.yaml", "--config", "configs/task/point_bert.yaml"]
    train.main([*config, *small, f"task.tokenizer={tokenizer}", "task.queue_size=50", f"run.dir={tmp_path}",
                "task.mask_ratio=[0.5,0.7]", "run.name=p"])  # fmt: skip
    model = load_any(tmp_path / "p").model
    whole, trained = (sum(one.numel() for one in part.parameters()) / 1e6 for part in (model, model.transformer_q))
    said = f"{whole:.1f} M parameters in training, of which {trained:.1f} M are trained, on cpu"
    assert said in capsys.readouterr().out
    page = (tmp_path / "p/report.html").read_text()
    assert "Predicted tokens, decoded by the tokenizer" in page
    assert "masked input: 4 of 8 patches" in page
    assert "accuracy of masked tokens" in page
    report.main([str(tmp_path / "p"), "--out", str(tmp_path / "again.html")])
    assert load_any(tmp_path / "p").model.mask_ratio == (0.5, 0.7)
    svm_tool.main([str(tmp_path / "p")])
    tool.main([str(tmp_path / "p"), str(tmp_path / "p.pth"), "--format", "point_mae"])


def test_all_of_it_is_exported_as_the_published_code_writes_it(tmp_path, tokenizer):
    from pointewa.models.point_bert import PointBert

    arch = Architecture(24, 2, 2, 8, 8, patch_width=64, patch_out=24)
    model = PointBert(arch, load_any(tokenizer).model, 50).eval()
    loaded = LoadedModel(model, (), 128, "shapes", "unit_sphere", "masked_point_modeling")
    export(loaded, tmp_path / "p.pth", "point_mae")
    state = read_state(tmp_path / "p.pth")["base_model"]
    assert len(state) == len(model.state_dict()) == 411 - 2 * 10 * 11 - 2 * 2  # 2 blocks of 12, no reduce_dim
    assert all(torch.equal(state[f"module.{name}"], value) for name, value in model.state_dict().items())
    with pytest.raises(CheckpointError, match="no classifier of 5 classes"):
        load_foreign(tmp_path / "p.pth", arch, 5)
    classifier = PointTransformerClassifier(arch, 5)
    from pointewa.runs.weights import init_from

    report = init_from(classifier, str(tmp_path / "p.pth"))
    assert all(name.startswith("cls_head_finetune.") for name in report.fresh)
    export(loaded, tmp_path / "p.safetensors", "safetensors")
    assert_same(load_any(tmp_path / "p.safetensors").model, model)
    for kind, suffix in (("onnx", ".onnx"), ("torch_pointcloud", ".safetensors")):
        with pytest.raises(CheckpointError, match="expected a classifier, found a point_bert, whose weights are"):
            export(loaded, tmp_path / f"other{suffix}", kind)
    assert not (tmp_path / "other.onnx").exists()


@pytest.mark.parametrize(
    ("override", "error", "message"),
    [
        ("task.tokenizer=null", ConfigError, "task.tokenizer: masked_point_modeling needs the run of a tokenizer"),
        ("task.tokenizer=runs/none", CheckpointError, "runs/none"),
        ("model.num_groups=9", ConfigError, "model.num_groups must be the tokenizer's 8, got 9: task.tokenizer="),
        ("model.group_size=4", ConfigError, "model.group_size must be the tokenizer's 8, got 4"),
        ("model.patch_out=32", ConfigError, "model.patch_out must be such that"),
        ("task.queue_size=15", ConfigError, "task.queue_size: expected at least train.batch_size 16, .* found 15"),
        ("task.mask_ratio=[0.4]", ConfigError, "task.mask_ratio: expected two rising numbers"),
        ("task.mask_ratio=[0.4,0.3]", ConfigError, "task.mask_ratio: expected two rising numbers"),
        ("task.mask_ratio=[0.4,1.0]", ConfigError, "task.mask_ratio: expected less than 1"),
        ("task.temperature=0", ConfigError, "task.temperature: expected more than 0"),
        ("train.ema_decay=0.9", ConfigError, "train.ema_decay: masked_point_modeling has an average of its own"),
        ("moe.router=top_k", ConfigError, "moe.router: masked_point_modeling folds its experts"),
        ("train.init_from=x", ConfigError, "train.init_from: masked_point_modeling starts from scratch"),
        ("train.freeze_backbone=true", ConfigError, "train.freeze_backbone: masked_point_modeling trains"),
    ],
)
def test_what_cannot_be_pretrained_is_refused(pretraining, override, error, message):
    with pytest.raises(error, match=message):
        pretraining(override)


def test_what_is_no_tokenizer_is_refused(pretraining, make_trainer, tmp_path):
    trainer = make_trainer("run.name=c", "train.epochs=1", "ewa.enabled=false")
    trainer.fit()
    trainer.finish()
    with pytest.raises(CheckpointError, match=r"/c: expected a tokenizer, found a classifier: train one by make"):
        pretraining(f"task.tokenizer={trainer.folder}")
    other = write_tokenizer(tmp_path / "narrow", patch_width=32)
    with pytest.raises(ConfigError, match=r"model\.preset: patch_width must be such that .*: task\.tokenizer=.*/nar"):
        pretraining(f"task.tokenizer={other}")
    other = write_tokenizer(tmp_path / "other", points=256)
    with pytest.warns(UserWarning, match="trained on 256 points a cloud, and these have 128"):
        pretraining(f"task.tokenizer={other}")


@pytest.mark.parametrize("normalize", ["center", "none", "unit_sphere_of_sample"])
def test_clouds_normalised_otherwise_than_the_tokenizers_are_refused(pretraining, tmp_path, normalize):
    other = write_tokenizer(tmp_path / "other", normalize=normalize)
    if normalize == "unit_sphere_of_sample":  # but for a little, the same
        pretraining(f"task.tokenizer={other}")
        return
    told = f"data.normalize: the tokenizer .*/other knows clouds that are normalised as {normalize}, and these are as "
    with pytest.raises(ConfigError, match=f"{told}unit_sphere: set data.normalize={normalize}, or train a tokenizer"):
        pretraining(f"task.tokenizer={other}")


def test_a_file_of_point_berts_code_is_taken_for_a_tokenizer(pretraining, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setitem(TOKENIZERS, "tiny", TokenizerSizes(**SIZES))
    dvae, file = load_any(tokenizer).model, tmp_path / "dVAE.pth"
    torch.save({"base_model": {f"module.{name}": one for name, one in dvae.state_dict().items()}}, file)
    with pytest.warns(UserWarning, match=r"dVAE\.pth does not say on which .* of 1024 points, unit_sphere_of_sample"):
        trainer = pretraining(f"task.tokenizer={file}")
    assert_same(dvae, trainer.model.dvae)
    torch.save({"base_model": {"codebook": torch.zeros(2, 2)}}, file)
    with pytest.raises(CheckpointError, match=r"dVAE\.pth: .* of another architecture: .*: task\.tokenizer takes"):
        pretraining(f"task.tokenizer={file}")


def test_a_queue_longer_than_the_set_and_both_masks_work(pretraining):
    trainer = pretraining("task.queue_size=1000", "task.mask_rand=true", "task.moco_loss=true", "train.epochs=1")
    trainer.fit()
    assert trainer.model.queue_ptr.item() == 160
    assert (trainer.model.plain_contrast, trainer.model.mask_rand) == (True, True)
    assert trainer.skipped == 0
