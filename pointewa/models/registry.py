"""The models that can be saved with a description and built again from it, by name."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from torch import nn

from pointewa.models.classifier import PointTransformerClassifier
from pointewa.models.dvae import DiscreteVAE, TokenizerSizes
from pointewa.models.masked_autoencoder import MaskedAutoencoder
from pointewa.models.parts import Parts
from pointewa.models.point_bert import PointBert
from pointewa.models.presets import Architecture
from pointewa.models.segmenter import PointTransformerSegmenter
from pointewa.models.timm_vit import TimmArchitecture, timm_vit

_MOST_DECODER_BLOCKS, _MOST_PARTS = 100, 2**12  # a file may say anything


@dataclass(frozen=True)
class Kind:
    """How a model is described.

    Args:
        model: its class; or that of its attribute ``architecture``, where the class is of another library.
        fields: names and types of the plain values that describe it besides its classes; of `Architecture` a mapping.
        describe: gives these values of a model.
        build: gives a model of these values and the number of classes; a ValueError refuses them.
        use: what can be done with a run of it where a classifier is expected; ``{path}`` stands for the run.
    """

    model: type
    fields: Mapping[str, type]
    describe: Callable[[Any], dict[str, Any]]
    build: Callable[[Mapping[str, Any], int], nn.Module]
    use: str = ""


def _autoencoder(values: Mapping[str, Any], num_classes: int) -> MaskedAutoencoder:
    if values["decoder_depth"] > _MOST_DECODER_BLOCKS:
        raise ValueError("decoder_depth is out of range")
    return MaskedAutoencoder(**values)


_DVAE = {f"dvae_{field.name}": int for field in fields(TokenizerSizes)}


def _describe_point_bert(model: PointBert) -> dict[str, Any]:
    low, high = model.mask_ratio
    return {
        "architecture": model.architecture,
        **{f"dvae_{name}": value for name, value in asdict(model.dvae.sizes).items()},
        "queue_size": model.queue.shape[1],
        "mask_low": low,
        "mask_high": high,
        "mask_rand": model.mask_rand,
    }


def _point_bert(values: Mapping[str, Any], num_classes: int) -> PointBert:
    sizes = TokenizerSizes(**{name.removeprefix("dvae_"): values[name] for name in _DVAE})
    return PointBert(
        values["architecture"], DiscreteVAE(sizes), values["queue_size"], (values["mask_low"], values["mask_high"]),
        values["mask_rand"],
    )  # fmt: skip


def _segmenter(values: Mapping[str, Any], num_classes: int) -> PointTransformerSegmenter:
    parts = values["parts"]
    for key, kind in (("names", str), ("classes", int)):
        listed = parts.get(key)
        if (
            type(listed) not in (list, tuple)
            or len(listed) > _MOST_PARTS
            or any(type(one) is not kind for one in listed)
        ):
            raise ValueError(f"parts: expected {key}, at most {_MOST_PARTS}, each of type {kind.__name__}")
    return PointTransformerSegmenter(
        values["architecture"], Parts(tuple(parts["names"]), tuple(parts["classes"])), num_classes, values["decoder"]
    )


_START = "train a classifier from it with train.init_from={path}"
PREDICTING = ("classifier", "timm", "segmenter")  # kinds of which `pointewa.load` makes predictors

KINDS: dict[str, Kind] = {
    "classifier": Kind(
        PointTransformerClassifier,
        {"architecture": Architecture},
        lambda model: {"architecture": model.architecture},
        lambda values, num_classes: PointTransformerClassifier(values["architecture"], num_classes),
    ),
    "masked_autoencoder": Kind(
        MaskedAutoencoder,
        {"architecture": Architecture, "mask_ratio": float, "decoder_depth": int},
        lambda model: {
            "architecture": model.architecture,
            "mask_ratio": model.mask_ratio,
            "decoder_depth": len(model.MAE_decoder.blocks),
        },
        _autoencoder,
        _START,
    ),
    "dvae": Kind(
        DiscreteVAE,
        dict.fromkeys(asdict(TokenizerSizes()), int),
        lambda model: asdict(model.sizes),
        lambda values, num_classes: DiscreteVAE(TokenizerSizes(**values)),
        "it is a tokenizer: pre-train on it with train.task=masked_point_modeling task.tokenizer={path}",
    ),
    "segmenter": Kind(
        PointTransformerSegmenter,
        {"architecture": Architecture, "decoder": str, "parts": dict},
        lambda model: {
            "architecture": model.architecture,
            "decoder": model.decoder,
            "parts": {"names": list(model.parts.names), "classes": list(model.parts.classes)},
        },
        _segmenter,
        "it tells parts apart: pointewa.load and make eval take it, and " + _START,
    ),
    "point_bert": Kind(
        PointBert,
        {
            "architecture": Architecture,
            **_DVAE,
            "queue_size": int,
            "mask_low": float,
            "mask_high": float,
            "mask_rand": bool,
        },
        _describe_point_bert,
        _point_bert,
        _START,
    ),
    "timm": Kind(
        TimmArchitecture,
        {"timm": dict},
        lambda model: {"timm": asdict(model.architecture)},
        lambda values, num_classes: timm_vit(TimmArchitecture.of(values["timm"]), num_classes),
    ),
}


def kind_of(model: nn.Module) -> str:
    """The name of a model's kind.

    Raises:
        KeyError: a model of no known kind.
    """
    for name, kind in KINDS.items():
        if kind.model in (type(model), type(getattr(model, "architecture", None))):
            return name
    raise KeyError(f"{type(model).__name__} is not in pointewa.models.registry.KINDS")


def model_ffns(model: nn.Module) -> Callable[[str, nn.Module], bool] | None:
    """``(name, module) -> bool``, whether a module is an FFN that may become experts, of a model that says so by a
    method ``is_ffn``; None: any of its FFNs may."""
    return getattr(model, "is_ffn", None)
