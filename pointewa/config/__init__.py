"""The configuration: typed defaults, YAML files on top of them, ``key=value`` last.

Unknown keys and values of a wrong type are errors that name the key.
"""

from pointewa.config.files import differences, find_config, load_config, read_yaml, to_yaml
from pointewa.config.schema import Config, DataConfig, ModelConfig, TrainConfig
from pointewa.config.values import build_architecture, check_used, decoder_of, flat, model_error, save_interval

__all__ = [
    "Config",
    "DataConfig",
    "ModelConfig",
    "TrainConfig",
    "build_architecture",
    "check_used",
    "decoder_of",
    "differences",
    "find_config",
    "flat",
    "load_config",
    "model_error",
    "read_yaml",
    "save_interval",
    "to_yaml",
]
