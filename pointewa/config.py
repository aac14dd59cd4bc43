"""The configuration: typed defaults, YAML files on top of them, ``key=value`` last.

Unknown keys and values of a wrong type are errors that name the key.
"""

import difflib
import functools
import re
import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import Field, TypeAdapter, ValidationError

from pointewa.clone import CONFIGS
from pointewa.errors import ConfigError, first_line
from pointewa.models.decoders import PRESET_DECODERS
from pointewa.models.presets import PRESETS, Architecture
from pointewa.safe.yaml_files import load_yaml

AtLeastOne = Annotated[int, Field(ge=1, lt=2**63)]
AtLeastTwo = Annotated[int, Field(ge=2, lt=2**63)]
Natural = Annotated[int, Field(ge=0, lt=2**63)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
PositiveFraction = Annotated[float, Field(gt=0, le=1)]


@dataclass
class DataConfig:
    """The clouds, and how they are presented."""

    name: str = "shapes"
    root: str = "data"  # folder or file
    variant: str | None = (
        None  # ScanObjectNN: obj_bg, pb_t50_rs/split2; others: a fold, a layout or the up axis, see docs/data.md
    )
    num_points: AtLeastOne = 1024
    img_size: AtLeastOne = 32  # side in pixels, of a set of images
    # centred and scaled to largest norm 1; centred, in their own units; as they come; auto: as is usual for the set
    normalize: Literal["auto", "unit_sphere", "center", "none"] = "auto"
    background: Literal["drop", "keep"] = "keep"  # of ScanObjectNN's objects; "drop" removes its points
    augment: Any = field(
        default_factory=lambda: ["scale_shift"]
    )  # applied in order; also scale_shift_uniform, rotate_up, jitter, dropout; of images: crop, flip
    stream: Any = "auto"  # leave the points on disk: true, false; auto: where they would fill the device's memory
    val_fraction: Fraction = 0.0  # of each class of the training split, held out for every choice; fixed objects
    train_fraction: PositiveFraction = (
        1.0  # of each class of the training split, used for training; the same objects for every seed
    )
    # Few-shot, all three or none, see docs/tasks.md: train on `shot` objects of each of `way` classes, test on 20.
    way: AtLeastTwo | None = None
    shot: AtLeastOne | None = None
    fold: Natural | None = None  # which classes and objects; the same ones for every seed

    def __post_init__(self) -> None:
        if isinstance(self.augment, str):  # version 0.1 had only one
            self.augment = [] if self.augment == "none" else [self.augment]
        if self.variant == "False":  # YAML takes off, a layout of ModelNet40, for false
            self.variant = "off"


@dataclass
class ModelConfig:
    """A preset and its overrides (None: the preset's own value)."""

    preset: str = "tiny"  # or "timm:NAME", a ViT of timm's for images
    width: int | None = None
    depth: int | None = None
    heads: int | None = None
    mlp_ratio: float | None = None
    num_groups: int | None = None
    group_size: int | None = None
    patch_out: int | None = None  # the patch encoder's output; if it is not `width`, reduce_dim follows
    drop_path: float | None = None
    mask_ratio: float = 0.6  # of the patches, in masked autoencoding
    decoder_depth: int = 4  # blocks of the decoder, in masked autoencoding
    patch_size: int | None = None  # side in pixels, of the patches of an image
    head: str | None = None  # "point_mae", "point_bert" or "linear"
    codebook_size: int | None = None  # codes of a tokenizer, a multiple of 4
    decoder: str | None = None  # of part segmentation: "point_mae", "point_bert" or "light"


@dataclass
class MoeConfig:
    """Which FFNs are mixtures of experts during training, and how tokens reach the experts."""

    router: Literal["auto", "none", "random", "top_k"] = "auto"  # random partition, then fold; top_k: learned,
    # and the experts stay (the naive MoE); auto: random with ewa.enabled, else none (the dense model)
    num_experts: AtLeastOne = 4
    layers: Any = "every_other"  # or "all", or a list of block numbers
    top_k: AtLeastOne = 1  # experts per token, with the learned router
    balance: NonNegative = 0.01  # weight of that router's load-balancing loss
    # copies of the FFN, or independent; auto: copies with init_from; mean, as a control: no experts, but the dense
    # model that starts from the mean of num_experts independent ones
    init: Literal["auto", "copy", "independent", "mean"] = "auto"
    scope: Literal["batch", "sample"] = "batch"  # of the random partition: the tokens of a batch, or of each sample


@dataclass
class EwaConfig:
    """Experts Weights Averaging: the experts are averaged towards each other after every optimizer step."""

    enabled: bool = True
    share_rate: float = 0.3  # b of Eq. 6, or the value that it rises to
    schedule: Literal["constant", "linear"] = "linear"
    rise: PositiveFraction = 1.0  # fraction of the training over which the linear one rises
    until: float = 1.0  # fraction of the training after which averaging stops


@dataclass
class TrainConfig:
    """The training recipe. Defaults: Point-BERT's and Point-MAE's for ModelNet40."""

    task: str = "classification"  # what is learned: a module of pointewa/tasks
    epochs: AtLeastOne = 300
    batch_size: AtLeastOne = 32  # over all processes
    accumulate: AtLeastOne = 1  # parts in which a batch is processed, to save memory
    # of the optimizer, on the same gradients; 2: one before they are clipped and one after, as published part
    # segmentations were trained
    steps_per_batch: Literal[1, 2] = 1
    activation_checkpointing: bool = False  # keep less for the backward pass and recompute it: exact, slower
    optimizer: Literal["adamw", "muon", "sgd"] = "adamw"  # muon: for the matrices in the blocks, AdamW for the rest
    lr: NonNegative = 5e-4
    min_lr: NonNegative = 1e-6  # where the warm-up starts and the cosine ends
    warmup_epochs: NonNegative | None = None  # None: by warmup_fraction
    warmup_fraction: Fraction | None = None  # of the epochs; None: a thirtieth, the usual 10 of 300
    betas: list[Fraction] = field(default_factory=lambda: [0.9, 0.999])  # of AdamW
    momentum: Fraction = 0.9  # of SGD and Muon
    weight_decay: NonNegative = 0.05
    clip_norm: NonNegative = 10.0  # 0: no clipping
    label_smoothing: Fraction = 0.0
    precision: Literal["auto", "bfloat16", "float32"] = "auto"  # auto: bfloat16 where the hardware computes in it
    compile: bool = False
    seed: Natural = 0
    device: str = "auto"
    save_every: Any = "15min"  # between checkpoints within an epoch: iterations or minutes; 0: only at its end
    max_skipped: Natural = 10  # steps of a run that may be skipped because the loss or a gradient was non-finite
    init_from: str | None = None  # weights to start from: a run, or a checkpoint of ours, Point-MAE or Point-BERT
    layer_decay: PositiveFraction = 1.0  # factor of the learning rate from each block to the one before it
    freeze_backbone: bool = False  # train the head only (probing)
    ema_decay: Fraction = 0.0  # of an exponential moving average of the weights, evaluated in their place; 0: none


@dataclass
class TaskConfig:
    """What only some tasks know; each names the tasks."""

    tokenizer: str | None = None  # masked_point_modeling: the run of a tokenizer, which gives the tokens
    mask_ratio: list[Fraction] = field(default_factory=lambda: [0.25, 0.45])  # masked_point_modeling: limits of the
    # fraction of the patches, drawn for each cloud
    mask_rand: bool = False  # masked_point_modeling: mask each patch by itself, not a block of neighbours
    queue_size: AtLeastOne = 16384  # masked_point_modeling: keys of former batches in the contrast
    moco_loss: bool = False  # masked_point_modeling: add the contrast of clouds that are not mixed
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.07  # masked_point_modeling: of the contrasts
    momentum: Annotated[float, Field(ge=0, le=1)] = 0.999  # masked_point_modeling: of the encoder of the keys


@dataclass
class RunConfig:
    """The run folder."""

    name: str | None = None  # None: composed of the data set, model, scheme and seed
    dir: str = "runs"
    overwrite: bool = False  # start over instead of resuming an unfinished run of this name
    tracker: Literal["none", "wandb", "mlflow", "trackio"] = "none"  # beside TensorBoard, if it is installed
    report: bool = True  # write the run's page at the end, and clouds, features, confusion matrix to TensorBoard


@dataclass
class Config:
    """The whole configuration."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    moe: MoeConfig = field(default_factory=MoeConfig)
    ewa: EwaConfig = field(default_factory=EwaConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    run: RunConfig = field(default_factory=RunConfig)

    @property
    def router(self) -> str:
        """How tokens reach the experts: "random" or "top_k"; "none" for a dense model."""
        if self.moe.router == "auto":
            return "random" if self.ewa.enabled else "none"
        return self.moe.router

    @property
    def scheme(self) -> str:
        """The scheme in a word, for names: dense; rup, ewa (random partition without and with averaging); moe,
        moe_ewa (behind a router)."""
        names = {"none": "dense", "random": "ewa" if self.ewa.enabled else "rup"}
        return names.get(self.router, "moe_ewa" if self.ewa.enabled else "moe")


_FOLDERS = ("data.root", "run.dir")


def load_config(
    files: Iterable[str | Path] = (), overrides: Iterable[str] = (), base: Mapping[str, Any] | None = None
) -> Config:
    """Defaults, then ``base``, then YAML files, then overrides; later ones win.

    Args:
        files: YAML files, each saying only what differs; see `find_config`.
        overrides: ``"group.key=value"``.
        base: nested values with less weight than the files.

    Raises:
        ConfigError: a file that cannot be read, an unknown key, a wrong type, a value out of range.
    """
    merged = OmegaConf.structured(Config)
    layers = [("base", OmegaConf.create(dict(base or {})))]
    layers += [(str(file), _modernised(read_yaml(find_config(file)))) for file in files]
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key:
            raise ConfigError(f"{override!r}: expected key=value, such as train.epochs=10")
        if key in _FOLDERS and value and value[0] not in "'\"":  # any name, though # and : mean something in YAML
            group, name = key.split(".")
            layers.append(("command line", OmegaConf.create({group: {name: value}})))
            continue
        try:
            layers.append(("command line", OmegaConf.from_dotlist([override])))
        except (yaml.YAMLError, OmegaConfBaseException) as error:
            raise ConfigError(f"{key}: the value {value!r} is not valid YAML ({first_line(error)})") from error
    for source, layer in layers:
        _check_keys(layer, Config, source)
        try:
            merged = OmegaConf.merge(merged, layer)
            OmegaConf.to_container(merged, resolve=True, throw_on_missing=True)
        except (OmegaConfBaseException, OverflowError, RecursionError) as error:
            key = getattr(error, "full_key", None) or "config"
            raise ConfigError(f"{source}: {key}: {first_line(error)}") from error
    config = OmegaConf.to_object(merged)
    _check_values(config)
    return config


def find_config(name: str | Path) -> Path:
    """The YAML file of this name; if there is none, that which comes with the package: ``modelnet40``, ``arm/ewa``.

    Raises:
        ConfigError: neither.
    """
    path = Path(name)
    if path.exists():
        return path
    if path.is_absolute():
        raise ConfigError(f"{path}: no such file")
    inside = Path(*path.parts[1:] if path.parts[:1] == ("configs",) else path.parts).with_suffix("")
    if (shipped := CONFIGS / inside.with_suffix(".yaml")).is_file():
        return shipped
    known = [one.relative_to(CONFIGS).with_suffix("") for one in (CONFIGS / inside).parent.glob("*.yaml")]
    raise ConfigError(f"{path}: no such file" + (f": {_expected(str(inside), map(str, known))}" if known else ""))


def build_architecture(config: ModelConfig) -> Architecture:
    """The preset with its overrides.

    Raises:
        ConfigError: an unknown preset, or values that do not go together.
    """
    if config.preset not in PRESETS:
        raise ConfigError(f"model.preset: {_expected(config.preset, PRESETS)}")
    # not fields of an architecture
    own = ("preset", "mask_ratio", "decoder_depth", "patch_size", "codebook_size", "decoder")
    overrides = {key: value for key, value in asdict(config).items() if key not in own and value is not None}
    values = asdict(PRESETS[config.preset]) | overrides
    if config.width and config.patch_out is None and PRESETS[config.preset].patch_out == PRESETS[config.preset].width:
        values["patch_out"] = config.width  # a preset without reduce_dim stays without it
    try:
        return Architecture(**values)
    except ValueError as error:
        raise ConfigError(f"model.{error}") from error


def decoder_of(config: ModelConfig) -> str:
    """The decoder of a part segmentation, as `pointewa.models.PointTransformerSegmenter` knows it."""
    return config.decoder or PRESET_DECODERS.get(config.preset, "light")


def save_interval(config: TrainConfig) -> tuple[int, float]:
    """Iterations and seconds between checkpoints within an epoch; 0 for none of that kind.

    Raises:
        ConfigError: neither a number of iterations nor one of minutes, such as "15min".
    """
    every = config.save_every
    if isinstance(every, int) and not isinstance(every, bool) and every >= 0:
        return every, 0.0
    minutes = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?) ?min", every) if isinstance(every, str) else None
    if not minutes:
        raise ConfigError(
            f"train.save_every: expected iterations (100) or minutes (15min), found {reprlib.repr(every)}"
        )
    return 0, 60 * float(minutes[1])


def to_yaml(config: Config) -> str:
    """The configuration as YAML that `load_config` reads back."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def differences(config: Config, other: Config, ignore: Iterable[str] = ()) -> list[str]:
    """Keys in which two configurations differ, as ``"key: value -> other value"``."""
    mine, theirs = flat(config), flat(other)
    return [f"{key}: {mine[key]} -> {theirs[key]}" for key in mine if mine[key] != theirs[key] and key not in ignore]


def flat(config: Config) -> dict[str, Any]:
    """All values of a configuration by their full keys, such as "train.lr"."""
    return {f"{group}.{key}": value for group, values in asdict(config).items() for key, value in values.items()}


def read_yaml(path: Path) -> Any:
    """The mapping of groups in a YAML file, as omegaconf holds it.

    Raises:
        ConfigError: no file, no YAML, no mapping, or refused by `pointewa.safe.yaml_files`.
    """
    layer = load_yaml(path)
    if not OmegaConf.is_dict(layer):
        raise ConfigError(f"{path}: expected a mapping of groups ({', '.join(_names(Config))}), found a list")
    return layer


def _check_keys(layer: Any, schema: type, source: str, prefix: str = "") -> None:
    known = {f.name: f.type if is_dataclass(f.type) else None for f in fields(schema)}
    for key in layer:
        full = f"{prefix}{key}" if str(key).isprintable() else repr(f"{prefix}{key}")
        if key not in known:
            groups = {f"{group}.{name}" for group in _names(Config) for name in _names(_schema(group))}
            hint = _expected(full, groups if prefix else known, near=True)
            raise ConfigError(f"{source}: unknown key {full}: {hint}")
        if known[key] is not None:
            value = layer._get_node(key)
            if not OmegaConf.is_dict(value):
                raise ConfigError(f"{source}: {full}: expected a group of keys, found {reprlib.repr(value._value())}")
            _check_keys(value, known[key], source, f"{full}.")


def _names(schema: type) -> list[str]:
    return [f.name for f in fields(schema)]


def _schema(group: str) -> type:
    return next(f.type for f in fields(Config) if f.name == group)


def _expected(found: str, names: Iterable[str], near: bool = False) -> str:
    names = sorted(names)
    close = difflib.get_close_matches(found, names, n=1, cutoff=0.4)
    if near and close:
        return f"did you mean {close[0]}?"
    return f"expected one of {', '.join(names)}, found {found!r}"


_LIMITS = {  # pydantic's errors in our words
    "greater_than_equal": "at least {ge:g}",
    "greater_than": "more than {gt:g}",
    "less_than": "less than {lt:g}",
    "less_than_equal": "at most {le:g}",
    "finite_number": "a finite number",
}


@functools.cache
def _adapter() -> TypeAdapter:
    return TypeAdapter(Config)  # most of what loading a configuration takes


def _check_values(config: Config) -> None:
    """Refuse values out of range, each by its own annotation, and values that do not go together.

    Raises:
        ConfigError: naming the key.
    """
    try:
        _adapter().validate_python(asdict(config))
    except ValidationError as error:
        first = error.errors()[0]
        key, limits = ".".join(map(str, first["loc"][:2])), first.get("ctx", {})
        expected = _LIMITS.get(first["type"], first["msg"]).format(**limits)
        raise ConfigError(f"{key}: expected {expected}, found {reprlib.repr(first['input'])}") from error
    data, train = config.data, config.train
    if data.stream not in ("auto", True, False):
        raise ConfigError(f"data.stream: expected auto, true or false, found {reprlib.repr(data.stream)}")
    if data.val_fraction and data.train_fraction < 1 and data.val_fraction + data.train_fraction > 1:
        raise ConfigError(f"data.train_fraction: expected at most 1 - data.val_fraction = {1 - data.val_fraction:g}, "
                          f"found {data.train_fraction}")  # fmt: skip
    fold = {f"data.{key}": getattr(data, key) for key in ("way", "shot", "fold")}
    if missing := [key for key, value in fold.items() if value is None]:
        if given := [key for key in fold if key not in missing]:
            raise ConfigError(f"{missing[0]}: expected a number beside {' and '.join(given)}, found none: few-shot "
                              "needs data.way, data.shot and data.fold")  # fmt: skip
    elif data.val_fraction or data.train_fraction < 1:
        key = "val_fraction" if data.val_fraction else "train_fraction"
        raise ConfigError(f"data.{key}: a fold (data.way) is trained on its whole support set: leave it out")
    if train.batch_size % train.accumulate:
        raise ConfigError(f"train.accumulate: expected a divisor of train.batch_size {train.batch_size}, found "
                          f"{train.accumulate}")  # fmt: skip
    if not isinstance(data.augment, list) or not all(isinstance(name, str) for name in data.augment):
        raise ConfigError(
            f"data.augment: expected a list of names, such as [scale_shift, jitter], found {reprlib.repr(data.augment)}"
        )
    if len(train.betas) != 2:
        raise ConfigError(f"train.betas: expected two numbers, such as [0.9,0.999], found {reprlib.repr(train.betas)}")
    low_high = config.task.mask_ratio
    if len(low_high) != 2 or not 0 < low_high[0] <= low_high[1]:
        raise ConfigError(f"task.mask_ratio: expected two rising numbers above 0, such as [0.25,0.45], found "
                          f"{reprlib.repr(low_high)}")  # fmt: skip
    if train.freeze_backbone and config.router != "none":
        raise ConfigError("train.freeze_backbone: a frozen backbone leaves no experts to train: set ewa.enabled=false")
    if config.moe.router == "none" and config.ewa.enabled:
        raise ConfigError("moe.router: a dense model has no experts to average: set ewa.enabled=false")
    if config.moe.init == "mean" and (config.router != "none" or train.init_from):
        raise ConfigError("moe.init: mean starts a dense model from scratch: set ewa.enabled=false, and no "
                          "train.init_from")  # fmt: skip
    if train.warmup_epochs is not None and train.warmup_epochs > train.epochs:
        raise ConfigError(f"train.warmup_epochs: expected at most train.epochs, found {train.warmup_epochs}")
    save_interval(train)


_MOVED = ("num_experts", "layers", "top_k", "balance", "init", "scope")  # to the group moe, since version 0.2


def _modernised(layer: Any) -> Any:
    """A layer of a run folder of version 0.1, whose group ``ewa`` has the experts' keys too, in today's keys.

    There ``ewa.enabled`` said whether there are experts, and a share rate of 0 that they are not averaged.
    """
    if not OmegaConf.is_dict(layer.get("ewa")) or "router" not in layer["ewa"]:
        return layer
    content = OmegaConf.to_container(layer)
    scheme = content["ewa"]
    router, experts = scheme.pop("router"), scheme.get("enabled", True)
    scheme["enabled"] = averaged = experts and scheme.get("share_rate") != 0
    content["moe"] = {key: scheme.pop(key) for key in _MOVED if key in scheme}
    content["moe"]["router"] = router if experts and (router != "random" or not averaged) else "auto"
    if not averaged:
        scheme.pop("share_rate", None)
    if isinstance(content.get("train"), dict) and content["train"].get("task") == "pretraining":
        content["train"]["task"] = "masked_autoencoding"
    return OmegaConf.create(content)
