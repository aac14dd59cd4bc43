"""The parameter names of the package torch-pointcloud (0.0.18), to ours and back.

It keeps the layers of a small network in two lists, ``lins`` and ``norms``, and its 1x1 convolutions are linear layers;
what they compute is the same. Point-BERT's classifier has all but its head under ``encoder``.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from pointewa.errors import CheckpointError
from pointewa.models.presets import Architecture

# Ends of the names of layers, theirs and ours.
_LAYERS = {
    "encoder.local_mlp.lins.0": "encoder.first_conv.0",
    "encoder.local_mlp.norms.0.module": "encoder.first_conv.1",
    "encoder.local_mlp.lins.1": "encoder.first_conv.3",
    "encoder.global_mlp.lins.0": "encoder.second_conv.0",
    "encoder.global_mlp.norms.0.module": "encoder.second_conv.1",
    "encoder.global_mlp.lins.1": "encoder.second_conv.3",
    "pos_embed.lins.0": "pos_embed.0",
    "pos_embed.lins.1": "pos_embed.2",
    ".mlp.lins.0": ".mlp.fc1",
    ".mlp.lins.1": ".mlp.fc2",
    "increase_dim.lins.0": "increase_dim.0",
}
_HEADS = {
    "point_mae": {
        "norm_f": "norm",
        "head.lins.0": "cls_head_finetune.0",
        "head.norms.0.module": "cls_head_finetune.1",
        "head.lins.1": "cls_head_finetune.4",
        "head.norms.1.module": "cls_head_finetune.5",
        "head.lins.2": "cls_head_finetune.8",
    },
    "point_bert": {"head.lins.0": "cls_head_finetune.0", "head.lins.1": "cls_head_finetune.3"},
    "dvae": {
        ".input_trans.lins.0": ".input_trans",
        ".conv": ".0",
        ".norm": ".1",
        ".layer5_conv": ".layer5.0",
        ".layer5_norm": ".layer5.1",
        "decoder.mlp.lins.0": "decoder.mlp.0",
        "decoder.mlp.lins.1": "decoder.mlp.2",
        "decoder.mlp.lins.2": "decoder.mlp.4",
        "decoder.final_conv.lins.0": "decoder.final_conv.0",
        "decoder.final_conv.norms.0.module": "decoder.final_conv.1",
        "decoder.final_conv.lins.1": "decoder.final_conv.3",
        "decoder.final_conv.norms.1.module": "decoder.final_conv.4",
        "decoder.final_conv.lins.2": "decoder.final_conv.6",
    },
}
_CONVOLUTIONS = re.compile(r"(_conv\.[036]|increase_dim\.0|input_trans|layer5\.0)\.weight$")  # ours
_BERT = "encoder."
# Layers that tell the kinds apart: of models that are read here, and of others, which are named and refused.
_KINDS = {
    "masked_autoencoder": ("MAE_encoder.encoder.local_mlp.lins.0.", "increase_dim.lins.0."),
    "point_bert": ("encoder.encoder.local_mlp.lins.0.", "encoder.blocks.0.attn.qkv."),
    "point_bert_pretraining": ("encoder.local_mlp.lins.0.", "lm_head.", "blocks.0.attn.qkv."),
    "point_mae": ("encoder.local_mlp.lins.0.", "cls_token", "norm_f.", "blocks.blocks.0.attn.qkv."),
    "dvae": ("encoder.local_mlp.lins.0.", "dgcnn_1.", "decoder.final_conv.lins.0."),
}
_OTHERS = {"PointGPT": "blocks.sos", "a part segmentation": "label_conv."}


def is_theirs(names: Iterable[str]) -> bool:
    """Whether parameters of these names are torch-pointcloud's."""
    return any(re.search(r"(^|\.)lins\.\d+\.", name) for name in names)


def to_ours(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state by torch-pointcloud's names, by Point-MAE's.

    Raises:
        CheckpointError: of another model than `_KINDS` has.
    """
    kind = next((kind for kind, marks in _KINDS.items() if all(_has(state, mark) for mark in marks)), None)
    if kind is None:
        found = next((other for other, mark in _OTHERS.items() if _has(state, mark)), "another model")
        raise CheckpointError(
            f"weights of {found} by torch-pointcloud, which are not read here: expected a classifier or a "
            "pre-training of Point-BERT's or Point-MAE's, or Point-BERT's tokenizer"
        )
    layers = {**_HEADS.get(kind, {}), **_LAYERS}  # the first that fits counts
    ours = {}
    for name, value in state.items():
        name = name.removeprefix(_BERT if kind == "point_bert" else "")
        if kind.startswith("point_bert"):
            name = re.sub(r"^blocks\.", "blocks.blocks.", name)
        if kind == "point_bert_pretraining":
            name = f"transformer_q.{name}"  # as Point-BERT's own file has it
        name = _renamed(name, layers)
        ours[name] = value.unsqueeze(-1) if _CONVOLUTIONS.search(name) and value.ndim == 2 else value
    return ours


def to_theirs(state: Mapping[str, Tensor], architecture: Architecture) -> dict[str, Tensor]:
    """The state of a classifier by torch-pointcloud's names.

    Raises:
        CheckpointError: torch-pointcloud builds no such model.
    """
    arch, bert = architecture, architecture.patch_out != architecture.width
    if arch.head != ("point_bert" if bert else "point_mae"):
        raise CheckpointError(
            "torch-pointcloud has classifiers with model.head=point_mae and model.patch_out=model.width, or "
            f"model.head=point_bert and another model.patch_out; found head={arch.head}, patch_out={arch.patch_out}, "
            f"width={arch.width}"
        )
    if arch.mlp_ratio != 4:
        raise CheckpointError(f"torch-pointcloud has no model.mlp_ratio={arch.mlp_ratio:g}: there it is 4")
    layers = {ours: theirs for theirs, ours in (_LAYERS | _HEADS[arch.head]).items()}
    theirs = {}
    for name, value in state.items():
        value = value.squeeze(-1) if _CONVOLUTIONS.search(name) else value
        name = _renamed(name, layers)
        if bert and not name.startswith("head."):
            name = _BERT + re.sub(r"^blocks\.", "", name)
        theirs[name] = value
    return theirs


def arguments(architecture: Architecture) -> tuple[str, dict[str, Any]]:
    """The name of their classifier of an architecture, and its arguments after the numbers of features and classes."""
    arch = architecture
    name, local = ("PointMAE", "encoder") if arch.head == "point_mae" else ("PointBERT", "token")
    width = arch.patch_width
    values = {
        "embed_dim": arch.width, "depth": arch.depth, "num_heads": arch.heads, "num_groups": arch.num_groups,
        "group_size": arch.group_size, f"{local}_local_channels": (width, 2 * width),
        f"{local}_global_channels": (4 * width,), "drop_path": arch.drop_path,
    }  # fmt: skip
    if name == "PointBERT":
        values["encoder_dims"] = arch.patch_out
    return f"{name}Classification", values


def constructor(architecture: Architecture, num_classes: int) -> str:
    """The call that builds their model of an architecture, for a note to the user."""
    name, values = arguments(architecture)
    return f"{name}(0, {num_classes}, {', '.join(f'{key}={value}' for key, value in values.items())})"


def _has(names: Iterable[str], start: str) -> bool:
    return any(name.startswith(start) for name in names)


def _renamed(name: str, layers: Mapping[str, str]) -> str:
    """``name``, of layer and tensor, with the end of the layer as ``layers`` says."""
    layer, _, tensor = name.rpartition(".")
    for old, new in layers.items():
        if layer.endswith(old) and (old not in ("norm", "norm_f") or layer == old):
            return f"{layer.removesuffix(old)}{new}.{tensor}"
    return name
