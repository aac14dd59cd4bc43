"""YAML of unknown origin: nothing in a file can run code, or take long or much memory to read."""

import io
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from pointewa.errors import ConfigError, first_line

_LARGEST, _DEEPEST, _MOST_REFERENCES = 100_000, 20, 20  # characters, levels, and ${...}


def load_yaml(path: Path) -> Any:
    """The mapping or list in a YAML file, as omegaconf holds it.

    Raises:
        ConfigError: no file, no YAML, or too large.
    """
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(_LARGEST + 1)
        if len(text) > _LARGEST:
            raise ConfigError(f"{path}: expected a configuration of at most {_LARGEST} characters")
        _check(text)
        return OmegaConf.load(io.StringIO(text))
    except ConfigError:
        raise
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot read the configuration: {first_line(error)}") from error
    except Exception as error:  # YAMLError, and whatever PyYAML makes of a value that does not fit its tag
        raise ConfigError(f"{path}: not valid YAML: {first_line(error)}") from error


def _check(text: str) -> None:
    """Refuse what would end the process by its nesting, or take any amount of memory or time to resolve."""
    depth = aliases = 0
    resolved: list[str] = []
    for event in yaml.parse(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        aliases += isinstance(event, yaml.AliasEvent)
        if isinstance(event, yaml.ScalarEvent):
            resolved += [event.value] * event.value.count("${")
        if depth > _DEEPEST:
            raise ValueError(f"nested deeper than {_DEEPEST} levels")
        if len(resolved) + aliases > _MOST_REFERENCES or (resolved and len(resolved[-1]) > 1000):
            raise ValueError(
                f"more than {_MOST_REFERENCES} references to other values, or in more than 1000 characters"
            )
