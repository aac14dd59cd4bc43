"""The functions that have a rule of their own: what is kept of them is not what torch would keep."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from pointewa.compression.kept import Cast, Exact, Mask, Recomputed, View, pieces, unpack, unpack_rows
from pointewa.compression.norms import NORMS, Norm

if TYPE_CHECKING:
    from pointewa.compression.hooks import activations

# Activation functions: their outputs are computed again from their inputs.
RECOMPUTED = {F.gelu, F.silu, F.hardswish, F.mish, F.elu, F.leaky_relu, F.softplus}
RELU = {F.relu, torch.relu, Tensor.relu}
MAXIMUM = {torch.amax, Tensor.amax}
MATRIX = {F.linear, F.conv1d, F.conv2d, F.conv3d}
PRODUCTS = {torch.matmul, torch.mm, torch.bmm, torch.addmm, torch.baddbmm, torch.einsum, Tensor.matmul, Tensor.mm,
            Tensor.bmm, Tensor.__matmul__}  # fmt: skip
FUSED = {F.scaled_dot_product_attention, F.multi_head_attention_forward}  # where a single kernel may compute attention
ATTENTION = FUSED | {F.softmax, torch.softmax, Tensor.softmax}
# Functions whose gradient is linear in what they keep, so that a small error of it is one of the gradient. Others
# compare what they keep, or divide by it: an amax of 4 bits has no maximum, and a square root of almost 0 is none.
LINEAR = MATRIX | PRODUCTS | ATTENTION | {F.dropout, torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__}


class Functions(TorchFunctionMode):
    """Takes over the functions that the rules are about."""

    def __init__(self, owner: "activations") -> None:
        super().__init__()
        self.owner = owner

    def __torch_function__(
        self, function: Callable, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, owner = kwargs or {}, self.owner
        if not torch.is_grad_enabled() or not _ours(owner):
            return function(*args, **kwargs)
        tensors = [one for one in _flat((*args, *kwargs.values())) if isinstance(one, Tensor)]
        weights = [one for one in tensors if owner.is_weight(one)]
        if weights and len(weights) == len(tensors):
            out = function(*args, **kwargs)
            if isinstance(out, Tensor):
                owner.remember_weight(out)
            return out
        if args and owner.compressible(args[0]):
            inplace = bool(kwargs.get("inplace") or any(one is True for one in args[1:]))
            if function in NORMS and (norm := NORMS[function](*args, **kwargs)):
                return _Normalize.apply(owner, norm, lambda: function(*args, **kwargs), args[0], norm.weight, norm.bias)
            if function in RECOMPUTED and not inplace:
                return _Recompute.apply(owner, function, tuple(kwargs), 1, *args, *kwargs.values())
            if function in RELU:
                return self._relu(args[0], inplace)
            if function in MAXIMUM:
                return _Amax.apply(owner, *args, *kwargs.values())
        if function is F.scaled_dot_product_attention and (out := self._attend(args, kwargs)) is not None:
            return out
        # An einsum that sums nothing is no product of matrices, and autocast leaves it alone.
        if (function in MATRIX or function in PRODUCTS) and function is not torch.einsum:
            args = [self._cast(one) if isinstance(one, Tensor) else one for one in args]
        owner.function, owner.attention = function, function in ATTENTION or (function in PRODUCTS and not weights)
        # Autocast's copies of what was computed from weights are saved too.
        owner.weight_shapes = frozenset(tuple(sorted(one.shape)) for one in weights)
        # What is much smaller than its inputs, such as the logarithms of attention's sums, is a statistic.
        owner.statistics = max((one.numel() for one in tensors), default=0) // 8
        try:
            with sdpa_kernel(SDPBackend.MATH) if function in FUSED else nullcontext():  # see `_attend`
                return function(*args, **kwargs)
        finally:
            owner.function, owner.attention, owner.weight_shapes, owner.statistics = None, False, frozenset(), 0

    def _attend(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor | None:
        """Attention in a single kernel, computed again from queries, keys and values; None if it is to be written out.

        The kernels compute the scores again themselves, but divide by the sums of the exact ones, so that a small error
        of large scores would be exponentiated. Dropout would be drawn anew. Written out, softmax's output is kept.
        """
        named, args = dict(kwargs), list(args)
        args += [named.pop(name) for name in ("query", "key", "value")[len(args) :]]
        dropout = args[4] if len(args) > 4 else named.get("dropout_p", 0.0)
        if dropout or torch._fused_sdp_choice(*args, **named) == SDPBackend.MATH.value:
            return None
        self.owner.attention = True
        try:
            return _Recompute.apply(self.owner, F.scaled_dot_product_attention, tuple(named), 3, *args, *named.values())
        finally:
            self.owner.attention = False

    def _relu(self, x: Tensor, inplace: bool) -> Tensor:
        kept, place = self.owner.find(x), (x.shape, x.stride(), x.storage_offset())
        out = _Relu.apply(self.owner, x, inplace)
        if isinstance(kept, Recomputed) and out.is_contiguous() and x.is_contiguous():
            self.owner.remember(out, Recomputed(torch.relu, View(kept, *place)))
        return out

    def _cast(self, x: Tensor) -> Tensor:
        """What autocast will make of a factor, made here, so that what it was made of is known."""
        device, owner = x.device.type, self.owner
        if not torch.is_autocast_enabled(device) or x.dtype != torch.float32:
            return x
        kind, kept = torch.get_autocast_dtype(device), owner.find(x)
        if owner.is_parameter(x):
            again = Cast(x, kind)
        elif isinstance(kept, Recomputed) and x.is_contiguous():
            view = View(kept, x.shape, x.stride(), x.storage_offset())
            again = Recomputed(lambda values: values.to(kind), view)
        else:
            return x
        cast = x.to(kind)
        owner.remember(cast, again)
        return cast


def _flat(values: Sequence[Any]) -> Iterator[Any]:
    for one in values:
        yield from one if isinstance(one, list | tuple) else (one,)


def _ours(owner: "activations") -> bool:
    """Whether hooks of ours decide what is kept, and not those of `torch.utils.checkpoint`, which computes what is
    inside it again without us."""
    top = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return top is not None and top[0] == owner.pack


class _Normalize(torch.autograd.Function):
    """A norm, of which the normalised input and the exact statistics are kept.

    Both the gradient and the output follow from them. Statistics of an input in few bits would be wrong wherever the
    input varies little beside what shares its scale: a batch norm's channels, or the class token of a fresh ViT of
    timm's, whose variance of almost 0 is divided by.
    """

    @staticmethod
    def forward(ctx: Any, owner: "activations", norm: Norm, run: Callable[[], Tensor], x: Tensor, weight: Tensor | None,
                bias: Tensor | None) -> Tensor:  # fmt: skip
        out = run()
        normalised, scale = norm.normalise(x)
        ctx.norm, ctx.x, ctx.dtype = norm, owner.keep(normalised), x.dtype
        ctx.scale = owner.hold(Exact(scale))
        kind, ctx.constants = out.dtype, [None if one is None else Exact(one) for one in (weight, bias)]
        if out.is_contiguous():
            constants = ctx.constants
            affine = Recomputed(
                lambda x: norm.affine(x, *map(_constant, constants)).to(kind), ctx.x, norm.by_rows(out.ndim)
            )
            owner.remember(out, affine)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        _constant(ctx.constants[0])  # refuses a weight that has been written to
        normalised = partial(unpack_rows, ctx.x)
        return None, None, None, *ctx.norm.gradients(grad, normalised, ctx.scale.values(), ctx.dtype)


class _Recompute(torch.autograd.Function):
    """A function that is computed again from its inputs: the first ``count`` in few bits, the others as they are."""

    @staticmethod
    def forward(
        ctx: Any, owner: "activations", function: Callable, keys: Sequence[str], count: int, *inputs: Any
    ) -> Tensor:
        call, autocast = _call(function, keys), _autocast(inputs[0].device.type)
        out = call(*inputs)
        few = [owner.save(one, True) for one in inputs[:count]]
        rest = [owner.hold(Exact(one)) if isinstance(one, Tensor) else one for one in inputs[count:]]
        ctx.call, ctx.autocast, ctx.few, ctx.rest = call, autocast, few, rest
        if count > 1:
            owner.save(out, True)  # for whatever comes after
        elif out.is_contiguous() and isinstance(few[0], View):

            def again(values: Tensor) -> Tensor:
                with autocast():
                    return call(values, *map(_constant, rest))

            owner.remember(out, Recomputed(again, few[0]))
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inputs, wanted = [*map(unpack, ctx.few), *map(_constant, ctx.rest)], ctx.needs_input_grad[4:]
        inputs = [one.detach().requires_grad_() if is_ else one for one, is_ in zip(inputs, wanted, strict=True)]
        with torch.enable_grad(), ctx.autocast():
            out = ctx.call(*inputs)
        found = iter(torch.autograd.grad(out, [one for one, is_ in zip(inputs, wanted, strict=True) if is_], grad))
        return (None, None, None, None, *(next(found) if is_ else None for is_ in wanted))


def _call(function: Callable, keys: Sequence[str]) -> Callable[..., Tensor]:
    """The function with its last arguments by name, so that all can be given by position."""

    def call(*args: Any) -> Tensor:
        count = len(args) - len(keys)
        return function(*args[:count], **dict(zip(keys, args[count:], strict=True)))

    return call


def _constant(value: Any) -> Any:
    return value.values() if isinstance(value, Exact) else value


def _autocast(device: str) -> Callable[[], torch.autocast]:
    """The present autocast again."""
    enabled, kind = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    return lambda: torch.autocast(device, kind, enabled=enabled)


class _Relu(torch.autograd.Function):
    """A ReLU that keeps a bit a value."""

    @staticmethod
    def forward(ctx: Any, owner: "activations", x: Tensor, inplace: bool) -> Tensor:
        ctx.positive = owner.hold(Mask(x > 0))
        if not inplace:
            return x.relu()
        ctx.mark_dirty(x)
        return x.relu_()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None]:
        of_x = torch.empty_like(grad, memory_format=torch.contiguous_format)
        row = grad[0].numel()
        for start, stop in pieces(grad.shape, grad.device):
            positive = ctx.positive.part(start * row, stop * row).view(-1, *grad.shape[1:])
            torch.mul(grad[start:stop], positive, out=of_x[start:stop])
        return None, of_x, None


class _Amax(torch.autograd.Function):
    """The maximum along a dimension, which keeps a bit a value; equal ones share the gradient, as in torch."""

    @staticmethod
    def forward(ctx: Any, owner: "activations", x: Tensor, dim: Any = (), keepdim: bool = False) -> Tensor:
        out = x.amax(dim, keepdim=True)
        ctx.largest = owner.hold(Mask(x == out))
        ctx.dim, ctx.shape, ctx.of = dim, out.shape, x.shape
        return out if keepdim else x.amax(dim)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None, None]:
        largest = ctx.largest.values().view(ctx.of)
        return None, largest * (grad.view(ctx.shape) / largest.sum(ctx.dim, keepdim=True)), None, None
