"""The optimizer, its learning rate, and what is left out of weight decay."""

import math

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
    """AdamW with weight decay on the weights only."""
    excluded = no_decay(model)
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for name, p in trained if name not in excluded], "weight_decay": config.weight_decay},
        {"params": [p for name, p in trained if name in excluded], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, fused=True)


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
