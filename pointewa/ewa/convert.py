"""Put EWA on a dense vision transformer (`to_moe`) and take it off again (`fold`).

The forms of FFN that are recognised, in any module tree:

| form | whose |
|---|---|
| a module with linear layers ``fc1*`` and ``fc2`` | timm (``Mlp``, ``GluMlp``, ``SwiGLU``), Point-MAE, ours |
| ``MLPBlock`` | torchvision |
| the loose ``linear1``, ``activation``, ``dropout``, ``linear2`` of a ``TransformerEncoderLayer`` | torch |

Any other form needs the caller's own predicate.
"""

import copy
from collections.abc import Callable, Iterator, Sequence

from torch import nn

from pointewa.ewa.experts import MixtureOfExperts, RandomPartitionMoE, moe_layers
from pointewa.ewa.stacked import swap_modules
from pointewa.ewa.torch_encoder import EncoderLayerFFN, close_nested_path, fold_encoder_layers, put_moe


def is_ffn(name: str, module: nn.Module) -> bool:
    """Whether a module has one of the FFN forms in the table above; the default ``predicate`` of `to_moe`."""
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
        layers: which of the model's FFNs, numbered from 0 in module order: "every_other" (1, 3, 5, ...), "all", or a
            sequence of numbers.
        init: "independent" experts (training from scratch) or "copy" of a trained FFN (fine-tuning); see
            `MixtureOfExperts`.
        predicate: ``(name, module) -> bool``, whether a module is an FFN; called from the outside in.
        inplace: change ``model`` itself instead of a copy.
        mixture: ``(ffn, num_experts, init) -> layer``; `TopKMoE` for gated experts.

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
        raise ValueError("no FFN of a known form in the model: name its FFNs with predicate=")
    chosen = {ffns[index] for index in _layer_numbers(layers, len(ffns))}
    moes = {  # all of them before the model is touched: a refusal must not leave it half converted
        ffn: mixture(EncoderLayerFFN(ffn) if isinstance(ffn, nn.TransformerEncoderLayer) else ffn, num_experts, init)
        for ffn in ffns
        if ffn in chosen
    }
    for layer in [ffn for ffn in moes if isinstance(ffn, nn.TransformerEncoderLayer)]:
        put_moe(layer, moes.pop(layer))
    model = swap_modules(model, moes)
    close_nested_path(model)
    return model


def fold(model: nn.Module, inplace: bool = False) -> nn.Module:
    """The dense model again: each MoE becomes one FFN with the experts' mean weights.

    The result has the classes, parameter names and shapes of the model that was given to `to_moe`, and its output
    equals the MoE model's in evaluation mode. The MoE model is left as it is, unless ``inplace``.

    Raises:
        ValueError: the model has no MoE layers, or gated ones, whose experts stay at inference.
    """
    if not moe_layers(model):
        raise ValueError("nothing to fold: the model has no MoE layers")
    if not all(isinstance(moe, RandomPartitionMoE) for moe in moe_layers(model).values()):
        raise ValueError("nothing to fold: experts behind a router stay experts at inference")
    if not inplace:
        model = copy.deepcopy(model)
    fold_encoder_layers(model)
    return swap_modules(model, {moe: moe.fuse() for moe in moe_layers(model).values()})


def moe_numbers(model: nn.Module) -> list[int]:
    """The numbers of a model's MoE layers among its FFNs, as `to_moe` takes them for ``layers``."""
    either = _find("", model, lambda name, module: isinstance(module, MixtureOfExperts) or is_ffn(name, module))
    return [number for number, ffn in enumerate(dict.fromkeys(either)) if isinstance(ffn, MixtureOfExperts)]


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
