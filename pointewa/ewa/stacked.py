"""N layers as one batched product.

The N experts of a layer are one copy of an FFN module in which every parameter is stacked to ``[N, ...]``. The FFN's
*own* forward code runs on tokens ``[N, T, D]``, its linear layers having become batched matrix products. So any FFN
made of linear layers, layer norms and element-wise functions can be an expert, gated ones included.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class StackedLayer(nn.Module):
    """N instances of one layer. Fed ``[N, T, in]`` each works on its own row; fed ``[1, T, in]`` their mean does.

    The number of rows decides, not ``self.training``: it cannot disagree with what the caller meant.
    """

    def __init__(self, layer: nn.Module, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.training = layer.training
        self._dense = (copy.deepcopy(layer).to("meta"),)  # without its weights; in a tuple, so not a submodule
        for name in ("weight", "bias"):
            parameter = getattr(layer, name)
            if parameter is not None:
                stacked = parameter.detach().expand(num_experts, *parameter.shape).clone()
                parameter = nn.Parameter(stacked, requires_grad=parameter.requires_grad)
            self.register_parameter(name, parameter)

    def _rows(self, parameter: Tensor | None, x: Tensor) -> Tensor | None:
        if parameter is None or x.shape[0] == self.num_experts:
            return parameter
        return parameter.mean(0, keepdim=True)

    def fuse(self) -> nn.Module:
        """The layer with the mean weights."""
        layer = copy.deepcopy(self._dense[0])
        for name, stacked in self.named_parameters():
            setattr(layer, name, nn.Parameter(stacked.detach().mean(0), requires_grad=stacked.requires_grad))
        layer.training = self.training
        return layer


class StackedLinear(StackedLayer):
    """N `torch.nn.Linear` as one batched product: weight ``[N, out, in]``, bias ``[N, out]`` or None."""

    def forward(self, x: Tensor) -> Tensor:
        """``[N or 1, T, in] -> [N or 1, T, out]``."""
        weight, bias = self._rows(self.weight, x), self._rows(self.bias, x)
        # W x^T rather than x W^T: the gradient of W then has W's own layout, and need not be copied into it.
        if bias is None:
            return torch.bmm(weight, x.mT).mT
        return torch.baddbmm(bias.unsqueeze(2), weight, x.mT).mT


class StackedLayerNorm(StackedLayer):
    """N `torch.nn.LayerNorm` over the last dimension: weight and bias ``[N, D]`` or None."""

    def __init__(self, layer: nn.LayerNorm, num_experts: int) -> None:
        super().__init__(layer, num_experts)
        self.normalized_shape, self.eps = layer.normalized_shape, layer.eps
        if len(self.normalized_shape) != 1:
            raise ValueError(f"an expert's LayerNorm must be over the last dimension, got {self.normalized_shape}")

    def forward(self, x: Tensor) -> Tensor:
        """``[N or 1, T, D]`` -> the same shape."""
        x = F.layer_norm(x, self.normalized_shape, eps=self.eps)
        weight, bias = self._rows(self.weight, x), self._rows(self.bias, x)
        if weight is not None:
            x = x * weight.unsqueeze(1)
        return x if bias is None else x + bias.unsqueeze(1)


def stack(ffn: nn.Module, num_experts: int) -> nn.Module:
    """A copy of ``ffn`` with each parameter stacked ``num_experts`` times, all experts equal to ``ffn``.

    Raises:
        ValueError: a layer with parameters or buffers that is neither `torch.nn.Linear` nor `torch.nn.LayerNorm`.
    """
    ffn = copy.deepcopy(ffn)
    stacked = {}
    for layer in ffn.modules():
        form = _stacked_form(layer)
        own = [name for name, _ in (*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False))]
        if form is not None:
            stacked[layer] = form(layer, num_experts)
        elif own:
            raise ValueError(
                f"cannot make experts of {type(ffn).__name__}: its {type(layer).__name__} holds {own}; "
                "an FFN may be built of nn.Linear, nn.LayerNorm and modules without parameters"
            )
    return swap_modules(ffn, stacked)


def unstack(experts: nn.Module) -> nn.Module:
    """What `stack` was given, with the experts' mean weights: the same class, names, dtype, device and mode."""
    ffn = copy.deepcopy(experts)
    return swap_modules(ffn, {layer: layer.fuse() for layer in ffn.modules() if isinstance(layer, StackedLayer)})


def _stacked_form(layer: nn.Module) -> type[StackedLayer] | None:
    if type(layer) is nn.Linear:
        return StackedLinear
    if isinstance(layer, nn.LayerNorm) and type(layer).__name__ == "LayerNorm":  # torch's, and timm's subclass
        return StackedLayerNorm
    return None


def swap_modules(model: nn.Module, replacement: dict[nn.Module, nn.Module]) -> nn.Module:
    """Put each replacement wherever the module that it replaces is used; returns the new ``model``."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in replacement:
                setattr(parent, name, replacement[child])
    return replacement.get(model, model)
