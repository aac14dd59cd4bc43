"""Part segmentation: its metrics by the field's rules, its loss, and a run from the start to the end."""

import json

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import nn

from pointewa import datasets, tasks
from pointewa.config import load_config
from pointewa.datasets.loader import EvalLoader, TrainLoader
from pointewa.errors import ConfigError
from pointewa.models.parts import EVERY, Parts
from pointewa.runs.folder import find_run
from pointewa.runs.weights import load_any
from pointewa.tasks.base import Batch
from pointewa.tasks.part_segmentation import Segmentation, segment
from pointewa.train.data import Data
from pointewa.train.trainer import Trainer
from tests.conftest import TINY

PARTS = Parts(("seat", "leg", "arm", "top", "foot", "dirt"), (0, 0, 0, 1, 1, EVERY))  # of chair, table, both
MASK = PARTS.mask(3)


class Told(nn.Module):
    """Predicts what it is told: the first coordinate of a point is its part."""

    parts, num_classes = PARTS, 3

    def forward(self, points, labels):
        assert not self.training
        return F.one_hot(points[..., 0].long(), len(PARTS)).float()


def batch(*objects):
    """Of objects: category, what is predicted, the truth."""
    labels, predicted, truth = (torch.tensor(column) for column in zip(*objects, strict=True))
    points = torch.zeros(*predicted.shape, 3)
    points[..., 0] = predicted
    return Batch(points, labels, truth)


def test_a_part_that_is_neither_predicted_nor_there_counts_fully():
    """A chair without arms, all right but one leg: seat 2/3, leg 1/2, arm and dirt 1."""
    result = segment(Told(), [batch((0, [0, 0, 1, 0], [0, 0, 1, 1]))])
    assert result.ious.tolist() == pytest.approx([100 * (2 / 3 + 1 / 2 + 1 + 1) / 4])
    assert result.metrics["accuracy"] == pytest.approx(75)


def test_a_part_that_is_predicted_and_not_there_counts_nothing():
    result = segment(Told(), [batch((0, [0, 2, 1, 1], [0, 0, 1, 1]))])
    assert result.ious.tolist() == pytest.approx([100 * (1 / 2 + 1 + 0 + 1) / 4])


def test_a_part_of_every_category_is_one_of_each_of_them():
    result = segment(Told(), [batch((0, [5, 0, 1, 2], [5, 0, 1, 2]), (1, [5, 3, 4, 4], [3, 3, 4, 4]))])
    assert result.ious.tolist() == pytest.approx([100, 100 * (1 / 2 + 1 + 0) / 3])


class Ranked(Told):
    """Of every point parts 3, 0, 1, 2, 4, 5, in this order."""

    def forward(self, points, labels):
        return torch.tensor([4.0, 3, 2, 5, 1, 0]).expand(*points.shape[:2], 6)


@pytest.mark.parametrize(("every_part", "iou", "accuracy"), [(False, (1 + 1 + 1 + 1) / 4, 100), (True, 3 / 4, 0)])
def test_the_prediction_is_among_the_parts_of_the_true_category_or_among_all(every_part, iou, accuracy):
    """The most probable part of a chair's points is the top of a table; of a chair's parts it is the seat."""
    result = segment(Ranked(), [batch((0, [0, 0], [0, 0]))], every_part=every_part)
    assert result.ious.tolist() == pytest.approx([100 * iou])
    assert result.metrics["accuracy"] == accuracy


def test_the_mean_over_categories_is_over_those_that_occur():
    objects = [(0, [0, 0, 1, 1], [0, 0, 1, 1])] * 3 + [(2, [5, 5, 5, 5], [5, 5, 5, 5])]  # no tables
    objects[1] = (0, [0, 0, 0, 1], [0, 0, 1, 1])
    result = segment(Told(), [batch(*objects[:2]), batch(*objects[2:])])
    worse = 100 * (2 / 3 + 1 / 2 + 1 + 1) / 4
    by_class = result.by_class(3)
    assert by_class[[0, 2]].tolist() == pytest.approx([(200 + worse) / 3, 100])
    assert by_class[1].isnan()
    assert result.metrics["miou"] == pytest.approx((300 + worse) / 4)
    assert result.metrics["class_miou"] == pytest.approx(((200 + worse) / 3 + 100) / 2)


def naive(predicted, truth, label):
    """IoU of one object, in a plain loop."""
    values = []
    for part in range(len(PARTS)):
        if not MASK[label, part]:
            continue
        both = sum(p == part and t == part for p, t in zip(predicted, truth, strict=True))
        either = sum(p == part or t == part for p, t in zip(predicted, truth, strict=True))
        values.append(both / either if either else 1.0)
    return 100 * sum(values) / len(values)


@pytest.mark.parametrize("every_part", [False, True])
def test_metrics_are_those_of_a_plain_loop(every_part):
    class Noise(Told):
        def forward(self, points, labels):
            return points @ torch.randn(3, 6, generator=torch.Generator().manual_seed(1))

    labels = torch.randint(3, (40,))
    truth = torch.multinomial(MASK[labels].float(), 25, replacement=True)
    points = torch.randn(40, 25, 3)
    batches = map(Batch, points.split(16), labels.split(16), truth.split(16))
    result = segment(Noise().train(), batches, every_part=every_part)
    model = Noise().eval()
    ious, right = [], 0
    for cloud, label, true in zip(points, labels.tolist(), truth.tolist(), strict=True):
        logits = model(cloud[None], None)[0].tolist()
        allowed = [part for part in range(6) if every_part or MASK[label, part]]
        predicted = [max(allowed, key=row.__getitem__) for row in logits]
        ious.append(naive(predicted, true, label))
        right += sum(p == t for p, t in zip(predicted, true, strict=True))
    assert result.ious.tolist() == pytest.approx(ious)
    assert result.metrics["miou"] == pytest.approx(sum(ious) / 40)
    each = [[iou for iou, one in zip(ious, labels, strict=True) if one == label] for label in range(3)]
    assert result.metrics["class_miou"] == pytest.approx(sum(sum(one) / len(one) for one in each) / 3)
    assert result.metrics["accuracy"] == pytest.approx(100 * right / 1000)
    loss = F.cross_entropy(model(points, None).flatten(0, 1), truth.flatten()).item()
    assert result.metrics["loss"] == pytest.approx(loss, rel=1e-5)
    assert result.predicted.dtype == torch.int16  # logits of a published test split would take 1.2 GB


def test_the_loss_is_over_all_parts_and_the_accuracy_among_those_of_the_category():
    task = tasks.task_class("part_segmentation")(load_config(overrides=["train.label_smoothing=0.1"]))
    one = batch((0, [0, 0], [0, 1]), (1, [0, 0], [4, 3]))
    loss, logged = task.loss(Ranked().eval(), one)
    logits = torch.tensor([4.0, 3, 2, 5, 1, 0]).expand(4, 6)
    expected = F.cross_entropy(logits, torch.tensor([0, 1, 4, 3]), label_smoothing=0.1)
    assert loss.item() == pytest.approx(expected.item())
    assert logged["accuracy"].item() == 50 + 50  # one of two points of each


# A run.

PART = ("train.task=part_segmentation", "train.lr=3e-3", "model.decoder=light", "data.augment=[scale_shift_uniform]")


@pytest.fixture(scope="module")
def clouds():
    """Those of 3 of the procedural classes."""

    def few(split, objects):
        found = datasets.load("shapes", "", split, 256, parts=True)
        return found.take(torch.isin(found.labels, torch.tensor([4, 8, 14])).nonzero().squeeze(1)[:objects])

    return {"train": few("train", 96), "test": few("test", 48)}


@pytest.fixture
def make(clouds, tmp_path):
    def build(*overrides, parts=True):
        config = load_config(overrides=[*TINY, *PART, f"run.dir={tmp_path}", *overrides])
        train, test = clouds["train"], clouds["test"]
        loader = TrainLoader(train, config.train.batch_size, 128, config.data.augment, config.train.seed)
        data = Data(loader, None, EvalLoader(test, 16, 128), train.class_names, parts=train.parts if parts else None)
        return Trainer(config, data, find_run(config), Console(quiet=True))

    return build


def test_a_run_learns_folds_and_can_be_loaded(make):
    trainer = make("run.name=a", "train.epochs=15")
    trainer.fit()
    summary = trainer.finish()
    assert json.loads((trainer.folder / "summary.json").read_text()) == summary
    assert summary["test"]["miou"] > 50
    assert summary["test"]["accuracy"] > 75
    assert summary["test"] == pytest.approx(summary["test_before_folding"], abs=1e-3)
    assert summary["points_changed_by_folding"] < 0.1
    present = [value for value in summary["miou_by_class"].values() if value is not None]
    assert [name for name, value in summary["miou_by_class"].items() if value is not None] == ["chair", "lamp", "table"]
    assert sum(present) / 3 == pytest.approx(summary["test"]["class_miou"], abs=1e-3)
    columns, rows = tasks.task_of(summary).result(summary)
    assert columns == ["", "in training (MoE)", "folded (dense)"]
    assert [row[0] for row in rows][:4] == ["instance mIoU", "class mIoU", "point accuracy", "parameters"]
    assert "points predicted otherwise" in [row[0] for row in rows]
    loaded = load_any(trainer.folder)
    assert loaded.model.parts == trainer.data.parts
    result = segment(loaded.model, trainer.data.test)
    assert result.metrics["miou"] == pytest.approx(summary["test"]["miou"], abs=1e-3)
    tuned = make("run.name=b", f"train.init_from={trainer.folder}", "train.freeze_backbone=true", "ewa.enabled=false")
    assert tuned.report.fresh == []
    trained = {name.partition(".")[0] for name, one in tuned.model.named_parameters() if one.requires_grad}
    assert trained == {"label_conv", "propagation_0", "convs1", "bns1", "convs2", "bns2", "convs3"}


def test_an_interrupted_run_goes_on_exactly(make, interrupt):
    whole = make("run.name=whole")
    whole.fit()
    interrupt(make("run.name=part", "train.save_every=3"), 8)
    resumed = make("run.name=part", "train.save_every=3")
    assert resumed.step == 6
    resumed.fit()
    for name, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name


def test_it_starts_from_a_pretraining_and_from_a_classifier(make, make_trainer):
    for task, name in (("masked_autoencoding", "p"), ("classification", "c")):
        before = make_trainer(f"train.task={task}", f"run.name={name}", "train.epochs=1", "ewa.enabled=false")
        before.fit()
        before.finish()
        trainer = make(f"train.init_from={before.folder}", f"run.name=from_{name}", "ewa.enabled=false")
        assert torch.equal(trainer.model.pos_embed[0].weight, before.model.state_dict()[
            "MAE_encoder.pos_embed.0.weight" if name == "p" else "pos_embed.0.weight"])  # fmt: skip
        assert {key.partition(".")[0] for key in trainer.report.fresh} == set(trainer.model._head) - {"dp1"}


def test_what_cannot_be_segmented_is_refused(make):
    with pytest.raises(ConfigError, match=r"data\.name: part_segmentation learns from points that are labelled"):
        make(parts=False)
    with pytest.raises(ConfigError, match=r"model\.decoder must be one of point_mae, point_bert, light, got 'x'"):
        make("model.decoder=x")
    unlabelled = Batch(torch.zeros(1, 4, 3), torch.tensor([0]))
    with pytest.raises(ConfigError, match=r"data\.name: .* those of this set have none"):
        segment(Told(), [unlabelled])


def test_rows_of_several_processes_are_concatenated():
    """As `Training.evaluate` does: each process measures its part."""
    objects = [(0, [0, 2, 1, 1], [0, 0, 1, 1]), (1, [5, 3, 4, 4], [3, 3, 4, 4]), (0, [0, 0, 1, 0], [0, 0, 1, 1])]
    task = tasks.task_class("part_segmentation")(load_config())
    model = Told().eval()
    halves = [task.outputs(model, [batch(*part)]) for part in (objects[:2], objects[2:])]
    joined = {name: torch.cat([half[name] for half in halves]) for name in halves[0]}
    assert task.measure(joined) == segment(Told(), [batch(*objects)]).metrics
    assert Segmentation(**joined).ious.shape == (3,)


@pytest.mark.parametrize(
    ("override", "parts", "message"),
    [
        (
            "model.width=6",
            Parts(("a",), (0,)),
            "model.width must be a multiple of 4 for the decoder's .*, got 6",
        ),
        ("model.decoder=heavy", Parts(("a",), (0,)), "model.decoder must be one of point_mae, .*, got 'heavy'"),
        ("model.heads=5", Parts(("a",), (0,)), "model.width must be a multiple of heads, got 24 and 5"),
        ("model.depth=2", Parts(("a",), (3,)), "model: parts: expected categories below 1, found 3"),
    ],
)
def test_what_the_model_refuses_is_told_by_the_key(override, parts, message):
    keys = [*TINY, "model.decoder=point_bert", "train.task=part_segmentation", override]
    with pytest.raises(ConfigError, match=message):
        tasks.task_class("part_segmentation")(load_config(overrides=keys)).build_model(("mug",), parts)
