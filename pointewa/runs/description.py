"""What must be known of a model besides its weights."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch

import pointewa.ewa as ewa
from pointewa.errors import CheckpointError, first_line
from pointewa.models import Architecture, MaskedAutoencoder, PointTransformerClassifier, fuse_batch_norm

# Of any number in a description, such as the points of all groups: published models have 2,048 to 16,384. No product of
# them overflows.
_MOST, _MOST_EXPERTS = 2**20, 2**10


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
        if not isinstance(weights, Mapping):
            raise ValueError(f"weights: expected tensors by name, found {type(weights).__name__}")
        architecture = _architecture(description, len(weights))
        names, experts = tuple(description["class_names"]), _experts(description)
        ratio, decoder = _masked(description)
        fused = description.get("fused_batch_norm", False)  # older files do not say
        expect(fused, bool, "fused_batch_norm")
        with torch.device("meta"):
            if decoder:
                model = MaskedAutoencoder(architecture, ratio, decoder)
            else:
                model = PointTransformerClassifier(architecture, len(names))
            model.eval()
            if fused:
                model = fuse_batch_norm(model)
            if experts:
                mixture = partial(ewa.TopKMoE, top_k=experts["top_k"])
                number, layers = experts["num_experts"], experts["layers"]
                model = ewa.to_moe(model, number, layers, "copy", inplace=True, mixture=mixture)
    except ValueError as error:  # of a value out of range; anything else that the model raises is a fault of its code
        raise CheckpointError(f"{path}: its description of the model is not valid ({first_line(error)})") from error
    return LoadedModel(model, names, *(description[name] for name in ("num_points", "dataset", "normalize")))


def _architecture(description: Any, num_weights: int) -> Architecture:
    """The architecture; all of the description that a classifier needs is then known to be of the right types."""
    expect(description, dict, "the description")
    values = description.get("architecture")
    expect(values, dict, "architecture")
    known = {field.name: field for field in fields(Architecture)}
    if unknown := [repr(str(key)[:40]) for key in values if key not in known]:
        raise ValueError(f"architecture: unknown keys {', '.join(unknown[:3])}")
    for name, field in known.items():
        value = values.get(name, field.default)
        expect(value, field.type, name)
        if field.type is not str and not value <= _MOST:
            raise ValueError(f"{name} is out of range")
    for name, kind in (("class_names", list), ("num_points", int), ("dataset", str), ("normalize", str)):
        expect(description.get(name), kind, name)
    for name in description["class_names"]:
        expect(name, str, "class_names")
    if description["num_points"] < 1 or description["normalize"] not in ("unit_sphere", "none"):
        raise ValueError("num_points or normalize is out of range")
    architecture = Architecture(**values)
    if not 0 < architecture.mlp_ratio <= 100:
        raise ValueError("mlp_ratio is out of range")
    if architecture.depth > num_weights:
        raise ValueError(f"depth {architecture.depth}, but {num_weights} tensors")
    if architecture.num_groups * architecture.group_size > _MOST:  # of which the weights tell nothing
        raise ValueError(f"{architecture.num_groups} groups of {architecture.group_size} points")
    return architecture


def _experts(description: dict[str, Any]) -> dict[str, Any] | None:
    experts = description.get("experts")
    if experts is None:
        return None
    expect(experts, dict, "experts")
    check_experts(experts.get("num_experts"), experts.get("layers"))
    expect(experts["layers"], list, "layers")
    expect(experts.get("top_k"), int, "top_k")
    return experts


def check_experts(num_experts: Any, layers: Any) -> None:
    """Refuse what `pointewa.ewa.to_moe` can't take, or would need absurd memory for.

    Raises:
        ValueError: a value of a wrong type or out of range.
    """
    expect(num_experts, int, "num_experts")
    if num_experts > _MOST_EXPERTS:
        raise ValueError("num_experts is out of range")
    expect(layers, str if isinstance(layers, str) else list, "layers")
    for layer in layers if isinstance(layers, list) else ():
        expect(layer, int, "layers")


def _masked(description: dict[str, Any]) -> tuple[float, int]:
    """Mask ratio and depth of the decoder, which is 0 for a classifier."""
    masked = description.get("masked")
    if masked is None:
        return 0.0, 0
    expect(masked, dict, "masked")
    expect(masked.get("mask_ratio"), float, "mask_ratio")
    expect(masked.get("decoder_depth"), int, "decoder_depth")
    if not 1 <= masked["decoder_depth"] <= 100:  # as a file may say anything
        raise ValueError("decoder_depth is out of range")
    return masked["mask_ratio"], masked["decoder_depth"]


def expect(value: Any, kind: type, name: str) -> None:
    """Refuse a value of another type.

    Raises:
        ValueError: naming ``name`` and both types.
    """
    # The type itself: True is an int, and printing what else may be there can take forever.
    if type(value) is not kind and (type(value), kind) != (int, float):
        raise ValueError(f"{name}: expected {kind.__name__}, found {type(value).__name__}")
