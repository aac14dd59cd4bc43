"""Gradients in 8 bits on their way between processes: a communication hook for DistributedDataParallel.

The exchange of ZeRO++ (arXiv 2306.10209) and AGoQ (arXiv 2605.00539): each process quantises its gradient and sends to
every other one the shard that is that one's to sum (all-to-all); shards are dequantised and summed in float32, never in
8 bits; the sums are quantised again and gathered by all. It works on gloo and NCCL. The exchange of a bucket is
waited for: it does not overlap with the rest of the backward pass.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from pointewa.compression.quantize import BLOCK, Quantized, dequantize, quantize

_SCALE = 4  # bytes


class GradientExchange:
    """Averages the gradients of the processes in few bits: `attach` it to a model.

    All processes have the same gradients afterwards, bit for bit.

    Args:
        bits: of a value: 4 or 8.
        block: values that share a scale.
        error_feedback: add to each gradient what the quantisation of the one before it left out (Seide et al., 2014).

    Raises:
        ValueError: other ``bits``, or a ``block`` that `quantize` refuses.

    Attributes:
        sent: bytes that this process has sent so far to others.
        plain: bytes that a ring all-reduce of the same gradients would have sent.
    """

    def __init__(self, bits: int = 8, block: int = BLOCK, error_feedback: bool = False) -> None:
        if bits not in (4, 8):
            raise ValueError(f"bits: expected 4 or 8, found {bits}")
        quantize(torch.zeros(1), bits, block)  # refuses what does not go
        self.bits, self.block, self.error_feedback = bits, block, error_feedback
        self.left: dict[int, Tensor] = {}  # by the number of the bucket
        self.sent = self.plain = 0

    def attach(self, model: DistributedDataParallel) -> "GradientExchange":
        """Make it the model's communication hook; returns itself."""
        model.register_comm_hook(None, self._hook)
        return self

    def state_dict(self) -> dict[int, Tensor]:
        """What this process has to keep for going on bit for bit: the errors that are to be fed back."""
        return dict(self.left)

    def load_state_dict(self, state: dict[int, Tensor]) -> None:
        """Go on from a `state_dict` of this process."""
        self.left = dict(state)

    def _hook(self, _: object, bucket: dist.GradBucket) -> Future[Tensor]:
        flat, world = bucket.buffer(), dist.get_world_size()
        if self.error_feedback and bucket.index() in self.left:
            flat += self.left[bucket.index()]
        padded = F.pad(flat, (0, -len(flat) % (world * self.block)))
        mine, size = quantize(padded, self.bits, self.block), len(padded) // world
        if self.error_feedback:
            self.left[bucket.index()] = flat - dequantize(mine)[: len(flat)]
        shards = _bytes(mine, world)
        received = torch.empty_like(shards)
        dist.all_to_all_single(received, shards)
        mean = sum(self._read(row, size, torch.float32) for row in received) / world
        shard = _bytes(quantize(mean, self.bits, self.block), 1)
        everything = torch.empty_like(shards)
        dist.all_gather_into_tensor(everything, shard)
        self.sent += 2 * (world - 1) * shard.nbytes
        self.plain += 2 * (world - 1) * flat.nbytes // world
        result: Future[Tensor] = Future()
        result.set_result(torch.cat([self._read(row, size, flat.dtype) for row in everything])[: len(flat)])
        return result

    def _read(self, row: Tensor, size: int, dtype: torch.dtype) -> Tensor:
        """The values ``[size]`` of a shard from its bytes."""
        codes, scales = row.split([size * self.bits // 8, size // self.block * _SCALE])
        scales = scales.clone().view(torch.float32).view(-1, 1)
        return dequantize(
            Quantized(codes.view(len(scales), -1), scales, self.bits, self.block, torch.Size([size]), dtype)
        )


def _bytes(quantized: Quantized, parts: int) -> Tensor:
    """Codes and scales of each of ``parts`` equal shards, uint8 ``[parts, S]``."""
    codes, scales = quantized.codes.view(parts, -1), quantized.scales.view(parts, -1)
    return torch.cat([codes, scales.view(torch.uint8)], 1)
