"""Masked autoencoding: Point-MAE's pre-training, which needs no labels."""

from collections.abc import Iterable
from typing import ClassVar

import torch
from torch import Tensor, nn

from pointewa.config import Config, build_architecture, model_error
from pointewa.errors import ConfigError
from pointewa.models import MaskedAutoencoder
from pointewa.models.parts import Parts
from pointewa.tasks import register
from pointewa.tasks.base import TRANSFORMER, Batch, Metric, Outputs, Shown, Subjects, Task


@register
class MaskedAutoencoding(Task):
    """Predict the points of masked patches. A classification starts from the encoder by ``train.init_from``."""

    name = "masked_autoencoding"
    metrics: ClassVar = {"loss": Metric("Chamfer distance of masked patches", ".3e", digits=8, higher_is_better=False)}
    reads = (*TRANSFORMER, "model.mask_ratio", "model.decoder_depth")
    model_file = "pretrained.safetensors"
    needs_labels = False

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        build_architecture(config.model)
        if config.router == "top_k":
            raise ConfigError(f"moe.router: {self.name} folds its experts, if any: set auto, none or random")

    def build_model(self, class_names: tuple[str, ...], parts: Parts | None = None) -> nn.Module:
        """The autoencoder, whatever the classes."""
        model = self.config.model
        try:
            return MaskedAutoencoder(build_architecture(model), model.mask_ratio, model.decoder_depth)
        except ValueError as error:
            raise model_error(error) from error

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The squared Chamfer distance on the masked patches."""
        return model(batch.points), {}

    def outputs(self, model: nn.Module, batches: Iterable[Batch]) -> Outputs:
        """The loss of each batch, repeated for each of its objects; the masks are the same in every call."""
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(0)
            return {"loss": torch.cat([model(batch.points).expand(len(batch.points)).cpu() for batch in batches])}

    def measure(self, outputs: Outputs) -> dict[str, float]:
        """The mean over the objects."""
        return {"loss": outputs["loss"].double().mean().item()}

    def input_classes(self, class_names: tuple[str, ...]) -> tuple[str, ...]:
        """None: the autoencoder knows no classes."""
        return ()

    def show(self, subjects: Subjects, count: int) -> Shown:
        """Reconstructions."""
        from pointewa.viz import drawings
        from pointewa.viz.clouds import clouds_figure
        from pointewa.viz.html import clouds_html
        from pointewa.viz.report import section_html

        picture = drawings.reconstructions(subjects.loaded.model, subjects.items([], count)).picture
        sections = [section_html("Reconstructions", clouds_html(picture))]
        return Shown(sections, figures={"reconstruction": clouds_figure(picture)})
