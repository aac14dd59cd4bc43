"""What the values of a configuration mean, and which do not go together."""

import difflib
import functools
import re
import reprlib
from collections.abc import Collection, Iterable
from dataclasses import asdict
from typing import Any

from pydantic import TypeAdapter, ValidationError

from pointewa.config.schema import CompressConfig, Config, ModelConfig, TrainConfig
from pointewa.errors import ConfigError
from pointewa.models.decoders import PRESET_DECODERS
from pointewa.models.presets import PRESETS, Architecture


def expected(found: str, names: Iterable[str], near: bool = False) -> str:
    """The end of a message about a name that is not among ``names``; with ``near`` only a similar one, if there is."""
    names = sorted(names)
    close = difflib.get_close_matches(found, names, n=1, cutoff=0.4)
    if near and close:
        return f"did you mean {close[0]}?"
    return f"expected one of {', '.join(names)}, found {found!r}"


def build_architecture(config: ModelConfig) -> Architecture:
    """The preset with its overrides.

    Raises:
        ConfigError: an unknown preset, or values that do not go together.
    """
    if config.preset not in PRESETS:
        raise ConfigError(f"model.preset: {expected(config.preset, PRESETS)}")
    # not fields of an architecture
    own = ("preset", "mask_ratio", "decoder_depth", "patch_size", "codebook_size", "decoder")
    overrides = {key: value for key, value in asdict(config).items() if key not in own and value is not None}
    values = asdict(PRESETS[config.preset]) | overrides
    if config.width and config.patch_out is None and PRESETS[config.preset].patch_out == PRESETS[config.preset].width:
        values["patch_out"] = config.width  # a preset without reduce_dim stays without it
    try:
        return Architecture(**values)
    except ValueError as error:
        raise model_error(error) from error


def model_error(error: ValueError) -> ConfigError:
    """What a model refuses, by the key that it is of: ``model.preset`` sets those of its sizes that have no key."""
    name = str(error).split(maxsplit=1)[0]
    if name in ModelConfig.__dataclass_fields__:
        return ConfigError(f"model.{error}")
    return ConfigError(f"model.preset: {error}" if name in Architecture.__dataclass_fields__ else f"model: {error}")


def decoder_of(config: ModelConfig) -> str:
    """The decoder of a part segmentation, as `pointewa.models.PointTransformerSegmenter` knows it."""
    return config.decoder or PRESET_DECODERS.get(config.preset, "light")


def flat(config: Config) -> dict[str, Any]:
    """All values of a configuration by their full keys, such as "train.lr"."""
    return {f"{group}.{key}": value for group, values in asdict(config).items() for key, value in values.items()}


_OF_ROUTER = {"top_k": "top_k", "balance": "top_k", "scope": "random", "dropout": "random"}  # keys of moe
# Which keys a task reads of those that not all of them do; `pointewa.tasks.base.Task.reads` names them.
_OF_SOME_TASKS = ("model.", "task.", "train.label_smoothing", "data.num_points", "data.img_size")


def check_used(config: Config, task: str, reads: Collection[str]) -> None:
    """Refuse keys that were set and have no effect on a new training. Runs of earlier versions may have them.

    Args:
        config: the configuration.
        task: the name of its task.
        reads: the keys that this task reads, of those that not every task does.

    Raises:
        ConfigError: naming the key.
    """
    train, defaults = config.train, flat(Config())
    if train.warmup_epochs is not None and train.warmup_fraction is not None:
        raise ConfigError(f"train.warmup_fraction: train.warmup_epochs={train.warmup_epochs:g} decides, found "
                          f"{train.warmup_fraction:g} too: set one of them to null")  # fmt: skip
    for key, router in _OF_ROUTER.items():
        if config.router not in ("none", router) and defaults[f"moe.{key}"] != (value := getattr(config.moe, key)):
            raise ConfigError(f"moe.{key}: moe.router={config.router} does not read it, found {value!r}: leave it out")
    for key, value in flat(config).items():
        if not key.startswith(_OF_SOME_TASKS) or key in ("model.preset", *reads) or value == defaults[key]:
            continue
        alike = [one for one in reads if one.split(".")[1] == key.split(".")[1]]
        instead = f"set {alike[0]} instead" if alike else "leave it out"
        raise ConfigError(f"{key}: {task} does not read it, found {reprlib.repr(value)}: {instead}")


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


def check_values(config: Config) -> None:
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
    compress = config.compress
    if train.compile and min(compress.activations, compress.gradients) < 32:
        key = "activations" if compress.activations < 32 else "gradients"
        reason = {"activations": "hooks on saved tensors do not reach into compiled code",
                  "gradients": "a hook on compiled gradients has not been tried"}[key]  # fmt: skip
        raise ConfigError(f"compress.{key}: {reason}: set train.compile=false, or leave it out")
    if compress.adaptive and compress.activations not in (2, 4, 8):
        raise ConfigError("compress.adaptive: expected compress.activations of 2, 4 or 8, the average of the bits to "
                          f"choose, found {compress.activations}")  # fmt: skip
    for key, needs in (("stochastic", "activations"), ("error_feedback", "gradients")):
        if getattr(compress, key) and getattr(compress, needs) == 32:
            raise ConfigError(f"compress.{key}: nothing is compressed: set compress.{needs} too, or leave it out")
    if compress.attention != CompressConfig().attention and (compress.activations == 32 or compress.adaptive):
        reason = "the bits of each tensor are chosen" if compress.adaptive else "activations are not compressed"
        raise ConfigError(f"compress.attention: {reason}: leave it out")
    if train.warmup_epochs is not None and train.warmup_epochs > train.epochs:
        raise ConfigError(f"train.warmup_epochs: expected at most train.epochs, found {train.warmup_epochs}")
    save_interval(train)
