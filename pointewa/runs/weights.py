"""Reading and writing models, and reading training states. No file can run code when it is read."""

import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

import pointewa.ewa as ewa
from pointewa.config import load_config
from pointewa.errors import CheckpointError, ConfigError, first_line
from pointewa.models import (
    Architecture,
    LoadReport,
    Parts,
    PointTransformerClassifier,
    PointTransformerSegmenter,
    load_weights,
)
from pointewa.models.foreign import classifier_state
from pointewa.models.foreign.published import published_name
from pointewa.models.foreign.torch_pointcloud import is_theirs
from pointewa.models.registry import KINDS, kind_of, model_ffns
from pointewa.runs.description import LoadedModel, check_experts, described_model, expect
from pointewa.runs.hub import located, own_names, published_model
from pointewa.safe.files import atomic_write, stands_for
from pointewa.safe.torch_files import read_state

RUN_CONFIG = "config.yaml"
MODEL, PRETRAINED, TOKENIZER = "model.safetensors", "pretrained.safetensors", "tokenizer.safetensors"
LAST, PREVIOUS = "last.ckpt", "previous.ckpt"
CONFIG = "config.json"  # what the description is called beside a model for Hugging Face's hub


def save_model(
    path: Path, loaded: LoadedModel, names: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict, beside: str = ""
) -> None:
    """Write a dense model: its weights as safetensors to ``path``, the rest as JSON beside it.

    Args:
        path: of the weights.
        loaded: the model.
        names: from its state to the one that is written, for other codebases' layouts.
        beside: name of the JSON file; by default that of the weights, with the suffix .json.

    Raises:
        OSError: a file cannot be written.
    """
    with atomic_write(path) as temporary:
        safetensors.torch.save_file(names(loaded.model.state_dict()), temporary)
    with atomic_write(path.with_name(beside) if beside else path.with_suffix(".json")) as temporary:
        temporary.write_text(json.dumps(loaded.description(), indent=1) + "\n")


def load_model(path: str | Path) -> LoadedModel:
    """The classifier, of clouds or images, in a run folder, a ``.safetensors`` file, a ``last.ckpt`` (which is folded),
    or of ``hub:NAME``.

    Raises:
        CheckpointError: no model of ours, damaged files, weights of another architecture, or a pre-training run.
    """
    return as_classifier(load_any(path), path)


def as_classifier(
    loaded: LoadedModel, path: str | Path, kinds: tuple[str, ...] = ("classifier", "timm")
) -> LoadedModel:
    """The same model.

    Raises:
        CheckpointError: it is no classifier, or whatever else of `pointewa.models.registry` is asked for; ``path`` is
            where it came from.
    """
    if (kind := kind_of(loaded.model)) not in kinds:
        use = KINDS[kind].use.format(path=path)
        raise CheckpointError(f"{path}: expected a classifier, found a {kind}" + (f": {use}" if use else ""))
    return loaded


def load_any(path: str | Path) -> LoadedModel:
    """As `load_model`, but for any kind of model, such as the autoencoder of a pre-training run.

    A ``.safetensors`` file is one of ours, with its description beside it, or one of torch-pointcloud's, of which the
    name of a file or folder on its path says which published model it is.

    Raises:
        CheckpointError: no model of ours, damaged files, weights of another architecture, or without a description.
    """
    path = located(path)
    if path.is_dir():
        found = [path / name for name in (MODEL, PRETRAINED, TOKENIZER) if (path / name).is_file()]
        if not found and not has_state(path):
            raise CheckpointError(
                f"{path}: expected a run folder with {MODEL} or {LAST}, found {_runs_in(path) or 'neither'}"
            )
        path = found[0] if found else path
    if path.suffix == ".safetensors":
        if beside := _beside(path):
            description = _read_description(beside)
            weights = own_names(read_weights(path), path)
        else:
            description, weights = published_model(path, read_weights(path))
        loaded = described_model(description, weights, path)
        _load_state(loaded.model, weights, path)
        loaded.up = loaded.up or _assumed_up(loaded.dataset, path.parent)
        return loaded
    restored = restore(path)
    if restored.state.get("ema") is not None:  # of such a run the average is the result
        if not isinstance(restored.state["ema"], dict):
            raise CheckpointError(f"{restored.path}: its average of the weights is not valid")
        average = {str(name): value for name, value in restored.state["ema"].items() if name != "n_averaged"}
        _load_state(restored.model, {name.removeprefix("module."): average[name] for name in average}, path)
    loaded = described_model(restored.state["description"], restored.state["model"], path)
    loaded.model = (restored.model if restored.state["ewa"] is None else ewa.fold(restored.model, inplace=True)).eval()
    loaded.up = loaded.up or _assumed_up(loaded.dataset, restored.path.parent)
    return loaded


def _assumed_up(dataset: str, folder: Path) -> str | None:
    """The axis that pointed up in the files of a training before descriptions said it, by the configuration in its
    folder; None where that leaves it open. Only two sets have files that were turned."""
    if dataset not in ("folder", "modelnet40"):
        return "y"
    try:
        data = load_config([folder / RUN_CONFIG]).data
    except ConfigError:
        return None
    if data.name != dataset or (dataset == "modelnet40" and data.variant is None):
        return None  # of modelnet40 any layout may have been there
    return "z" if data.variant in ("z_up", "off") else "y"  # there were no other axes then


def is_described(path: str | Path) -> bool:
    """Whether `load_any` is to load a file; if not, it says nothing but the weights, which is for `load_foreign`."""
    path = Path(path)
    if path.suffix in (".pth", ".pt"):
        return False
    if path.suffix != ".safetensors" or not path.is_file() or _beside(path) or published_name(path):
        return True
    return not is_theirs(read_weights(path))


def load_foreign(
    path: str | Path,
    architecture: Architecture,
    num_classes: int,
    parts: Parts | None = None,
    decoder: str = "point_mae",
) -> torch.nn.Module:
    """The classifier of a file of another codebase, which does not describe its architecture; with parts the segmenter.

    Raises:
        CheckpointError: missing, damaged, of another architecture, or without a head for as many classes and parts.
        ValueError: values that no segmenter can have.
    """
    if parts is None:
        model, what = PointTransformerClassifier(architecture, num_classes), f"classifier of {num_classes} classes"
    else:
        model = PointTransformerSegmenter(architecture, parts, num_classes, decoder)
        what = f"segmenter of {num_classes} categories and {len(parts)} parts with the decoder {decoder}"
    report = init_from(model.eval(), str(path))
    if report.fresh:
        why = report.misfit or f"{', '.join(report.fresh[:3])}, ... are missing or of another size"
        instead = (
            "" if report.misfit or not report.unused else f"; there are {', '.join(report.unused[:3])}, ... instead"
        )
        raise CheckpointError(f"{path}: no {what}: {why}{instead}; train it with train.init_from first")
    if report.unused:  # such as the class token of a pre-training: not what the file's model computes
        raise CheckpointError(f"{path}: no {what}: it has {', '.join(report.unused[:3])}, which that has not")
    return model


def has_state(folder: Path) -> bool:
    """Whether a run folder has a training state, intact or not."""
    return any((folder / name).is_file() for name in (LAST, PREVIOUS))


def _runs_in(folder: Path) -> str:
    """What a folder holds in place of a run, if that is runs."""
    runs = sorted(str(file.parent) for file in folder.glob(f"*/{RUN_CONFIG}"))
    more = ", ..." if len(runs) > 3 else ""
    return f"a folder of runs: name one, such as {', '.join(runs[:3])}{more}" if runs else ""


@dataclass
class Restored:
    """A training state.

    Args:
        model: as it was in training.
        state: the content of the file.
        path: the file.
    """

    model: torch.nn.Module
    state: dict[str, Any]
    path: Path


def restore(path: str | Path) -> Restored:
    """The model of a ``last.ckpt`` (or of its run folder) as it was in training, and the whole state.

    If ``last.ckpt`` of a run folder is damaged or missing, ``previous.ckpt`` takes its place, with a warning.

    Raises:
        CheckpointError: missing, damaged, or not a training state of ours.
    """
    path = Path(path)
    if not path.is_dir():
        return _restore(path)
    if not has_state(path):
        raise CheckpointError(f"{path}: expected a run folder with {LAST}, found {_runs_in(path) or 'no such file'}")
    try:
        return _restore(path / LAST)
    except CheckpointError as error:
        if not (path / PREVIOUS).is_file():
            raise
        try:
            found = _restore(path / PREVIOUS)
        except CheckpointError as previous:
            raise CheckpointError(f"{error}; and so is the one before it: {previous}") from previous
        warnings.warn(f"{error}; taking {PREVIOUS}, the one before it", stacklevel=2)
        return found


def _restore(path: Path) -> Restored:
    state = read_state(path)
    if not {"description", "model", "ewa", "step"} <= state.keys():
        found = sorted(repr(str(key)[:40])[1:-1] for key in state)
        raise CheckpointError(
            f"{path}: not a training state of this library: expected description, model, ewa and step, "
            f"found {', '.join(found[:6])}; if it is from another codebase, name it .pth"
        )
    model = described_model(state["description"], state["model"], path).model
    if type(state["step"]) is not int:
        raise CheckpointError(f"{path}: its step is not valid: expected a whole number")
    if state["ewa"] is not None:
        try:
            expect(state["ewa"], dict, "ewa")
            experts, layers = state["ewa"].get("num_experts"), state["ewa"].get("layers")
            check_experts(experts, layers)
            model = ewa.to_moe(model, experts, layers, init="copy", predicate=model_ffns(model), inplace=True)
        except ValueError as error:
            raise CheckpointError(f"{path}: its mixture of experts is not valid ({first_line(error)})") from error
    _load_state(model, state["model"], path)
    return Restored(model, state, path)


def read_weights(path: str | Path) -> Mapping[str, Any]:
    """The tensors by name in a run folder, a safetensors file, or a checkpoint, ours or another codebase's.

    Raises:
        CheckpointError: missing or damaged.
    """
    path = located(path)
    if path.is_dir() or path.name in (LAST, PREVIOUS):
        return load_any(path).model.state_dict()
    if path.suffix != ".safetensors":
        return read_state(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    try:
        with open(path, "rb") as file:
            if other := stands_for(file.read(1024)):
                raise CheckpointError(f"{path}: {other}")
        return safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot read the weights, the file is damaged ({first_line(error)})") from error


def init_from(model: torch.nn.Module, path: str, **options: Any) -> LoadReport:
    """Load initial weights into a dense model; see `pointewa.models.load_weights` for the options.

    Raises:
        CheckpointError: missing, damaged, or of another architecture.
    """
    weights = read_weights(path)
    try:
        for name, value in classifier_state(weights).items():
            # torch would drop the imaginary part of complex numbers.
            dense = (value.layout, value.device.type, value.is_quantized) == (torch.strided, "cpu", False)
            if value.is_complex() or not dense:
                raise CheckpointError(f"{name}: expected real numbers, found {_kind(value)}")
        return load_weights(model, weights, **options)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {' '.join(str(error).split()[:60])}") from error


def _beside(path: Path) -> Path | None:
    """The description beside a file of weights."""
    of_ours = path.name == MODEL and not published_name(path)  # beside theirs it describes their model
    places = [path.with_suffix(".json"), *([path.with_name(CONFIG)] if of_ours else [])]
    return next((place for place in places if place.is_file()), None)  # reading a pipe would wait


def _read_description(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({first_line(error)})") from error


def _load_state(model: torch.nn.Module, state: Any, path: Path) -> None:
    """Load the weights of a model from `described_model`.

    Raises:
        CheckpointError: they are not exactly its parameters and buffers.
    """
    expected, weights = model.state_dict(), {}
    try:
        if not isinstance(state, Mapping):
            raise ValueError(f"expected tensors by name, found {type(state).__name__}")
        missing = [name for name in expected if name not in state]
        unknown = [name for name in state if name not in expected]
        if missing or unknown:
            names = ", ".join(repr(str(name)[:80]) for name in (missing or unknown)[:3])
            raise ValueError(f"{'Missing' if missing else 'unknown'}: {names}")
        for name, like in expected.items():
            value, kind = state[name], f"{like.dtype}, {torch.strided}, cpu, {list(like.shape)}"
            if (found := _kind(value)) != kind or not value.is_contiguous():
                raise ValueError(f"{name}: expected {kind}, found {found}")
            # Copies: a tensor in a mapped file is not aligned, and the last digits of products may depend on that.
            weights[name] = value.detach().clone()
        if len({value.data_ptr() for value in state.values()}) < len(state):
            raise ValueError("two tensors share their memory")
    except ValueError as error:
        reason = " ".join(str(error).split()[:40])
        raise CheckpointError(f"{path}: the weights are of another architecture than described ({reason})") from error
    model.load_state_dict(weights, assign=True)


def _kind(value: Any) -> str:
    """Type, layout, device and shape of a tensor, as text."""
    if not isinstance(value, torch.Tensor):
        return type(value).__name__
    return f"{value.dtype}, {value.layout}, {value.device.type}, {list(value.shape)}"
