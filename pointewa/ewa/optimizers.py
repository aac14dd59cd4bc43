"""Parameter groups of a model with experts, each parameter treated as what it is in the dense model, and Muon.

An expert's bias is stacked to ``[N, D]`` and its matrix to ``[N, out, in]``. A rule that looks at a parameter's
dimensions would decay the one, and Muon would orthogonalise the other as a single matrix.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pointewa.ewa.experts import moe_layers, stacked_parameters
from pointewa.ewa.torch_encoder import LAYERS


def param_groups(
    model: nn.Module,
    weight_decay: float,
    lr: float | None = None,
    decays: Callable[[str, int], bool] | None = None,
    lr_scale: Callable[[str], float] = lambda name: 1.0,
    muon: Callable[[str, int], bool] = lambda name, ndim: False,
) -> list[dict[str, Any]]:
    """The trained parameters in groups for an optimizer.

    The functions are given a parameter's name and number of dimensions *in the dense model*, as `fold` will return it.

    Args:
        model: what `to_moe` returned, or a dense model.
        weight_decay: of the parameters that are decayed.
        lr: learning rate; if given, a group's "lr" is its share of it.
        decays: whether a parameter is decayed; by default if it has at least 2 dimensions and timm's
            ``model.no_weight_decay()``, where there is one, does not list it.
        lr_scale: a parameter's factor of the learning rate, for layer-wise decay; a group's "lr_scale", as in timm.
        muon: whether a parameter is a matrix for Muon: a group's "kind" is "muon" or "adamw", see `MuonAndAdamW`.

    Example:
        >>> groups = param_groups(model, 0.05, lr=1e-3, muon=lambda name, ndim: ndim == 2 and "blocks." in name)
        >>> optimizer = MuonAndAdamW(groups, lr=1e-3)
    """
    names, stacked, spared = dense_names(model), stacked_parameters(model), _listed(model)
    if decays is None:

        def decays(name: str, ndim: int) -> bool:
            return ndim > 1 and name not in spared

    groups: dict[tuple[float, float, str], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            dense, ndim = names[name], parameter.ndim - (name in stacked)
            decay = weight_decay if decays(dense, ndim) else 0.0
            groups.setdefault((lr_scale(dense), decay, "muon" if muon(dense, ndim) else "adamw"), []).append(parameter)
    ordered = sorted(groups.items(), key=lambda item: item[0], reverse=True)
    return [
        {"params": parameters, "lr_scale": scale, "weight_decay": decay, "kind": kind}
        | ({} if lr is None else {"lr": lr * scale})
        for (scale, decay, kind), parameters in ordered
    ]


def dense_names(model: nn.Module) -> dict[str, str]:
    """From the name of each parameter to the one that it has in the dense model; a router's stays as it is."""
    names = {name: name for name, _ in model.named_parameters()}
    for layer, moe in moe_layers(model).items():
        around = layer.rpartition(".")[0]
        loose = isinstance(model.get_submodule(around), LAYERS) and layer != around
        for own, _ in moe.experts.named_parameters():
            names[f"{layer}.experts.{own}".lstrip(".")] = f"{around if loose else layer}.{own}".lstrip(".")
    return names


class _NoWeightDecay:
    """The ``no_weight_decay()`` of a converted model: timm's helpers ask for it, and do not know what is stacked."""

    def __init__(self, names: set[str], dense: Callable[[], set[str]] | None) -> None:
        self.names, self.dense = names, dense

    def __call__(self) -> set[str]:
        return set(self.names)


def hide_from_decay(model: nn.Module) -> None:
    """Let a converted model's ``no_weight_decay()`` list the experts' biases and norms, and what it listed, renamed."""
    listed = _listed(model)
    spared = {name for name, dense in dense_names(model).items() if dense in listed}
    spared |= {name for name, parameter in stacked_parameters(model).items() if parameter.ndim <= 2}
    model.no_weight_decay = _NoWeightDecay(listed | spared, vars(model).get("no_weight_decay"))


def show_to_decay(model: nn.Module) -> None:
    """Undo `hide_from_decay`, wherever in the model."""
    for part in model.modules():
        if isinstance(hook := vars(part).get("no_weight_decay"), _NoWeightDecay):
            del part.no_weight_decay
            if hook.dense is not None:
                part.no_weight_decay = hook.dense


def _listed(model: nn.Module) -> set[str]:
    listed = getattr(model, "no_weight_decay", None)
    return set(listed()) if callable(listed) else set()


class MuonAndAdamW(torch.optim.Optimizer):
    """torch's Muon for the groups of kind "muon", its AdamW for the others, as one optimizer.

    Muon orthogonalises matrices, so each expert of a stacked parameter ``[N, out, in]`` is one matrix. Updates are
    scaled to AdamW's size ("match_rms_adamw", Liu et al., arXiv 2502.16982): one learning rate serves both.

    A step with a non-zero ``found_inf`` changes nothing; Muon has no fused form, so reading it waits for the device.

    Args:
        groups: of `param_groups`: with "params", "weight_decay", "kind".
        lr: learning rate of groups that name none.
        betas: of AdamW.
        momentum: of Muon.
    """

    found_inf: Tensor | None = None

    def __init__(
        self,
        groups: list[dict[str, Any]],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        momentum: float = 0.95,
    ) -> None:
        super().__init__(groups, {"lr": lr})
        self._parts: list[torch.optim.Optimizer] = []  # one for each group
        self._slices: dict[nn.Parameter, list[nn.Parameter]] = {}
        for group in self.param_groups:
            if group["kind"] == "adamw":
                part = torch.optim.AdamW(group["params"], lr, betas, weight_decay=group["weight_decay"], fused=True)
            else:
                for one in group["params"]:  # slices in the same memory
                    self._slices[one] = [nn.Parameter(row, requires_grad=False) for row in _rows(one.data)]
                matrices = [row for one in group["params"] for row in self._slices[one]]
                part = torch.optim.Muon(matrices, lr, group["weight_decay"], momentum, adjust_lr_fn="match_rms_adamw")
            self._parts.append(part)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One step of both."""
        if self.found_inf is not None and self.found_inf.item():
            return
        for group, part in zip(self.param_groups, self._parts, strict=True):
            part.param_groups[0]["lr"] = group["lr"]
            if group["kind"] == "muon":
                for one in group["params"]:
                    self._prepare(part, one)
            else:
                part.state = self.state  # load_state_dict replaces it
            part.step()

    def _prepare(self, part: torch.optim.Optimizer, parameter: nn.Parameter) -> None:
        """Make the slices views of the whole parameter's gradient and momentum, and keep the momentum as its state."""
        slices = self._slices[parameter]
        if parameter.grad is None:
            for row in slices:
                row.grad = None
            return
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter, memory_format=torch.contiguous_format)
        views = map(_rows, (parameter.data, parameter.grad, state["momentum_buffer"]))
        for row, data, grad, momentum in zip(slices, *views, strict=True):
            row.data, row.grad = data, grad
            part.state[row]["momentum_buffer"] = momentum


def _rows(parameter: Tensor) -> list[Tensor]:
    """A matrix, or the matrices of the experts that are stacked in it."""
    return [parameter] if parameter.ndim == 2 else list(parameter.unbind())
