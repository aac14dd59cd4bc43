"""A trained model, ready to classify clouds of any kind, or to segment them into parts."""

import warnings
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from pointewa.errors import CheckpointError
from pointewa.inference.all_points import on_all_points
from pointewa.models import PointTransformerSegmenter, in_precision
from pointewa.models.parts import predicted_parts
from pointewa.models.registry import PREDICTING
from pointewa.ops import canonical_order, farthest_point_sample, flaw, group, placed, turn_up, unit_sphere
from pointewa.ops.images import fitted, scaled
from pointewa.runs.description import LoadedModel
from pointewa.runs.pretrained import from_pretrained, push_to_hub, save_pretrained
from pointewa.runs.weights import as_classifier, load_any
from pointewa.train.device import name_of, select_device, select_precision

_BATCH = 64  # clouds that go through the model at a time
_LARGEST = 1e18  # the square of a distance must fit float32


class Predictor:
    """Classifies clouds, after preparing them as those of the training were prepared.

    Args:
        loaded: a classifier; it is moved to the device and set to evaluation mode.
        device: where it runs.
        precision: "float32"; "bfloat16", which is faster where the hardware computes in it and tells a few clouds
            otherwise (`pointewa.models.in_precision`); "auto", bfloat16 only on such hardware.

    Attributes:
        precision: the one that was chosen.
        class_names: C names, in the order of the probabilities.
        num_points: how many points of a cloud the model sees.
        up: the axis that pointed up in the files of the training, which were turned so that y is up.
        loaded: the model and its description.
    """

    def __new__(cls, loaded: LoadedModel, device: torch.device | str = "cpu", precision: str = "float32") -> Self:
        """Of a model of images an `ImagePredictor`, of one of parts a `PartPredictor`."""
        kind = ImagePredictor if loaded.normalize == "minus_one_to_one" else cls
        return super().__new__(PartPredictor if isinstance(loaded.model, PointTransformerSegmenter) else kind)

    def __init__(self, loaded: LoadedModel, device: torch.device | str = "cpu", precision: str = "float32") -> None:
        self.loaded, self.device = loaded, torch.device(device)
        dtype = select_precision(precision, self.device)
        self.model, self.precision = in_precision(loaded.model.to(device).eval(), dtype), name_of(dtype)
        self.class_names, self.num_points = loaded.class_names, loaded.num_points
        self.normalize = loaded.normalize
        self.up = loaded.up or "y"
        if loaded.up is None:
            text = "the model's description does not say which axis points up in files like those of its training"
            warnings.warn(f"{text}: y is assumed, up= (--up) names another one", stacklevel=2)

    def predict(
        self, points: np.ndarray | Tensor, *, normalized: bool = False, up: str | None = None
    ) -> tuple[str, np.ndarray] | tuple[list[str], np.ndarray]:
        """The most probable class, and the probabilities of all classes.

        A cloud is a set: its points in any order give the same probabilities, bit for bit. Farthest point sampling,
        here and in the model, starts at the point farthest from the centroid (`pointewa.ops.canonical_order`).

        Args:
            points: ``[P, 3]``, or ``[B, P, 3]`` for many clouds; any P and any type of numbers. They are centred in
                float64, in which clouds far from the origin, as in UTM coordinates, must come. If there are more points
                than the model was trained on, it sees the farthest point sample; if there are fewer, it sees
                some of them repeatedly.
            normalized: the clouds are those of `pointewa.datasets.load`, which are prepared: centred, scaled to largest
                norm 1, and sampled from their first point on, as published. They are taken as they are, in the order
                that they have, and so give exactly what the evaluation of the run computes.
            up: the axis that points up in the clouds; None: that of the training's files. They are turned so that y
                is up, unless they are ``normalized``.

        Returns:
            A name and float32 ``[C]`` that sums to 1; for ``[B, P, 3]`` a list of B names and ``[B, C]``.

        Raises:
            ValueError: a wrong shape, no points, coordinates that are non-finite or beyond 1e18, an unknown axis, or a
                cloud whose points are all in one place, or were rounded to float32 far from the origin.
        """
        probabilities = self.logits(points, normalized=normalized, up=up).softmax(-1).numpy()
        names = [self.class_names[index] for index in np.atleast_2d(probabilities).argmax(1)]
        return (names[0] if probabilities.ndim == 1 else names), probabilities

    @classmethod
    def from_pretrained(
        cls, name: str | Path, device: str = "auto", precision: str = "float32", **options: Any
    ) -> Self:
        """A classifier or segmenter from a folder of `save_pretrained`, or from Hugging Face's hub.

        Args:
            name: a folder, or a repository ``"owner/name"``.
            device: as in `load`.
            precision: as in `load`.
            **options: see `pointewa.runs.pretrained.from_pretrained`.

        Raises:
            CheckpointError: nothing of that name, or no classifier or segmenter of ours.
            ConfigError: huggingface_hub is missing, or a device that does not exist.
        """
        loaded = as_classifier(from_pretrained(name, **options), name, PREDICTING)
        return cls(loaded, select_device(device), precision)

    def save_pretrained(
        self, save_directory: str | Path, *, push_to_hub: bool = False, repo_id: str | None = None, **options: Any
    ) -> str | None:
        """Write ``model.safetensors`` and ``config.json``, and on request upload them: see `push_to_hub`.

        Args:
            save_directory: the folder.
            push_to_hub: upload the model too.
            repo_id: where to; by default the folder's name.
            **options: of `push_to_hub`.

        Returns:
            The address of the commit, if it was uploaded.
        """
        save_pretrained(self.loaded, save_directory)
        return self.push_to_hub(repo_id or Path(save_directory).name, **options) if push_to_hub else None

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload the model to Hugging Face's hub; see `pointewa.runs.pretrained.push_to_hub`."""
        return push_to_hub(self.loaded, repo_id, **options)

    @torch.no_grad()
    def logits(self, points: np.ndarray | Tensor, *, normalized: bool = False, up: str | None = None) -> Tensor:
        """As `predict`: float32 ``[C]`` or ``[B, C]``, on the CPU."""
        clouds, many = self._checked(points, normalized)
        samples = (self._sample(self._ordered(part, normalized, up)[0]) for part in clouds.split(_BATCH))
        parts = [self.model(part).float().cpu() for part in samples]
        return torch.cat(parts) if many else torch.cat(parts)[0]

    def _checked(self, points: np.ndarray | Tensor, normalized: bool) -> tuple[Tensor, bool]:
        """Clouds ``[B, P, 3]``, and whether they came as many."""
        if not isinstance(points, Tensor):
            points = torch.from_numpy(np.array(points, np.float64))  # a copy: it may be read-only or big-endian
        if points.ndim not in (2, 3) or points.shape[-1] != 3 or 0 in points.shape:
            raise ValueError(f"expected points [P, 3] or [B, P, 3] with B, P > 0, found {list(points.shape)}")
        clouds = points if points.ndim == 3 else points[None]
        if not (clouds.double().abs() <= _LARGEST).all():  # nor NaN
            raise ValueError(f"points has coordinates that are non-finite or beyond {_LARGEST:.0e}")
        for number, cloud in enumerate(() if normalized else clouds):
            seen = cloud.float() if self.normalize == "none" else cloud  # by the model
            if problem := flaw(seen):
                raise ValueError(f"cloud {number}: {problem}" if points.ndim == 3 else problem)
        return clouds, points.ndim == 3

    def _ordered(self, points: Tensor, normalized: bool, up: str | None) -> tuple[Tensor, Tensor]:
        """All points float32 ``[B, P, 3]``, scaled, in an order that does not depend on the one that they came in, and
        which point came where, int64 ``[B, P]``."""
        points = points.to(self.device, torch.float64)
        order = torch.arange(points.shape[1], device=self.device).expand(points.shape[:2])
        if not normalized:
            points = turn_up(points, up or self.up)
            order = canonical_order(points)
            # By all points, as the training's clouds were, before any is left out; far from the origin, float32 would
            # not hold their shape before they are centred.
            points = placed(group(points, order), self.normalize)
        return points.to(self.device, torch.float32), order

    def _sample(self, points: Tensor) -> Tensor:
        """What the model is given of ``[B, P, 3]``."""
        points = group(points, farthest_point_sample(points, self.num_points, check_finite=False))
        return unit_sphere(points) if self.normalize == "unit_sphere_of_sample" else points


class ImagePredictor(Predictor):
    """Classifies images, after preparing them as those of the training were prepared.

    `predict` and `logits` take images uint8 ``[H, W, 3]``, as numpy makes them of a picture in RGB, or many of one size
    ``[B, H, W, 3]``, of any size; or, with ``normalized``, batches of `pointewa.datasets.images`, float32
    ``[3, S, S]`` or ``[B, 3, S, S]`` in [-1, 1].
    """

    @torch.no_grad()
    def logits(self, points: np.ndarray | Tensor, *, normalized: bool = False, up: str | None = None) -> Tensor:
        """As `predict`: float32 ``[C]`` or ``[B, C]``, on the CPU."""
        if up is not None:
            raise ValueError("the axis that points up is for point clouds, and this model classifies images")
        images, size = torch.as_tensor(points), self.model.architecture.img_size
        shape, kind = ([3, size, size], torch.float32) if normalized else ([3], torch.uint8)
        if images.ndim not in (3, 4) or list(images.shape[-len(shape) :]) != shape or 0 in images.shape:
            wanted = f"[{', '.join(map(str, shape))}]" if normalized else "[H, W, 3]"
            raise ValueError(f"expected images {wanted} or a batch of them, found {list(images.shape)}")
        if images.dtype != kind:
            raise ValueError(f"expected images of type {kind}, found {images.dtype}")
        batch = images if images.ndim == 4 else images[None]
        if not normalized:
            batch = scaled(torch.stack([fitted(one.permute(2, 0, 1), size) for one in batch]))
        parts = [self.model(part.to(self.device)).float().cpu() for part in batch.split(_BATCH)]
        return torch.cat(parts) if images.ndim == 4 else torch.cat(parts)[0]


class PartPredictor(Predictor):
    """Segments clouds into the parts of their category, after preparing them as those of the training were prepared.

    Args:
        loaded: a segmenter; it is moved to the device and set to evaluation mode.
        device: where it runs.
        precision: see `Predictor`.

    Attributes:
        parts: the parts of all categories (`pointewa.models.Parts`), as the labels count them.

    Raises:
        ValueError: a model whose clouds were scaled by their sample, which does not say where the other points are.
    """

    def __init__(self, loaded: LoadedModel, device: torch.device | str = "cpu", precision: str = "float32") -> None:
        if loaded.normalize == "unit_sphere_of_sample":
            raise ValueError("normalize: expected unit_sphere or none for a segmenter, found unit_sphere_of_sample")
        super().__init__(loaded, device, precision)
        self.parts = loaded.model.parts

    def predict(
        self, points: np.ndarray | Tensor, category: str = "", *, normalized: bool = False, up: str | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The most probable part of every point, of the parts that objects of its category have.

        The model sees a farthest point sample; the logits of all points are those of the three nearest points of the
        sample, weighted by their inverse squared distances. The order of the points makes no difference.

        Args:
            points: ``[P, 3]``, see `Predictor.predict`.
            category: what the object is, one of `class_names`: the model has to be told.
            normalized: see `Predictor.predict`.
            up: see `Predictor.predict`.

        Returns:
            Names of the parts, str ``[P]``, and their numbers in `parts`, int64 ``[P]``.

        Raises:
            ValueError: as `Predictor.predict`; an unknown category; many clouds.
        """
        allowed = self.parts.mask(len(self.class_names))[self._category(category)]
        logits = self.logits(points, category, normalized=normalized, up=up)
        labels = predicted_parts(logits[None], allowed[None])[0].numpy()
        return np.array(self.parts.names)[labels], labels

    @torch.no_grad()
    def logits(
        self, points: np.ndarray | Tensor, category: str = "", *, normalized: bool = False, up: str | None = None
    ) -> Tensor:
        """Of all M parts, for `predict`: float32 ``[P, M]``, on the CPU."""
        label = torch.tensor([self._category(category)], device=self.device)
        clouds, many = self._checked(points, normalized)
        if many:
            raise ValueError(f"expected one cloud [P, 3], found {list(clouds.shape)}: predict one after the other")
        everywhere, order = self._ordered(clouds, normalized, up)
        sample = self._sample(everywhere)
        found = on_all_points(self.model(sample, label)[0].float(), sample[0], everywhere[0])
        return found[order[0].argsort()].cpu()

    def _category(self, name: str) -> int:
        if name not in self.class_names:
            raise ValueError(f"category: expected one of {', '.join(self.class_names)}, found {name!r}")
        return self.class_names.index(name)


def load(path: str | Path, device: str = "auto", precision: str = "float32") -> Predictor:
    """A model of this library, ready to classify clouds; an `ImagePredictor` if it was trained on images, a
    `PartPredictor` if on parts.

    ```python
    model = pointewa.load("runs/shapes-tiny-ewa-seed0")
    name, probabilities = model.predict(points)  # [P, 3]
    print(name, dict(zip(model.class_names, probabilities)))
    ```

    Args:
        path: a run folder, finished or not, its ``last.ckpt``, or a ``.safetensors`` file with its ``.json``. An EWA
            run is folded on the way. Or a published model of Point-BERT or Point-MAE, such as
            ``"hub:point-mae-base.modelnet40.yatian-pang"``; see `pointewa.runs.hub`.
        device: "auto" is CUDA if there is a GPU, else the CPU.
        precision: of the large matrix products: "float32"; "bfloat16"; or "auto", for throughput: bfloat16 where the
            hardware computes in it, else float32. See `Predictor`.

    Raises:
        CheckpointError: not a classifier or segmenter of this library, or damaged.
        ConfigError: a device that does not exist, an unknown precision.
    """
    if Path(path).suffix in (".pth", ".pt"):
        raise CheckpointError(
            f"{path}: expected a run folder or .safetensors: a file of another codebase names neither its architecture "
            "nor its classes; load it with pointewa.runs.weights.load_foreign and build a pointewa.Predictor from it"
        )
    return Predictor(as_classifier(load_any(path), path, PREDICTING), select_device(device), precision)
