"""Norms as one formula: which values share their statistics, and how the gradient follows from what is kept."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pointewa.compression.kept import pieces


@dataclass(frozen=True)
class Norm:
    """A norm of a tensor.

    Args:
        rows: shape of the input in which the values along ``dims`` share their statistics.
        dims: see ``rows``.
        eps: added to the variance.
        weight, bias: of the affine map that follows, or None.
        broadcast: their shape beside the input's.
        centred: subtract the mean.
    """

    rows: Sequence[int]
    dims: tuple[int, ...]
    eps: float
    weight: Tensor | None
    bias: Tensor | None
    broadcast: Sequence[int]
    centred: bool = True

    def normalise(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The normalised input, contiguous and in float32 at least, and what it was multiplied by."""
        # These can be the largest tensors of a training: what can be done in place, is.
        wide = x.to(torch.promote_types(x.dtype, torch.float32), memory_format=torch.contiguous_format, copy=True)
        rows = wide.view(self.rows)
        if self.centred:
            variance, mean = torch.var_mean(rows, self.dims, correction=0, keepdim=True)
            rows -= mean
        else:
            variance = rows.square().mean(self.dims, keepdim=True)
        scale = (variance + self.eps).rsqrt_()
        rows *= scale
        return wide, scale

    def affine(self, normalised: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """The norm's output."""
        if weight is None:
            return normalised if bias is None else normalised + bias.view(self.broadcast)
        out = normalised * weight.view(self.broadcast)
        return out if bias is None else out.add_(bias.view(self.broadcast))

    def by_rows(self, ndim: int) -> bool:
        """Whether each row, along the first of ``ndim`` dimensions, of the output follows from that of the normalised
        input."""
        return len(self.broadcast) < ndim

    def gradients(
        self, grad: Tensor, normalised: Callable[[int, int], Tensor], scale: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Those of the input, the weight and the bias, some rows at a time.

        Args:
            grad: of the output.
            normalised: rows of the normalised input along its first dimension, by where they start and stop.
            scale: of `normalise`.
            dtype: of the input.
        """
        weight = None if self.weight is None else self.weight.detach().view(self.broadcast)
        of_weight, of_bias = (torch.zeros(self.broadcast, dtype=scale.dtype, device=grad.device) for _ in range(2))
        count = grad.numel() // scale.numel()  # values that share their statistics

        def read(start: int, stop: int) -> tuple[Tensor, Tensor]:
            return grad[start:stop].to(scale.dtype), normalised(start, stop).to(scale.dtype)

        def weighted(grad: Tensor) -> Tensor:
            return (grad if weight is None else grad * weight).reshape(-1, *self.rows[1:])

        def means(grad: Tensor, normalised: Tensor) -> tuple[Tensor, Tensor]:
            """Of the normalised input times the gradient, and of the gradient: what these rows add to them."""
            product = normalised * grad
            of_weight.add_(product.sum_to_size(self.broadcast))
            of_bias.add_(grad.sum_to_size(self.broadcast))
            along, level = (weighted(one).sum(self.dims, keepdim=True) / count for one in (product, grad))
            return along, level

        of_x = torch.empty(grad.shape, dtype=dtype, device=grad.device)
        cuts = pieces(grad.shape, grad.device) if self.by_rows(grad.ndim) else [(0, len(grad))]
        all_rows = 0 in (dim % len(self.rows) for dim in self.dims)  # share their statistics
        if all_rows:
            along, level = map(sum, zip(*(means(*read(*cut)) for cut in cuts), strict=True))
        for start, stop in cuts:
            rows, normal = read(start, stop)
            if not all_rows:
                along, level = means(rows, normal)
            of_rows = torch.addcmul(weighted(rows), normal.view(-1, *self.rows[1:]), along, value=-1)
            if self.centred:
                of_rows -= level
            of_rows *= scale if all_rows else scale[start:stop]
            of_x[start:stop] = of_rows.view(rows.shape)
        return (
            of_x,
            None if self.weight is None else of_weight.view(self.weight.shape).to(self.weight.dtype),
            None if self.bias is None else of_bias.view(self.bias.shape).to(self.bias.dtype),
        )


def _layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Norm:
    return Norm(input.shape, tuple(range(-len(normalized_shape), 0)), eps, weight, bias, tuple(normalized_shape))


def _rms_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Norm:
    eps = torch.finfo(input.dtype).eps if eps is None else eps
    return Norm(
        input.shape, tuple(range(-len(normalized_shape), 0)), eps, weight, None, tuple(normalized_shape), centred=False
    )


def _batch_norm(input: Tensor, running_mean: Tensor | None, running_var: Tensor | None, weight: Tensor | None = None,
                bias: Tensor | None = None, training: bool = False, momentum: float = 0.1,
                eps: float = 1e-5) -> Norm | None:  # fmt: skip
    if not training:
        return None
    return Norm(input.shape, (0, *range(2, input.ndim)), eps, weight, bias, _channels(input))


def _group_norm(input: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None,
                eps: float = 1e-5) -> Norm:  # fmt: skip
    return Norm((len(input), num_groups, input[0].numel() // num_groups), (2,), eps, weight, bias, _channels(input))


def _instance_norm(input: Tensor, running_mean: Tensor | None = None, running_var: Tensor | None = None,
                   weight: Tensor | None = None, bias: Tensor | None = None, use_input_stats: bool = True,
                   momentum: float = 0.1, eps: float = 1e-5) -> Norm | None:  # fmt: skip
    return _group_norm(input, input.shape[1], weight, bias, eps) if use_input_stats else None


def _channels(x: Tensor) -> Sequence[int]:
    return (x.shape[1], *(1 for _ in range(x.ndim - 2)))


# By the arguments of torch's functions; None for what is to be left to them.
NORMS: dict[Callable, Callable[..., Norm | None]] = {
    F.layer_norm: _layer_norm,
    F.rms_norm: _rms_norm,
    F.batch_norm: _batch_norm,
    F.group_norm: _group_norm,
    F.instance_norm: _instance_norm,
}
