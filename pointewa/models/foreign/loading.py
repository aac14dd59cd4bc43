"""Loading weights into a classifier: ours, and Point-BERT's and Point-MAE's in their files or torch-pointcloud's."""

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


@dataclass(frozen=True)
class LoadReport:
    """What became of each key.

    Args:
        loaded: keys of the model that were loaded.
        fresh: keys of the model that kept their initialisation.
        unused: keys of the file's head that were not used.
    """

    loaded: list[str]
    fresh: list[str]
    unused: list[str]


def classifier_state(checkpoint: Mapping) -> dict[str, Tensor]:
    """The state of a classifier, by Point-MAE's names, from the content of a checkpoint file of these codebases.

    Raises:
        CheckpointError: it holds no mapping of names to tensors, or torch-pointcloud's of a model that is none of ours.
    """
    for container in ("base_model", "model"):
        if isinstance(checkpoint.get(container), Mapping):
            checkpoint = checkpoint[container]
            break
    named = {key: value for key, value in checkpoint.items() if isinstance(key, str) and isinstance(value, Tensor)}
    state = {re.sub(r"^module\.", "", key): value for key, value in named.items()}
    if not state:
        raise CheckpointError(
            "no named tensors in the checkpoint: expected parameters by name, at the top or under 'base_model' or "
            f"'model', found {sorted(map(str, checkpoint))[:6]}"
        )
    if is_theirs(state):
        state = to_ours(state)
    for prefix, leave in _PRETRAINING.items():
        if any(key.startswith(prefix) for key in state):
            inside = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
            return {key: value for key, value in inside.items() if not key.startswith(leave)}
    return state


_OPTIONAL = ("cls_head_finetune.", "cls_token", "cls_pos")


def load_weights(model: nn.Module, checkpoint: Mapping, optional: tuple[str, ...] = _OPTIONAL) -> LoadReport:
    """Load a classifier or pre-training checkpoint into a classifier, in place.

    A head that is missing or has another number of classes keeps its initialisation, and so does a class token that
    the pre-training did not have. Everything else must be present and fit; otherwise nothing is loaded.

    Args:
        model: the dense model.
        checkpoint: the content of a file (`torch.load` with ``weights_only=True``, or safetensors).
        optional: how the names of what may be missing begin, those of the head first; none if all is needed.

    Raises:
        CheckpointError: the checkpoint is of another architecture.
    """
    state, own = classifier_state(checkpoint), model.state_dict()
    head = {key: value for key, value in state.items() if key.startswith(optional[:1])}
    if any(key not in own or own[key].shape != value.shape for key, value in head.items()):
        state = {key: value for key, value in state.items() if key not in head}
    wrong = [
        f"{key} {list(state[key].shape) if key in state else 'missing'}, expected {list(value.shape)}"
        for key, value in own.items()
        if (key not in state and not key.startswith(optional)) or (key in state and state[key].shape != value.shape)
    ]
    # such as the blocks of a deeper model: to ignore them would silently load a different network
    wrong += [f"{key} {list(value.shape)}, expected none" for key, value in state.items() if key not in own]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise CheckpointError(f"the checkpoint is of another architecture: {'; '.join(wrong[:3])}{more}")
    with torch.no_grad():
        model.load_state_dict(state, strict=False)
    fresh = [key for key in own if key not in state]
    return LoadReport(loaded=sorted(state), fresh=fresh, unused=sorted(head.keys() - state.keys()))
