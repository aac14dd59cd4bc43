"""The splits that a configuration names, on its device: for training, and for whatever is done with a model later."""

import sys
from typing import Any

from pointewa.config import Config, TrainConfig
from pointewa.datasets.base import Clouds
from pointewa.datasets.few_shot import Fold
from pointewa.datasets.images import Images, ImageTrainLoader
from pointewa.datasets.loader import EvalLoader, TrainLoader
from pointewa.datasets.registry import fold_file, load, reported
from pointewa.errors import ConfigError
from pointewa.tasks import task_class
from pointewa.train.data import Data
from pointewa.train.device import select_device
from pointewa.train.distributed import ALONE, World

EVAL_BATCH = 64


def fold_of(config: Config) -> Fold | None:
    """The few-shot fold that a configuration names."""
    data = config.data
    return None if data.way is None else Fold(data.way, data.shot, data.fold)


def fold_entry(config: Config) -> dict[str, Any] | None:
    """What a run's summary says of its few-shot fold: ``drawn`` by this library, or published; None without a fold.

    Raises:
        DataError: published folds are there, without this one.
    """
    data, fold = config.data, fold_of(config)
    if fold is None:
        return None
    drawn = fold_file(data.name, data.root, fold, data.variant, data.background) is None
    return {"way": fold.way, "shot": fold.shot, "fold": fold.number, "drawn": drawn}


def load_split(config: Config, split: str, task: str | None = None) -> Clouds:
    """A whole split ("train" or "test") of the configuration's data set, on the configuration's device; of a few-shot
    fold (``data.fold``) its support set and its queries.

    Args:
        config: the whole configuration.
        split: "train" or "test".
        task: the clouds are for this task; None for that of the configuration.

    Raises:
        DataError: see `pointewa.datasets.load`.
        ConfigError: a device that is not there.
    """
    data = config.data
    stream = None if data.stream == "auto" else data.stream
    device = select_device(config.train.device)
    return load(
        data.name,
        data.root,
        split,
        data.num_points,
        variant=data.variant,
        background=data.background,
        normalize=data.normalize,
        labelled=task_class(task or config.train.task).needs_labels,
        stream=stream,
        device=device,
        img_size=data.img_size,
        fold=fold_of(config),
        parts=task_class(task or config.train.task).point_labels,
    )


def check_kind(clouds: Clouds, of_points: bool, what: str) -> None:
    """Refuse images where clouds are expected, and clouds where images are.

    Raises:
        ConfigError: naming ``what`` expects them.
    """
    if isinstance(clouds, Images) == of_points:
        kinds = ("point clouds", "images")[:: 1 if of_points else -1]
        raise ConfigError(f"data.name: {what} expects {kinds[0]}, found {kinds[1]} ({clouds.source}): set another one")


def training_split(config: Config, task: str | None = None) -> tuple[Clouds, Clouds | None]:
    """The objects that are trained on, ``data.train_fraction`` of each class, and those that are held out of the
    training split for validation, ``data.val_fraction`` of each class; None if that is 0.

    Both depend on the configuration only, not on the seed of the training. For ``task`` see `load_split`.

    Raises:
        DataError, ConfigError: see `load_split`.
    """
    data, held_out, task = config.data, None, task or config.train.task
    train = load_split(config, "train", task)
    check_kind(train, task_class(task).of_points, f"train.task={task}")
    if data.val_fraction:
        train, held_out = train.split(data.val_fraction, seed=0)
    share = data.train_fraction / (1 - data.val_fraction)  # of what is left
    if share < 1:
        train = train.split(share, seed=0)[1]
    return train, held_out


def _batch_size(config: Config, objects: int, world: World) -> int:
    """``train.batch_size``, or what a set has that is smaller than the default."""
    size, parts = config.train.batch_size, config.train.accumulate * world.size
    if size <= objects or size != TrainConfig.batch_size or objects < parts:
        return size
    fitting = objects // parts * parts
    if world.first:
        print(f"note: {objects} training objects are fewer than train.batch_size={size}: {fitting} is used",
              file=sys.stderr)  # fmt: skip
    return fitting


def training_data(config: Config, world: World = ALONE) -> Data:
    """The batches of training, validation (if ``data.val_fraction``) and test, this process's part of them.

    Raises:
        DataError, ConfigError: see `load_split`, and `TrainLoader` and `EvalLoader` of `pointewa.datasets.loader`.
    """
    data, share = config.data, (world.rank, world.size)
    if data.fold is not None and not task_class(config.train.task).predicts_classes:
        raise ConfigError(f"data.fold: few-shot folds are of classification, found train.task={config.train.task}: "
                          "leave data.way, data.shot and data.fold out")  # fmt: skip
    train, held_out = training_split(config)
    test = load_split(config, "test")
    val = None if held_out is None else EvalLoader(held_out, EVAL_BATCH, data.num_points, None, *share)
    train_loader = ImageTrainLoader if isinstance(train, Images) else TrainLoader
    return Data(
        train_loader(
            train, _batch_size(config, len(train), world), data.num_points, data.augment, config.train.seed, *share
        ),
        val,
        EvalLoader(test, EVAL_BATCH, data.num_points, None, *share),
        train.class_names,
        train.normalize,
        train.up,
        train.parts,
        reported(data.name),
        fold_entry(config),
    )
