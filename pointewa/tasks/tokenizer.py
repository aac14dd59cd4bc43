"""The tokenizer of Point-BERT's pre-training: a discrete VAE of patches, which needs no labels."""

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from pointewa.config import Config, ModelConfig, model_error
from pointewa.errors import ConfigError
from pointewa.models import TOKENIZERS, DiscreteVAE, LoadReport, TokenizerSizes
from pointewa.models.dvae import reconstruction_losses
from pointewa.models.parts import Parts
from pointewa.runs.weights import TOKENIZER, init_from
from pointewa.tasks import register
from pointewa.tasks.base import Batch, Metric, Outputs, Shown, Subjects, Task

# The published schedules count steps: the temperature falls over the first 100,000, the weight of the divergence rises
# over as many from step 10,000 on. That training, on 41,952 clouds of ShapeNet-55 in batches of 64, has 655 steps in
# each of 301 epochs, 197,155 in all. As fractions of the training both also fit shorter ones.
_STEPS = 655 * 301
_COOLING, _FROM, _RISE = 100_000 / _STEPS, 10_000 / _STEPS, 100_000 / _STEPS  # 0.507, 0.051, 0.507
_HOT, _COLD = 1.0, 0.0625
_KL_WEIGHT = 0.1
# What the weights of the norm before the logits start from, by preset; elsewhere 1, as published. From 1, in the few
# thousand steps that the small sizes are made for, the noise drowns the logits and the divergence flattens them: fewer
# codes are taken.
_LOGIT_SCALE = {"tiny": 3.0, "small": 3.0}


def temperature(progress: float) -> float:
    """Of the Gumbel softmax: from 1 to 1/16 by half a cosine over the first 0.507 of the training."""
    return _half_cosine(_HOT, _COLD, progress / _COOLING)


def kl_weight(progress: float) -> float:
    """Of the divergence in the loss: 0 for the first 0.051 of the training, then to 0.1 by half a cosine over 0.507."""
    return _half_cosine(0.0, _KL_WEIGHT, (progress - _FROM) / _RISE)


def _half_cosine(start: float, end: float, fraction: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * min(1.0, max(0.0, fraction)))) / 2


def sizes_of(config: ModelConfig) -> TokenizerSizes:
    """The sizes that ``model.preset`` names, with their overrides.

    Raises:
        ConfigError: an unknown preset, or values out of range.
    """
    if config.preset not in TOKENIZERS:
        raise ConfigError(f"model.preset: expected one of {', '.join(TOKENIZERS)}, found {config.preset!r}")
    keys = (key.removeprefix("model.") for key in Tokenizer.reads)
    own = {key: value for key in keys if (value := getattr(config, key)) is not None}
    try:
        return replace(TOKENIZERS[config.preset], **own)
    except ValueError as error:
        raise model_error(error) from error


@register
class Tokenizer(Task):
    """Reconstruct patches from one code each. Masked point modelling predicts these codes."""

    name = "tokenizer"
    metrics: ClassVar = {
        "cd": Metric("CD-L1 of fine points", ".5f", short="CD-L1", digits=8, higher_is_better=False),
        "coarse": Metric("CD-L1 of coarse points", ".5f", digits=8, higher_is_better=False, headline=False),
        "usage": Metric("codes in use", ".1f", "%", digits=4),
        "perplexity": Metric("perplexity of the codes", ".1f", digits=4),
    }
    train_metrics = ("cd",)
    reads = ("model.num_groups", "model.group_size", "model.patch_out", "model.codebook_size")
    model_file = TOKENIZER

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        train = config.train
        if train.task != self.name:
            return  # a model that is there, by a configuration of its data
        sizes_of(config.model)
        if config.router != "none":
            raise ConfigError(f"ewa.enabled: a {self.name} has no FFNs that could be experts: set ewa.enabled=false, "
                              "and leave out moe.router")  # fmt: skip
        if train.optimizer == "muon" or train.activation_checkpointing:
            key = "optimizer=muon" if train.optimizer == "muon" else "activation_checkpointing"
            raise ConfigError(f"train.{key}: a {self.name} has no transformer blocks, for which that is: leave it out")

    def build_model(self, class_names: tuple[str, ...], parts: Parts | None = None) -> nn.Module:
        """The discrete VAE, whatever the classes."""
        model = DiscreteVAE(sizes_of(self.config.model))
        nn.init.constant_(model.dgcnn_1.layer5[1].weight, _LOGIT_SCALE.get(self.config.model.preset, 1.0))
        return model

    def load_initial(self, model: nn.Module, path: str) -> LoadReport:
        """From a tokenizer of this library's, or the file of Point-BERT's."""
        return init_from(model, path, head=(), tokens=())

    def before_step(self, model: nn.Module, progress: float) -> None:
        """Set temperature and weight of the divergence by their schedules."""
        model.temperature, model.kl_weight = temperature(progress), kl_weight(progress)

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """CD-L1 of coarse and of fine points, and the weighted divergence of the codes' frequencies from uniform."""
        losses = model(batch.points)
        return losses.total, {"cd": losses.fine.detach() * len(batch.points)}

    def outputs(self, model: nn.Module, batches: Iterable[Batch]) -> Outputs:
        """CD-L1 of each cloud ``[N]``, of fine and of coarse points; its codes ``[N, G]``; how many codes there are."""
        rows = []
        for batch in batches:
            found = model.autoencode(batch.points)
            coarse, fine = reconstruction_losses(found)
            rows.append((fine, coarse, found.logits.argmax(-1), torch.full_like(fine, model.codebook_size)))
        columns = (torch.cat(parts).cpu() for parts in zip(*rows, strict=True))
        return dict(zip(("cd", "coarse", "tokens", "codebook_size"), columns, strict=True))

    def measure(self, outputs: Outputs) -> dict[str, float]:
        """Means over the clouds; the share of the codes that occur in the split, and the perplexity of their use.

        The latter is the number of codes that, all used alike, would have the same entropy.
        """
        counts = outputs["tokens"].flatten().bincount(minlength=int(outputs["codebook_size"][0]))
        shares = counts.double() / counts.sum()
        return {
            **{name: outputs[name].double().mean().item() for name in ("cd", "coarse")},
            "usage": 100 * (counts > 0).double().mean().item(),
            "perplexity": torch.special.entr(shares).sum().exp().item(),
        }

    def input_classes(self, class_names: tuple[str, ...]) -> tuple[str, ...]:
        """None: the tokenizer knows no classes."""
        return ()

    def show(self, subjects: Subjects, count: int) -> Shown:
        """Reconstructions."""
        from pointewa.viz import drawings
        from pointewa.viz.clouds import clouds_figure
        from pointewa.viz.html import clouds_html
        from pointewa.viz.report import section_html

        picture = drawings.reconstructions(subjects.loaded.model, subjects.items([], count)).picture
        sections = [section_html("Reconstructions from one code a patch", clouds_html(picture))]
        return Shown(sections, figures={"reconstruction": clouds_figure(picture)})
