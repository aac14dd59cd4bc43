"""What must be known of a model besides its weights."""

from dataclasses import asdict, dataclass, fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import pointewa.ewa as ewa
from pointewa.errors import CheckpointError, first_line
from pointewa.models import Architecture, fuse_batch_norm
from pointewa.models.patch_embed import PatchEncoder
from pointewa.models.registry import KINDS, Kind, kind_of

_MOST_POINTS = 2**20  # of all groups of a cloud; published models have 2,048 to 16,384


@dataclass
class LoadedModel:
    """A model, dense or with gated experts, and what must be known to use it.

    Args:
        model: of a kind in `pointewa.models.registry`, in evaluation mode.
        class_names: C names; none of a model that knows no classes.
        num_points: P of its training.
        dataset: name of the set it was trained on.
        normalize: what was done to its clouds: "unit_sphere" (centred, scaled to largest norm 1) or "none".
    """

    model: nn.Module
    class_names: tuple[str, ...]
    num_points: int
    dataset: str
    normalize: str

    def description(self) -> dict[str, Any]:
        """All but the weights, as plain values."""
        name = kind_of(self.model)
        values = KINDS[name].describe(self.model)
        gated = {path: moe for path, moe in ewa.moe_layers(self.model).items() if isinstance(moe, ewa.TopKMoE)}
        layer = next(iter(gated.values()), None)
        return {
            "model": name,
            **{key: asdict(value) if is_dataclass(value) else value for key, value in values.items()},
            "class_names": list(self.class_names),
            "num_points": self.num_points,
            "dataset": self.dataset,
            "normalize": self.normalize,
            "fused_batch_norm": batch_norms_are_fused(self.model),
            "experts": layer and {
                "num_experts": layer.num_experts,
                "top_k": layer.top_k,
                "layers": [int(path.split(".")[-2]) for path in gated],  # numbers of their blocks
            },
        }  # fmt: skip


def batch_norms_are_fused(model: nn.Module) -> bool:
    """Whether the patch encoder's batch norms are part of the layers before them."""
    encoders = [module for module in model.modules() if isinstance(module, PatchEncoder)]
    norms = [one for encoder in encoders for one in encoder.modules() if isinstance(one, nn.BatchNorm1d)]
    return bool(encoders) and not norms


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
        kind, values, experts = _checked(description, weights)
        names = tuple(description["class_names"])
        with torch.device("meta"):
            model = kind.build(values, len(names)).eval()
            if description.get("fused_batch_norm"):  # older files do not say
                model = fuse_batch_norm(model)
            if experts:
                mixture = partial(ewa.TopKMoE, top_k=experts["top_k"])
                model = ewa.to_moe(model, experts["num_experts"], experts["layers"], "copy", mixture=mixture)
    except (KeyError, OverflowError, ValueError) as error:
        raise CheckpointError(f"{path}: its description of the model is not valid ({first_line(error)})") from error
    return LoadedModel(model, names, *(description[name] for name in ("num_points", "dataset", "normalize")))


def _checked(description: Any, weights: Any) -> tuple[Kind, dict[str, Any], dict[str, Any] | None]:
    """The kind of model, the values it is built of, and its gated experts, after a look at each type and size."""
    expect(description, dict, "the description")
    masked = description.get("masked")  # how version 0.1 told the two kinds apart
    name = description.get("model", "masked_autoencoder" if masked else "classifier")
    if not isinstance(name, str) or name not in KINDS:
        raise ValueError(f"model: expected one of {', '.join(KINDS)}")
    if masked:
        expect(masked, dict, "masked")
        description = description | masked
    values: dict[str, Any] = {}
    for key, field_type in KINDS[name].fields.items():
        if field_type is Architecture:
            values[key] = _architecture(description[key], weights)
        else:
            expect(description[key], field_type, key)
            values[key] = description[key]
    for key, field_type in (("class_names", list), ("num_points", int), ("dataset", str), ("normalize", str)):
        expect(description[key], field_type, key)
    for one in description["class_names"]:
        expect(one, str, "class_names")
    if description["num_points"] < 1 or description["normalize"] not in ("unit_sphere", "none"):
        raise ValueError("num_points or normalize is out of range")
    experts = description.get("experts")
    if experts:
        expect(experts, dict, "experts")
        for key, field_type in (("num_experts", int), ("top_k", int), ("layers", list)):
            expect(experts[key], field_type, key)
        for layer in experts["layers"]:
            expect(layer, int, "layers")
    return KINDS[name], values, experts


def _architecture(found: Any, weights: Any) -> Architecture:
    expect(found, dict, "architecture")
    known = {one.name: one for one in fields(Architecture)}
    if unknown := found.keys() - known.keys():
        raise ValueError(f"architecture: unknown key {str(next(iter(unknown)))[:40]!r}")
    for name, one in known.items():
        expect(found.get(name, one.default), one.type, name)
    architecture = Architecture(**found)
    if architecture.depth > len(weights):
        raise ValueError(f"depth {architecture.depth}, but {len(weights)} tensors")
    if architecture.num_groups * architecture.group_size > _MOST_POINTS:  # of which the weights tell nothing
        raise ValueError(f"{architecture.num_groups} groups of {architecture.group_size} points")
    return architecture


def expect(value: Any, kind: type, name: str) -> None:
    """Refuse a value of another type.

    Raises:
        ValueError: naming ``name`` and both types.
    """
    # The type itself: True is an int, and printing what else may be there can take forever.
    if type(value) is not kind and (type(value), kind) != (int, float):
        raise ValueError(f"{name}: expected {kind.__name__}, found {type(value).__name__}")
