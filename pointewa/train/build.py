"""What a configuration says is to be trained: model, experts, their averaging, the average of the weights."""

from functools import partial

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import pointewa.ewa as ewa
from pointewa.config import Config, build_architecture
from pointewa.errors import ConfigError
from pointewa.models import LoadReport, PointTransformerClassifier
from pointewa.runs.weights import init_from


def build_model(config: Config, num_classes: int, load: bool = True) -> tuple[nn.Module, LoadReport | None]:
    """The model to train, and what ``train.init_from`` brought.

    Args:
        config: the configuration.
        num_classes: C.
        load: take the weights of ``train.init_from``; not where a checkpoint will be loaded anyway.

    Raises:
        ConfigError, CheckpointError: values that do not go together, weights that do not fit.
    """
    model, report = PointTransformerClassifier(build_architecture(config.model), num_classes), None
    if config.train.init_from and load:
        report = init_from(model, config.train.init_from)
    if config.train.freeze_backbone:
        model.requires_grad_(False).cls_head_finetune.requires_grad_(True)
    return with_experts(model, config), report


def with_experts(model: nn.Module, config: Config) -> nn.Module:
    """The model itself, its FFNs replaced as ``ewa`` says.

    Raises:
        ConfigError: values that do not fit the model.
    """
    scheme = config.ewa
    if not scheme.enabled:
        return model
    init = ("copy" if config.train.init_from else "independent") if scheme.init == "auto" else scheme.init
    gated, dealt = partial(ewa.TopKMoE, top_k=scheme.top_k), partial(ewa.RandomPartitionMoE, scope=scheme.scope)
    mixture = gated if scheme.router == "top_k" else dealt
    try:
        return ewa.to_moe(model, scheme.num_experts, scheme.layers, init, inplace=True, mixture=mixture)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"ewa: {error}") from error


def build_averaging(
    config: Config, model: nn.Module, optimizer: torch.optim.Optimizer, total_steps: int
) -> ewa.ExpertAveraging | None:
    """The averaging of the experts, attached to the optimizer; None without experts.

    Raises:
        ConfigError: a share rate or a fraction out of range.
    """
    scheme = config.ewa
    if not scheme.enabled:
        return None
    try:
        schedule = ewa.ShareRate(scheme.share_rate, total_steps if scheme.schedule == "linear" else 0)
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
