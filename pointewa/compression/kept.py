"""What is kept of tensors, and how their values come back: all of them, or some rows at a time.

The largest tensors of a training are as large as what compression saves, so none is there in full without need.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from weakref import ref

import torch
from torch import Tensor

from pointewa.compression.quantize import Quantized, at_once, dequantize_part, pack_mask, unpack_mask


class Kept(ABC):
    """Something from which the values of a storage can be had again."""

    device: torch.device
    nbytes = 0

    @abstractmethod
    def values(self) -> Tensor:
        """All values of the storage, ``[n]``."""

    def part(self, start: int, stop: int) -> Tensor:
        """The values ``start:stop``."""
        return self.values().reshape(-1)[start:stop]


class Computed(Kept):
    """Values that are computed when they are asked for, and held as long as somebody uses them."""

    def __init__(self) -> None:
        self._values: Callable[[], Tensor | None] = lambda: None

    def values(self) -> Tensor:
        """Of `Kept`."""
        found = self._values()
        if found is None:
            found = self.compute()
            self._values = ref(found)
        return found

    def part(self, start: int, stop: int) -> Tensor:
        """Of `Kept`, from what somebody holds, where that is so."""
        found = self._values()
        return self.compute_part(start, stop) if found is None else found.view(-1)[start:stop]

    def compute_part(self, start: int, stop: int) -> Tensor:
        """`part`, anew."""
        return self.values().view(-1)[start:stop]

    @abstractmethod
    def compute(self) -> Tensor:
        """`values`, anew."""


class Few(Computed):
    """Values in few bits."""

    def __init__(self, quantized: Quantized) -> None:
        super().__init__()
        self.quantized, self.nbytes, self.device = quantized, quantized.nbytes, quantized.codes.device

    def compute(self) -> Tensor:
        """Of `Computed`."""
        return self.compute_part(0, math.prod(self.quantized.shape))

    def compute_part(self, start: int, stop: int) -> Tensor:
        """Of `Computed`."""
        return dequantize_part(self.quantized, start, stop)


class Exact(Kept):
    """Values as they are, which are not to be written to before the backward pass.

    torch itself checks that of what it saves, but not where hooks have taken over.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.version, self.device = tensor.detach(), tensor._version, tensor.device
        self.nbytes = tensor.untyped_storage().nbytes() if tensor.layout is torch.strided else 0

    def values(self) -> Tensor:
        """Of `Kept`, in the tensor's own shape.

        Raises:
            RuntimeError: it has been written to.
        """
        if self.tensor._version != self.version:
            raise RuntimeError(
                f"a tensor of shape {tuple(self.tensor.shape)} that the backward pass needs has been modified in place "
                "since the forward pass: for instance by an optimizer's step between the two"
            )
        return self.tensor


class Cast(Exact):
    """A parameter in another type, of which nothing is kept but the parameter."""

    def __init__(self, parameter: Tensor, kind: torch.dtype) -> None:
        super().__init__(parameter)
        self.kind, self.nbytes = kind, 0

    def values(self) -> Tensor:
        """Of `Exact`."""
        return super().values().to(self.kind)


class Mask(Computed):
    """A bool tensor, in one bit a value."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.packed, self.count, self.device = pack_mask(mask), mask.numel(), mask.device
        self.nbytes = self.packed.nbytes

    def compute(self) -> Tensor:
        """Of `Computed`."""
        return self.compute_part(0, self.count)

    def compute_part(self, start: int, stop: int) -> Tensor:
        """Of `Computed`."""
        return unpack_mask(self.packed, start, stop)


class Recomputed(Computed):
    """The output of a function of one kept tensor and constants, of that tensor's shape.

    Args:
        function: of the tensor.
        x: the tensor.
        by_rows: each row along the first dimension of the output follows from the same row of the input.
    """

    def __init__(self, function: Callable[[Tensor], Tensor], x: "View | Exact", by_rows: bool = True) -> None:
        super().__init__()
        self.function, self.x = function, x
        self.by_rows = by_rows and isinstance(x, View) and x.is_contiguous
        self.device = x.kept.device if isinstance(x, View) else x.device

    @torch.no_grad()
    def compute(self) -> Tensor:
        """Of `Computed`."""
        if not self.by_rows:
            return self.function(unpack(self.x)).reshape(-1)
        out = None
        for start, stop in pieces(self.x.shape, self.x.kept.device):
            piece = self.function(unpack_rows(self.x, start, stop))
            if out is None:
                out = piece.new_empty(self.x.shape)
            out[start:stop] = piece
        return out.view(-1)

    @torch.no_grad()
    def compute_part(self, start: int, stop: int) -> Tensor:
        """Of `Computed`, by whole rows."""
        if not self.by_rows:
            return super().compute_part(start, stop)
        row = math.prod(self.x.shape[1:])
        first, last = start // row, -(-stop // row)
        values = self.function(unpack_rows(self.x, first, last)).reshape(-1)
        return values[start - first * row : stop - first * row]


@dataclass(frozen=True)
class View:
    """A part of what is kept."""

    kept: Kept
    shape: torch.Size
    stride: Sequence[int]
    offset: int

    @property
    def is_contiguous(self) -> bool:
        """Whether its values lie in their order in the storage."""
        return torch.empty_strided(self.shape, self.stride, device="meta").is_contiguous()


def unpack(saved: "Exact | View") -> Tensor:
    """The tensor of what a pack hook has returned."""
    if isinstance(saved, Exact):
        return saved.values()
    return saved.kept.values().as_strided(saved.shape, saved.stride, saved.offset)


def unpack_rows(saved: View, start: int, stop: int) -> Tensor:
    """The rows ``start:stop`` of a contiguous view, along its first dimension."""
    row = math.prod(saved.shape[1:])
    return saved.kept.part(saved.offset + start * row, saved.offset + stop * row).view(-1, *saved.shape[1:])


def pieces(shape: torch.Size, device: torch.device) -> list[tuple[int, int]]:
    """Where to cut a tensor along its first dimension, so as to work on a few rows at a time."""
    step = max(at_once(device) // max(math.prod(shape[1:]), 1), 1)
    return [(start, min(start + step, shape[0])) for start in range(0, shape[0], step)]
