"""Mixtures of experts in the place of an FFN: the paper's, by random uniform partition, and a gated one."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pointewa.ewa.partition import combine, dispatch, partition_by_expert, random_partition
from pointewa.ewa.stacked import StackedLinear, stack, unstack


class MixtureOfExperts(nn.Module):
    """N experts in the place of one FFN. Subclasses decide which tokens go to which expert.

    Args:
        ffn: the dense FFN. Not changed; every expert starts as a copy of it.
        num_experts: N >= 2.
        init: "copy" leaves the experts equal (fine-tuning). "independent" (training from scratch) keeps ``ffn`` as
            expert 0 and gives every other expert a random shuffle of its tensors' entries, among units that were
            initialised alike (see `shuffle_experts_`): another draw from the same initialisation, whatever it was. It
            would destroy trained weights: use "copy" for those.

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
        self.experts = stack(ffn, num_experts)
        self.training = ffn.training
        if init == "independent":
            shuffle_experts_(self.experts)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return f"num_experts={self.num_experts}"


class RandomPartitionMoE(MixtureOfExperts):
    """The paper's mixture, for training: no router, no balance loss, no output scaling.

    *Training*: all tokens of the batch, flattened, are dispatched to the experts by a fresh uniform permutation at
    every forward pass, in groups whose sizes differ by at most one.
    *Evaluation*: the expert with the mean weights sees every token: exactly the FFN that `fuse` returns.

    The permutation comes from torch's default generator of the input's device, so it follows `torch.manual_seed`
    and is drawn again identically by `torch.utils.checkpoint`.

    Args:
        ffn: the dense FFN. Not changed.
        num_experts: N >= 2.
        init: of the experts, see `MixtureOfExperts`.
        scope: "batch", or "sample" to partition the tokens of each sample, along the first dimension, by a permutation
            of its own, so that every expert gets its share of every sample.
        dropout: the largest rate of dropout on what the experts are given in training: 0 for the first of them and
            rising evenly to this for the last, so that each learns from tokens that were augmented differently, as the
            members of PAPA's populations do (arXiv 2304.03094). Below 1.

    Raises:
        ValueError: an unknown ``scope``, a rate out of range, or what `MixtureOfExperts` refuses.
    """

    def __init__(
        self,
        ffn: nn.Module,
        num_experts: int,
        init: str = "independent",
        scope: str = "batch",
        dropout: float = 0.0,
    ) -> None:
        super().__init__(ffn, num_experts, init)
        if scope not in ("batch", "sample"):
            raise ValueError(f'scope must be "batch" or "sample", got {scope!r}')
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be from 0 to below 1, got {dropout}")
        self.scope, self.dropout = scope, dropout

    def forward(self, x: Tensor) -> Tensor:
        """``[..., D] -> [..., D']``."""
        tokens = x.flatten(0, -2)  # [T, D]
        if self.training:
            samples = len(x) if self.scope == "sample" else 1
            partition = random_partition(len(tokens), self.num_experts, tokens.device, samples)
            groups = dispatch(tokens, *partition).unflatten(0, (self.num_experts, -1))
            if self.dropout:
                step = self.dropout / (self.num_experts - 1)
                groups = torch.stack([F.dropout(own, step * number) for number, own in enumerate(groups)])
            out = self.experts(groups)  # [N, ceil(T/N), D']
            out = combine(out.flatten(0, 1), *partition)  # [T, D']
        else:
            out = self.experts(tokens.unsqueeze(0)).squeeze(0)
        return out.unflatten(0, x.shape[:-1])

    @torch.no_grad()
    def fuse(self) -> nn.Module:
        """The dense FFN with the mean weights, with the original class, names, dtype, device and mode.

        The name is the one timm's re-parameterisation walker calls.
        """
        return unstack(self.experts)


class TopKMoE(MixtureOfExperts):
    """N experts behind a softmax router, in training and at inference. No token is dropped.

    Each token goes to the ``top_k`` experts of largest probability, and their outputs are summed, weighted by these
    probabilities: as they are for ``top_k = 1`` (Switch Transformer, Fedus et al., 2021), so that the router learns
    from the loss; else scaled to sum 1 (GShard, Lepikhin et al., 2020). After a forward pass in training `balance`
    holds the load-balancing loss (Switch Transformer, Eq. 4): ``N sum_i f_i P_i``, f_i being the fraction of the tokens
    sent to expert i and P_i its mean probability; 1 if all experts get equally many.

    Groups are padded to the largest one, so an unbalanced router costs time, and finding its size waits for the device.

    Args:
        ffn: the dense FFN. Not changed.
        num_experts: N >= 2.
        init: of the experts, see `MixtureOfExperts`. The router starts from N(0, 0.02).
        top_k: experts for each token, at most N.

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
        with torch.autocast(x.device.type, enabled=False):  # the choice of experts must not depend on bfloat16 rounding
            wide = torch.promote_types(self.router.weight.dtype, torch.float32)
            probability = F.linear(tokens.to(wide), self.router.weight.to(wide)).softmax(-1)  # (T, N)
        weight, expert = probability.topk(self.top_k, dim=-1)  # (T, k)
        if self.top_k > 1:
            weight = weight / weight.sum(-1, keepdim=True)
        count = torch.bincount(expert.flatten(), minlength=self.num_experts)
        if self.training:
            self.balance = self.num_experts * (count / expert.numel() * probability.mean(0)).sum()
        partition = partition_by_expert(expert.flatten(), self.num_experts, int(count.max()))
        slots = dispatch(tokens.repeat_interleave(self.top_k, 0), *partition)
        out = self.experts(slots.unflatten(0, (self.num_experts, -1))).flatten(0, 1)
        out = combine(out, *partition).unflatten(0, (-1, self.top_k))  # (T, k, D')
        return (out * weight.to(out.dtype).unsqueeze(-1)).sum(1).unflatten(0, x.shape[:-1])

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"balance": None}  # a copy has had no forward pass, and graphs cannot be copied

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return f"{super().extra_repr()}, top_k={self.top_k}"


@torch.no_grad()
def shuffle_experts_(experts: nn.Module) -> None:
    """Shuffle, in every expert but the first, the entries of each tensor among the units that were initialised alike.

    A layer's output units are alike if the median sizes of their weights round to the same power of ten. Entries of the
    weight, and of the bias, change places within such a group only, which keeps the two halves of a packed GLU apart:
    timm starts the gate half of `GluMlp` and `SwiGLUPacked` with weights of standard deviation 1e-6 and biases of 1.
    In a vector, such as a bias, neighbours of equal value are taken for constants and stay where they are.

    Shuffling each row of a weight by itself would be simpler, but all experts would have the same row sums. Since the
    activations that go into an FFN's second layer have a positive mean, the outputs of the experts would be correlated.

    Args:
        experts: of `pointewa.ewa.stacked.stack`, all equal.
    """
    for layer in experts.modules():
        group = None  # (out)
        if isinstance(layer, StackedLinear):
            group = layer.weight[0].float().abs().median(1).values.log10().round().clamp(min=-99).long()
        for stacked in layer.parameters(recurse=False):
            first = stacked[0]
            if first.ndim == 2:
                groups = group.unsqueeze(1).expand_as(first).flatten()
            else:
                equal = first[1:] == first[:-1]
                constant = F.pad(equal, (1, 0)) | F.pad(equal, (0, 1))
                own = torch.arange(100, 100 + len(first), device=first.device)  # a group for each: above all others
                groups = torch.where(constant, own, 0 if group is None else group)
            place = groups.argsort(stable=True)
            for expert in stacked[1:]:
                drawn = torch.randperm(len(groups), device=first.device)
                drawn = drawn[groups[drawn].argsort(stable=True)]  # group by group, in random order within each
                expert.view(-1)[place] = first.flatten()[drawn]


def balance_loss(model: nn.Module) -> Tensor:
    """The sum of the load-balancing losses of a model's gated layers in their last forward pass.

    To be added to the loss with a weight of about 0.01.

    Raises:
        ValueError: no gated layers, or no forward pass in training so far.
    """
    losses = [moe.balance for moe in moe_layers(model).values() if isinstance(moe, TopKMoE)]
    if not losses or any(loss is None for loss in losses):
        raise ValueError("the model has no gated layers that have had a forward pass in training")
    return torch.stack(losses).sum()


def moe_layers(model: nn.Module) -> dict[str, MixtureOfExperts]:
    """The MoE layers of a model by their module names (shared ones once)."""
    return {name: module for name, module in model.named_modules() if isinstance(module, MixtureOfExperts)}


def stacked_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The experts' parameters, each ``[N, ...]``, by name.

    A rule such as "no weight decay for 1-D parameters" must not count their first dimension: a stacked bias is 2-D.
    """
    layers = moe_layers(model).items()
    return {
        f"{layer}.experts.{name}".lstrip("."): parameter
        for layer, moe in layers
        for name, parameter in moe.experts.named_parameters()
    }
