"""The naive mixture of experts to compare with: a learned router that sends each token to its top-k experts."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pointewa.ewa.experts import MixtureOfExperts, collect, deal, moe_layers, slots_by_expert


class TopKMoE(MixtureOfExperts):
    """N experts behind a softmax router, in training and at inference. No token is dropped.

    Each token goes to the ``top_k`` experts of largest probability, and their outputs are summed, weighted by these
    probabilities: as they are for ``top_k = 1`` (Switch Transformer, Fedus et al., 2021), so that the router learns
    from the loss; else scaled to sum 1 (GShard, Lepikhin et al., 2020). After a forward pass in training `balance`
    holds the load-balancing loss (Switch Transformer, Eq. 4): ``N sum_i f_i P_i``, f_i being the fraction of the tokens
    sent to expert i and P_i its mean probability; 1 where all experts get the same.

    Groups are padded to the largest one, so an unbalanced router costs time, and finding its size waits for the device.

    Args:
        ffn: the dense FFN. Not changed.
        num_experts: N >= 2.
        init: of the experts, see `MixtureOfExperts`. The router starts from N(0, 0.02).
        top_k: experts a token, at most N.

    Raises:
        ValueError: a number out of range, or what `MixtureOfExperts` refuses.
    """

    def __init__(self, ffn: nn.Module, num_experts: int, init: str = "independent", top_k: int = 1) -> None:
        super().__init__(ffn, num_experts, init)
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"top_k must be from 1 to num_experts = {num_experts}, got {top_k}")
        self.top_k = top_k
        first = next(parameter for parameter in self.experts.parameters() if parameter.ndim == 3)  # [N, out, in]
        self.router = nn.Linear(first.shape[-1], num_experts, bias=False, device=first.device, dtype=first.dtype)
        nn.init.normal_(self.router.weight, std=0.02)
        self.balance: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """``[..., D] -> [..., D']``."""
        tokens = x.flatten(0, -2)  # (T, D)
        with torch.autocast(x.device.type, enabled=False):  # which expert is taken must not hang on bfloat16's digits
            wide = torch.promote_types(self.router.weight.dtype, torch.float32)
            probability = F.linear(tokens.to(wide), self.router.weight.to(wide)).softmax(-1)  # (T, N)
        weight, expert = probability.topk(self.top_k, dim=-1)  # (T, k)
        if self.top_k > 1:
            weight = weight / weight.sum(-1, keepdim=True)
        count = torch.bincount(expert.flatten(), minlength=self.num_experts)
        if self.training:
            self.balance = self.num_experts * (count / expert.numel() * probability.mean(0)).sum()
        token_of_slot, slot_of_token = slots_by_expert(expert.flatten(), self.num_experts, int(count.max()))
        slots = deal(tokens.repeat_interleave(self.top_k, 0), token_of_slot, slot_of_token)
        out = self.experts(slots.unflatten(0, (self.num_experts, -1))).flatten(0, 1)
        out = collect(out, token_of_slot, slot_of_token).unflatten(0, (-1, self.top_k))  # (T, k, D')
        return (out * weight.to(out.dtype).unsqueeze(-1)).sum(1).unflatten(0, x.shape[:-1])

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"balance": None}  # a copy has had no forward pass, and graphs cannot be copied

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return f"{super().extra_repr()}, top_k={self.top_k}"


def balance_loss(model: nn.Module) -> Tensor:
    """The sum of the load-balancing losses of a model's gated layers in their last forward pass; to add to the loss,
    times something like 0.01.

    Raises:
        ValueError: no gated layers, or no forward pass in training so far.
    """
    losses = [moe.balance for moe in moe_layers(model).values() if isinstance(moe, TopKMoE)]
    if not losses or any(loss is None for loss in losses):
        raise ValueError("no gated layers that have had a forward pass in training")
    return torch.stack(losses).sum()
