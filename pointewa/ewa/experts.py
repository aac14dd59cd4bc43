"""A mixture of experts without a router: tokens go to experts by random uniform partition (arXiv 2308.06093).

The N experts of a layer are copies of one FFN module in which every parameter is stacked to ``[N, ...]``: the tokens
are dealt into ``[N, tokens/N, D]``, and the FFN's *own* forward code runs on that tensor, its linear layers having
become batched matrix products. So any FFN made of linear layers, layer norms and element-wise functions can be an
expert, gated ones included.
"""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _Stacked(nn.Module):
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


class StackedLinear(_Stacked):
    """N `torch.nn.Linear` as one batched product: weight ``[N, out, in]``, bias ``[N, out]`` or None."""

    def forward(self, x: Tensor) -> Tensor:
        """``[N or 1, T, in] -> [N or 1, T, out]``."""
        weight, bias = self._rows(self.weight, x), self._rows(self.bias, x)
        # W x^T rather than x W^T: the gradient of W then has W's own layout, and need not be copied into it.
        if bias is None:
            return torch.bmm(weight, x.mT).mT
        return torch.baddbmm(bias.unsqueeze(2), weight, x.mT).mT


class StackedLayerNorm(_Stacked):
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


def _stacked_form(layer: nn.Module) -> type[_Stacked] | None:
    if type(layer) is nn.Linear:
        return StackedLinear
    if isinstance(layer, nn.LayerNorm) and type(layer).__name__ == "LayerNorm":  # torch's, and timm's subclass
        return StackedLayerNorm
    return None


def swap_modules(model: nn.Module, replacement: dict[nn.Module, nn.Module]) -> nn.Module:
    """Put each replacement in every place where the module it stands for is used; returns the new ``model``."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in replacement:
                setattr(parent, name, replacement[child])
    return replacement.get(model, model)


def _stack(ffn: nn.Module, num_experts: int) -> nn.Module:
    """A copy of ``ffn`` with each parameter stacked ``num_experts`` times (all experts equal to ``ffn``)."""
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


class MixtureOfExperts(nn.Module):
    """N experts in the place of one FFN; which tokens go where is the subclass's business.

    Args:
        ffn: the dense FFN. Not changed; every expert starts as a copy of it.
        num_experts: N >= 2.
        init: "copy" leaves the experts equal (fine-tuning). "independent" (training from scratch) keeps ``ffn`` as
            expert 0 and gives every other expert a random shuffle of each of its tensors' entries. For freshly
            initialised, i.i.d. entries that is another draw from the same initialisation, whatever it was.
            It would destroy trained weights: use "copy" for those.

    Raises:
        ValueError: ``num_experts`` < 2, an unknown ``init``, or an FFN with parameters that cannot be stacked.
    """

    def __init__(self, ffn: nn.Module, num_experts: int, init: str = "independent") -> None:
        super().__init__()
        if num_experts < 2:
            raise ValueError(f"num_experts must be at least 2, got {num_experts}")
        if init not in ("independent", "copy"):
            raise ValueError(f'init must be "independent" or "copy", got {init!r}')
        self.num_experts = num_experts
        self.experts = _stack(ffn, num_experts)
        self.training = ffn.training
        if init == "independent":
            for parameter in self.experts.parameters():
                for expert in parameter.detach()[1:]:
                    shuffle = torch.randperm(expert.numel(), device=expert.device)
                    expert.copy_(expert.flatten()[shuffle].view_as(expert))

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return f"num_experts={self.num_experts}"


class RandomPartitionMoE(MixtureOfExperts):
    """The paper's mixture, for training: no router, no balance loss, no output scaling.

    *Training*: all tokens of the batch, flattened, are dealt to the experts by a fresh uniform permutation at every
    forward, in groups whose sizes differ by at most one.
    *Evaluation*: the expert with the mean weights sees every token: exactly the FFN that `fuse` returns.

    The permutation comes from torch's default generator of the input's device, so it follows `torch.manual_seed`
    and is drawn again identically by `torch.utils.checkpoint`.

    Args:
        ffn: the dense FFN. Not changed.
        num_experts: N >= 2.
        init: of the experts, see `MixtureOfExperts`.
        scope: "batch", or "sample" to deal the tokens of each sample, along the first dimension, by a permutation of
            its own, so that every expert gets its share of every sample.

    Raises:
        ValueError: an unknown ``scope``, or what `MixtureOfExperts` refuses.
    """

    def __init__(self, ffn: nn.Module, num_experts: int, init: str = "independent", scope: str = "batch") -> None:
        super().__init__(ffn, num_experts, init)
        if scope not in ("batch", "sample"):
            raise ValueError(f'scope must be "batch" or "sample", got {scope!r}')
        self.scope = scope

    def forward(self, x: Tensor) -> Tensor:
        """``[..., D] -> [..., D']``."""
        tokens = x.flatten(0, -2)  # [T, D]
        if self.training:
            samples = len(x) if self.scope == "sample" else 1
            token_of_slot, slot_of_token = random_partition(len(tokens), self.num_experts, tokens.device, samples)
            groups = deal(tokens, token_of_slot, slot_of_token).unflatten(0, (self.num_experts, -1))
            out = self.experts(groups)  # [N, ceil(T/N), D']
            out = collect(out.flatten(0, 1), token_of_slot, slot_of_token)  # [T, D']
        else:
            out = self.experts(tokens.unsqueeze(0)).squeeze(0)
        return out.unflatten(0, x.shape[:-1])

    @torch.no_grad()
    def fuse(self) -> nn.Module:
        """The dense FFN with the mean weights, with the original class, names, dtype, device and mode.

        The name is the one timm's re-parameterisation walker calls.
        """
        ffn = copy.deepcopy(self.experts)
        return swap_modules(ffn, {layer: layer.fuse() for layer in ffn.modules() if isinstance(layer, _Stacked)})


def deal(tokens: Tensor, token_of_slot: Tensor, slot_of_token: Tensor) -> Tensor:
    """Tokens ``[T, D]`` to slots ``[S, D]``; see `random_partition`. Of an idle slot there must be no gradient."""
    return _Deal.apply(tokens, token_of_slot, slot_of_token)


def collect(slots: Tensor, token_of_slot: Tensor, slot_of_token: Tensor) -> Tensor:
    """Slots ``[S, D]`` to tokens ``[T, D]``, leaving idle slots aside."""
    return _Collect.apply(slots, token_of_slot, slot_of_token)


# Both ways a gather: what autograd makes of indexing is a sum by index, for which a GPU sorts.


class _Deal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, token_of_slot: Tensor, slot_of_token: Tensor) -> Tensor:
        ctx.save_for_backward(token_of_slot, slot_of_token)
        return tokens[token_of_slot]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _Collect.apply(grad, *ctx.saved_tensors), None, None


class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, slots: Tensor, token_of_slot: Tensor, slot_of_token: Tensor) -> Tensor:
        ctx.save_for_backward(token_of_slot, slot_of_token)
        return slots[slot_of_token]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        token_of_slot, slot_of_token = ctx.saved_tensors
        slots = _Deal.apply(grad, token_of_slot, slot_of_token)
        if len(token_of_slot) > len(slot_of_token):
            idle = torch.ones_like(token_of_slot, dtype=torch.bool)
            idle[slot_of_token] = False
            slots = slots.masked_fill(idle.unsqueeze(1), 0)
        return slots, None, None


def random_partition(
    num_tokens: int, num_experts: int, device: torch.device | str, samples: int = 1
) -> tuple[Tensor, Tensor]:
    """Deal tokens to experts uniformly at random, in groups whose sizes differ by at most one.

    Every expert has ``ceil(T/N)`` slots; where T is no multiple of N the last slot of the later experts is idle: it
    holds token 0, and nothing reads its output, so it has no effect on any value or gradient.

    Args:
        num_tokens: T.
        num_experts: N.
        device: of the result.
        samples: equal parts of the tokens, each dealt by itself in groups whose sizes differ by at most one.

    Returns:
        token_of_slot int64 ``[N * ceil(T/N)]`` and slot_of_token int64 ``[T]``, its inverse on the slots in use.
    """
    size = -(-num_tokens // num_experts)
    if samples == 1:
        shuffled = torch.randperm(num_tokens, device=device)
        # dealt like cards, one round after another
        return _with_inverse(shuffled % num_experts * size + shuffled // num_experts, num_experts * size)
    rank = torch.rand(samples, num_tokens // samples, device=device).argsort(1)
    # Each sample's cards begin where those of the one before it ended, so that all together come out even too.
    dealt = torch.arange(samples, device=device).unsqueeze(1) * rank.shape[1] + rank
    return _with_inverse((dealt % num_experts * size + dealt // num_experts).flatten(), num_experts * size)


def slots_by_expert(expert: Tensor, num_experts: int, size: int) -> tuple[Tensor, Tensor]:
    """As `random_partition`, for tokens whose experts are given, ``[T]``, at most ``size`` for each expert."""
    taken = F.one_hot(expert, num_experts)  # (T, N)
    place = (taken.cumsum(0) - taken).gather(1, expert.unsqueeze(1)).squeeze(1)  # among those of the same expert
    return _with_inverse(expert * size + place, num_experts * size)


def _with_inverse(slot_of_token: Tensor, num_slots: int) -> tuple[Tensor, Tensor]:
    token_of_slot = slot_of_token.new_zeros(num_slots)
    token_of_slot[slot_of_token] = torch.arange(len(slot_of_token), device=slot_of_token.device)
    return token_of_slot, slot_of_token


def moe_layers(model: nn.Module) -> dict[str, MixtureOfExperts]:
    """The MoE layers of a model by their module names (shared ones once)."""
    return {name: module for name, module in model.named_modules() if isinstance(module, MixtureOfExperts)}


def stacked_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The experts' parameters, each ``[N, ...]``, by name.

    A rule such as "no weight decay for 1-D parameters" must look past their first dimension: a stacked bias is 2-D.
    """
    layers = moe_layers(model).items()
    return {
        f"{layer}.experts.{name}": parameter
        for layer, moe in layers
        for name, parameter in moe.experts.named_parameters()
    }
