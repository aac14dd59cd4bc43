"""Reading and writing models and the state of a training run. No file that is read can run code."""

import json
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

import pointewa.ewa as ewa
from pointewa.errors import CheckpointError, first_line
from pointewa.files import atomic_write
from pointewa.models import Architecture, LoadReport, PointTransformerClassifier, load_weights

MODEL, LAST = "model.safetensors", "last.ckpt"


@dataclass
class LoadedModel:
    """A dense classifier and what must be known to use it.

    Args:
        model: ``points [B, P, 3] -> logits [B, C]``, in evaluation mode.
        class_names: C names.
        num_points: P of its training.
        dataset: name of the set it was trained on.
        normalize: what was done to its clouds: "unit_sphere" (centred, scaled to largest norm 1) or "none".
    """

    model: PointTransformerClassifier
    class_names: tuple[str, ...]
    num_points: int
    dataset: str
    normalize: str

    def description(self) -> dict[str, Any]:
        """All but the weights, as plain values."""
        return {
            "architecture": asdict(self.model.architecture),
            "class_names": list(self.class_names),
            "num_points": self.num_points,
            "dataset": self.dataset,
            "normalize": self.normalize,
        }


def save_state(path: Path, state: Mapping[str, Any]) -> None:
    """Write a training state; on failure the previous file is still there.

    Raises:
        CheckpointError: the file cannot be written, as on a full disk.
    """
    kept = "the previous one is kept" if path.exists() else "nothing was written"
    try:
        with atomic_write(path) as temporary:
            torch.save(dict(state), temporary)
    except (OSError, RuntimeError) as error:  # torch reports a short write as a RuntimeError
        raise CheckpointError(
            f"{path}: cannot write the checkpoint ({first_line(error)}); {kept}: free some space, then go on from it"
        ) from None


def read_state(path: Path) -> dict[str, Any]:
    """Content of a file written by `torch.save`: tensors and plain values only.

    Raises:
        CheckpointError: missing, damaged, or holding anything else.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such checkpoint") from None
    except UnpicklingError as error:
        raise CheckpointError(
            f"{path}: not a checkpoint of tensors and plain values, or damaged ({first_line(error)}): refused"
        ) from None
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{path}: cannot read the checkpoint, it is damaged ({first_line(error)})") from None
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: expected a dictionary, found a {type(state).__name__}")
    return state


def save_model(path: Path, loaded: LoadedModel) -> None:
    """Write a dense model: its weights as safetensors to ``path``, the rest as JSON beside it.

    Raises:
        CheckpointError: a file cannot be written.
    """
    try:
        with atomic_write(path) as temporary:
            safetensors.torch.save_file(loaded.model.state_dict(), temporary)
        with atomic_write(path.with_suffix(".json")) as temporary:
            temporary.write_text(json.dumps(loaded.description(), indent=1) + "\n")
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot write the model ({first_line(error)})") from None


def load_model(path: str | Path) -> LoadedModel:
    """The dense model of a run folder, a ``.safetensors`` file of ours, or a ``last.ckpt`` (folded on the way).

    Raises:
        CheckpointError: nothing there that is a model of ours, damaged files, weights of another architecture.
    """
    path = Path(path)
    if path.is_dir():
        found = [path / name for name in (MODEL, LAST) if (path / name).is_file()]
        if not found:
            raise CheckpointError(f"{path}: expected a run folder with {MODEL} or {LAST}, found neither")
        path = found[0]
    if path.suffix == ".safetensors":
        description = _read_description(path.with_suffix(".json"))
        loaded = _build(description, path)
        _load_state(loaded.model, read_weights(path), path)
        return loaded
    model, state = restore(path)
    loaded = _build(state["description"], path)
    loaded.model = (ewa.fold(model, inplace=True) if state["ewa"] else model).eval()
    return loaded


def load_foreign(path: str | Path, architecture: Architecture, num_classes: int) -> PointTransformerClassifier:
    """The classifier of a Point-MAE or Point-BERT file, which does not tell its architecture itself.

    Raises:
        CheckpointError: missing, damaged, of another architecture, or without a head for as many classes.
    """
    model = PointTransformerClassifier(architecture, num_classes).eval()
    fresh = init_from(model, str(path)).fresh
    if fresh:
        raise CheckpointError(
            f"{path}: no classifier of {num_classes} classes: {', '.join(fresh[:3])}, ... are missing or of another "
            "size; train it with train.init_from first"
        )
    return model


def restore(path: str | Path) -> tuple[torch.nn.Module, dict[str, Any]]:
    """The model of a ``last.ckpt`` (or of the run folder it is in) as it was in training, and the whole state.

    Raises:
        CheckpointError: missing, damaged, or not a training state of ours.
    """
    path = Path(path)
    path = path / LAST if path.is_dir() else path
    state = read_state(path)
    if not {"description", "model", "ewa"} <= state.keys():
        raise CheckpointError(
            f"{path}: not a training state of this library: expected description, model and ewa, "
            f"found {', '.join(sorted(map(str, state))[:6])}; is it of another codebase? Name it .pth"
        )
    model = _build(state["description"], path).model
    if state["ewa"]:
        model = ewa.to_moe(model, state["ewa"]["num_experts"], state["ewa"]["layers"], init="copy", inplace=True)
    _load_state(model, state["model"], path)
    return model, state


def read_weights(path: str | Path) -> Mapping[str, Any]:
    """Whatever names to tensors a path holds: a run folder, safetensors, or a checkpoint of ours or of others.

    Raises:
        CheckpointError: missing or damaged.
    """
    path = Path(path)
    if path.is_dir() or path.name == LAST:
        return load_model(path).model.state_dict()
    if path.suffix != ".safetensors":
        return read_state(path)
    try:
        return safetensors.torch.load_file(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot read the weights, the file is damaged ({first_line(error)})") from None


def init_from(model: PointTransformerClassifier, path: str) -> LoadReport:
    """Load weights to start from into a dense model; see `pointewa.models.load_weights`.

    Raises:
        CheckpointError: missing, damaged, or of another architecture.
    """
    weights = read_weights(path)
    try:
        return load_weights(model, weights)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None


def _read_description(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing: it says of which architecture the weights beside it are") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({first_line(error)})") from None


def _build(description: Mapping[str, Any], path: Path) -> LoadedModel:
    try:
        architecture = Architecture(**description["architecture"])
        names = tuple(str(name) for name in description["class_names"])
        model = PointTransformerClassifier(architecture, len(names)).eval()
        dataset, normalize = str(description["dataset"]), str(description["normalize"])
        return LoadedModel(model, names, int(description["num_points"]), dataset, normalize)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: its description of the model is not valid ({first_line(error)})") from None


def _load_state(model: torch.nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split()[:40])
        raise CheckpointError(f"{path}: the weights are of another architecture than described ({reason})") from None
