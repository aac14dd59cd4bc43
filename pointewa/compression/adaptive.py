"""Bits a tensor by measured sensitivity, as in GACT (Liu et al., ICML 2022), under a budget of bits a value."""

import heapq
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pointewa.compression.hooks import activations

CHOICES = (2, 4, 8)


def adapt(compressed: activations, run: Callable[[], Tensor], average_bits: float = 4.0) -> dict[int, int]:
    """Choose the bits of each saved tensor, and have ``compressed`` use them from now on.

    The error of the gradient that a tensor of b bits causes is taken to be c / (2^b - 1)^2; c is measured by a forward
    and backward pass for each saved tensor, in which that one alone is compressed. Buffers, gradients and torch's
    random states are as before afterwards.

    Args:
        compressed: not entered.
        run: the forward pass of a typical batch, to the loss.
        average_bits: of a value, over all saved tensors.

    Returns:
        Bits by the number of the saved tensor within a forward pass.

    Raises:
        ValueError: a budget below the fewest bits there are.
    """
    if average_bits < CHOICES[0]:
        raise ValueError(f"average_bits: expected at least {CHOICES[0]}, found {average_bits}")
    errors, sizes = sensitivities(compressed, run)
    compressed.chosen = allocate(errors, sizes, average_bits)
    return compressed.chosen


def sensitivities(compressed: activations, run: Callable[[], Tensor], bits: int = 4) -> tuple[list[float], list[int]]:
    """For each saved tensor c of `adapt`, and its number of values."""
    before, exact, sizes = compressed.chosen, _gradient(compressed, run, {}, 32), list(compressed.sizes)
    norm, errors = float(exact.norm()), []
    for number in range(len(sizes)):
        found = _gradient(compressed, run, {number: bits}, 32)
        errors.append((float((found - exact).norm()) / norm) ** 2 * (2**bits - 1) ** 2)
    compressed.chosen = before
    return errors, sizes


def allocate(errors: Sequence[float], sizes: Sequence[int], average_bits: float) -> dict[int, int]:
    """The bits that make the sum of the errors small: the next ones go where they save most for each bit.

    Args:
        errors: c of each tensor.
        sizes: values of each tensor.
        average_bits: of a value, over all tensors.
    """
    level = [0] * len(sizes)
    free = (average_bits - CHOICES[0]) * sum(sizes)

    def step(number: int) -> tuple[float, int]:
        low, high = CHOICES[level[number] : level[number] + 2]
        saved = errors[number] * ((2**low - 1) ** -2 - (2**high - 1) ** -2)
        return -saved / ((high - low) * max(sizes[number], 1)), number

    queue = [step(number) for number in range(len(sizes))]
    heapq.heapify(queue)
    while queue:
        _, number = heapq.heappop(queue)
        low, high = CHOICES[level[number] : level[number] + 2]
        if (cost := (high - low) * sizes[number]) > free:
            continue
        free -= cost
        level[number] += 1
        if level[number] + 1 < len(CHOICES):
            heapq.heappush(queue, step(number))
    return {number: CHOICES[one] for number, one in enumerate(level)}


def _gradient(compressed: activations, run: Callable[[], Tensor], chosen: dict[int, int], others: int) -> Tensor:
    """The gradient of all parameters, flat, with ``chosen`` bits, and ``others`` where they say nothing."""
    model, settings = compressed.model, (compressed.bits, compressed.attention_bits)
    buffers = [buffer.clone() for buffer in model.buffers()]
    parameters = [one for one in model.parameters() if one.requires_grad]
    devices = {one.device.index for one in parameters if one.device.type == "cuda"}
    compressed.chosen, compressed.bits, compressed.attention_bits = chosen, others, others
    try:
        with torch.random.fork_rng(devices=devices):
            with compressed:
                loss = run()
            found = torch.autograd.grad(loss, parameters, allow_unused=True)
    finally:
        compressed.bits, compressed.attention_bits = settings
        with torch.no_grad():
            for buffer, value in zip(model.buffers(), buffers, strict=True):
                buffer.copy_(value)
    return torch.cat([one.flatten().float() for one in found if one is not None])
