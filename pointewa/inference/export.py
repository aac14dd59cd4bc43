"""Dense models as files for others, each read back and compared with the model before it gets its name."""

import importlib
import json
import os
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from functools import partial
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

import pointewa.ewa as ewa
import pointewa.inference.int8 as int8_
from pointewa.errors import CheckpointError, ConfigError, first_line
from pointewa.inference.portable import PortableClassifier, PortableSegmenter
from pointewa.models import fuse_batch_norm
from pointewa.models.foreign.torch_pointcloud import constructor, to_theirs
from pointewa.models.registry import kind_of
from pointewa.ops import unit_sphere
from pointewa.runs.description import LoadedModel
from pointewa.runs.weights import load_any, load_foreign, save_model
from pointewa.safe.files import atomic_write
from pointewa.safe.torch_files import read_state

SUFFIXES = {"safetensors": ".safetensors", "torchscript": ".pt", "torch_export": ".pt2", "onnx": ".onnx",
            "point_mae": ".pth", "torch_pointcloud": ".safetensors"}  # fmt: skip
OPSET = 18  # of ONNX
TOLERANCE = 1e-4  # largest difference of logits that is accepted

Logits = Callable[..., Tensor]  # from what the model takes to its logits


@dataclass(frozen=True)
class Exported:
    """What was written.

    Args:
        path: the file.
        format: a key of `SUFFIXES`.
        bytes: its size.
        difference: largest difference of logits between the file, read back, and the model, on `check_clouds`.
        notes: what to know about it.
        agreement: of an 8-bit file, in percent, how often its classes are the model's on held-out clouds.
    """

    path: str
    format: str
    bytes: int
    difference: float
    notes: tuple[str, ...]
    agreement: float | None = None


def export(
    loaded: LoadedModel, path: str | Path, format: str, fuse: bool = False, int8: int8_.Clouds | None = None
) -> Exported:
    """Write a classifier or a segmenter for others, the latter not as "torch_pointcloud"; or a pre-training's model.

    "safetensors" (with a ``.json`` beside it) is what `load_model` takes, and "torch_pointcloud" the same by that
    package's parameter names; "point_mae" is a checkpoint as Point-MAE's and Point-BERT's code write it. The others are
    programs: ``points float32 [B, num_points, 3] -> logits [B, C]``, of a segmenter ``points, labels int64 [B] ->
    logits [B, num_points, M]``, any B, patches included; they contain the description of the model, as
    ``description.json`` or ONNX metadata. Of a pre-training there are "safetensors" and "point_mae", with everything
    that its training state has of the model: decoder, tokenizer, momentum encoder, queue.

    Args:
        loaded: the model, on the CPU, in evaluation mode.
        path: file to write, with the format's suffix.
        format: a key of `SUFFIXES`.
        fuse: make batch norms part of the layers before them. Not for "point_mae" and "torch_pointcloud", whose
            parameters they are.
        int8: clouds to quantise an "onnx" file by, see `pointewa.inference.int8`, and others on which its classes have
            to be the model's, by default 95 % of them. Batch norms are fused then.

    Raises:
        ConfigError: an unknown format, a wrong suffix, a missing package, a combination that does not exist.
        CheckpointError: gated experts in a format that has none; a file whose logits differ by more than `TOLERANCE`,
            or, in 8 bits, whose classes too often, which is not kept: what was at ``path`` stays.
        OSError: the file cannot be written.
    """
    path = Path(path)
    if format not in SUFFIXES:
        raise ConfigError(f"--format: expected one of {', '.join(SUFFIXES)}, found {format!r}")
    if path.suffix != SUFFIXES[format]:
        raise ConfigError(f"OUT: expected a file name ending in {SUFFIXES[format]} for {format}, found {str(path)!r}")
    if format != "safetensors" and any(isinstance(module, ewa.TopKMoE) for module in loaded.model.modules()):
        raise CheckpointError(
            f"gated experts (moe.router=top_k) cannot be folded, and {format} has no place for them: --format "
            "safetensors keeps them, for this library only"
        )
    kind, agreement = kind_of(loaded.model), None
    if int8 is not None and (format != "onnx" or kind not in ("classifier", "segmenter")):
        raise ConfigError(f"--int8: expected --format onnx of a classifier or a part segmentation, found {format} of a "
                          f"{kind}")  # fmt: skip
    if kind not in ("classifier", "segmenter", "timm"):
        return _pretraining(loaded, path, format, fuse)
    if kind == "timm":
        raise CheckpointError(
            "expected a classifier of clouds, found one of images, an ordinary ViT of timm's: model.safetensors "
            "in its run folder has the weights by timm's names, for any export of timm's and torch's"
        )
    if kind == "segmenter" and format == "torch_pointcloud":
        raise ConfigError("--format: a part segmentation is not written in torch-pointcloud's layout: choose another")
    plain, notes, names = loaded.model, (), dict
    if format in ("point_mae", "torch_pointcloud") and (fuse or loaded.description()["fused_batch_norm"]):
        raise ConfigError(f"{format} has batch norms of its own: export it from the run, without --fuse-batch-norm")
    if format == "point_mae":
        notes = _for_point_mae(loaded) if kind == "classifier" else _for_part_segmentation(loaded)
    elif format == "torch_pointcloud":
        names = partial(to_theirs, architecture=plain.architecture)
        notes = (f"its model: {constructor(plain.architecture, len(loaded.class_names))}",)
    elif format != "safetensors" and loaded.normalize != "none":
        done = "centred" if loaded.normalize == "center" else "centred and scaled to norm 1"
        notes = (f"it takes float32, {done}: centre clouds far from the origin in float64 first",)
    if fuse or int8 is not None:
        loaded = replace(loaded, model=fuse_batch_norm(plain))
    if int8 is not None:
        int8_.with_constant_products(loaded.model)
    notes += _turned(loaded.up)
    with torch.no_grad():
        if path.suffix == ".safetensors":
            difference = _safetensors(loaded, plain, path, names)
        else:
            with atomic_write(path) as temporary:
                difference = _compare(_WRITERS[format](loaded, temporary), plain, loaded.num_points, path)
                if int8 is not None:
                    difference, agreement = _to_int8(temporary, plain, int8, path)
    return Exported(str(path), format, path.stat().st_size, difference, notes, agreement)


def _to_int8(file: Path, model: nn.Module, clouds: int8_.Clouds, path: Path) -> tuple[float, float]:
    """The largest difference of logits, and the agreement in percent, on the held-out clouds."""
    int8_.quantize(file, clouds.calibrate)
    read = session(file)
    agreement = int8_.agreement(read, model, clouds.held_out)
    if not agreement >= clouds.least:
        raise CheckpointError(
            f"{path}: refused, nothing is written: in 8 bits {agreement:.1f} % of its classes on held-out clouds are "
            f"the model's, at least {clouds.least:g} % are expected: export it without --int8"
        )
    return max((read(*one) - model(*one)).abs().max().item() for one in clouds.held_out), agreement


def _pretraining(loaded: LoadedModel, path: Path, format: str, fuse: bool) -> Exported:
    """The whole model of a pre-training, which has no logits to compare: its weights are, bit for bit."""
    if format not in ("safetensors", "point_mae") or fuse:
        found = "--fuse-batch-norm" if fuse else f"--format {format}"
        raise CheckpointError(
            f"{found}: expected a classifier, found a {kind_of(loaded.model)}, whose weights are written as "
            "safetensors or point_mae; train a classifier from it with train.init_from for anything else"
        )
    if format == "point_mae":
        with atomic_write(path) as temporary:
            _write_state(loaded.model, temporary)
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_model(path, loaded)
    return Exported(str(path), format, path.stat().st_size, 0.0, _turned(loaded.up))


def check_clouds(num_points: int) -> Iterable[Tensor]:
    """Batches ``[B, num_points, 3]`` of 1 and of 4 clouds: Gaussian, a box, and one whose points all come twice."""
    generator = torch.Generator().manual_seed(0)
    for size in (1, 4):
        points = torch.randn(size, num_points, 3, generator=generator)
        points[1:2] = torch.rand(num_points, 3, generator=generator)
        points[2:3] = points[2:3, torch.arange(num_points) // 2]
        yield unit_sphere(points)


def _compare(read: Logits, model: nn.Module, num_points: int, path: Path) -> float:
    inputs = [_inputs(model, points) for points in check_clouds(num_points)]
    pairs = [(read(*given), model(*given)) for given in inputs]
    difference = max((found - expected).abs().max().item() for found, expected in pairs)
    if all(found.shape == expected.shape for found, expected in pairs) and difference <= TOLERANCE:  # NaN is not
        return difference
    raise CheckpointError(
        f"{path}: refused, nothing is written: its logits differ from the model's by up to {difference:.1e}, at most "
        f"{TOLERANCE:.0e} is accepted"
    )


def _inputs(model: nn.Module, points: Tensor) -> tuple[Tensor, ...]:
    """What a model takes: points ``[B, P, 3]``, and of a segmenter one category after another."""
    return (points, torch.arange(len(points)) % model.num_classes) if kind_of(model) == "segmenter" else (points,)


def _safetensors(loaded: LoadedModel, model: nn.Module, path: Path, names: Callable[[dict], dict]) -> float:
    """Both files are compared before either takes the place of what may be there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        written = Path(folder, path.name)
        save_model(written, loaded, names)
        difference = _compare(load_any(written).model, model, loaded.num_points, path)
        for suffix in (".json", ".safetensors"):
            os.replace(written.with_suffix(suffix), path.with_suffix(suffix))
    return difference


def _torchscript(loaded: LoadedModel, path: Path) -> Logits:
    with warnings.catch_warnings(action="ignore"):  # that TorchScript is deprecated
        portable = _portable(loaded, scripted=True)
        traced = torch.jit.trace(
            portable, _inputs(loaded.model, torch.rand(2, loaded.num_points, 3)), check_trace=False
        )
        buffer = BytesIO()  # of a full disk torch would abort the process
        torch.jit.save(traced, buffer, _extra_files={"description.json": _description(loaded)})
        path.write_bytes(buffer.getvalue())
        return torch.jit.load(str(path))


def _torch_export(loaded: LoadedModel, path: Path) -> Logits:
    buffer = BytesIO()  # a path would have to end in .pt2
    module, given, shapes = _program(loaded)
    program = torch.export.export(module, given, dynamic_shapes=shapes)
    torch.export.save(program, buffer, extra_files={"description.json": _description(loaded)})
    path.write_bytes(buffer.getvalue())
    with warnings.catch_warnings(action="ignore"):  # about weights in read-only memory
        return torch.export.load(BytesIO(path.read_bytes())).module()


def _onnx(loaded: LoadedModel, path: Path) -> Logits:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise ConfigError(
                f"--format onnx needs {package} ({first_line(error)}): pip install onnx onnxscript onnxruntime"
            ) from error
    import onnx

    module, given, shapes = _program(loaded)
    with warnings.catch_warnings(action="ignore"):  # the exporter's, about itself
        program = torch.onnx.export(module, given, input_names=list(shapes), output_names=["logits"], verbose=False,
                                    opset_version=OPSET, dynamo=True, dynamic_shapes=shapes)  # fmt: skip
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # stack traces with the paths of this machine
    model = program.model_proto
    onnx.helper.set_model_props(model, {"description.json": _description(loaded)})
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, str(path))
    return session(path)


def session(path: Path) -> Logits:
    """An ONNX file on the CPU, with as many threads as torch has."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_inputs()]
    return lambda *inputs: torch.from_numpy(
        session.run(["logits"], {name: value.numpy() for name, value in zip(names, inputs, strict=True)})[0]
    )


def _point_mae(loaded: LoadedModel, path: Path) -> Logits:
    model, parts = loaded.model, ()
    if kind_of(model) == "segmenter":  # whose code saves, and loads, another dictionary
        parts = (model.parts, model.decoder)
        _write_state(model, path, "model_state_dict", "")
    else:
        _write_state(model, path)
    return load_foreign(path, model.architecture, len(loaded.class_names), *parts)


def _write_state(model: nn.Module, path: Path, place: str = "base_model", prefix: str = "module.") -> None:
    """A model's weights as Point-MAE's and Point-BERT's code write them, read back and compared."""
    state, buffer = model.state_dict(), BytesIO()
    torch.save({place: {f"{prefix}{name}": value for name, value in state.items()}}, buffer)
    path.write_bytes(buffer.getvalue())
    found = read_state(path)[place]
    wrong = [name for name in state if not torch.equal(found[f"{prefix}{name}"], state[name])]
    if wrong or len(found) != len(state):
        raise CheckpointError(f"{path}: read back, these differ from what was written: {', '.join(wrong[:3])}")


_WRITERS = {"torchscript": _torchscript, "torch_export": _torch_export, "onnx": _onnx, "point_mae": _point_mae}


def _portable(loaded: LoadedModel, scripted: bool = False) -> nn.Module:
    kind = PortableSegmenter if kind_of(loaded.model) == "segmenter" else PortableClassifier
    return kind(loaded.model, loaded.num_points, scripted).eval()


def _program(loaded: LoadedModel) -> tuple[nn.Module, tuple[Tensor, ...], dict[str, dict]]:
    """What is exported, an example input (of 2 clouds: a 1 would be taken for a constant), and which sizes are free."""
    given = _inputs(loaded.model, torch.rand(2, loaded.num_points, 3))
    batch = torch.export.Dim("batch", min=1)
    return _portable(loaded), given, {name: {0: batch} for name, _ in zip(("points", "labels"), given, strict=False)}


def _description(loaded: LoadedModel) -> str:
    return json.dumps(loaded.description())


def _turned(up: str | None) -> tuple[str, ...]:
    """What whoever uses the file must do first; in this library `pointewa.Predictor` does it."""
    if up == "y":
        return ()
    if up is None:
        return ("the clouds need y up; the model's description does not say how the files of its training were",)
    turns = {"x": "-y, x, z", "z": "x, z, -y", "-x": "y, -x, z", "-y": "x, -y, -z", "-z": "x, -z, y"}
    turn = f"(x, y, z) -> ({turns[up]})"
    return (f"the clouds need y up: those with {up} up, as the training's files, are turned first: {turn}",)


def _for_point_mae(loaded: LoadedModel) -> tuple[str, ...]:
    """What to set in Point-MAE's configuration, and what cannot be set there."""
    arch, fields = loaded.model.architecture, asdict(loaded.model.architecture)
    keys = {"trans_dim": "width", "depth": "depth", "num_heads": "heads", "num_group": "num_groups",
            "group_size": "group_size", "encoder_dims": "patch_out", "drop_path_rate": "drop_path"}  # fmt: skip
    says = ", ".join(f"{theirs}: {fields[ours]}" for theirs, ours in keys.items())
    notes = [f"its configuration: {says}, cls_dim: {len(loaded.class_names)}; of num_points {loaded.num_points}"]
    fixed = {"patch_width": 128, "mlp_ratio": 4.0}
    other = [
        f"{name}={fields[name]} (fixed at {value} there)" for name, value in fixed.items() if fields[name] != value
    ]
    if arch.head == "linear":
        other.append("head=linear (there Point-MAE's or Point-BERT's)")
    if other:
        notes.append(f"the published code builds no such model: {', '.join(other)}; tools.evaluate loads it")
    return tuple(notes)


def _for_part_segmentation(loaded: LoadedModel) -> tuple[str, ...]:
    """Whose code of part segmentation loads it, and what it cannot build."""
    model, fields = loaded.model, asdict(loaded.model.architecture)
    if model.decoder == "light":
        return ("the published code has no such decoder (model.decoder=light); this library loads it",)
    # Its blocks are numbers 3, 7 and 11, and the layers of both decoders are of that width.
    fixed = {"width": 384, "depth": 12, "patch_width": 128, "mlp_ratio": 4.0}
    if model.decoder == "point_mae":
        fixed |= {"heads": 6, "num_groups": 128, "group_size": 32, "patch_out": 384}
    other = [f"{name}={fields[name]} ({value} there)" for name, value in fixed.items() if fields[name] != value]
    if len(loaded.class_names) != 16:
        other.append(f"{len(loaded.class_names)} categories (16 there)")
    if model.decoder == "point_bert" and fields["patch_out"] == fields["width"]:
        other.append("no reduce_dim (there always)")
    name = "segmentation/models/pt.py of Point-MAE" if model.decoder == "point_mae" else "Point-BERT's segmentation"
    notes = [f"its model: {name}, with {len(model.parts)} parts; of num_points {loaded.num_points}"]
    if other:
        notes.append(f"the published code builds no such model: {', '.join(other)}; this library loads it")
    return tuple(notes)
