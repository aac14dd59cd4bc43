"""Masked point modelling: Point-BERT's pre-training, which needs a tokenizer and no labels."""

import warnings
from collections.abc import Callable, Iterable
from typing import ClassVar

import torch
from torch import Tensor, nn

from pointewa.config import Config, build_architecture, model_error
from pointewa.errors import CheckpointError, ConfigError
from pointewa.models.dvae import DiscreteVAE
from pointewa.models.parts import Parts
from pointewa.models.point_bert import PointBert
from pointewa.models.registry import kind_of
from pointewa.runs.description import LoadedModel
from pointewa.runs.weights import init_from, is_described, load_any
from pointewa.tasks import register
from pointewa.tasks.base import TRANSFORMER, Batch, Metric, Outputs, Shown, Subjects, Task
from pointewa.tasks.tokenizer import sizes_of


@register
class MaskedPointModeling(Task):
    """Predict the tokens of masked patches. A classification starts from the trunk by ``train.init_from``."""

    name = "masked_point_modeling"
    metrics: ClassVar = {
        "accuracy": Metric("accuracy of masked tokens", ".2f", "%", "masked tokens", digits=4),
        "loss": Metric("cross-entropy of masked tokens", ".4f", higher_is_better=False),
    }
    train_metrics = ("accuracy",)
    reads = (*TRANSFORMER, "task.tokenizer", "task.mask_ratio", "task.mask_rand", "task.queue_size", "task.moco_loss",
             "task.temperature", "task.momentum")  # fmt: skip
    model_file = "pretrained.safetensors"

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        build_architecture(config.model)
        train, task = config.train, config.task
        if config.router == "top_k":
            raise ConfigError(f"moe.router: {self.name} folds its experts, if any: set auto, none or random")
        if train.task != self.name:
            return  # only looking at a run's model, by a configuration of its data
        if task.tokenizer is None:
            raise ConfigError(f"task.tokenizer: {self.name} needs the run of a tokenizer, such as runs/tokenizer: "
                              "make pretrain TASK=tokenizer RUN=tokenizer")  # fmt: skip
        if train.ema_decay:
            raise ConfigError(f"train.ema_decay: {self.name} has an average of its own, the momentum encoder: set 0")
        if train.batch_size > task.queue_size:
            raise ConfigError(f"task.queue_size: expected at least train.batch_size {train.batch_size}, whose keys it "
                              f"takes at each step, found {task.queue_size}")  # fmt: skip

    def build_model(self, class_names: tuple[str, ...], parts: Parts | None = None) -> nn.Module:
        """Point-BERT's pre-training model on the tokenizer of ``task.tokenizer``, whatever the classes.

        Raises:
            CheckpointError: that is no tokenizer.
            ConfigError: a tokenizer of other patches.
        """
        return self._model(_tokenizer(self.config).model)

    def rebuild_model(self, class_names: tuple[str, ...], parts: Parts | None, saved: nn.Module) -> nn.Module:
        """On the tokenizer of the checkpoint.

        Raises:
            CheckpointError: it is of another model.
        """
        if not isinstance(saved, PointBert):
            raise CheckpointError(f"the run's checkpoint is not of {self.name}, but of a {kind_of(saved)}: start over "
                                  "with run.overwrite=true")  # fmt: skip
        return self._model(saved.dvae)

    def _model(self, dvae: DiscreteVAE) -> PointBert:
        task, model = self.config.task, self.config.model
        try:
            return PointBert(
                build_architecture(model), dvae, task.queue_size, (task.mask_ratio[0], task.mask_ratio[1]),
                task.mask_rand, task.moco_loss, task.temperature, task.momentum,
            )  # fmt: skip
        except ValueError as error:
            raise ConfigError(f"{model_error(error)}: task.tokenizer={task.tokenizer} was trained so") from error

    def check_data(self, normalize: str) -> None:
        """Refuse clouds that are normalised otherwise than the tokenizer's, of which it would make meaningless tokens;
        warn of clouds of another number of points.

        Raises:
            CheckpointError: ``task.tokenizer`` is no tokenizer.
            ConfigError: clouds normalised otherwise.
        """
        path, points = self.config.task.tokenizer, self.config.data.num_points
        known = _tokenizer(self.config)
        how = known.normalize.removesuffix("_of_sample")  # by all points or by a sample: almost the same
        if not is_described(path):
            warnings.warn(f"{path} does not say on which clouds it was trained: taken for the published tokenizer, of "
                          f"{known.num_points} points, {known.normalize}", stacklevel=2)  # fmt: skip
        if how != normalize:
            raise ConfigError(f"data.normalize: the tokenizer {path} knows clouds that are normalised as "
                              f"{how}, and these are as {normalize}: set data.normalize={how}, or train a tokenizer "
                              "on these")  # fmt: skip
        if points != known.num_points:
            warnings.warn(f"the tokenizer {path} was trained on {known.num_points} points a cloud, and these have "
                          f"{points}: its tokens are of patches of another size", stacklevel=2)  # fmt: skip

    def before_step(self, model: nn.Module, progress: float) -> None:
        """Forget the keys of a step that was skipped."""
        model.forget()

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The cross-entropies of masked tokens, of clouds and of mixtures, and the contrast of mixtures."""
        found = model(batch.points)
        loss = found.masked + found.mixed + found.contrast + found.plain
        return loss, {"accuracy": 100 * found.accuracy * len(batch.points)}

    def after_step(self, model: nn.Module, gather: Callable[[Tensor], Tensor]) -> None:
        """Move the momentum encoder and the queue."""
        model.follow(gather)

    def outputs(self, model: nn.Module, batches: Iterable[Batch]) -> Outputs:
        """For each object the sum of its masked tokens' cross-entropies, how many are predicted, and how many there
        are; the masks are the same in every call."""
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(0)
            found = [model.predict(batch.points) for batch in batches]
        losses, hits, counts = (torch.cat(parts).cpu() for parts in zip(*found, strict=True))
        return {"losses": losses, "correct": hits, "masked": counts}

    def measure(self, outputs: Outputs) -> dict[str, float]:
        """The accuracy in percent and the mean cross-entropy, over all masked tokens."""
        masked = outputs["masked"].sum().item()
        return {
            "accuracy": 100 * outputs["correct"].sum().item() / masked,
            "loss": outputs["losses"].double().sum().item() / masked,
        }

    def input_classes(self, class_names: tuple[str, ...]) -> tuple[str, ...]:
        """None: the model knows no classes."""
        return ()

    def show(self, subjects: Subjects, count: int) -> Shown:
        """Predicted tokens, decoded by the tokenizer."""
        from pointewa.viz import drawings
        from pointewa.viz.clouds import clouds_figure
        from pointewa.viz.html import clouds_html
        from pointewa.viz.report import section_html

        picture = drawings.reconstructions(subjects.loaded.model, subjects.items([], count)).picture
        sections = [section_html("Predicted tokens, decoded by the tokenizer", clouds_html(picture))]
        return Shown(sections, figures={"predicted tokens": clouds_figure(picture)})


def _tokenizer(config: Config) -> LoadedModel:
    """The model of ``task.tokenizer``, a run or a file of Point-BERT's code, whose sizes ``model.preset`` says.

    Raises:
        CheckpointError: no tokenizer, or of other sizes.
    """
    path = config.task.tokenizer
    if not is_described(path):
        model = DiscreteVAE(sizes_of(config.model))
        try:
            init_from(model, path, head=(), tokens=())
        except CheckpointError as error:
            raise CheckpointError(f"{error}: task.tokenizer takes the run of a tokenizer, or Point-BERT's dVAE.pth "
                                  "with model.preset=point_bert") from error  # fmt: skip
        return LoadedModel(model.eval(), (), 1024, "shapenet55", "unit_sphere_of_sample", "tokenizer")
    loaded = load_any(path)
    if (kind := kind_of(loaded.model)) != "dvae":
        raise CheckpointError(f"{path}: expected a tokenizer, found a {kind}: train one by make pretrain "
                              "TASK=tokenizer, and name its run by task.tokenizer")  # fmt: skip
    return loaded
