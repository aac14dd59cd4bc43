"""The transformer's layers."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class DropPath(nn.Module):
    """Stochastic depth (Huang et al., ECCV 2016): drops the residual branch of whole samples during training."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """``[B, ...]`` -> the same shape: a sample becomes 0 with probability ``rate``, else is scaled up."""
        if not self.training or self.rate == 0:
            return x
        keep = 1 - self.rate
        mask = torch.rand(len(x), *[1] * (x.ndim - 1), device=x.device) < keep
        return x * (mask / keep).to(x.dtype)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return f"rate={self.rate:.3g}"


class Attention(nn.Module):
    """Multi-head self-attention without a bias in the joint query, key and value projection."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, T, C] -> [B, T, C]``."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (B, heads, T, C/heads) each
        if x.device.type == "cpu" and torch.is_grad_enabled() and torch.is_autocast_enabled("cpu"):
            # In bfloat16 the backward pass of torch's fused kernel takes several times as long as this.
            x = (q * q.shape[-1] ** -0.5 @ k.mT).softmax(-1) @ v
        else:
            x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """The FFN."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., C] -> [..., C]``."""
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = Mlp(width, int(width * mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, T, C] -> [B, T, C]``."""
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class Encoder(nn.Module):
    """A stack of blocks that adds the position embedding before each of them.

    Attributes:
        activation_checkpointing: keep only the input of each block and compute the block again in the backward pass,
            with the same random draws: the same gradients with less memory, at the cost of a second forward pass.
    """

    def __init__(self, width: int, depth: int, heads: int, mlp_ratio: float, drop_path: float) -> None:
        super().__init__()
        self.activation_checkpointing = False
        rates = torch.linspace(0, drop_path, depth, device="cpu").tolist()
        self.blocks = nn.ModuleList(Block(width, heads, mlp_ratio, rate) for rate in rates)

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        """``[B, T, C], [B, T, C] -> [B, T, C]``."""
        for block in self.blocks:
            x = self._run(block, x + position)
        return x

    def outputs(self, x: Tensor, position: Tensor, numbers: Sequence[int]) -> list[Tensor]:
        """As `forward`, but the outputs of the blocks with these numbers, from 0, one of which may come twice."""
        found = {}
        for number, block in enumerate(self.blocks):
            x = self._run(block, x + position)
            if number in numbers:
                found[number] = x
        return [found[number] for number in numbers]

    def _run(self, block: nn.Module, x: Tensor) -> Tensor:
        if self.activation_checkpointing and self.training:
            return checkpoint(block, x, use_reentrant=False)
        return block(x)


def pointwise(conv: nn.Conv1d, x: Tensor) -> Tensor:
    """A 1x1 convolution on the last dimension: ``[..., C] -> [..., C']``."""
    return F.linear(x, conv.weight.squeeze(-1), conv.bias)


def at_least_float32(x: Tensor) -> Tensor:
    """For a softmax, for which bfloat16 is too coarse."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def init_weights(module: nn.Module) -> None:
    """The initialisation of Point-BERT and Point-MAE, for ``model.apply``.

    Weights are normal with standard deviation 0.02, truncated at -2 and 2; biases are 0.
    """
    if isinstance(module, nn.Linear | nn.Conv1d):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
