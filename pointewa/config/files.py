"""Configurations from YAML files and the command line, and to YAML."""

import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pointewa.clone import CONFIGS
from pointewa.config.schema import Config
from pointewa.config.values import check_values, expected, flat
from pointewa.errors import ConfigError, first_line
from pointewa.safe.yaml_files import load_yaml

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
    check_values(config)
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
    raise ConfigError(f"{path}: no such file" + (f": {expected(str(inside), map(str, known))}" if known else ""))


def to_yaml(config: Config) -> str:
    """The configuration as YAML that `load_config` reads back."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def differences(config: Config, other: Config, ignore: Iterable[str] = ()) -> list[str]:
    """Keys in which two configurations differ, as ``"key: value -> other value"``."""
    mine, theirs = flat(config), flat(other)
    return [f"{key}: {mine[key]} -> {theirs[key]}" for key in mine if mine[key] != theirs[key] and key not in ignore]


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
            hint = expected(full, groups if prefix else known, near=True)
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
