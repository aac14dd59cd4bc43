"""The configuration of the data that a model was trained on."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pointewa.config import Config, load_config
from pointewa.errors import ConfigError
from pointewa.models.foreign.published import PUBLISHED, published_name
from pointewa.runs.description import LoadedModel
from pointewa.runs.folder import CONFIG

_OF_THE_RUN = (
    "root",
    "variant",
    "background",
    "normalize",
    "val_fraction",
    "train_fraction",
    "img_size",
    "way",
    "shot",
    "fold",
)  # as long as the data set is the run's
# What data.normalize can say of a model's own set; other sets are normalised as is usual for them, unless the model has
# its clouds in their own units about the origin, and the rest is done by `pointewa.datasets.subjects`.
_OF_THE_KEY = ("unit_sphere", "center", "none")


def config_of(loaded: LoadedModel, run: Path, files: Sequence[str | Path], overrides: Sequence[str]) -> Config:
    """The configuration of a model's data, as its run recorded it, on which ``files`` and ``overrides`` stand.

    Args:
        loaded: the model.
        run: its run folder, or a file in it.
        files: YAML files.
        overrides: ``"group.key=value"``.

    Raises:
        ConfigError: see `pointewa.config.load_config`.
    """
    base: dict[str, Any] = {"name": loaded.dataset}
    if loaded.normalize == "center":  # whatever is usual for another set
        base["normalize"] = loaded.normalize
    # The number of points is the model's, whatever the data set's recipe says, unless the user says otherwise.
    size = getattr(getattr(loaded.model, "architecture", None), "img_size", None)
    overrides = [f"data.num_points={loaded.num_points}", *([f"data.img_size={size}"] if size else []), *overrides]
    config = load_config(files, overrides, {"data": base})
    if config.data.name != loaded.dataset:
        return config
    folder, name = run if run.is_dir() else run.parent, published_name(run)
    if name:
        base["variant"] = PUBLISHED[name].variant
    elif (folder / CONFIG).is_file():
        try:
            recorded = load_config([folder / CONFIG]).data
            if recorded.name == loaded.dataset:
                base |= {key: getattr(recorded, key) for key in _OF_THE_RUN}
        except ConfigError as error:  # of another version of this library: the model's own description has the most
            print(f"note: {error}: data.root and the like are not taken from the run", file=sys.stderr)
    if loaded.normalize in _OF_THE_KEY:
        base["normalize"] = loaded.normalize
    return load_config(files, overrides, {"data": base})
