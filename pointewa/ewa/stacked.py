"""N layers as one batched product.

The N experts of a layer are one copy of an FFN module in which every parameter is stacked to ``[N, ...]``. The FFN's
*own* forward code runs on tokens ``[N, T, D]``, its linear layers having become batched matrix products. So any FFN
made of linear layers, layer norms and element-wise functions can be an expert, gated ones included.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized


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
            parameter = getattr(layer, name, None)
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


class StackedNorm(StackedLayer):
    """N `torch.nn.LayerNorm` or `torch.nn.RMSNorm` over the last dimension: weight and bias ``[N, D]`` or None."""

    def __init__(self, layer: nn.LayerNorm | nn.RMSNorm, num_experts: int) -> None:
        super().__init__(layer, num_experts)
        self.normalized_shape, self.eps = layer.normalized_shape, layer.eps
        self.normalize = F.rms_norm if isinstance(layer, nn.RMSNorm) else F.layer_norm
        if len(self.normalized_shape) != 1:
            raise ValueError(f"an expert's norm must be over the last dimension, got {self.normalized_shape}")

    def forward(self, x: Tensor) -> Tensor:
        """``[N or 1, T, D]`` -> the same shape."""
        x = self.normalize(x, self.normalized_shape, eps=self.eps)
        weight, bias = self._rows(self.weight, x), self._rows(self.bias, x)
        if weight is not None:
            x = x * weight.unsqueeze(1)
        return x if bias is None else x + bias.unsqueeze(1)


NORMS = (nn.LayerNorm, nn.RMSNorm)


def linear_shape(layer: nn.Module) -> tuple[int, int] | None:
    """Inputs and outputs of a linear layer of any class, or of N stacked ones; None if its parameters are others."""
    if isinstance(layer, StackedLinear):
        return layer.weight.shape[2], layer.weight.shape[1]
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    if layer._modules or isinstance(layer, NORMS) or "bias" not in layer._parameters:  # no embedding
        return None
    weight, bias = layer._parameters.get("weight"), layer._parameters["bias"]
    if weight is None or weight.ndim != 2 or not {*own_names(layer)} <= {"weight", "bias"}:
        return None
    return (weight.shape[1], weight.shape[0]) if bias is None or bias.shape == weight.shape[:1] else None


def own_names(layer: nn.Module) -> list[str]:
    """The names of the parameters and buffers that a module holds itself."""
    return [name for name, _ in (*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False))]


def reparametrised(layer: nn.Module) -> bool:
    """Whether a layer's weight or bias is computed from others, as by weight_norm, spectral_norm and pruning."""
    if not isinstance(layer, (nn.Linear, *NORMS)):
        return False
    return is_parametrized(layer) or not {*own_names(layer)} <= {"weight", "bias"}


def check_stackable(ffn: nn.Module, name: str = "") -> None:
    """Refuse an FFN that `stack` cannot take, calling it by ``name``.

    Raises:
        ValueError: a layer with parameters or buffers that is neither linear nor a norm over the last dimension, or
            that computes its weight from other parameters.
    """
    title = f"cannot make experts of {name or type(ffn).__name__}"
    computed = [layer_name for layer_name, layer in ffn.named_modules() if reparametrised(layer)]
    if computed:
        raise ValueError(
            f"{title}: the weights of {', '.join(computed)} are computed from others (weight_norm, spectral_norm, "
            "pruning): remove that first (torch.nn.utils.parametrize.remove_parametrizations, remove_weight_norm, "
            "prune.remove), and put it on the folded model again"
        )
    for layer in ffn.modules():
        if own_names(layer) and _stacked_form(layer) is None:
            raise ValueError(
                f"{title}: its {type(layer).__name__} holds {own_names(layer)}; an FFN may be built of linear layers, "
                "nn.LayerNorm, nn.RMSNorm and modules without parameters"
            )


def stack(ffn: nn.Module, num_experts: int) -> nn.Module:
    """A copy of ``ffn`` with each parameter stacked ``num_experts`` times, all experts equal to ``ffn``.

    Raises:
        ValueError: what `check_stackable` refuses.
    """
    check_stackable(ffn)
    ffn = copy.deepcopy(ffn)
    forms = {layer: _stacked_form(layer) for layer in ffn.modules()}
    return swap_modules(ffn, {layer: form(layer, num_experts) for layer, form in forms.items() if form is not None})


def unstack(experts: nn.Module) -> nn.Module:
    """What `stack` was given, with the experts' mean weights: the same class, names, dtype, device and mode."""
    ffn = copy.deepcopy(experts)
    return swap_modules(ffn, {layer: layer.fuse() for layer in ffn.modules() if isinstance(layer, StackedLayer)})


def _stacked_form(layer: nn.Module) -> type[StackedLayer] | None:
    if type(layer) is nn.Linear or (linear_shape(layer) and _computes_linear(layer)):
        return StackedLinear
    if type(layer) is nn.RMSNorm or (type(layer).__name__ == "LayerNorm" and isinstance(layer, nn.LayerNorm)):
        return StackedNorm  # torch's, and timm's subclass
    return None


def _computes_linear(layer: nn.Module) -> bool:
    """Whether a layer of another class than torch's is what its parameters look like."""
    generator = torch.Generator().manual_seed(0)
    drawn = {name: torch.rand(one.shape, generator=generator, device="cpu") for name, one in layer.named_parameters()}
    x = torch.rand(1, 3, drawn["weight"].shape[1], generator=generator, device="cpu")
    try:
        out = torch.func.functional_call(layer, drawn, (x,))
        return torch.allclose(out, F.linear(x, drawn["weight"], drawn.get("bias")))
    except Exception:  # anything can be wrong with a layer that is something else
        return False


def swap_modules(model: nn.Module, replacement: dict[nn.Module, nn.Module]) -> nn.Module:
    """Put each replacement wherever the module that it replaces is used; returns the new ``model``."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in replacement:
                setattr(parent, name, replacement[child])
    return replacement.get(model, model)
