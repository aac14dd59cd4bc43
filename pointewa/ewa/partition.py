"""Which token goes to which expert, and the way there and back.

A partition of T tokens among N experts is a pair of index tensors: ``token_of_slot`` int64 ``[S]``, the slots being
those of expert 0, then those of expert 1, and so on, equally many each; and ``slot_of_token`` int64 ``[T]``, its
inverse on the slots in use. A slot that is not in use, an idle one, holds token 0, and nothing reads its output.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def random_partition(
    num_tokens: int, num_experts: int, device: torch.device | str, samples: int = 1
) -> tuple[Tensor, Tensor]:
    """Random uniform partition (arXiv 2308.06093), in groups whose sizes differ by at most one.

    Every expert has ``ceil(T/N)`` slots; if T is not a multiple of N, the last slot of the later experts is idle.

    Args:
        num_tokens: T.
        num_experts: N.
        device: of the result.
        samples: number of equal parts of the tokens, each partitioned by itself in groups whose sizes differ by at
            most one.

    Returns:
        token_of_slot ``[N * ceil(T/N)]`` and slot_of_token ``[T]``.
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


def partition_by_expert(expert: Tensor, num_experts: int, size: int) -> tuple[Tensor, Tensor]:
    """The partition that a router chose.

    Args:
        expert: of each token, int64 ``[T]``; at most ``size`` tokens for each.
        num_experts: N.
        size: slots of each expert.

    Returns:
        token_of_slot ``[N * size]`` and slot_of_token ``[T]``.
    """
    taken = F.one_hot(expert, num_experts)  # (T, N)
    place = (taken.cumsum(0) - taken).gather(1, expert.unsqueeze(1)).squeeze(1)  # among those of the same expert
    return _with_inverse(expert * size + place, num_experts * size)


def _with_inverse(slot_of_token: Tensor, num_slots: int) -> tuple[Tensor, Tensor]:
    token_of_slot = slot_of_token.new_zeros(num_slots)
    token_of_slot[slot_of_token] = torch.arange(len(slot_of_token), device=slot_of_token.device)
    return token_of_slot, slot_of_token


def dispatch(tokens: Tensor, token_of_slot: Tensor, slot_of_token: Tensor) -> Tensor:
    """Tokens ``[T, D]`` to slots ``[S, D]``. The backward pass ignores the gradient of idle slots."""
    return _Dispatch.apply(tokens, token_of_slot, slot_of_token)


def combine(slots: Tensor, token_of_slot: Tensor, slot_of_token: Tensor) -> Tensor:
    """Slots ``[S, D]`` to tokens ``[T, D]``, leaving out idle slots."""
    return _Combine.apply(slots, token_of_slot, slot_of_token)


# Each is a gather, forward and backward. Autograd would make the backward pass of indexing a sum by index, for which a
# GPU sorts.


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, token_of_slot: Tensor, slot_of_token: Tensor) -> Tensor:
        ctx.save_for_backward(token_of_slot, slot_of_token)
        return tokens[token_of_slot]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _Combine.apply(grad, *ctx.saved_tensors), None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, slots: Tensor, token_of_slot: Tensor, slot_of_token: Tensor) -> Tensor:
        ctx.save_for_backward(token_of_slot, slot_of_token)
        return slots[slot_of_token]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        token_of_slot, slot_of_token = ctx.saved_tensors
        slots = _Dispatch.apply(grad, token_of_slot, slot_of_token)
        if len(token_of_slot) > len(slot_of_token):
            idle = torch.ones_like(token_of_slot, dtype=torch.bool)
            idle[slot_of_token] = False
            slots = slots.masked_fill(idle.unsqueeze(1), 0)
        return slots, None, None
