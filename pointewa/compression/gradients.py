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

    All processes have the same gradients afterwards, bit for bit. No block holds values of two parameters, so that the
    result does not depend on how the parameters are spread over DDP's buckets, which change after the first step.

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
        self.left: dict[str, Tensor] = {}  # by the name of the parameter
        self.sent = self.plain = 0

    def attach(self, model: DistributedDataParallel) -> "GradientExchange":
        """Make it the model's communication hook; returns itself."""
        self._names = {parameter: name for name, parameter in model.module.named_parameters()}
        model.register_comm_hook(None, self._hook)
        return self

    def state_dict(self) -> dict[str, Tensor]:
        """What this process has to keep for going on bit for bit: the errors that are to be fed back."""
        return dict(self.left)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from a `state_dict` of this process."""
        self.left = dict(state)

    def _hook(self, _: object, bucket: dist.GradBucket) -> Future[Tensor]:
        world, gradients = dist.get_world_size(), bucket.gradients()
        names = [self._names[parameter] for parameter in bucket.parameters()]
        rows = []
        for name, gradient in zip(names, gradients, strict=True):
            if name in self.left:
                gradient = gradient + self.left[name].to(gradient.device)
            rows.append(F.pad(gradient.reshape(-1), (0, -gradient.numel() % self.block)))
        sizes = [len(row) for row in rows]
        whole = torch.cat(rows)
        whole = F.pad(whole, (0, -len(whole) % (world * self.block)))
        mine, size = quantize(whole, self.bits, self.block), len(whole) // world
        if self.error_feedback:
            error = whole - dequantize(mine)
            error = error.where(error.isfinite(), 0.0)  # a failed step must not spoil all that follow
            for name, gradient, part in zip(names, gradients, error[: sum(sizes)].split(sizes), strict=True):
                self.left[name] = part[: gradient.numel()].view(gradient.shape).clone()
        shards = _bytes(mine, world)
        received = torch.empty_like(shards)
        dist.all_to_all_single(received, shards)
        mean = sum(self._read(row, size, torch.float32) for row in received) / world
        shard = _bytes(quantize(mean, self.bits, self.block), 1)
        everything = torch.empty_like(shards)
        dist.all_gather_into_tensor(everything, shard)
        self.sent += 2 * (world - 1) * shard.nbytes
        self.plain += 2 * (world - 1) * bucket.buffer().nbytes // world
        means = torch.cat([self._read(row, size, whole.dtype) for row in everything])
        for gradient, part in zip(gradients, means[: sum(sizes)].split(sizes), strict=True):
            gradient.copy_(part[: gradient.numel()].view(gradient.shape))  # a view of the bucket's buffer
        result: Future[Tensor] = Future()
        result.set_result(bucket.buffer())
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
