"""Published models, fetched by name through the package torch-pointcloud, or downloaded by hand."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pointewa.errors import CheckpointError, first_line
from pointewa.models.foreign.published import PUBLISHED, published_name
from pointewa.models.foreign.torch_pointcloud import is_theirs, to_ours

PREFIX = "hub:"


def located(path: str | Path) -> Path:
    """A path as it is; of ``hub:NAME`` the file of that published model, fetched if it is not in the cache yet.

    The cache is torch-pointcloud's: ``TORCH_POINTCLOUD_CACHE_DIR``, or ``~/.cache/torch-pointcloud``.

    Raises:
        CheckpointError: no such model, torch-pointcloud is missing, or the file cannot be fetched.
    """
    name = str(path).removeprefix(PREFIX)
    if name == str(path):
        return Path(path)
    if name not in PUBLISHED:
        raise CheckpointError(f"{path}: expected {PREFIX} and one of {', '.join(sorted(PUBLISHED))}")
    try:
        from torch_pointcloud.models import model_info
        from torch_pointcloud.models._registry import resolve_weights
    except ImportError as error:
        raise CheckpointError(
            f"{path}: published models are fetched through a package that is missing ({first_line(error)}): "
            f"pip install torch-pointcloud==0.0.18, or name a file in a folder {name}"
        ) from error
    try:
        return Path(resolve_weights(name, model_info(name)["weights"]["url"]))
    except (OSError, ValueError) as error:  # its errors say where from and where to
        raise CheckpointError(f"{path}: {first_line(error)}") from error


def own_names(weights: Mapping[str, Any], path: Path) -> Mapping[str, Any]:
    """Weights by our names.

    Raises:
        CheckpointError: torch-pointcloud's, of a model that there is none of here.
    """
    try:
        return to_ours(weights) if is_theirs(weights) else weights
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error


def published_model(path: Path, weights: Mapping[str, Any]) -> tuple[dict[str, Any], Mapping[str, Any]]:
    """Description and weights, by our names, of a file that has no description beside it.

    Raises:
        CheckpointError: it is not torch-pointcloud's, or of no model that we know.
    """
    if not is_theirs(weights):
        raise CheckpointError(
            f"{path.with_suffix('.json')}: missing: it says of which architecture the weights beside it are"
        )
    weights, name = own_names(weights, path), published_name(path)
    if name is None:
        raise CheckpointError(
            f"{path}: weights by torch-pointcloud, which do not say their heads, patches, points, classes and "
            "preprocessing: keep a published file in a folder of its name, such as "
            "point-mae-base.modelnet40.yatian-pang, or evaluate it with a configuration that says them (tools.evaluate)"
        )
    published = PUBLISHED[name]
    if not published.kind:
        raise CheckpointError(f"{path}: a pre-training of Point-BERT, of which only the encoder is used here: "
                              f"train a classifier from it with train.init_from={path}")  # fmt: skip
    last, classes = "cls_head_finetune.3", len(published.class_names)
    if len(weights.get(f"{last}.weight", ())) == 40 > classes > 0:
        warnings.warn(
            f"{name}: its head has 40 outputs for the {classes} classes of {published.dataset}: the last "
            f"{40 - classes}, which no class has, are left out",
            stacklevel=2,
        )
        kept = {f"{last}.{tensor}": weights[f"{last}.{tensor}"][:classes] for tensor in ("weight", "bias")}
        weights = {**weights, **kept}
    return published.description(), weights
