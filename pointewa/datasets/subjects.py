"""A model together with the clouds that it is evaluated on, drawn with, or explained by."""

import sys
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path

import torch
from torch import Generator, Tensor

from pointewa.config import build_architecture, decoder_of, load_config
from pointewa.datasets.base import Clouds
from pointewa.datasets.files import SUFFIXES, read_points
from pointewa.datasets.images import Images
from pointewa.datasets.loader import EvalLoader
from pointewa.datasets.prepare import originals
from pointewa.datasets.registry import open_source
from pointewa.datasets.source import progress
from pointewa.datasets.splits import EVAL_BATCH, check_kind, fold_entry, fold_of, load_split, training_split
from pointewa.datasets.transforms import pool_size, random_subset, scale_shift
from pointewa.errors import CheckpointError, ConfigError, DataError, counted
from pointewa.inference.evaluate import Evaluator, Transform
from pointewa.inference.svm import features
from pointewa.models import PointTransformerSegmenter, in_precision
from pointewa.models.registry import kind_of
from pointewa.ops import canonical_order, farthest_point_sample, flaw, group, placed, turn_up, unit_sphere
from pointewa.runs.description import LoadedModel
from pointewa.runs.hub import located
from pointewa.runs.recorded import config_of
from pointewa.runs.summary import fold_text
from pointewa.runs.weights import is_described, load_any, load_foreign
from pointewa.tasks import task_class
from pointewa.tasks.base import Batch, Task, evaluating
from pointewa.tasks.classification import Classification, Evaluation
from pointewa.train.device import name_of, select_device, select_precision
from pointewa.viz.drawings import Item

_SAMPLES = 8192  # points drawn on a mesh


class Subjects:
    """A split of a data set, files on disk, and the model that looks at them.

    The data set is that of the model's training, found where the run found it, with as many points a cloud, unless the
    configuration says otherwise. Clouds are scaled as the model's were in training.

    Args:
        run: a run folder, a model file in one, a published model (``hub:NAME``), or a file of another codebase that
            does not say its architecture, which the configuration then says; None: no model, clouds only.
        split: "train" or "test".
        files: YAML files of configuration.
        overrides: ``"group.key=value"``.
        up: the axis of files on disk that points up, one of `pointewa.ops.UP_AXES`; None: that of the model's training.
        precision: in which the model runs, see `pointewa.load`.

    Raises:
        UserError: a configuration or run that is not valid.
    """

    def __init__(
        self,
        run: str | Path | None = None,
        split: str = "test",
        files: Sequence[str | Path] = (),
        overrides: Sequence[str] = (),
        up: str | None = None,
        precision: str = "float32",
    ) -> None:
        self.run, self.split, self.up, self._precision, self._loaded = run, split, up, precision, None
        path = None if run is None else located(run)
        if path is None:
            self.config = load_config(files, overrides)
        elif not is_described(path):
            self.config = load_config(files, overrides)
            if not files and not any(one.startswith("data.name=") for one in overrides):
                name = self.config.data.name
                print(f"note: {run} does not say of which data set it is: {name} is assumed", file=sys.stderr)
            names, data = self.clouds.class_names, self.config.data
            task, parts = task_class(self.config.train.task), self.clouds.parts
            of_parts = (parts, decoder_of(self.config.model)) if task.point_labels else ()
            model = load_foreign(path, build_architecture(self.config.model), len(names), *of_parts)
            task = task.name if of_parts else Classification.name
            self._loaded = LoadedModel(model, names, data.num_points, data.name, "none", task, self.clouds.up)
        else:
            self._loaded = load_any(path)
            self.config = config_of(self._loaded, path, files, overrides)

    @property
    def num_points(self) -> int:
        """Points a cloud."""
        return self.config.data.num_points

    @property
    def what(self) -> str:
        """Set and split, for titles, and the precision where it is not float32."""
        part, lowered = f"{self.split} split", "" if self.precision == "float32" else f", in {self.precision}"
        if fold := fold_entry(self.config):
            part = f"{'support set' if self.split == 'train' else 'queries'} of {fold_text(fold)}"
        return f"{self.config.data.name}, {part}{lowered}"

    @cached_property
    def clouds(self) -> Clouds:
        """The split.

        Raises:
            ConfigError: images for a model of clouds, or clouds for one of images.
        """
        found = load_split(self.config, self.split, self._loaded and self._loaded.task)
        if self._loaded is not None:
            check_kind(found, task_class(self._loaded.task).of_points, f"the model of {self.run}")
            self._check_parts(found)
            if fold_of(self.config) and found.class_names != self._loaded.class_names:
                mine = f"{fold_of(self.config).name}, as it is found now, is of {', '.join(found.class_names)}"
                raise ConfigError(
                    f"data.fold: {mine}, and the model of {self.run} is of {', '.join(self._loaded.class_names)}: "
                    "name the fold and the data that it was trained on"
                )
        return found

    def _check_parts(self, found: Clouds) -> None:
        """Refuse other categories or parts than those that a segmenter knows: there is no shared subset of them."""
        model = self._loaded.model
        if isinstance(model, PointTransformerSegmenter):
            pairs = (("categories", self._loaded.class_names, found.class_names),
                     ("parts", model.parts.names, found.parts.names), ("parts", model.parts, found.parts))  # fmt: skip
            for what, mine, theirs in pairs:
                if mine != theirs:
                    raise ConfigError(
                        f"data.name: the model of {self.run} segments {', '.join(self._loaded.class_names[:3])}, ... "
                        f"into {counted(len(model.parts), 'part')}, and {found.source} has other {what}: evaluate it "
                        "on a set that has the same"
                    )

    @cached_property
    def loaded(self) -> LoadedModel:
        """The model, on the device of the configuration, in the precision that was asked for.

        Raises:
            ConfigError: no run was named.
        """
        if self._loaded is None:
            raise ConfigError("--run: say which run the picture is of: --run runs/x")
        model = self._loaded.model.to(select_device(self.config.train.device)).eval()
        self._loaded.model = in_precision(model, self._dtype)
        return self._loaded

    @cached_property
    def _dtype(self) -> torch.dtype:
        if self._precision == "float32":
            return torch.float32  # whatever the device, which a picture of clouds does not need
        return select_precision(self._precision, select_device(self.config.train.device))

    @property
    def precision(self) -> str:
        """In which the model runs: "float32" or "bfloat16"."""
        return name_of(self._dtype)

    @property
    def task(self) -> Task:
        """What the model learned.

        Raises:
            ConfigError: a task that is not known here, or keys that do not go with it.
        """
        return task_class(self.loaded.task)(self.config)

    def need_clouds(self, what: str) -> None:
        """Refuse images.

        Raises:
            ConfigError: naming what needs clouds.
        """
        of_points = self.task.of_points if self._loaded else not isinstance(self.clouds, Images)
        if not of_points:
            found = self.run or f"data.name={self.config.data.name}"
            raise ConfigError(f"{what}: works on clouds, and {found} is of images; make report draws such a run's page")

    @property
    def classifier(self) -> LoadedModel:
        """The model, which is a classifier.

        Raises:
            CheckpointError: it is none.
        """
        if not self.task.predicts_classes:
            raise CheckpointError(
                f"{self.run}: {_kind(self.loaded)}, which predicts no classes: name a classifier's run"
            )
        return self.loaded

    @property
    def autoencoder(self) -> LoadedModel:
        """The model, which reconstructs what was masked.

        Raises:
            CheckpointError: it is none.
        """
        if not hasattr(self.loaded.model, "reconstruct"):
            raise CheckpointError(
                f"{self.run}: {_kind(self.loaded)}, which reconstructs nothing: name a pre-training's run"
            )
        return self.loaded

    @property
    def segmenter(self) -> LoadedModel:
        """The model, which is a segmenter.

        Raises:
            CheckpointError: it is none.
        """
        if not isinstance(self.loaded.model, PointTransformerSegmenter):
            raise CheckpointError(
                f"{self.run}: {_kind(self.loaded)}, which predicts no parts: name a part segmentation's run"
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
        if is_file and path.exists():  # it needs no data set
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
            return [self._file(path)]  # raises the error that says that it does not exist
        raise ConfigError(
            f"--object: expected an index, an object such as {clouds.object_names[0]}, a class "
            f"({', '.join(clouds.class_names[:5])}, ...) or a file ({' '.join(SUFFIXES)}), found {wanted!r}"
        )

    def at(self, indices: Sequence[int]) -> list[Item]:
        """The objects of the split with these numbers."""
        clouds = self.clouds
        index = torch.as_tensor(list(indices), device=clouds.labels.device)
        ((points, parts),) = clouds.batches([index], min(clouds.num_points, pool_size(self.num_points)))
        labels, points = clouds.labels[index].tolist(), self._sampled(self._scaled(points))
        parts = [None] * len(points) if parts is None else parts[:, : self.num_points]
        return [Item(one, clouds.object_names[i], clouds.class_names[label], mine)
                for i, one, label, mine in zip(indices, points, labels, parts, strict=True)]  # fmt: skip

    def _scaled(self, points: Tensor) -> Tensor:
        """A batch of the pool ``[B, P', 3]``, scaled as the model's clouds were in training."""
        return placed(points, self._loaded.normalize) if self._scale else points

    def _sampled(self, points: Tensor) -> Tensor:
        """What the model is given of a batch of the pool: the first points, in farthest-point order."""
        points = points[:, : self.num_points]
        return unit_sphere(points) if self._scale_sample else points

    @property
    def _scale(self) -> bool:
        """Whether the model's clouds were centred or also scaled in training, and those of the split are not."""
        done = {"unit_sphere": ("center", "none"), "center": ("none",)}
        return self._loaded is not None and self.clouds.normalize in done.get(self._loaded.normalize, ())

    @property
    def _scale_sample(self) -> bool:
        """Whether the model's clouds were scaled in training by the points that it was given."""
        return self._loaded is not None and self._loaded.normalize == "unit_sphere_of_sample"

    def _file(self, path: Path) -> Item:
        up = self.up or (self._loaded and self._loaded.up) or "y"
        points = turn_up(torch.from_numpy(read_points(path, _SAMPLES)), up)
        device = select_device(self.config.train.device)
        if problem := flaw(points):
            raise DataError(f"{path}: {problem}")
        how = self._loaded.normalize if self._loaded else "unit_sphere"
        points = placed(group(points[None], canonical_order(points[None])), how).float()  # as in `pointewa.load`
        points = points.to(device)
        points = group(points, farthest_point_sample(points, min(self.num_points, points.shape[1])))
        return Item(self._sampled(points)[0], path.name)

    def batches(
        self, transform: Transform | None = None, title: str = "", clouds: Clouds | None = None
    ) -> Iterable[Batch]:
        """The split in batches, scaled as the model's clouds were in training.

        Args:
            transform: from a pool of points ``[B, P', 3]``, in farthest-point order, to those that the model is given,
                ``[B, P, 3]``; None: the first ``num_points``.
            title: of a progress bar; none without.
            clouds: other clouds of the same data set, in place of the split.
        """

        def prepared(pool: Tensor) -> Tensor:
            pool = self._scaled(pool)
            if transform is None:
                return self._sampled(pool)
            return transform(unit_sphere(pool) if self._scale_sample else pool)

        # Without a change the points keep their labels.
        change = prepared if transform or self._scale or self._scale_sample else None
        loader = EvalLoader(self.clouds if clouds is None else clouds, EVAL_BATCH, self.num_points, change,
                            ordered=transform is None)  # fmt: skip
        return progress(loader, title) if title else loader

    def draw(self, pool: Tensor, generator: Generator) -> Tensor:
        """A random sample of a pool ``[B, P', 3]``, scaled and shifted, as Point-BERT and Point-MAE vote."""
        return scale_shift(random_subset(pool, self.num_points, generator), generator)

    def metrics(self) -> dict[str, float]:
        """The task's metrics of the split."""
        with evaluating(self.loaded.model) as model:
            return self.task.measure(self.task.outputs(model, self.batches(title="evaluating")))

    @cached_property
    def evaluator(self) -> Evaluator:
        """For the classifier on the split.

        Raises:
            CheckpointError: the model is no classifier.
            DataError: the set shares fewer than two classes with the model.
        """
        loaded, clouds = self.classifier, self.clouds
        own_units = {"none": "as they come", "center": "in their own units"}.get(loaded.normalize)
        if own_units and clouds.normalized and loaded.dataset != self.config.data.name:
            print(f"note: the model was trained on clouds {own_units}, these are scaled to norm 1", file=sys.stderr)
        return Evaluator(loaded, self.batches, self.config.data.name, clouds.class_names, self.num_points,
                         clouds.normalized or not own_units, progress)  # fmt: skip

    @cached_property
    def evaluation(self) -> Evaluation:
        """The classifier on the whole split.

        Raises:
            ConfigError: the set has other classes than the model.
        """
        if self.classifier.class_names != self.clouds.class_names:
            raise ConfigError(f"data.name: {self.config.data.name} has other classes than the model of {self.run}")
        return self.evaluator.plain()

    def originals(self) -> Iterator[tuple[Tensor, Tensor]]:
        """All points ``[P, 3]`` of each object of the split as its file has them, and their parts ``[P]``.

        They are scaled as the clouds of the split, with which they are in step, and on their device.

        Raises:
            ConfigError: the model's clouds were scaled otherwise than those of the split.
            DataError: see `pointewa.datasets.open_source`.
        """
        data, device = self.config.data, self.clouds.labels.device
        if self._scale or self._scale_sample:
            raise ConfigError(
                f"--points: the clouds of {data.name} are not scaled as those of the model of {self.run}: leave it out"
            )
        source = open_source(
            data.name, data.root, self.split, 1, data.variant, data.background, data.normalize, parts=True
        )
        for points, labels in originals(source, source.num_points or pool_size(self.num_points)):
            yield points.to(device), labels.to(device)

    def features(self) -> Tensor:
        """Of the whole split, ``[N, F]``, on the CPU.

        Raises:
            CheckpointError: a model without features of objects.
        """
        self._need_features()
        return features(self.loaded.model, self.batches(title="features"))[0]

    def training_features(self) -> tuple[Tensor, Tensor]:
        """Features ``[N, F]`` and labels ``[N]`` of the objects that a training on this configuration is given."""
        self._need_features()
        train, _ = training_split(self.config, self.loaded.task)
        return features(self.loaded.model, self.batches(title="training split", clouds=train))

    def _need_features(self) -> None:
        if not hasattr(self.loaded.model, "features"):
            raise CheckpointError(f"{self.run}: {_kind(self.loaded)}, which has no features of whole objects: name the "
                                  "run of a classifier or a pre-training")  # fmt: skip


def _kind(loaded: LoadedModel) -> str:
    kinds = {"classifier": "a classifier", "timm": "a classifier", "masked_autoencoder": "a pre-training",
             "segmenter": "a part segmentation", "dvae": "a tokenizer"}  # fmt: skip
    name = kind_of(loaded.model)
    return kinds.get(name, f"a {name}")
