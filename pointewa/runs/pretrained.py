"""Folders as huggingface_hub's users know them: ``model.safetensors``, ``config.json`` and a ``README.md``.

Nothing here needs huggingface_hub but what goes over the network.
"""

import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pointewa.errors import CheckpointError, ConfigError, first_line, is_bug
from pointewa.runs.description import LoadedModel
from pointewa.runs.weights import CONFIG, MODEL, load_any, save_model
from pointewa.safe.files import atomic_write

_CARD = """\
---
library_name: pointewa
tags: [point-cloud]
---

A {model} of point clouds ({task}), trained on {dataset} with {num_points} points a cloud. `config.json` says of which
architecture it is, and which classes and which preprocessing it has.
"""


def save_pretrained(loaded: LoadedModel, folder: str | Path) -> None:
    """Write a model of any kind to a folder, from which `from_pretrained` and `pointewa.load` take it.

    Raises:
        ConfigError: a run folder.
        CheckpointError: it cannot be written.
    """
    folder = Path(folder)
    own = folder / Path(MODEL).with_suffix(".json")
    if own.exists():
        raise ConfigError(f"{folder}: expected a folder for a copy of the model, found a run's: name another one")
    save_model(folder / MODEL, loaded, beside=CONFIG)
    if not (folder / "README.md").exists():
        with atomic_write(folder / "README.md") as temporary:
            temporary.write_text(_CARD.format(**loaded.description()))


def from_pretrained(
    name: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    force_download: bool = False,
    local_files_only: bool = False,
) -> LoadedModel:
    """A model of any kind from a folder, or from a repository on Hugging Face's hub.

    Args:
        name: a folder, as `save_pretrained` writes it, or a repository ``"owner/name"``.
        revision, token, cache_dir, force_download, local_files_only: as in `huggingface_hub.snapshot_download`.

    Raises:
        CheckpointError: nothing of that name, or no model of ours.
        ConfigError: huggingface_hub is missing.
    """
    if os.path.isdir(name):
        return load_any(name)
    if isinstance(name, Path) or name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise CheckpointError(f"{name}: no such folder, nor the name of a repository (owner/name)")
    download = _hub("snapshot_download", name)
    try:
        folder = download(
            name, revision=revision, token=token, cache_dir=cache_dir, force_download=force_download,
            local_files_only=local_files_only, allow_patterns=[MODEL, CONFIG],
        )  # fmt: skip
    except Exception as error:  # of many kinds, its HTTP library's included
        if is_bug(error):
            raise
        raise CheckpointError(
            f"{name}: no such folder, and not to be had from Hugging Face's hub ({first_line(error)})"
        ) from error
    return load_any(folder)


def push_to_hub(
    loaded: LoadedModel,
    repo_id: str,
    *,
    commit_message: str = "Push a model of PointEWA",
    private: bool | None = None,
    token: str | None = None,
    branch: str | None = None,
    create_pr: bool | None = None,
) -> str:
    """Upload a model to a repository on Hugging Face's hub, made if it is not there, and give the commit's address.

    Args:
        loaded: of any kind.
        repo_id: ``"owner/name"``.
        commit_message, private, token, branch, create_pr: as in `huggingface_hub.HfApi`.

    Raises:
        ConfigError: huggingface_hub is missing.
        CheckpointError: the hub refuses, or cannot be reached.
    """
    api = _hub("HfApi", repo_id)(token=token)
    with TemporaryDirectory() as folder:
        save_pretrained(loaded, folder)
        try:
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            return api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=commit_message,
                                     revision=branch, create_pr=create_pr)  # fmt: skip
        except Exception as error:
            if is_bug(error):
                raise
            raise CheckpointError(f"{repo_id}: Hugging Face's hub does not take it ({first_line(error)})") from error


def _hub(what: str, name: str | Path) -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise ConfigError(
            f"{name}: Hugging Face's hub needs a package that is missing: pip install huggingface_hub"
        ) from error
    return getattr(huggingface_hub, what)
