"""What a run folder says of a model besides its weights."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import pointewa.ewa as ewa
from pointewa.errors import CheckpointError, first_line
from pointewa.models import Architecture, fuse_batch_norm
from pointewa.models.mixed_precision import MergedPatchEncoder
from pointewa.models.patch_embed import PatchEncoder
from pointewa.models.registry import KINDS, Kind, kind_of
from pointewa.ops import UP_AXES

# The limit of any number in a description, such as the points of all groups: published models have 2,048 to 16,384, and
# no product of such numbers overflows.
_MOST, _MOST_EXPERTS = 2**20, 2**10
NORMALIZE = ("unit_sphere", "unit_sphere_of_sample", "center", "none", "minus_one_to_one")


@dataclass
class LoadedModel:
    """A model, dense or with gated experts, and what is needed to use it.

    Args:
        model: of a kind in `pointewa.models.registry`, in evaluation mode.
        class_names: C names; none for a model without classes.
        num_points: P in its training; of no meaning to a model of images.
        dataset: name of the set it was trained on.
        normalize: how its clouds were normalised: "unit_sphere" (centred, scaled to largest norm 1),
            "unit_sphere_of_sample" (so after the sample of ``num_points`` was taken, by these points), "center"
            (centred, in the units of the files), or "none"; of images "minus_one_to_one" (bytes divided by 127.5,
            minus 1).
        task: what it has learned, a name in `pointewa.tasks`.
        up: the axis that pointed up in the files of its training: clouds like these are turned by
            `pointewa.ops.turn_up`, so that y is up, before anything else. None: not recorded.
    """

    model: nn.Module
    class_names: tuple[str, ...]
    num_points: int
    dataset: str
    normalize: str
    task: str = "classification"
    up: str | None = "y"

    def description(self) -> dict[str, Any]:
        """Everything but the weights, as plain values."""
        name = kind_of(self.model)
        values = KINDS[name].describe(self.model)
        gated = next((moe for moe in ewa.moe_layers(self.model).values() if isinstance(moe, ewa.TopKMoE)), None)
        return {
            "model": name,
            **{key: asdict(value) if is_dataclass(value) else value for key, value in values.items()},
            "class_names": list(self.class_names),
            "num_points": self.num_points,
            "dataset": self.dataset,
            "normalize": self.normalize,
            "up": self.up,
            "task": self.task,
            "fused_batch_norm": batch_norms_are_fused(self.model),
            "experts": gated and {
                "num_experts": gated.num_experts,
                "top_k": gated.top_k,
                "layers": ewa.moe_numbers(self.model),
            },
        }  # fmt: skip


def batch_norms_are_fused(model: nn.Module) -> bool:
    """Whether the patch encoder's batch norms are merged into the layers before them."""
    encoders = [module for module in model.modules() if isinstance(module, PatchEncoder | MergedPatchEncoder)]
    norms = [one for encoder in encoders for one in encoder.modules() if isinstance(one, nn.BatchNorm1d)]
    return bool(encoders) and not norms


def described_model(description: Any, weights: Any, path: Path) -> LoadedModel:
    """The model of a description, on the meta device: a wrong description must not allocate memory.

    Args:
        description: as from `LoadedModel.description`, or whatever a file holds.
        weights: names to tensors; there must be at least as many as the description has blocks.
        path: for messages.

    Raises:
        CheckpointError: the description is not valid.
    """
    try:
        if not isinstance(weights, Mapping):
            raise ValueError(f"weights: expected tensors by name, found {type(weights).__name__}")
        kind, values = _kind(description, len(weights))
        names, experts = tuple(description["class_names"]), _experts(description)
        fused = description.get("fused_batch_norm", False)  # older files do not say
        expect(fused, bool, "fused_batch_norm")
        with torch.device("meta"):
            model = kind.build(values, len(names)).eval()
            if fused:
                model = fuse_batch_norm(model)
            if experts:
                mixture = partial(ewa.TopKMoE, top_k=experts["top_k"])
                model = ewa.to_moe(model, experts["num_experts"], experts["layers"], "copy", mixture=mixture)
    except ValueError as error:  # a value out of range; anything else that the model raises is a fault in its code
        raise CheckpointError(f"{path}: its description of the model is not valid ({first_line(error)})") from error
    task = description.get("task", "classification" if kind is KINDS["classifier"] else "masked_autoencoding")
    values = [description[name] for name in ("num_points", "dataset", "normalize")]
    return LoadedModel(model, names, *values, task, description.get("up"))


def _kind(description: Any, num_weights: int) -> tuple[Kind, dict[str, Any]]:
    """The kind of model and the values to build it from; also checks the types of what all models need."""
    expect(description, dict, "the description")
    masked = description.get("masked")  # how version 0.1 distinguished the two kinds
    name = description.get("model", "classifier" if masked is None else "masked_autoencoder")
    if not isinstance(name, str) or name not in KINDS:
        raise ValueError(f"model: expected one of {', '.join(KINDS)}")
    if masked is not None:
        expect(masked, dict, "masked")
        description = description | masked
    for key, field_type in (("class_names", list), ("num_points", int), ("dataset", str), ("normalize", str)):
        expect(description.get(key), field_type, key)
    for one in description["class_names"]:
        expect(one, str, "class_names")
    expect(description.get("task", ""), str, "task")  # version 0.1 had no such key
    if description["num_points"] < 1 or description["normalize"] not in NORMALIZE:
        raise ValueError("num_points or normalize is out of range")
    if (up := description.get("up")) is not None:  # older files do not say
        expect(up, str, "up")
        if up not in UP_AXES:
            raise ValueError(f"up: expected one of {', '.join(UP_AXES)}")
    values = {key: description.get(key) for key in KINDS[name].fields}
    for key, field_type in KINDS[name].fields.items():
        if field_type is Architecture:
            values[key] = _architecture(values[key], num_weights)
        else:
            _expect_small(values[key], field_type, key)
    return KINDS[name], values


def _architecture(values: Any, num_weights: int) -> Architecture:
    expect(values, dict, "architecture")
    known = {field.name: field for field in fields(Architecture)}
    if unknown := [repr(str(key)[:40]) for key in values if key not in known]:
        raise ValueError(f"architecture: unknown keys {', '.join(unknown[:3])}")
    for name, field in known.items():
        _expect_small(values.get(name, field.default), field.type, name)
    architecture = Architecture(**values)
    if architecture.depth > num_weights:
        raise ValueError(f"depth {architecture.depth}, but {num_weights} tensors")
    if architecture.num_groups * architecture.group_size > _MOST:  # the weights do not depend on it
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
    """Refuse what `pointewa.ewa.to_moe` cannot take, or would need absurd amounts of memory for.

    Raises:
        ValueError: a value of a wrong type or out of range.
    """
    expect(num_experts, int, "num_experts")
    if num_experts > _MOST_EXPERTS:
        raise ValueError("num_experts is out of range")
    expect(layers, str if isinstance(layers, str) else list, "layers")
    for layer in layers if isinstance(layers, list) else ():
        expect(layer, int, "layers")


def _expect_small(value: Any, kind: type, name: str) -> None:
    """`expect`, and no number beyond `_MOST`."""
    expect(value, kind, name)
    if kind in (int, float) and not value <= _MOST:
        raise ValueError(f"{name} is out of range")


def expect(value: Any, kind: type, name: str) -> None:
    """Refuse a value of another type.

    Raises:
        ValueError: naming ``name`` and both types.
    """
    # The type itself, since True is an int; it is not printed, since printing an unknown value can take forever.
    if type(value) is not kind and (type(value), kind) != (int, float):
        raise ValueError(f"{name}: expected {kind.__name__}, found {type(value).__name__}")
