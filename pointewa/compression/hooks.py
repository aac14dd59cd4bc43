"""Activations in few bits between the forward and the backward pass, for any model and loop.

What autograd saves goes through `torch.autograd.graph.saved_tensors_hooks`, as in GACT (Liu et al., ICML 2022). As in
AGoQ (arXiv 2605.00539) of a norm or an activation function only its *input* is stored, quantised, and what follows from
it, such as the input of the linear layer behind it, is computed again in the backward pass; attention has more bits
than the rest. Unlike there, a norm's input is stored normalised, with exact statistics: see `functions`.
"""

import sys
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Self
from weakref import WeakSet

import torch
from torch import Generator, Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from pointewa.compression.functions import LINEAR, Functions
from pointewa.compression.kept import Exact, Few, Kept, View, unpack
from pointewa.compression.quantize import BLOCK, quantize

SMALL = 4096  # values: smaller tensors, such as statistics and masks of samples, are kept as they are


class activations:
    """Within this context what autograd keeps for the backward pass is kept in few bits.

    ```python
    compressed = compression.activations(model, bits=4)
    for x, y in loader:
        with compressed:
            loss = F.cross_entropy(model(x), y)
        loss.backward()  # inside or after
    ```

    Not compressed: parameters and what shares their storage, integers and masks, tensors of fewer than `SMALL` values.
    Views of one storage, such as queries, keys and values, are stored once, as is what is saved several times.
    A ReLU keeps one bit a value: its gradient needs no more. What a `torch.autograd.Function` of your own saves is kept
    as it is, unless the class says ``linear_in_saved = True``: an error of it is one of the gradient.

    Args:
        model: whose parameters are left alone.
        bits: of everything that is not said below: 2, 4, 8, 16 (bfloat16) or 32 (as it is).
        attention_bits: of queries, keys, values, attention and its output. Its gradient suffers most.
        block: values that share a scale.
        stochastic: round at random, right on average, by draws from a generator of its own: see `state_dict`.
        seed: of that generator.

    Raises:
        ValueError: ``bits`` or ``block`` that `quantize` refuses.

    Attributes:
        chosen: bits by the number of the saved tensor within a forward pass, from `pointewa.compression.adapt`.
        sizes: values of the tensors that were saved in few bits since it was entered.
    """

    def __init__(
        self,
        model: nn.Module,
        bits: int = 4,
        attention_bits: int = 8,
        block: int = BLOCK,
        stochastic: bool = False,
        seed: int = 0,
    ) -> None:
        for value in (bits, attention_bits):
            quantize(torch.zeros(1), value, block)  # refuses what does not go
        self.model, self.bits, self.attention_bits, self.block = model, bits, attention_bits, block
        self.stochastic, self.seed = stochastic, seed
        self.chosen: dict[int, int] = {}
        self.sizes: list[int] = []
        self._generators: dict[torch.device, Generator] = {}
        self._kept: WeakSet[Kept] = WeakSet()
        self._stack: ExitStack | None = None

    def __enter__(self) -> Self:
        if torch.compiler.is_compiling() or any(map(_is_compiled, self.model.modules())):
            raise RuntimeError("compression.activations: hooks on saved tensors do not reach into compiled code: "
                               "leave torch.compile out")  # fmt: skip
        if self._stack is not None:
            raise RuntimeError("compression.activations: it is entered already")
        self._parameters = {one.untyped_storage().data_ptr() for one in self.model.parameters()}
        # By the addresses of storages: what is computed from parameters alone, and what is kept of activations.
        self._weights: dict[int, StorageWeakRef] = {}
        self._known: dict[int, tuple[StorageWeakRef, int, torch.dtype, Kept]] = {}
        self.function, self.attention, self.weight_shapes = None, False, frozenset()
        self.statistics = 0
        self.sizes.clear()
        with ExitStack() as stack:
            stack.enter_context(saved_tensors_hooks(self.pack, unpack))
            stack.enter_context(Functions(self))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        stack, self._stack = self._stack, None
        self._known, self._weights = {}, {}
        stack.close()

    @property
    def nbytes(self) -> int:
        """Bytes that are kept at this moment, by graphs that are still there."""
        return sum(one.nbytes for one in self._kept)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs for going on bit for bit."""
        states = {str(device): generator.get_state() for device, generator in self._generators.items()}
        return {"generators": states, "chosen": dict(self.chosen)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`."""
        self.chosen = dict(state["chosen"])
        for name, one in state["generators"].items():
            self._generator(torch.device(name)).set_state(one)

    def _generator(self, device: torch.device) -> Generator:
        if device not in self._generators:
            self._generators[device] = Generator(device).manual_seed(self.seed)
        return self._generators[device]

    def pack(self, tensor: Tensor) -> View | Exact:
        """What is kept of a tensor that autograd saves."""
        weight = tuple(sorted(tensor.shape)) in self.weight_shapes
        return self.save(tensor, not weight and (self.function in LINEAR if self.function else _says_linear()))

    def save(self, tensor: Tensor, linear: bool) -> View | Exact:
        """What is kept of a tensor: in few bits only where ``linear``, that an error of it is one of the gradient."""
        if tensor.layout is not torch.strided or type(tensor) not in (Tensor, nn.Parameter):
            return Exact(tensor)
        if self.is_parameter(tensor):
            return Exact(tensor)
        tensor, kept = tensor.detach(), self.find(tensor)
        if kept and (linear or isinstance(kept, Exact)):
            return View(kept, tensor.shape, tensor.stride(), tensor.storage_offset())
        whole = tensor.untyped_storage().nbytes() // tensor.element_size()
        if whole > 4 * tensor.numel():  # a small part of something large: not worth keeping all of it
            tensor = tensor.clone(memory_format=torch.contiguous_format)
            return View(self._kept_of(tensor.view(-1), linear), tensor.shape, tensor.stride(), 0)
        kept = self._kept_of(tensor.as_strided((whole,), (1,), 0), linear)
        self.remember(tensor, kept)
        return View(kept, tensor.shape, tensor.stride(), tensor.storage_offset())

    def compressible(self, tensor: Any) -> bool:
        """Whether a tensor is of the kind that is kept in few bits."""
        return (
            isinstance(tensor, Tensor)
            and tensor.is_floating_point()
            and tensor.numel() >= SMALL
            and not self.is_weight(tensor)
        )

    def is_weight(self, tensor: Tensor) -> bool:
        """Whether it is a parameter, or was computed from parameters alone."""
        found = self._weights.get(tensor.untyped_storage().data_ptr())
        return self.is_parameter(tensor) or (found is not None and not found.expired())

    def is_parameter(self, tensor: Tensor) -> bool:
        """Whether it is a parameter, or a view of one."""
        return tensor.untyped_storage().data_ptr() in self._parameters

    def remember_weight(self, tensor: Tensor) -> None:
        """Take a tensor for one that was computed from parameters alone."""
        storage = tensor.untyped_storage()
        self._weights[storage.data_ptr()] = StorageWeakRef(storage)

    def keep(self, tensor: Tensor) -> View:
        """Keep a contiguous tensor in few bits, whatever saves it."""
        return View(self._kept_of(tensor.view(-1), True), tensor.shape, tensor.stride(), 0)

    def _kept_of(self, flat: Tensor, linear: bool) -> Kept:
        if not (self.compressible(flat) and linear and len(flat) > self.statistics):
            return self.hold(Exact(flat))
        bits = self.chosen.get(len(self.sizes), self.attention_bits if self.attention else self.bits)
        self.sizes.append(flat.numel())
        generator = self._generator(flat.device) if self.stochastic and bits < 16 else None
        return self.hold(Few(quantize(flat, bits, self.block, generator)))

    def hold(self, kept: Kept) -> Kept:
        """Count what is kept among `nbytes`."""
        self._kept.add(kept)
        return kept

    def find(self, tensor: Tensor) -> Kept | None:
        """What is kept of a tensor's storage, unless it has been freed, or written to since."""
        found = self._known.get(tensor.untyped_storage().data_ptr())
        if found is None or found[0].expired() or found[1:3] != (tensor._version, tensor.dtype):
            return None
        return found[3]

    def remember(self, tensor: Tensor, kept: Kept) -> None:
        """Keep a tensor's storage, whoever saves it from now on, in this way."""
        storage = tensor.untyped_storage()
        self._known[storage.data_ptr()] = (StorageWeakRef(storage), tensor._version, tensor.dtype, kept)


def _says_linear() -> bool:
    """Whether the `torch.autograd.Function` that saves, which no mode sees, says that its gradient is linear in it.

    That of a norm or of an attention in one kernel is not, and neither is that of what is computed again.
    """
    frame = sys._getframe(1)
    while frame.f_globals.get("__name__") == __name__:
        frame = frame.f_back
    return getattr(frame.f_locals.get("cls"), "linear_in_saved", False) is True


def _is_compiled(module: nn.Module) -> bool:
    return type(module).__name__ == "OptimizedModule" or getattr(module, "_compiled_call_impl", None) is not None


def kept_bytes(model: nn.Module, run: Callable[[], Tensor]) -> int:
    """Bytes that autograd keeps for the backward pass of ``run``'s result, without those of the parameters.

    Args:
        model: whose parameters do not count.
        run: the forward pass, to the loss.
    """
    parameters = {one.untyped_storage().data_ptr() for one in model.parameters()}
    kept: dict[int, Tensor] = {}  # by storage, and held, so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        if (address := tensor.untyped_storage().data_ptr()) not in parameters:
            kept[address] = tensor
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = run()
    del loss
    return sum(one.untyped_storage().nbytes() for one in kept.values())
