"""What to watch during training: how far apart the experts are, and what folding them now would change."""

import torch
from torch import Tensor, nn

from pointewa.ewa.experts import RandomPartitionMoE, moe_layers


@torch.no_grad()
def disagreement(model: nn.Module) -> dict[str, float]:
    """``sum_i ||W_i - m|| / ||m||`` for each MoE layer, each expert's parameters taken as one vector.

    0 for equal experts; independently initialised ones start at about ``N sqrt(N - 1)``.
    """
    result = {}
    for name, moe in moe_layers(model).items():
        mean_square, spread_square = 0.0, 0.0
        for stacked in moe.experts.parameters():
            mean = stacked.mean(0, keepdim=True)
            mean_square += mean.square().sum()
            spread_square += (stacked - mean).square().flatten(1).sum(1)  # (N,)
        result[name] = (spread_square.sqrt().sum() / mean_square.sqrt()).item()
    return result


@torch.no_grad()
def fold_gap(model: nn.Module, *inputs: Tensor) -> dict[str, float]:
    """``||mean_i f(x; W_i) - f(x; m)|| / ||f(x; m)||`` for each layer with random partition.

    How much the mean of the experts' outputs differs from the folded FFN's output, x being the tokens that reach the
    layer for these inputs; second order in W_i - m. The model is run once in evaluation mode, and every module is left
    in the mode that it was in.

    Args:
        model: what `to_moe` returned.
        inputs: the arguments of its forward pass.
    """
    result = {}

    def measure(name: str, moe: RandomPartitionMoE, x: Tensor, folded: Tensor) -> None:
        tokens = x.flatten(0, -2)
        outputs = moe.experts(tokens.expand(moe.num_experts, *tokens.shape)).mean(0)
        result[name] = ((outputs - folded.flatten(0, -2)).norm() / folded.norm()).item()

    hooks = [
        moe.register_forward_hook(lambda moe, args, output, name=name: measure(name, moe, args[0], output))
        for name, moe in moe_layers(model).items()
        if isinstance(moe, RandomPartitionMoE)
    ]
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes.items():
            module.training = training
    return result
