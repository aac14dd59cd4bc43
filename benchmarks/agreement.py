"""What a trained model predicts in a lower precision, beside what it predicts in float32."""

from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from pointewa.tools.export import training_clouds
from torch import Tensor

from pointewa.datasets.subjects import Subjects
from pointewa.errors import ConfigError
from pointewa.inference.export import export, session
from pointewa.inference.int8 import Clouds
from pointewa.runs.description import LoadedModel
from pointewa.train.device import name_of


def agreement(run: str, device: torch.device, precision: torch.dtype) -> dict[str, dict[str, Any]]:
    """The metrics of a run's test split in float32 and in another precision, and the share of equal predictions.

    Args:
        run: of a classifier or a part segmentation.
        device: where it runs.
        precision: beside float32.

    Returns:
        A row for each precision, and on a CPU with onnxruntime one for a classifier of clouds in 8 bits: in ``agreement
        %`` the share of predictions, classes or parts of points, that are those in float32, and the metrics.

    Raises:
        ConfigError: a model that predicts neither.
    """
    rows, expected = {}, None
    names = dict.fromkeys(("float32", name_of(precision), *(("int8",) if has_int8(device) else ())))
    for name in names:
        floats = "float32" if name == "int8" else name
        subjects = Subjects(run, "test", overrides=[f"train.device={device}"], precision=floats)
        if not (subjects.task.predicts_classes or subjects.task.point_labels):
            raise ConfigError(f"--run: expected a classifier or a part segmentation, found {subjects.task.name}")
        model = subjects.loaded.model.eval()
        if name == "int8":
            if not subjects.task.predicts_classes or not subjects.task.of_points:
                continue
            model = int8(*training_clouds(run, (), ()))
        with torch.no_grad():
            outputs = subjects.task.outputs(model, subjects.batches())
        found = _predicted(outputs)
        expected = found if expected is None else expected
        same = 100 * (found == expected).double().mean().item()
        rows[name] = {"agreement %": same, "predictions": found.numel(), **subjects.task.measure(outputs)}
    return rows


def has_int8(device: torch.device) -> bool:
    """Whether there is onnxruntime with what it needs, for a model on a CPU."""
    return device.type == "cpu" and all(find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime"))


def int8(loaded: LoadedModel, clouds: Clouds) -> Callable[..., Tensor]:
    """A model as `pointewa.inference.export` writes it in 8 bits, read back, whatever its classes on the clouds are."""
    with TemporaryDirectory() as folder:
        path = Path(folder, "int8.onnx")
        export(loaded, path, "onnx", int8=replace(clouds, least=0))
        return session(path)


def _predicted(outputs: dict[str, Tensor]) -> Tensor:
    return outputs["predicted"] if "predicted" in outputs else outputs["logits"].argmax(1)
