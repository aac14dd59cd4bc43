"""Masked pre-training in the same loop: another model, another loss, no labels."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

import pointewa.ewa as ewa
from pointewa.config import build_architecture
from pointewa.errors import ConfigError
from pointewa.models import MaskedAutoencoder
from pointewa.runs.description import LoadedModel
from pointewa.runs.summary import write_summary
from pointewa.runs.weights import PRETRAINED, save_model
from pointewa.tasks.base import Batch
from pointewa.train.build import with_experts
from pointewa.train.trainer import Trainer


class MaskedPretraining(Trainer):
    """Trains Point-MAE's masked autoencoder; the run folder then holds ``pretrained.safetensors``, which
    ``train.init_from`` takes."""

    def _build_model(self) -> torch.nn.Module:
        config = self.config
        if config.train.init_from or config.train.freeze_backbone or self.gated:
            raise ConfigError(
                "train.task: pretraining starts from scratch, trains everything, and folds its experts, if any: leave "
                "train.init_from, train.freeze_backbone and ewa.router as they are"
            )
        try:
            model = MaskedAutoencoder(
                build_architecture(config.model), config.model.mask_ratio, config.model.decoder_depth
            )
        except ValueError as error:
            raise ConfigError(f"model.{error}") from error
        return with_experts(model, config)

    def _loss(self, output: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return output, torch.zeros((), device=output.device)

    def _figures(self) -> dict[str, float]:
        figures = super()._figures()
        del figures["train/oa"]
        return figures

    def _validation(self) -> dict[str, float]:
        return {"val/loss": self._chamfer(self.evaluated, self.data.val)} if self.data.val is not None else {}

    def _chamfer(self, model: torch.nn.Module, batches: Iterable[Batch]) -> float:
        """The mean loss over a set, always with the same masks."""
        was_training, total = model.training, torch.zeros(2, device=self.device)
        model.eval()
        with torch.no_grad(), torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(0)
            for points, *_ in batches:
                total += torch.stack(
                    [model(points) * len(points), torch.tensor(float(len(points)), device=self.device)]
                )
        model.train(was_training)
        loss, objects = self.world.sum_(total).tolist()
        return loss / objects

    def finish(self) -> dict[str, Any]:
        """Fold, evaluate on the test split, write the model and ``summary.json``; returns the summary."""
        in_training = self._chamfer(self.evaluated, self.data.test)
        final = ewa.fold(self.evaluated) if self.averaging else self.evaluated
        loss = self._chamfer(final, self.data.test)
        summary = self._summary(final) | {
            "task": "pretraining",
            "test": {"loss": round(loss, 8)},
            "test_before_folding": {"loss": round(in_training, 8)} if self.averaging else None,
        }
        if self.world.first:
            save_model(self.folder / PRETRAINED, self.loaded(final.eval()))
            write_summary(self.folder, summary)
        return summary

    def loaded(self, model: torch.nn.Module) -> LoadedModel:
        """The autoencoder with what must be known to use it."""
        data = self.config.data
        return LoadedModel(model, (), data.num_points, data.name, self.data.normalize)
