"""The optimizer, its learning rate, and what is left out of weight decay."""

import math
import re

import torch
from torch import nn

import pointewa.ewa as ewa
from pointewa.config import TrainConfig


def no_decay(model: nn.Module) -> set[str]:
    """Names of the parameters without weight decay: biases, norms and tokens.

    As in Point-MAE those are the parameters of at most one dimension, the biases and the tokens. An expert's
    parameter counts without its stacking dimension: a stacked bias is 2-D.
    """
    stacked = ewa.stacked_parameters(model)
    return {
        name
        for name, parameter in model.named_parameters()
        if parameter.ndim - (name in stacked) <= 1 or name.endswith(".bias") or name in ("cls_token", "cls_pos")
    }


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW with weight decay on the weights only; a group's "lr_scale" is its factor of the learning rate.

    With ``layer_decay`` d the head and the last norm have the whole rate, block i of n the fraction d^(n - i), i from
    0, and what comes before the blocks d^(n + 1) (BEiT, Bao et al., 2021).
    """
    excluded, depth = no_decay(model), 0
    if config.layer_decay < 1:
        depth = len(model.blocks.blocks)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            scale = config.layer_decay ** (depth + 1 - _layer(name, depth)) if depth else 1.0
            groups.setdefault((scale, 0.0 if name in excluded else config.weight_decay), []).append(parameter)
    ordered = sorted(groups.items(), key=lambda item: item[0], reverse=True)
    return torch.optim.AdamW(
        [{"params": parameters, "lr_scale": scale, "weight_decay": decay} for (scale, decay), parameters in ordered],
        lr=config.lr,
        fused=True,
    )


def _layer(name: str, depth: int) -> int:
    block = re.match(r"blocks\.blocks\.(\d+)\.", name)
    if block:
        return int(block[1]) + 1
    return depth + 1 if name.startswith(("norm.", "cls_head_finetune.")) else 0


def learning_rate(step: int, steps_per_epoch: int, config: TrainConfig) -> float:
    """Of iteration ``step``, counted from 0: linear warm-up from ``min_lr``, then a cosine back to it.

    The last iteration has ``min_lr`` but for one step of the cosine.
    """
    warmup_epochs = config.epochs / 30 if config.warmup_epochs is None else config.warmup_epochs
    warmup, total = round(warmup_epochs * steps_per_epoch), config.epochs * steps_per_epoch
    if step < warmup:
        factor = step / warmup
    else:
        factor = 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(total - warmup, 1)))
    return config.min_lr + (config.lr - config.min_lr) * factor
