"""What must be known of a model besides its weights."""

from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch

import pointewa.ewa as ewa
from pointewa.errors import CheckpointError, first_line
from pointewa.models import Architecture, MaskedAutoencoder, PointTransformerClassifier, fuse_batch_norm

_MOST_POINTS = 2**20  # of all groups of a cloud; published models have 2,048 to 16,384


@dataclass
class LoadedModel:
    """A classifier, dense or with gated experts, or a masked autoencoder, and what must be known to use it.

    Args:
        model: ``points [B, P, 3] -> logits [B, C]``, in evaluation mode; the autoencoder's loss in their place.
        class_names: C names.
        num_points: P of its training.
        dataset: name of the set it was trained on.
        normalize: what was done to its clouds: "unit_sphere" (centred, scaled to largest norm 1) or "none".
    """

    model: PointTransformerClassifier | MaskedAutoencoder
    class_names: tuple[str, ...]
    num_points: int
    dataset: str
    normalize: str

    def description(self) -> dict[str, Any]:
        """All but the weights, as plain values."""
        masked = isinstance(self.model, MaskedAutoencoder)
        patch_encoder = self.model.MAE_encoder.encoder if masked else self.model.encoder
        fused = not any(isinstance(module, torch.nn.BatchNorm1d) for module in patch_encoder.modules())
        gated = {number: block.mlp for number, block in enumerate(self.model.blocks.blocks)
                 if isinstance(block.mlp, ewa.TopKMoE)}  # fmt: skip
        layer = next(iter(gated.values()), None)
        return {
            "architecture": asdict(self.model.architecture),
            "class_names": list(self.class_names),
            "num_points": self.num_points,
            "dataset": self.dataset,
            "normalize": self.normalize,
            "fused_batch_norm": fused,
            "experts": layer and {"num_experts": layer.num_experts, "top_k": layer.top_k, "layers": list(gated)},
            "masked": {"mask_ratio": self.model.mask_ratio, "decoder_depth": len(self.model.MAE_decoder.blocks)}
            if masked else None,
        }  # fmt: skip


def described_model(description: Any, weights: Any, path: Path) -> LoadedModel:
    """The model of a description, its parameters without memory: a wrong description must not ask for a lot of it.

    Args:
        description: what `LoadedModel.description` returned, or whatever a file holds.
        weights: names to tensors, of which there must be as many as the description asks for blocks.
        path: for messages.

    Raises:
        CheckpointError: the description is not valid.
    """
    try:
        expect(description, dict, "the description")
        expect(description["architecture"], dict, "architecture")
        for field in fields(Architecture):
            expect(description["architecture"].get(field.name, field.default), field.type, field.name)
        architecture = Architecture(**description["architecture"])
        for name, kind in (("class_names", list), ("num_points", int), ("dataset", str), ("normalize", str)):
            expect(description[name], kind, name)
        for name in description["class_names"]:
            expect(name, str, "class_names")
        if description["num_points"] < 1 or description["normalize"] not in ("unit_sphere", "none"):
            raise ValueError("num_points or normalize is out of range")
        if architecture.depth > len(weights):
            raise ValueError(f"depth {architecture.depth}, but {len(weights)} tensors")
        if architecture.num_groups * architecture.group_size > _MOST_POINTS:  # of which the weights tell nothing
            raise ValueError(f"{architecture.num_groups} groups of {architecture.group_size} points")
        names = tuple(description["class_names"])
        with torch.device("meta"):
            if description.get("masked"):
                model = _masked(architecture, description["masked"]).eval()
            else:
                model = PointTransformerClassifier(architecture, len(names)).eval()
            if description.get("fused_batch_norm"):  # older files do not say
                model = fuse_batch_norm(model)
            if description.get("experts"):
                model = _gated(model, description["experts"])
        return LoadedModel(model, names, *(description[name] for name in ("num_points", "dataset", "normalize")))
    except (AttributeError, KeyError, OverflowError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: its description of the model is not valid ({first_line(error)})") from error


def _gated(model: torch.nn.Module, experts: Any) -> torch.nn.Module:
    expect(experts, dict, "experts")
    for name, kind in (("num_experts", int), ("top_k", int), ("layers", list)):
        expect(experts[name], kind, name)
    for layer in experts["layers"]:
        expect(layer, int, "layers")
    mixture = partial(ewa.TopKMoE, top_k=experts["top_k"])
    return ewa.to_moe(model, experts["num_experts"], experts["layers"], "copy", inplace=True, mixture=mixture)


def _masked(architecture: Architecture, masked: Any) -> MaskedAutoencoder:
    expect(masked, dict, "masked")
    expect(masked["mask_ratio"], float, "mask_ratio")
    expect(masked["decoder_depth"], int, "decoder_depth")
    if masked["decoder_depth"] > 100:  # as a file may say anything
        raise ValueError(f"decoder_depth {masked['decoder_depth']}")
    return MaskedAutoencoder(architecture, masked["mask_ratio"], masked["decoder_depth"])


def expect(value: Any, kind: type, name: str) -> None:
    """Refuse a value of another type.

    Raises:
        TypeError: naming ``name`` and both types.
    """
    # The type itself: True is an int, and printing what else may be there can take forever.
    if type(value) is not kind and (type(value), kind) != (int, float):
        raise TypeError(f"{name}: expected {kind.__name__}, found {type(value).__name__}")
