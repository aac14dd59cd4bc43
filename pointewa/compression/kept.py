"""What is kept of tensors, and how their values come back."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from weakref import ref

import torch
from torch import Tensor

from pointewa.compression.quantize import Quantized, dequantize, pack_mask, unpack_mask


class Kept(ABC):
    """Something from which the values of a storage can be had again."""

    nbytes = 0

    @abstractmethod
    def values(self) -> Tensor:
        """All values of the storage, ``[n]``."""


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

    @abstractmethod
    def compute(self) -> Tensor:
        """`values`, anew."""


class Few(Computed):
    """Values in few bits."""

    def __init__(self, quantized: Quantized) -> None:
        super().__init__()
        self.quantized, self.nbytes = quantized, quantized.nbytes

    def compute(self) -> Tensor:
        """Of `Computed`."""
        return dequantize(self.quantized)


class Exact(Kept):
    """Values as they are, which are not to be written to before the backward pass.

    torch itself checks that of what it saves, but not where hooks have taken over.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.version = tensor.detach(), tensor._version
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


class Mask(Computed):
    """A bool tensor, in one bit a value."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.packed, self.shape = pack_mask(mask), mask.shape
        self.nbytes = self.packed.nbytes

    def compute(self) -> Tensor:
        """Of `Computed`."""
        return unpack_mask(self.packed, self.shape)


class Recomputed(Computed):
    """The output of a function of one kept tensor and constants."""

    def __init__(self, function: Callable[[Tensor], Tensor], x: "View | Exact") -> None:
        super().__init__()
        self.function, self.x = function, x

    @torch.no_grad()
    def compute(self) -> Tensor:
        """Of `Computed`."""
        return self.function(unpack(self.x)).reshape(-1)


@dataclass(frozen=True)
class View:
    """A part of what is kept."""

    kept: Kept
    shape: torch.Size
    stride: Sequence[int]
    offset: int


def unpack(saved: "Exact | View") -> Tensor:
    """The tensor of what a pack hook has returned."""
    if isinstance(saved, Exact):
        return saved.values()
    return saved.kept.values().as_strided(saved.shape, saved.stride, saved.offset)
