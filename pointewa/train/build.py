"""From a configuration to what is trained: model, experts, their averaging, the average of the weights."""

from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import pointewa.ewa as ewa
from pointewa.config import Config, check_used
from pointewa.errors import ConfigError
from pointewa.models import LoadReport
from pointewa.models.parts import Parts
from pointewa.models.registry import model_ffns
from pointewa.runs.weights import RUN_CONFIG
from pointewa.tasks import task_class
from pointewa.tasks.base import Task


def task_of_run(config: Config, folder: Path, reported: tuple[str, ...] = ()) -> Task:
    """What a training learns. In a new one keys without effect are refused; one that goes on may have them.

    Args:
        config: the configuration.
        folder: of the run, see `pointewa.runs.folder.find_run`.
        reported: metrics that the data set asks for.

    Raises:
        ConfigError: values that do not go with the task or with each other.
    """
    task = task_class(config.train.task).reporting(reported)(config)
    if config.run.overwrite or not (folder / RUN_CONFIG).is_file():
        check_used(config, task.name, (*task.reads, "data.num_points") if task.of_points else task.reads)
    return task


def build_model(
    task: Task, class_names: tuple[str, ...], parts: Parts | None = None, saved: nn.Module | None = None
) -> tuple[nn.Module, LoadReport | None]:
    """The model to train, its modules in training or evaluation mode, and the report of ``train.init_from``.

    Args:
        task: what is learned.
        class_names: of the data set.
        parts: of the data set's objects.
        saved: the model of the checkpoint that will be loaded, in place of the weights of ``train.init_from``.

    Raises:
        ConfigError, CheckpointError: values that do not go together, weights that do not fit.
    """
    train = task.config.train
    model = task.build_model(class_names, parts) if saved is None else task.rebuild_model(class_names, parts, saved)
    report = None
    if train.init_from and saved is None:
        report = task.load_initial(model, train.init_from)
    if train.freeze_backbone:
        head = task.trained_head(model.requires_grad_(False)).requires_grad_(True)
        model.eval()  # its batch norms keep their statistics, nothing is dropped
        head.train()
    return with_experts(model, task.config), report


def with_experts(model: nn.Module, config: Config) -> nn.Module:
    """The same model, its FFNs replaced as the group ``moe`` says.

    Raises:
        ConfigError: values that do not fit the model.
    """
    moe = config.moe
    if config.router == "none" and moe.init != "mean":
        return model
    init = ("copy" if config.train.init_from else "independent") if moe.init == "auto" else moe.init
    random = partial(ewa.RandomPartitionMoE, scope=moe.scope, dropout=moe.dropout)
    mixture = partial(ewa.TopKMoE, top_k=moe.top_k) if config.router == "top_k" else random
    convert = partial(ewa.to_moe, model, moe.num_experts, moe.layers, predicate=model_ffns(model), inplace=True)
    try:
        if init == "mean":  # of the experts that an EWA run of the same seed starts from
            return ewa.fold(convert(init="independent"), inplace=True)
        return convert(init=init, mixture=mixture)
    except ValueError as error:
        raise ConfigError(f"moe: {error}") from error


def build_averaging(
    config: Config, model: nn.Module, optimizer: torch.optim.Optimizer, total_steps: int
) -> ewa.ExpertAveraging | None:
    """The averaging of the experts, attached to the optimizer; None without ``ewa.enabled``.

    Raises:
        ConfigError: a share rate or a fraction out of range.
    """
    scheme = config.ewa
    if not scheme.enabled:
        return None
    try:
        rise = round(scheme.rise * total_steps) if scheme.schedule == "linear" else 0
        schedule = ewa.ShareRate(scheme.share_rate, rise)
        if scheme.until != 1:
            schedule = ewa.until(schedule, scheme.until, total_steps)
        return ewa.ExpertAveraging(model, schedule).attach(optimizer)
    except ValueError as error:
        raise ConfigError(f"ewa: {error}") from error


def build_ema(model: nn.Module, decay: float) -> AveragedModel | None:
    """An exponential moving average of weights and batch norm statistics; None for ``decay`` 0.

    Its decay rises as (1 + n) / (10 + n) with the number n of updates, so that it forgets the initialisation.
    """

    def update(averages: list[Tensor], values: list[Tensor], updates: Tensor | int) -> None:
        if averages[0].is_floating_point():
            torch._foreach_lerp_(averages, values, 1 - min(decay, (1 + int(updates)) / (10 + int(updates))))
        else:
            torch._foreach_copy_(averages, values)

    return AveragedModel(model, multi_avg_fn=update, use_buffers=True).eval().requires_grad_(False) if decay else None
