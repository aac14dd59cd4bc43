"""ONNX files whose large matrix products are computed in 8 bits: onnxruntime's static quantisation."""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from pointewa.models.mixed_precision import MergedPatchEncoder
from pointewa.models.patch_embed import PatchEncoder

CALIBRATE, HOLD_OUT = 64, 256  # clouds, at most; more than these calibrate no better, and take up to 60 MB each
LEAST_AGREEMENT = 95.0  # percent
PERCENTILE = 99.999  # of the activations; with their extremes the logits' error is a tenth larger
_BATCH = 8

Batches = tuple[tuple[Tensor, ...], ...]  # each what the model takes


@dataclass(frozen=True)
class Clouds:
    """What a model is given: clouds for the ranges of its activations, and others for the comparison.

    Args:
        calibrate: in batches.
        held_out: likewise.
        least: in percent, how many of the classes on the latter have to be the model's.
    """

    calibrate: Batches
    held_out: Batches
    least: float = LEAST_AGREEMENT

    @property
    def count(self) -> int:
        """How many are held out."""
        return sum(len(one[0]) for one in self.held_out)

    @classmethod
    def of(cls, *inputs: Tensor) -> "Clouds":
        """Of N rows of what a model takes: the first ones calibrate, at most a half."""
        first = min(CALIBRATE, len(inputs[0]) // 2)
        parts = (slice(first), 1), (slice(first, first + HOLD_OUT), _BATCH)  # the calibration wants equal batches
        return cls(*(tuple(zip(*(one[rows].split(size) for one in inputs), strict=True)) for rows, size in parts))


def with_constant_products(model: nn.Module) -> nn.Module:
    """A model without batch norms, with the patch encoder's products of weights computed beforehand: only products with
    constants are quantised. It is changed in place."""
    for name, module in list(model.named_modules()):
        if isinstance(module, PatchEncoder):
            model.set_submodule(name, MergedPatchEncoder(module, module.first_conv[0].weight.dtype))
    return model


def quantize(path: Path, calibrate: Batches) -> None:
    """Quantise an ONNX file in place: activations to unsigned, weights to signed 8 bits, a scale for each channel.

    Products with coordinates and those that make the logits stay in float32, as do attention, norms and sampling.

    Args:
        path: of `pointewa.inference.export.export`.
        calibrate: whose percentiles give the ranges of the activations.
    """
    import onnx
    from onnxruntime.quantization import (
        CalibrationDataReader,
        CalibrationMethod,
        QuantFormat,
        QuantType,
        quantize_static,
    )

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.rows: Iterator[Mapping[str, Any]] = (
                {name: value.numpy() for name, value in zip(names, batch, strict=True)} for batch in calibrate
            )

        def get_next(self) -> Mapping[str, Any] | None:
            return next(self.rows, None)

    model = onnx.load(str(path))
    names = [one.name for one in model.graph.input]
    with TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        named, out = Path(folder, "named.onnx"), Path(folder, "int8.onnx")
        for number, node in enumerate(model.graph.node):
            node.name = node.name or f"node_{number}"
        onnx.save(model, str(named))
        with _quiet():
            quantize_static(str(named), str(out), Reader(), quant_format=QuantFormat.QDQ, per_channel=True,
                            activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
                            op_types_to_quantize=["MatMul", "Gemm"], nodes_to_exclude=_exact(model.graph),
                            calibrate_method=CalibrationMethod.Percentile,
                            extra_options={"MatMulConstBOnly": True, "CalibPercentile": PERCENTILE})  # fmt: skip
        written = onnx.load(str(out))
    kept = {one.key: one.value for one in model.metadata_props}
    onnx.helper.set_model_props(written, kept | {"int8": "onnxruntime, static, QDQ"})
    onnx.save(written, str(path))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what onnxruntime prints about its progress, and its advice to simplify the graph first."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with redirect_stdout(StringIO()):
            yield
    finally:
        logging.disable(before)


def _exact(graph: Any) -> list[str]:
    """Names of the products that stay: with a matrix of three rows or columns, and the last one before the logits."""
    shapes = {one.name: list(one.dims) for one in graph.initializer}
    products = [node for node in graph.node if node.op_type in ("MatMul", "Gemm")]
    products = [node for node in products if len(shapes.get(node.input[1], ())) == 2]
    return [node.name for node in products if 3 in shapes[node.input[1]]] + [products[-1].name]


def agreement(found: Callable[..., Tensor], model: Callable[..., Tensor], batches: Batches) -> float:
    """In percent, how often the largest logit is the same."""
    same = [found(*one).argmax(-1) == model(*one).argmax(-1) for one in batches]
    return 100 * torch.cat([one.flatten() for one in same]).double().mean().item()
