"""Classification of images by a ViT of timm's, in the same training and with the same experts as the clouds."""

import torch
from torch import nn

from pointewa.config import Config
from pointewa.errors import ConfigError
from pointewa.models import LoadReport
from pointewa.models.parts import Parts
from pointewa.models.timm_vit import TimmArchitecture, need_timm, timm_vit
from pointewa.runs.weights import init_from
from pointewa.tasks import register
from pointewa.tasks.base import Shown, Subjects, Task
from pointewa.tasks.classification import Classification, class_sections, evaluate

# The fields of timm's by our keys in the group model.
_FIELDS = {"patch_size": "patch_size", "width": "embed_dim", "depth": "depth", "heads": "num_heads",
           "mlp_ratio": "mlp_ratio", "drop_path": "drop_path_rate"}  # fmt: skip


def architecture_of(config: Config) -> TimmArchitecture:
    """What ``model`` and ``data.img_size`` say.

    Raises:
        ConfigError: no preset of timm's, a value out of range.
    """
    library, _, name = config.model.preset.partition(":")
    if library != "timm":
        raise ConfigError(f"model.preset: image_classification expects a ViT of timm's, such as "
                          f"timm:vit_tiny_patch16_224, found {config.model.preset!r}")  # fmt: skip
    values = {theirs: getattr(config.model, ours) for ours, theirs in _FIELDS.items()}
    try:
        return TimmArchitecture(name, config.data.img_size, **values)
    except ValueError as error:
        raise ConfigError(f"model.preset: timm: {error}") from error


@register
class ImageClassification(Classification):
    """Cross-entropy; accuracy over all images, and its mean over the classes."""

    name = "image_classification"
    reads = (*(f"model.{key}" for key in _FIELDS), "data.img_size", "train.label_smoothing")
    of_points = False

    def __init__(self, config: Config) -> None:
        Task.__init__(self, config)
        if config.train.task == self.name:  # else it evaluates a model that is there
            architecture_of(config)
            need_timm()

    def build_model(self, class_names: tuple[str, ...], parts: Parts | None = None) -> nn.Module:
        """A ViT of timm's."""
        try:
            model = timm_vit(architecture_of(self.config), len(class_names))
        except ValueError as error:
            raise ConfigError(f"model.preset: timm: {error}") from error
        if self.config.train.device == "cpu" or not torch.cuda.is_available():
            # On CPUs the backward pass of torch's fused attention took half as long again as the whole step for the
            # 17 tokens of a 32 x 32 image.
            for module in model.modules():
                if hasattr(module, "fused_attn"):
                    module.fused_attn = False
        return model

    def load_initial(self, model: nn.Module, path: str) -> LoadReport:
        """From an image classification of this library's, or weights by timm's names."""
        return init_from(model, path, head=("head.",), tokens=())

    def trained_head(self, model: nn.Module) -> nn.Module:
        """The classification head."""
        return model.get_classifier()

    def show(self, subjects: Subjects, count: int) -> Shown:
        """Confusion matrix, and the most confident mistakes."""
        from pointewa.viz.confusion import confusion_figure
        from pointewa.viz.html import svg_html
        from pointewa.viz.images import images_figure
        from pointewa.viz.mistakes import confident_mistakes, mistake_title
        from pointewa.viz.report import section_html

        names, result = subjects.loaded.class_names, evaluate(subjects.loaded.model, subjects.batches())
        what = f"{subjects.what}, {len(result.labels)} images"
        sections = class_sections(result, names, what)
        every = confident_mistakes(result.logits, result.labels)
        if shown := every[:count]:
            pictures = [item.points for item in subjects.at([one.index for one in shown])]
            figure = images_figure(pictures, [mistake_title(one, names) for one in shown])
            heading = f"The {len(shown)} most confident of {len(every)} mistakes"
            sections.append(section_html(heading, f'<div class="photos">{svg_html(figure)}</div>\n'))
        figures = {"confusion matrix": confusion_figure(result.confusion, names, subjects.what)}
        return Shown(sections, result.metrics, {"mistakes": len(every)}, figures)
