"""The optimizer, its learning rate, and the parameters without weight decay."""

import math
import re
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

import pointewa.ewa as ewa
from pointewa.config import TrainConfig
from pointewa.errors import ConfigError

_BLOCK = re.compile(r"(?:^|\.)blocks\.(\d+)\.")
_TENSORS = {"adamw": {"step", "exp_avg", "exp_avg_sq"}, "sgd": {"momentum_buffer"}, "muon": {"momentum_buffer"}}


def no_decay(model: nn.Module) -> set[str]:
    """Names of the parameters without weight decay: of at most one dimension, biases, and names with "token" in them.

    That is the rule of Point-BERT's and Point-MAE's code, by which ``cls_pos`` is decayed. An expert's parameter
    counts without its stacking dimension: a stacked bias is 2-D. Models of timm's name further ones.
    """
    stacked = ewa.stacked_parameters(model)
    decays = _decays(model)
    return {name for name, one in model.named_parameters() if not decays(name, one.ndim - (name in stacked))}


def _decays(model: nn.Module) -> Callable[[str, int], bool]:
    named = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()
    return lambda name, ndim: ndim > 1 and not name.endswith(".bias") and "token" not in name and name not in named


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """The optimizer that ``train.optimizer`` names; a group's "lr_scale" is its factor of the learning rate.

    With ``layer_decay`` d the head and the last norm have the whole rate, block i of n the fraction d^(n - i), i from
    0, and what comes before the blocks d^(n + 1) (BEiT, Bao et al., 2021).

    Raises:
        ConfigError: ``layer_decay`` for a model without blocks under the classifier's names.
    """

    def is_matrix(name: str, ndim: int) -> bool:
        return config.optimizer == "muon" and bool(_BLOCK.search(name)) and ndim == 2 and "router" not in name

    layer = _layers(model, config.layer_decay)
    settings = ewa.param_groups(model, config.weight_decay, decays=_decays(model), lr_scale=layer, muon=is_matrix)
    if config.optimizer == "sgd":
        settings = [group | {"kind": "sgd"} for group in settings]
        return torch.optim.SGD(
            settings, lr=config.lr, momentum=config.momentum, nesterov=config.momentum > 0, fused=True
        )
    betas = (config.betas[0], config.betas[1])
    if config.optimizer == "muon":
        return ewa.MuonAndAdamW(settings, config.lr, betas, config.momentum)
    if config.optimizer == "adamw8bit":
        try:
            from pointewa.train.eight_bit import AdamW8bit
        except ImportError as error:
            raise ConfigError("train.optimizer: adamw8bit needs torchao: pip install torchao==0.18.0") from error
        return AdamW8bit([group | {"kind": "adamw8bit"} for group in settings], config.lr, betas)
    return torch.optim.AdamW(settings, lr=config.lr, betas=betas, fused=True)


_BEFORE_BLOCKS = ("encoder.", "reduce_dim.", "cls_token", "cls_pos", "pos_embed.")  # of a trunk; the rest is a head


def _layers(model: nn.Module, decay: float) -> Callable[[str], float]:
    """From a parameter's name to the factor of its learning rate."""
    if decay == 1:
        return lambda name: 1.0
    found = [re.match(r"blocks\.blocks\.(\d+)\.", name) for name, _ in model.named_parameters()]
    depth = 1 + max((int(match[1]) for match in found if match), default=-1)
    if not depth:
        raise ConfigError(
            "train.layer_decay: works on the blocks of a classifier or a segmenter, and this model has none by their "
            "names: set 1"
        )

    def factor(name: str) -> float:
        block = re.match(r"blocks\.blocks\.(\d+)\.", name)
        return decay ** (depth - int(block[1]) if block else depth + 1 if name.startswith(_BEFORE_BLOCKS) else 0)

    return factor


def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
    """The optimizer's tensors for each parameter, by the parameter's name."""
    found = {name: optimizer.state[one] for name, one in model.named_parameters() if one in optimizer.state}
    plain = getattr(optimizer, "plain", None)  # where moments are in 8 bits
    return {name: plain(state) for name, state in found.items()} if plain else found


def load_optimizer_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[Any, dict[str, Tensor]]
) -> None:
    """Resume from an `optimizer_state`, or from one of version 0.1, which numbered the parameters.

    Raises:
        ValueError: a state of other parameters, of another optimizer, or of other shapes.
    """
    named, kinds = dict(model.named_parameters()), {}
    for group in optimizer.param_groups:
        kinds |= {one: group["kind"] for one in group["params"]}
    if state and all(isinstance(key, int) for key in state):
        numbers = dict(enumerate(_numbered(model, optimizer)))
        if state.keys() - numbers.keys():
            raise ValueError("optimizer: of other parameters")
        state = {numbers[key]: tensors for key, tensors in state.items()}
        if any(group["weight_decay"] for group in optimizer.param_groups):
            note = "a checkpoint of version 0.1: from here on cls_pos is decayed, and mask_token is not"
            warnings.warn(f"{note}, so the run ends differently than it would have there", stacklevel=2)
    loaded = {}
    for name, tensors in state.items():
        parameter = named.get(name)
        if parameter not in kinds:
            raise ValueError("optimizer: of other parameters")
        if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
            raise ValueError("optimizer: expected tensors by name")
        wanted = _tensors(optimizer, parameter, kinds[parameter])
        if {key: value.shape for key, value in tensors.items()} != {key: shape for key, (shape, _) in wanted.items()}:
            raise ValueError("optimizer: of another kind, or of other shapes or types")
        if any(value.dtype not in wanted[key][1] for key, value in tensors.items()):
            raise ValueError("optimizer: of another kind, or of other shapes or types")
        loaded[parameter] = {key: value.clone(memory_format=torch.contiguous_format) for key, value in tensors.items()}
    optimizer.state.clear()
    for parameter, tensors in loaded.items():
        if hasattr(optimizer, "restored"):
            place = optimizer.restored(parameter, tensors)
        else:
            place = {key: value.to(parameter.device) for key, value in tensors.items()}
        optimizer.state[parameter].update(place)


def _tensors(
    optimizer: torch.optim.Optimizer, parameter: nn.Parameter, kind: str
) -> dict[str, tuple[torch.Size, tuple[torch.dtype, ...]]]:
    """Shapes and possible types of what an optimizer keeps of a parameter."""
    if hasattr(optimizer, "restored"):
        plain = optimizer.plain(optimizer.fresh(parameter))
        return {key: (value.shape, (value.dtype,)) for key, value in plain.items()}
    step = (torch.Size(), (torch.float32, torch.float64))
    return {key: step if key == "step" else (parameter.shape, (parameter.dtype,)) for key in _TENSORS[kind]}


def _numbered(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterable[str]:
    """Names in the order in which version 0.1 numbered the parameters: there ``cls_pos`` was not decayed, and
    ``mask_token`` was."""
    excluded = no_decay(model) - {"mask_token"} | {"cls_pos"}
    if not any(group["weight_decay"] for group in optimizer.param_groups):
        excluded = set()  # all parameters of one rate were one group
    scales = {one: group["lr_scale"] for group in optimizer.param_groups for one in group["params"]}
    trained = [(name, one) for name, one in model.named_parameters() if one in scales]
    return [name for name, one in sorted(trained, key=lambda item: (-scales[item[1]], item[0] in excluded))]


def learning_rate(step: int, steps_per_epoch: int, config: TrainConfig) -> float:
    """For iteration ``step``, counted from 0: linear warm-up from ``min_lr``, then a cosine back to it.

    The last iteration is one step of the cosine short of ``min_lr``.
    """
    warmup_epochs = config.warmup_epochs
    if warmup_epochs is None:
        fraction = config.warmup_fraction
        warmup_epochs = config.epochs / 30 if fraction is None else fraction * config.epochs
    warmup, total = round(warmup_epochs * steps_per_epoch), config.epochs * steps_per_epoch
    if step < warmup:
        factor = step / warmup
    else:
        factor = 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(total - warmup, 1)))
    return config.min_lr + (config.lr - config.min_lr) * factor
