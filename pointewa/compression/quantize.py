"""Block-wise quantisation: every block of values has a scale, by its largest absolute value."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

BLOCK = 128
BITS = (2, 4, 8, 16, 32)  # 16: bfloat16; 32: kept as it is


@dataclass(frozen=True)
class Quantized:
    """Values in few bits.

    Args:
        codes: uint8, several codes a byte where they have fewer than 8 bits; bfloat16 for 16 bits; the values for 32.
        scales: float32, one a block; those of blocks without negative values are negative. None for 16 and 32 bits.
        bits: of a value.
        block: values that share a scale.
        shape, dtype: of the values.
    """

    codes: Tensor
    scales: Tensor | None
    bits: int
    block: int
    shape: torch.Size
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes that are kept."""
        return self.codes.nbytes + (0 if self.scales is None else self.scales.nbytes)


def at_once(device: torch.device) -> int:
    """Values that are worked on at a time: what lies between a tensor and its codes takes several times its memory.

    They fit into a CPU's cache; elsewhere a call costs more than its memory.
    """
    return 2**18 if device.type == "cpu" else 2**24


def quantize(x: Tensor, bits: int, block: int = BLOCK, generator: Generator | None = None) -> Quantized:
    """Quantise a tensor.

    A block is scaled by its largest absolute value. Codes are signed, from -L to L with L = 2^(bits-1) - 1; a block
    without negative values, such as the output of a ReLU or a softmax, has the codes from 0 to 2^bits - 1, so that no
    code is wasted on signs. 0 stays 0. A block with a non-finite value comes back non-finite, so that a failed training
    step is noticed.

    Args:
        x: of any shape and floating type.
        bits: of `BITS`.
        block: values that share a scale, a multiple of 8; the last block is padded with zeros.
        generator: of the device of ``x``, for stochastic rounding, which is right on average; None rounds to nearest.

    Raises:
        ValueError: other ``bits``, or a ``block`` that does not fill whole bytes.
    """
    if bits not in BITS:
        raise ValueError(f"bits: expected one of {', '.join(map(str, BITS))}, found {bits}")
    if block < 8 or block % 8:
        raise ValueError(f"block: expected a multiple of 8, found {block}")
    x = x.detach()
    if bits >= 16:
        return Quantized(x if bits == 32 else x.to(torch.bfloat16), None, bits, block, x.shape, x.dtype)
    flat = x.reshape(-1)
    count = -(-len(flat) // block)
    codes = torch.empty(count, block * bits // 8, dtype=torch.uint8, device=x.device)
    scales = torch.empty(count, 1, device=x.device)
    for start in range(0, count, step := max(at_once(x.device) // block, 1)):
        rows = flat[start * block : (start + step) * block]
        rows = F.pad(rows, (0, -len(rows) % block)).view(-1, block).to(torch.float32)  # (R, block)
        codes[start : start + step], scales[start : start + step] = _quantized(rows, bits, generator)
    return Quantized(codes, scales, bits, block, x.shape, x.dtype)


def _quantized(rows: Tensor, bits: int, generator: Generator | None) -> tuple[Tensor, Tensor]:
    low, high = torch.aminmax(rows, dim=1, keepdim=True)
    positive = low >= 0
    most = torch.where(positive, 2.0**bits - 1, 2.0 ** (bits - 1) - 1)
    scales = torch.maximum(high, -low) / most
    codes = rows / torch.where(scales == 0, 1.0, scales)
    if generator is None:
        codes.round_()
    else:
        codes.add_(torch.rand(codes.shape, generator=generator, device=codes.device)).floor_().clamp_(-most, most)
    codes += torch.where(positive, 0.0, most)
    codes = codes.nan_to_num_(0.0).to(torch.uint8)
    return _packed(codes, bits), torch.where(positive, -scales, scales)


def dequantize(q: Quantized) -> Tensor:
    """The values again, as near as their bits allow, in their former shape and type."""
    return dequantize_part(q, 0, math.prod(q.shape)).view(q.shape)


def dequantize_part(q: Quantized, start: int, stop: int) -> Tensor:
    """The values ``start:stop`` of the flat tensor."""
    if q.scales is None:
        return q.codes.reshape(-1)[start:stop].to(q.dtype)
    first, last = start // q.block, -(-stop // q.block)
    out = torch.empty(last - first, q.block, dtype=q.dtype, device=q.codes.device)
    for at in range(first, last, step := max(at_once(out.device) // q.block, 1)):
        piece = slice(at, min(at + step, last))
        scales = q.scales[piece]
        rows = _unpacked(q.codes[piece], q.bits).to(torch.float32)
        rows -= torch.where(scales.signbit(), 0.0, 2.0 ** (q.bits - 1) - 1)
        out[piece.start - first : piece.stop - first] = rows.mul_(scales.abs())
    return out.view(-1)[start - first * q.block : stop - first * q.block]


def _packed(codes: Tensor, bits: int) -> Tensor:
    """Codes ``[R, B]`` below 2^bits, several a byte: ``[R, B * bits / 8]``."""
    parts = codes.unflatten(1, (8 // bits, -1)).unbind(1)
    packed = parts[0].clone() if bits < 8 else parts[0]
    for number, part in enumerate(parts[1:], 1):
        packed |= part << (number * bits)
    return packed


def _unpacked(packed: Tensor, bits: int) -> Tensor:
    if bits == 8:
        return packed
    return torch.cat([packed >> shift & (2**bits - 1) for shift in range(0, 8, bits)], 1)


def pack_mask(mask: Tensor) -> Tensor:
    """A bool tensor in one bit a value, uint8 ``[ceil(n / BLOCK), BLOCK / 8]``."""
    flat = mask.reshape(-1)
    return _packed(F.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK).to(torch.uint8), 1)


def unpack_mask(packed: Tensor, start: int, stop: int) -> Tensor:
    """The values ``start:stop`` of the flat tensor of `pack_mask`."""
    first = start // BLOCK
    values = _unpacked(packed[first : -(-stop // BLOCK)], 1).view(-1)
    return values[start - first * BLOCK : stop - first * BLOCK].bool()
