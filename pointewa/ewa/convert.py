"""Put EWA on a dense vision transformer (`to_moe`) and take it off again (`fold`).

The forms of FFN that are recognised, in any module tree:

| form | whose |
|---|---|
| a module with linear layers ``fc1*`` and ``fc2`` | timm (``Mlp``, ``GluMlp``, ``SwiGLU``), Point-MAE, ours |
| ``MLPBlock`` | torchvision |
| the loose ``linear1``, ``activation``, ``dropout``, ``linear2`` of a ``TransformerEncoderLayer`` | torch |

Others are named by the caller's own predicate.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import nn

from pointewa.ewa.experts import MixtureOfExperts, RandomPartitionMoE, moe_layers, swap_modules


def is_ffn(name: str, module: nn.Module) -> bool:
    """Whether a module is one of the FFN forms in the table above; the default ``predicate`` of `to_moe`."""
    if isinstance(module, nn.TransformerEncoderLayer) or type(module).__name__ == "MLPBlock":
        return True
    linear = [child_name for child_name, child in module.named_children() if isinstance(child, nn.Linear)]
    return "fc2" in linear and any(child_name.startswith("fc1") for child_name in linear)


def to_moe(
    model: nn.Module,
    num_experts: int = 4,
    layers: str | Sequence[int] = "every_other",
    init: str = "independent",
    predicate: Callable[[str, nn.Module], bool] = is_ffn,
    inplace: bool = False,
    mixture: Callable[[nn.Module, int, str], MixtureOfExperts] = RandomPartitionMoE,
) -> nn.Module:
    """Replace FFNs of a dense model by mixtures of experts, by default with random uniform partition.

    Build the optimizer afterwards: the experts are new parameters.

    Args:
        model: any module tree.
        num_experts: N >= 2 experts a layer.
        layers: which of the model's FFNs, counted from 0 in module order: "every_other" (1, 3, 5, ...), "all", or
            their numbers.
        init: "independent" experts (training from scratch) or "copy" of a trained FFN (fine-tuning); see
            `MixtureOfExperts`.
        predicate: ``(name, module) -> bool`` saying which modules are FFNs, called from the outside in.
        inplace: change ``model`` itself instead of a copy.
        mixture: ``(ffn, num_experts, init) -> layer``; for gated experts `TopKMoE`.

    Returns:
        The model with MoE layers. With random partition its output in evaluation mode is that of the folded model.

    Raises:
        ValueError: no FFN found, a layer number out of range, or what the mixture refuses.
    """
    if moe_layers(model):
        raise ValueError("the model has MoE layers already")
    if not inplace:
        model = copy.deepcopy(model)
    ffns = list(dict.fromkeys(_find("", model, predicate)))  # a shared FFN counts once
    if not ffns:
        raise ValueError("no FFN of a known form in the model: say which modules they are with predicate=")
    chosen = {ffns[index] for index in _layer_numbers(layers, len(ffns))}
    moes = {  # all of them before the model is touched: one that is refused must not leave it half converted
        ffn: mixture(_pieces(ffn), num_experts, init) for ffn in ffns if ffn in chosen
    }
    for ffn, moe in moes.items():
        if isinstance(ffn, nn.TransformerEncoderLayer):
            _put_into_encoder_layer(ffn, moe)
    model = swap_modules(
        model, {ffn: moe for ffn, moe in moes.items() if not isinstance(ffn, nn.TransformerEncoderLayer)}
    )
    for encoder in _encoders(model):
        if moe_layers(encoder):
            encoder._dense_use_nested_tensor, encoder.use_nested_tensor = encoder.use_nested_tensor, False
    return model


def fold(model: nn.Module, inplace: bool = False) -> nn.Module:
    """The dense model again: each MoE becomes one FFN with the experts' mean weights.

    The result has the classes, parameter names and shapes of the model that was given to `to_moe`, and its output
    equals the MoE model's in evaluation mode. The MoE model is left as it is, unless ``inplace``.

    Raises:
        ValueError: the model has no MoE layers, or gated ones, whose experts differ and stay.
    """
    if not moe_layers(model):
        raise ValueError("nothing to fold: the model has no MoE layers")
    if not all(isinstance(moe, RandomPartitionMoE) for moe in moe_layers(model).values()):
        raise ValueError("nothing to fold: experts behind a router stay experts at inference")
    if not inplace:
        model = copy.deepcopy(model)
    for encoder in _encoders(model):
        if hasattr(encoder, "_dense_use_nested_tensor"):
            encoder.use_nested_tensor = encoder._dense_use_nested_tensor
            del encoder._dense_use_nested_tensor
    for layer in model.modules():
        if isinstance(layer, nn.TransformerEncoderLayer) and isinstance(layer.linear1, RandomPartitionMoE):
            _fold_encoder_layer(layer)
    return swap_modules(model, {moe: moe.fuse() for moe in moe_layers(model).values()})


def _find(name: str, module: nn.Module, predicate: Callable[[str, nn.Module], bool]) -> Iterator[nn.Module]:
    if predicate(name, module):
        yield module
    else:
        for child_name, child in module.named_children():
            yield from _find(f"{name}.{child_name}" if name else child_name, child, predicate)


def _layer_numbers(layers: str | Sequence[int], count: int) -> list[int]:
    if layers == "every_other":
        numbers = list(range(1, count, 2))
    elif layers == "all":
        numbers = list(range(count))
    elif isinstance(layers, str):
        raise ValueError(f'layers must be "every_other", "all" or numbers, got {layers!r}')
    else:
        numbers = list(layers)
    if not numbers or not all(0 <= number < count for number in numbers):
        raise ValueError(f"layers={layers!r} selects {numbers} of the model's {count} FFNs (numbered from 0)")
    return numbers


# torch.nn.TransformerEncoderLayer keeps its FFN in pieces, and its fused inference path reads ``linear1.weight`` and
# hands nested tensors from layer to layer. So the whole MoE takes the place of ``linear1`` and identities that of the
# other pieces, the fused path is closed by the flags it looks at, and all are put back by `fold`.


class _EncoderLayerFFN(nn.Module):
    PIECES = ("linear1", "activation", "dropout", "linear2")

    def __init__(self, layer: nn.TransformerEncoderLayer) -> None:
        super().__init__()
        for name in self.PIECES:
            setattr(self, name, getattr(layer, name))
        self.fused_activation = layer.activation_relu_or_gelu
        self.training = layer.training

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear2(self.dropout(self.activation(self.linear1(x))))


def _pieces(ffn: nn.Module) -> nn.Module:
    return _EncoderLayerFFN(ffn) if isinstance(ffn, nn.TransformerEncoderLayer) else ffn


def _put_into_encoder_layer(layer: nn.TransformerEncoderLayer, moe: MixtureOfExperts) -> None:
    _set_pieces(layer, [moe, nn.Identity(), nn.Identity(), nn.Identity()])
    layer.activation_relu_or_gelu = 0


def _fold_encoder_layer(layer: nn.TransformerEncoderLayer) -> None:
    ffn = layer.linear1.fuse()
    _set_pieces(layer, [getattr(ffn, name) for name in ffn.PIECES])
    layer.activation_relu_or_gelu = ffn.fused_activation


def _set_pieces(layer: nn.TransformerEncoderLayer, pieces: Iterable) -> None:
    for name, piece in zip(_EncoderLayerFFN.PIECES, pieces, strict=True):
        if name == "activation":  # it changes between a function and a module, which setattr alone refuses
            delattr(layer, name)
        setattr(layer, name, piece)


def _encoders(model: nn.Module) -> list[nn.TransformerEncoder]:
    return [module for module in model.modules() if isinstance(module, nn.TransformerEncoder)]
