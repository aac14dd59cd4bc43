"""Put EWA on a dense vision transformer (`to_moe`) and take it off again (`fold`)."""

import copy
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence

from torch import nn

from pointewa.ewa.experts import MixtureOfExperts, RandomPartitionMoE, moe_layers
from pointewa.ewa.ffns import LOOKED_FOR, find_ffns
from pointewa.ewa.optimizers import hide_from_decay, show_to_decay
from pointewa.ewa.stacked import check_stackable, swap_modules
from pointewa.ewa.torch_encoder import LAYERS, EncoderLayerFFN, close_nested_path, fold_encoder_layers, put_moe


def to_moe(
    model: nn.Module,
    num_experts: int = 4,
    layers: str | Sequence[int] = "every_other",
    init: str = "independent",
    predicate: Callable[[str, nn.Module], bool] | None = None,
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
        predicate: ``(name, module) -> bool``, whether a module is an FFN; called from the outside in. By default the
            FFNs are those of `find_ffns`, which goes by structure.
        inplace: change ``model`` itself instead of a copy.
        mixture: ``(ffn, num_experts, init) -> layer``; `TopKMoE` for gated experts.

    Returns:
        The model with MoE layers. With random partition its output in evaluation mode is that of the folded model.

    Raises:
        ValueError: no FFN found, a layer number out of range, an FFN that shares parameters with another module or
            computes its weights from others (weight_norm), or what the mixture refuses.
    """
    if moe_layers(model):
        raise ValueError("the model has MoE layers already")
    ffns = find_ffns(model) if predicate is None else _named(model, predicate)
    if not ffns:
        raise ValueError(
            f"no FFN found: looked for {LOOKED_FOR}. Name the model's FFNs with predicate=, such as "
            'predicate=lambda name, module: name.endswith(".ffn")'
        )
    numbers = _layer_numbers(layers, len(ffns))
    chosen = {name: ffn for number, (name, ffn) in enumerate(ffns.items()) if number in numbers}
    _check_unshared(model, chosen)
    for name, ffn in chosen.items():
        check_stackable(_pieces(ffn), name)
    if not inplace:
        model = copy.deepcopy(model)
        chosen = {name: model.get_submodule(name) for name in chosen}
    # all of them before the model is touched: a refusal must not leave it half converted
    moes = {ffn: mixture(_pieces(ffn), num_experts, init) for ffn in chosen.values()}
    for layer in [ffn for ffn in moes if isinstance(ffn, LAYERS)]:
        put_moe(layer, moes.pop(layer))
    model = swap_modules(model, moes)
    close_nested_path(model)
    hide_from_decay(model)
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
    show_to_decay(model)
    fold_encoder_layers(model)
    return swap_modules(model, {moe: moe.fuse() for moe in moe_layers(model).values()})


def moe_numbers(model: nn.Module) -> list[int]:
    """The numbers of a model's MoE layers among its FFNs, as `to_moe` takes them for ``layers``."""
    return [number for number, ffn in enumerate(find_ffns(model).values()) if moe_layers(ffn)]


def _pieces(ffn: nn.Module) -> nn.Module:
    return EncoderLayerFFN(ffn) if isinstance(ffn, LAYERS) else ffn


def _named(model: nn.Module, predicate: Callable[[str, nn.Module], bool]) -> dict[str, nn.Module]:
    names: dict[nn.Module, str] = {}
    for name, module in _find("", model, predicate):
        names.setdefault(module, name)  # a shared FFN counts once
    return {name: module for module, name in names.items()}


def _find(name: str, module: nn.Module, predicate: Callable[[str, nn.Module], bool]) -> Iterator[tuple[str, nn.Module]]:
    if predicate(name, module):
        yield name, module
    else:
        for child_name, child in module.named_children():
            yield from _find(f"{name}.{child_name}" if name else child_name, child, predicate)


def _check_unshared(model: nn.Module, ffns: dict[str, nn.Module]) -> None:
    """Refuse FFNs of whose parameters something else holds one: N experts would not stay tied to it."""
    ways, holders = defaultdict(list), defaultdict(dict)
    for path, part in model.named_modules(remove_duplicate=False):
        ways[part].append(path)
        for own, parameter in part._parameters.items():
            if parameter is not None:
                holders[parameter].setdefault((part, own), []).append(path)
    for name, ffn in ffns.items():
        own_parts = set(_pieces(ffn).modules())
        for held in holders.values():
            if not any(part in own_parts for part, _ in held):
                continue
            inside = [f"{path}." for path in ways[ffn]]
            places = [f"{path}.{own}" for (_, own), paths in held.items() for path in paths]
            places.sort(key=lambda place: not place.startswith(tuple(inside)))  # the FFN's own first
            if len(held) > 1 or (name and not places[-1].startswith(tuple(inside))):
                others = " and ".join(place for place in places if place != places[0])
                raise ValueError(
                    f"cannot make experts of {name}: {places[0]} is also {others}, to which N experts cannot stay "
                    "tied: give each an nn.Parameter of its own, or leave the FFN out with layers= or predicate="
                )


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
