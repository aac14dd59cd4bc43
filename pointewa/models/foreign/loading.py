"""Loading weights into a classifier or a segmenter: ours, and Point-BERT's and Point-MAE's in their files or
torch-pointcloud's."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pointewa.errors import CheckpointError
from pointewa.models.foreign.torch_pointcloud import is_theirs, to_ours

# The prefix under which a pre-training file keeps the encoder, and what else it keeps there that a classifier does not
# need. Everything outside the prefix (decoder, dVAE, momentum encoder, queue) is ignored.
_PRETRAINING = {
    "MAE_encoder.": (),
    "transformer_q.": ("cls_head.", "lm_head.", "mask_token"),
}
_CONTAINERS = ("base_model", "model", "model_state_dict")  # the last is that of files of part segmentation
# How the parameters begin of what comes after the blocks: of classifiers, and of segmenters' decoders.
HEADS = ("cls_head_finetune.", "label_conv.", "propagation_", "dgcnn_pro_", "convs", "bns", "conv1.", "conv2.", "bn1.")
_TOKENS = ("cls_token", "cls_pos")


@dataclass(frozen=True)
class LoadReport:
    """What became of each key.

    Args:
        loaded: keys of the model that were loaded.
        fresh: keys of the model that kept their initialisation.
        unused: keys of the file's head, or of its class token, that were not used.
        misfit: the first of them that the model has with another shape, with both shapes; empty if none.
    """

    loaded: list[str]
    fresh: list[str]
    unused: list[str]
    misfit: str = ""


def classifier_state(checkpoint: Mapping) -> dict[str, Tensor]:
    """The state of a classifier or segmenter, by Point-MAE's names, from the content of these codebases' files.

    Raises:
        CheckpointError: it holds no mapping of names to tensors, or torch-pointcloud's of a model that is none of ours.
    """
    for container in _CONTAINERS:
        if isinstance(checkpoint.get(container), Mapping):
            checkpoint = checkpoint[container]
            break
    named = {key: value for key, value in checkpoint.items() if isinstance(key, str) and isinstance(value, Tensor)}
    state = {re.sub(r"^module\.", "", key): value for key, value in named.items()}
    if not state:
        raise CheckpointError(
            "no named tensors in the checkpoint: expected parameters by name, at the top or under "
            f"{', '.join(map(repr, _CONTAINERS))}, found {sorted(map(str, checkpoint))[:6]}"
        )
    if is_theirs(state):
        state = to_ours(state)
    for prefix, leave in _PRETRAINING.items():
        if any(key.startswith(prefix) for key in state):
            inside = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
            return {key: value for key, value in inside.items() if not key.startswith(leave)}
    return state


def load_weights(
    model: nn.Module, checkpoint: Mapping, head: tuple[str, ...] = HEADS, tokens: tuple[str, ...] = _TOKENS
) -> LoadReport:
    """Load a checkpoint of a classifier, a segmenter or a pre-training into a classifier or segmenter, in place.

    A head (of a segmenter its decoder) that is missing, of another kind of model, or of other sizes keeps its
    initialisation, and so does a class token that the file does not have; one that the model does not have is left
    out. Everything else must be present and fit; otherwise nothing is loaded.

    Args:
        model: the dense model.
        checkpoint: the content of a file (`torch.load` with ``weights_only=True``, or safetensors).
        head: how the names of a head's parameters begin.
        tokens: those of a class token's, which may be missing on either side.

    Raises:
        CheckpointError: the checkpoint is of another architecture.
    """
    state, own = classifier_state(checkpoint), model.state_dict()
    unused = {key for key in state if key.startswith(tokens) and key not in own}
    of_head = {key for key in state if key.startswith(head)}
    misfit = [_differs(key, state, own) for key in sorted(of_head & own.keys()) if state[key].shape != own[key].shape]
    if misfit or of_head - own.keys():
        unused |= of_head
    state = {key: value for key, value in state.items() if key not in unused}
    wrong = [
        _differs(key, state, own)
        for key, value in own.items()
        if (key not in state and not key.startswith(head + tokens))
        or (key in state and state[key].shape != value.shape)
    ]
    # such as the blocks of a deeper model: to ignore them would silently load a different network
    wrong += [_differs(key, state, own) for key in state if key not in own]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise CheckpointError(f"the checkpoint is of another architecture: {'; '.join(wrong[:3])}{more}")
    with torch.no_grad():
        model.load_state_dict(state, strict=False)
    fresh = [key for key in own if key not in state]
    return LoadReport(sorted(state), fresh, sorted(unused), "".join(misfit[:1]))


def _differs(key: str, state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> str:
    """The shapes that a parameter has in a file and in the model."""
    found = list(state[key].shape) if key in state else "missing"
    return f"{key} {found}, expected {list(own[key].shape) if key in own else 'none'}"
