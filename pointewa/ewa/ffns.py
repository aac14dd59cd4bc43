"""Which modules of a model are its FFNs: told by their structure, not by their names.

A module has the *form* of an FFN if its layers with parameters are, norms aside, the linear layers

| | |
|---|---|
| plain | ``D -> H``, ``H -> D`` |
| gated | ``D -> H``, ``D -> H``, ``H -> D`` |
| gated, packed | ``D -> 2H``, ``H -> D`` |

and if, run on tokens, it gives tokens of the same width, each from its own token alone. That tells it from attention,
whose projections can have the same shapes. Of modules within one another the innermost that holds all the layers
counts, so that norms and residuals around an FFN stay as they are.

Of those, `find_ffns` takes the ones that stand in a block of that width: one that is repeated, or that has an
attention beside the FFN. That leaves out heads, the MLPs of relative positions, and the token mixing of MLP-Mixer. A
model without such blocks is taken for a stack of FFNs, if it has several alike.
"""

import re
from collections import Counter
from collections.abc import Iterator

import torch
from torch import nn
from torch.func import functional_call

from pointewa.ewa.experts import MixtureOfExperts
from pointewa.ewa.stacked import NORMS, StackedNorm, linear_shape, own_names, reparametrised
from pointewa.ewa.torch_encoder import LAYERS

LOOKED_FOR = (
    "modules of two linear layers D -> H -> D, or of three if gated (packed: D -> 2H, H -> D), norms allowed, in "
    "blocks that are repeated or hold an attention. FFNs of convolutions, or whose layers lie apart in the block, are "
    "not found: build such an FFN as one module of linear layers first"
)
_MOST_RUN = 2**25  # parameters of a module that is run to see what it does; above that its form decides


def is_ffn(name: str, module: nn.Module) -> bool:
    """Whether a module has the form of an FFN, wherever it stands: to build a ``predicate`` of `to_moe` with."""
    return [found for _, found in _candidates(name, module, {})] == [module]


def find_ffns(model: nn.Module) -> dict[str, nn.Module]:
    """The FFNs of a model by their names, in module order; a shared one once. MoE layers count as the FFNs they were.

    For `torch.nn.TransformerEncoderLayer` and ``TransformerDecoderLayer``, whose FFN lies loose in them, it is the
    layer itself.

    Raises:
        ValueError: blocks without attention hold several FFNs of one width: which of them mixes tokens cannot be told.
    """
    names: dict[nn.Module, str] = {}
    for name, module in _candidates("", model, {}):
        names.setdefault(module, name)
    inside = {part for module in names for part in module.modules()}
    blocks = {module: _block(model, name, inside) for module, name in names.items()}
    formed = {one: widths for one in blocks if (widths := _widths(one))}  # any module can have become an MoE layer
    fitting = [
        one
        for one, (width, _) in formed.items()
        if blocks[one] is None or isinstance(one, LAYERS) or width in _sizes(blocks[one], inside)
    ]
    repeated = Counter(type(block) for block in {blocks[one] for one in fitting} if block is not None)
    attentions = [name for name, one in model.named_modules() if one not in inside and _is_attention(one)]
    found = {
        one
        for one in fitting
        if isinstance(one, LAYERS)
        or repeated[type(blocks[one])] > 1
        or _is_beside(names[one], attentions, list(names.values()))
    }
    if not found:
        alike = Counter(map(_kind, fitting))
        found = {one for one in fitting if alike[_kind(one)] > 1}
    for block in dict.fromkeys(blocks[one] for one in fitting if one in found and repeated[type(blocks[one])] > 1):
        mixers = [child for child in block.children() if child in found]
        if len(mixers) > 1 and not any(_is_attention(part) for part in block.modules() if part not in inside):
            listed = " and ".join(names[one] for one in mixers)
            raise ValueError(
                f"{listed} are FFNs of one width in a block without attention, and which of them mixes tokens cannot "
                "be told: name the model's FFNs with predicate="
            )
    return {name: one for one, name in names.items() if one in found or isinstance(one, MixtureOfExperts)}


def _candidates(name: str, module: nn.Module, run: dict[str, bool]) -> Iterator[tuple[str, nn.Module]]:
    """The innermost modules of an FFN's form; ``run`` remembers for each kind of module what running it showed."""
    if isinstance(module, (*LAYERS, MixtureOfExperts)):
        yield name, module
        return
    within = False
    for child_name, child in module.named_children():
        for found in _candidates(f"{name}.{child_name}" if name else child_name, child, run):
            within = True
            yield found
    if not within and type(module).forward is not nn.Module.forward and (widths := _widths(module)):
        text = f"{type(module)} {module}"
        if text not in run:
            run[text] = _maps_tokens(module, widths[0])
        if run[text]:
            yield name, module


def _widths(module: nn.Module) -> tuple[int, int] | None:
    """D and H of a module of an FFN's form; None if it has another."""
    if isinstance(module, LAYERS):
        return _widths(module.linear1) if isinstance(module.linear1, MixtureOfExperts) else linear_shape(module.linear1)
    shapes: list[tuple[int, int]] = []
    todo = [module.experts if isinstance(module, MixtureOfExperts) else module]
    while todo:
        layer = todo.pop()
        if shape := linear_shape(layer):
            shapes.append(shape)
        elif not isinstance(layer, (*NORMS, StackedNorm)):
            if len(shapes) > 3 or own_names(layer):
                return None
            todo.extend(reversed(list(layer.children())))
    if len(shapes) == 2:
        (width, up), (down, out) = shapes
        return (width, down) if out == width and up in (down, 2 * down) else None
    for number, (hidden, width) in enumerate(shapes):  # the order of the three differs between models
        if len(shapes) == 3 and shapes[:number] + shapes[number + 1 :] == 2 * [(width, hidden)]:
            return width, hidden
    return None


def _kind(module: nn.Module) -> tuple[type, tuple[int, int] | None]:
    return type(module.experts if isinstance(module, MixtureOfExperts) else module), _widths(module)


def _maps_tokens(module: nn.Module, width: int) -> bool:
    """Whether a module makes of each token another, from that token alone; run on the CPU with weights drawn for it."""
    parts = list(module.modules())
    if (
        any(part._forward_pre_hooks or part._forward_hooks or reparametrised(part) for part in parts)
        or sum(parameter.numel() for parameter in module.parameters()) > _MOST_RUN
    ):
        return True
    generator = torch.Generator().manual_seed(0)
    with torch.device("cpu"), torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.enable_grad():
        weights = {
            name: torch.rand(parameter.shape, generator=generator) - 0.5
            for name, parameter in module.named_parameters()
        }
        tokens = torch.randn(1, 5, width, generator=generator).requires_grad_()
        try:
            out = functional_call(module, weights, (tokens,))
            if out.shape != tokens.shape:
                return False
            (gradient,) = torch.autograd.grad(out[:, 0].square().sum(), tokens)
        except Exception:  # anything can be wrong with what is no FFN: other arguments, shapes, devices
            return False
    return not gradient[:, 1:].any()


def _block(model: nn.Module, name: str, inside: set[nn.Module]) -> nn.Module | None:
    """The nearest module around an FFN that has parameters besides those of FFNs."""
    while name:
        name = name.rpartition(".")[0]
        around = model.get_submodule(name)
        if any(part._parameters for part in around.modules() if part not in inside):
            return around
    return None


def _sizes(block: nn.Module, inside: set[nn.Module]) -> set[int]:
    """The sizes of the parameters of a block's layers, without those of FFNs.

    What lies beside linear layers in a module, such as the temperatures of an attention's heads, has no token's width.
    """
    layers = (part for part in block.modules() if part not in inside and not any(map(linear_shape, part.children())))
    return {size for layer in layers for parameter in layer.parameters(recurse=False) for size in parameter.shape}


def _is_attention(module: nn.Module) -> bool:
    if isinstance(module, nn.MultiheadAttention) or re.search("attn|attention", type(module).__name__, re.IGNORECASE):
        return True
    shapes = [shape for shape in map(linear_shape, module.children()) if shape]
    packed = any(out == 3 * width for _, out in shapes for width, _ in shapes)
    return packed or max(Counter(width for width, _ in shapes).values(), default=0) > 2


def _is_beside(name: str, attentions: list[str], ffns: list[str]) -> bool:
    """Whether an FFN and an attention are each other's nearest."""
    near = max((_common(name, one) for one in attentions if not f"{name}.".startswith(f"{one}.")), default=-1)
    return any(
        _common(name, one) == near == max(_common(other, one) for other in ffns)
        for one in attentions
        if not f"{name}.".startswith(f"{one}.")
    )


def _common(one: str, other: str) -> int:
    """How many modules around both there are."""
    pairs = list(zip(one.split("."), other.split("."), strict=False))
    return next((number for number, (a, b) in enumerate(pairs) if a != b), len(pairs))
