"""What a trained model predicts in a lower precision, beside what it predicts in float32."""

from typing import Any

import torch
from torch import Tensor

from pointewa.datasets.subjects import Subjects
from pointewa.errors import ConfigError
from pointewa.train.device import name_of


def agreement(run: str, device: torch.device, precision: torch.dtype) -> dict[str, dict[str, Any]]:
    """The metrics of a run's test split in float32 and in another precision, and the share of equal predictions.

    Args:
        run: of a classifier or a part segmentation.
        device: where it runs.
        precision: beside float32.

    Returns:
        A row for each precision: ``agreement %`` with float32, of classes or of the parts of points, and the metrics.

    Raises:
        ConfigError: a model that predicts neither.
    """
    rows, expected = {}, None
    for name in dict.fromkeys(("float32", name_of(precision))):
        subjects = Subjects(run, "test", overrides=[f"train.device={device}"], precision=name)
        if not (subjects.task.predicts_classes or subjects.task.point_labels):
            raise ConfigError(f"--run: expected a classifier or a part segmentation, found {subjects.task.name}")
        with torch.no_grad():
            outputs = subjects.task.outputs(subjects.loaded.model.eval(), subjects.batches())
        found = _predicted(outputs)
        expected = found if expected is None else expected
        same = 100 * (found == expected).double().mean().item()
        rows[name] = {"agreement %": same, "predictions": found.numel(), **subjects.task.measure(outputs)}
    return rows


def _predicted(outputs: dict[str, Tensor]) -> Tensor:
    return outputs["predicted"] if "predicted" in outputs else outputs["logits"].argmax(1)
