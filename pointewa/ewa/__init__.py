"""Experts Weights Averaging (EWA, arXiv 2308.06093) for any vision transformer and any training loop.

    model = ewa.to_moe(vit, num_experts=4, layers="every_other")
    averaging = ewa.ExpertAveraging(model, ewa.linear(0.3, total_steps)).attach(optimizer)
    ...                                  # your own loop, unchanged
    dense = ewa.fold(model)              # the original class with the original parameter names

Imports torch only.
"""

from pointewa.ewa.averaging import ExpertAveraging, ShareRate, average_experts_, constant, linear, until
from pointewa.ewa.convert import fold, moe_numbers, to_moe
from pointewa.ewa.diagnostics import disagreement, fold_gap
from pointewa.ewa.experts import (
    MixtureOfExperts,
    RandomPartitionMoE,
    TopKMoE,
    balance_loss,
    moe_layers,
    stacked_parameters,
)
from pointewa.ewa.ffns import find_ffns, is_ffn
from pointewa.ewa.optimizers import MuonAndAdamW, dense_names, param_groups

__all__ = [
    "ExpertAveraging",
    "MixtureOfExperts",
    "MuonAndAdamW",
    "RandomPartitionMoE",
    "ShareRate",
    "TopKMoE",
    "average_experts_",
    "balance_loss",
    "constant",
    "dense_names",
    "disagreement",
    "find_ffns",
    "fold",
    "fold_gap",
    "is_ffn",
    "linear",
    "moe_layers",
    "moe_numbers",
    "param_groups",
    "stacked_parameters",
    "to_moe",
    "until",
]
