"""The model and the clouds that a picture or a report is of."""

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from datasets.base import Clouds
from datasets.files import SUFFIXES, read_points
from datasets.loader import EvalLoader
from datasets.source import progress
from datasets.transforms import pool_size
from pointewa.config import build_architecture, load_config
from pointewa.errors import CheckpointError, ConfigError
from pointewa.models import MaskedAutoencoder
from pointewa.ops import farthest_point_sample, turn_up, unit_sphere
from pointewa.runs.description import LoadedModel
from pointewa.runs.folder import CONFIG
from pointewa.runs.weights import load_any, load_foreign
from pointewa.tasks.base import Batch
from pointewa.tasks.classification import Evaluation, evaluate
from pointewa.train.device import select_device
from tools import cli

_SAMPLES = 8192  # points drawn on a mesh


@dataclass(frozen=True)
class Item:
    """One object: points ``[P, 3]`` as the model takes them, and its class where that is known."""

    points: Tensor
    name: str
    class_name: str | None = None


class Subjects:
    """A split of a data set, files on disk, and the model of a run that looks at them.

    Args:
        args: ``config``, ``overrides``, ``run`` (or None: no model), ``split``, ``up``.

    Raises:
        UserError: a configuration, run or file that is not valid.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self._loaded, base, overrides = args, None, {}, args.overrides
        foreign = args.run and Path(args.run).suffix in (".pth", ".pt")
        if args.run and not foreign:
            self._loaded = load_any(args.run)
            base = {"data": {"name": self._loaded.dataset, "num_points": self._loaded.num_points}}
            base["data"] |= _recorded(Path(args.run), self._loaded.dataset)
        self.config = load_config(args.config, overrides, base)
        if foreign:
            classes = self.clouds.class_names
            model = load_foreign(args.run, build_architecture(self.config.model), len(classes))
            self._loaded = LoadedModel(model, classes, self.num_points, self.config.data.name, "none")

    @property
    def num_points(self) -> int:
        """Points a cloud."""
        return self.config.data.num_points

    @property
    def what(self) -> str:
        """Set and split, for titles."""
        return f"{self.config.data.name}, {self.args.split} split"

    @cached_property
    def clouds(self) -> Clouds:
        """The split."""
        return cli.load(self.config, self.args.split)

    @cached_property
    def loaded(self) -> LoadedModel:
        """The model, on the device of the configuration.

        Raises:
            ConfigError: no run was named.
        """
        if self._loaded is None:
            raise ConfigError("--run: say which run the picture is of: --run runs/x")
        self._loaded.model.to(select_device(self.config.train.device)).eval()
        return self._loaded

    @property
    def classifier(self) -> LoadedModel:
        """The model, which is a classifier.

        Raises:
            CheckpointError: it is a pre-training.
        """
        if isinstance(self.loaded.model, MaskedAutoencoder):
            raise CheckpointError(
                f"{self.args.run}: a pre-training, which predicts no classes: name a classifier's run"
            )
        return self.loaded

    @property
    def autoencoder(self) -> LoadedModel:
        """The model, which is a masked autoencoder.

        Raises:
            CheckpointError: it is a classifier.
        """
        if not isinstance(self.loaded.model, MaskedAutoencoder):
            raise CheckpointError(
                f"{self.args.run}: a classifier, which reconstructs nothing: name a pre-training's run"
            )
        return self.loaded

    def items(self, wanted: Sequence[str], count: int) -> list[Item]:
        """Objects by index, name, class (its first ``count``), or file; without any the first of each class, up to
        ``count``.

        Raises:
            ConfigError: nothing of that name.
            DataError: a file that cannot be read.
        """
        if not wanted:
            labels = self.clouds.labels.tolist()
            firsts = [labels.index(label) for label in sorted(set(labels))]
            step = max(1, len(firsts) / count)  # spread over the classes
            return self.at([firsts[int(i * step)] for i in range(min(count, len(firsts)))])
        return [item for one in wanted for item in self._find(one, count)]

    def _find(self, wanted: str, count: int) -> list[Item]:
        path, is_file = Path(wanted), Path(wanted).suffix.lower() in SUFFIXES
        if is_file and path.exists():  # such needs no data set
            return [self._file(path)]
        clouds = self.clouds
        if wanted.isdecimal():
            if int(wanted) >= len(clouds):
                raise ConfigError(f"--object: expected 0 to {len(clouds) - 1}, found {wanted}")
            return self.at([int(wanted)])
        if wanted in clouds.object_names:
            return self.at([clouds.object_names.index(wanted)])
        if wanted in clouds.class_names:
            members = (clouds.labels == clouds.class_names.index(wanted)).nonzero().squeeze(1)[:count].tolist()
            if members:
                return self.at(members)
        if is_file:
            return [self._file(path)]  # which says that there is none
        raise ConfigError(
            f"--object: expected an index, an object such as {clouds.object_names[0]}, a class "
            f"({', '.join(clouds.class_names[:5])}, ...) or a file ({' '.join(SUFFIXES)}), found {wanted!r}"
        )

    def at(self, indices: Sequence[int]) -> list[Item]:
        """The objects of the split with these numbers."""
        clouds = self.clouds
        index = torch.as_tensor(list(indices), device=clouds.labels.device)
        ((points, _),) = clouds.batches([index], min(clouds.num_points, pool_size(self.num_points)))
        labels = clouds.labels[index].tolist()
        return [Item(one, clouds.object_names[i], clouds.class_names[label])
                for i, one, label in zip(indices, self.prepared(points), labels, strict=True)]  # fmt: skip

    def prepared(self, points: Tensor) -> Tensor:
        """A batch of the pool ``[B, pool, 3]`` as the model takes it, as `tools.evaluate` does: ``[B, P, 3]``."""
        model = self._loaded
        scale = model is not None and model.normalize == "unit_sphere" and not self.clouds.normalized
        return (unit_sphere(points) if scale else points)[:, : self.num_points]

    def _file(self, path: Path) -> Item:
        points = turn_up(torch.from_numpy(read_points(path, _SAMPLES)), self.args.up)
        device = select_device(self.config.train.device)
        points = unit_sphere(points[None]).to(device)
        count = min(self.num_points, points.shape[1])
        return Item(points[0, farthest_point_sample(points, count)[0]], path.name)

    @cached_property
    def evaluation(self) -> Evaluation:
        """The classifier on the whole split.

        Raises:
            ConfigError: the set has other classes than the model.
        """
        loaded = self.classifier
        if loaded.class_names != self.clouds.class_names:
            raise ConfigError(f"data.name: {self.config.data.name} has other classes than the model of {self.args.run}")
        return evaluate(loaded.model, self._batches("evaluating"))

    @torch.no_grad()
    def features(self) -> Tensor:
        """Of the whole split, ``[N, F]``, on the CPU."""
        model = self.loaded.model
        return torch.cat([model.features(points).float().cpu() for points, *_ in self._batches("features")])

    def _batches(self, title: str) -> Iterable[Batch]:
        return progress(EvalLoader(self.clouds, cli.EVAL_BATCH, self.num_points, self.prepared), title)


def _recorded(path: Path, dataset: str) -> dict[str, str | None]:
    """Where the run found its data, so that nobody has to say it again."""
    folder = path if path.is_dir() else path.parent
    if not (folder / CONFIG).is_file():
        return {}
    try:
        data = load_config([folder / CONFIG]).data
    except ConfigError:  # of another version of this library: what matters is in the model's own description
        return {}
    return {"root": data.root, "variant": data.variant} if data.name == dataset else {}
