"""Copies of trained models that compute in bfloat16, for inference."""

from functools import partial
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pointewa.models.fuse import fuse_batch_norm
from pointewa.models.patch_embed import PatchEncoder

Model = TypeVar("Model", bound=nn.Module)

# What positions and decisions go through. Gated experts choose by their router's weights.
_FLOAT32 = ("pos_embed", "cls_head_finetune", "head", "router")
_ROWS = 2**13  # points that the patch encoder takes at a time on a CPU, so that they stay in its cache


def in_precision(model: Model, precision: torch.dtype) -> Model:
    """The model itself for float32; for bfloat16 a copy that computes its large matrix products in it.

    Weights are cast here, once. Float32 stay: sampling and neighbours, the patches' first layer, the position
    embedding, the sums of the residual branches and their norms, the softmax of attention within torch's kernel, and
    the layers that make the logits. Batch norms are part of the layers before them, see `fuse_batch_norm`.

    The copy is for inference only: without gradients, and not to be saved.

    Args:
        model: a classifier or a segmenter, in evaluation mode, in float32.
        precision: ``torch.float32`` or ``torch.bfloat16``.
    """
    if precision == torch.float32:
        return model
    model = fuse_batch_norm(model)
    for name, module in list(model.named_modules()):
        words = name.split(".")
        if isinstance(module, PatchEncoder):
            model.set_submodule(name, MergedPatchEncoder(module, precision))
        elif name in _FLOAT32:
            # Partial functions of the module itself, not closures: they can be copied and pickled with it.
            module.forward = partial(_without_autocast, module)
        elif isinstance(module, nn.Linear) and not set(words) & set(_FLOAT32):
            module.to(precision)
    model.forward = partial(_with_autocast, model, precision)
    return model.requires_grad_(False)


def _with_autocast(model: nn.Module, precision: torch.dtype, points: Tensor, *others: Tensor) -> Tensor:
    with torch.autocast(points.device.type, precision):
        return type(model).forward(model, points, *others).float()


def _without_autocast(module: nn.Module, x: Tensor) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        return type(module).forward(module, x.float())


class MergedPatchEncoder(nn.Module):
    """What a `PatchEncoder` computes without gradients, with the products of its weights computed beforehand.

    Args:
        encoder: without batch norms, see `fuse_batch_norm`.
        precision: of all products but those of the first layer, which takes coordinates in the encoder's own.
    """

    def __init__(self, encoder: PatchEncoder, precision: torch.dtype) -> None:
        super().__init__()
        first, _, _, second = encoder.first_conv
        third, _, _, last = encoder.second_conv
        weights = [conv.weight.detach().squeeze(-1) for conv in (first, second, third, last)]
        of_patch, of_point = weights[2].chunk(2, dim=1)  # (4w, 2w) each
        # The second layer's bias reaches the third one through both halves.
        bias = third.bias + (of_patch + of_point) @ second.bias
        own = {"first": weights[0], "first_bias": first.bias}
        lowered = {"second": weights[1], "of_point": of_point @ weights[1], "of_patch": of_patch, "bias": bias,
                   "last": weights[3], "last_bias": last.bias}  # fmt: skip
        for name, value in (own | {name: value.to(precision) for name, value in lowered.items()}).items():
            self.register_buffer(name, value.detach().contiguous())

    def forward(self, patches: Tensor) -> Tensor:
        """``[B, G, K, 3] -> [B, G, out]``."""
        flat = patches.flatten(0, 1)  # (BG, K, 3)
        if torch.compiler.is_exporting():  # which would make the number of portions a constant
            return self._tokens(flat).unflatten(0, patches.shape[:2])
        size = max(1, _ROWS // flat.shape[1]) if flat.device.type == "cpu" else len(flat)
        with torch.autocast(flat.device.type, enabled=False):
            tokens = torch.cat([self._tokens(part) for part in flat.split(size)])
        return tokens.unflatten(0, patches.shape[:2])

    def _tokens(self, patches: Tensor) -> Tensor:
        """``[P, K, 3] -> [P, out]``."""
        x = F.linear(patches.to(self.first.dtype), self.first, self.first_bias).relu_().to(self.second.dtype)
        pooled = F.linear(x, self.second).amax(1)  # (P, 2w)
        x = F.linear(x, self.of_point)  # (P, K, 4w)
        x += F.linear(pooled, self.of_patch, self.bias).unsqueeze(1)
        return F.linear(x.relu_(), self.last).amax(1) + self.last_bias
