"""Labelled images in place of clouds: resident on the device of the training, cropped and flipped there."""

import io
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from pointewa.datasets.base import Clouds, Labelled, check_labels
from pointewa.datasets.loader import TrainLoader
from pointewa.datasets.prepare import free_memory
from pointewa.datasets.source import Source, progress
from pointewa.errors import DataError
from pointewa.ops.images import fitted, scaled
from pointewa.safe.files import reading

if TYPE_CHECKING:
    import PIL.Image

_FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP")
_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")  # others have more than 8 bits a channel
_MOST_PIXELS = 2**27
_ORIENTATION = 0x0112  # EXIF's tag; 1 is upright


@dataclass(frozen=True)
class Images(Clouds):
    """Square images that are held in memory, on the device of the training.

    Args:
        pixels: uint8 ``[N, 3, S, S]``.
        labels: int64 ``[N]``, indices into ``class_names``.
        class_names: C names.
        object_names: N names.
        source: the file or folder they came from, for messages.

    Raises:
        DataError: a label out of range.
    """

    pixels: Tensor
    labels: Tensor
    class_names: tuple[str, ...]
    object_names: tuple[str, ...]
    source: str
    normalized = False  # to the unit sphere
    up = "y"
    parts = None

    def __post_init__(self) -> None:
        check_labels(self.labels, self.class_names, self.object_names, self.source)

    @property
    def num_points(self) -> int:
        """S, the side of the images."""
        return self.pixels.shape[-1]

    @property
    def normalize(self) -> str:
        """See `pointewa.runs.description.LoadedModel`."""
        return "minus_one_to_one"

    def batches(self, indices: Iterable[Tensor], count: int = 0) -> Iterator[Labelled]:
        """For each of ``indices`` ``[B]`` those images, float32 ``[B, 3, S, S]``; ``count`` has no meaning here."""
        return (Labelled(scaled(self.pixels[index])) for index in indices)

    def take(self, indices: Sequence[int] | Tensor) -> "Images":
        """The images at ``indices``."""
        indices = torch.as_tensor(indices)
        names = tuple(self.object_names[i] for i in indices.tolist())
        return replace(self, pixels=self.pixels[indices], labels=self.labels[indices], object_names=names)

    def relabelled(self, labels: Tensor, class_names: tuple[str, ...]) -> "Images":
        """The same images with other labels."""
        return replace(self, labels=labels.to(self.labels.device), class_names=class_names)

    def to(self, device: torch.device | str) -> "Images":
        """The images on a device."""
        return replace(self, pixels=self.pixels.to(device), labels=self.labels.to(device))

    @classmethod
    def of(cls, source: Source, size: int, device: torch.device, title: str = "") -> "Images":
        """The images of a source. Those of other sizes are resized and cropped in the middle, with a note on stderr.

        Args:
            source: of images.
            size: S.
            device: of the training.
            title: shown with the progress.

        Raises:
            DataError: there is no room, or an image cannot be read.
        """
        needed, free = 3 * len(source) * size**2, free_memory(device)
        if needed > free / 2:
            raise DataError(
                f"{source.path}: {len(source)} images of {size} x {size} pixels need {needed / 2**30:.1f} GiB, and "
                f"{free / 2**30:.1f} GiB are free: they are held in memory, lower data.img_size"
            )
        pixels, resized = torch.empty(len(source), 3, size, size, dtype=torch.uint8), 0
        for place, image in zip(pixels, progress(source.clouds(size), title, len(source)), strict=True):
            resized += image.points.shape[:2] != (size, size)
            place.copy_(fitted(torch.from_numpy(image.points).permute(2, 0, 1), size))
        if resized:
            note = f"{resized} of {len(source)} images are not {size} x {size}: resized and cropped in the middle"
            print(f"note: {source.path}: {note}; data.img_size is {size}", file=sys.stderr)
        labels = torch.from_numpy(source.labels)
        return cls(pixels, labels, source.class_names, source.object_names, str(source.path)).to(device)


def read_image(path: Path, data: bytes, changed: Counter[str] | None = None) -> np.ndarray:
    """Pixels uint8 ``[H, W, 3]``, as torchvision's loader has them: converted to RGB without transparency, the first of
    several frames, and not turned as a camera's EXIF data say.

    Args:
        path: for messages.
        data: content of the file.
        changed: counts what of this was done, in words.

    Raises:
        DataError: damaged, of another format, or of more than 8 bits a channel.
    """
    with reading(path, "an image"):
        from PIL import Image, UnidentifiedImageError

        try:
            opened = Image.open(io.BytesIO(data), formats=_FORMATS)
        except UnidentifiedImageError as error:
            raise DataError(f"{path}: damaged, or no image of a known format ({', '.join(_FORMATS)}): get it again or "
                            "remove it") from error  # fmt: skip
        with opened as image:
            if image.width * image.height > _MOST_PIXELS:
                raise DataError(f"{path}: expected at most {_MOST_PIXELS} pixels, found {image.width} x {image.height}")
            if image.mode not in _MODES:
                raise DataError(
                    f"{path}: expected 8 bits a channel, found Pillow's mode {image.mode!r}: convert it to RGB first"
                )
            pixels = np.array(image.convert("RGB"))
            if changed is not None:
                changed.update(_changes(image))
            return pixels


def _changes(image: "PIL.Image.Image") -> Iterator[str]:
    if image.mode != "RGB":
        yield f"are {image.mode} and converted to RGB"
    with suppress(Exception):  # the pixels are good, whatever is wrong with the rest
        if getattr(image, "n_frames", 1) > 1:
            yield "have several frames, of which the first is taken"
        if image.getexif().get(_ORIENTATION, 1) != 1:
            yield "are to be turned by their EXIF data and are left as they are, as torchvision leaves them"


def crop(images: Tensor, generator: Generator) -> Tensor:
    """Shift each image ``[B, 3, S, S]`` by up to an eighth of its side along both axes; what comes in is black.

    That is torchvision's ``RandomCrop(S, padding=S // 8)``, 4 pixels for the usual 32, drawn for each image.
    """
    count, _, size, _ = images.shape
    reach, device = size // 8, images.device
    padded = F.pad(images, [reach] * 4, value=-1.0).movedim(1, 3)
    corner = torch.randint(2 * reach + 1, (2, count, 1), device=device, generator=generator)
    rows, columns = corner + torch.arange(size, device=device)  # (B, S) each
    each = torch.arange(count, device=device).view(-1, 1, 1)
    return padded[each, rows.unsqueeze(2), columns.unsqueeze(1)].movedim(3, 1).contiguous()


def flip(images: Tensor, generator: Generator) -> Tensor:
    """Mirror each image ``[B, 3, S, S]`` from left to right with probability 1/2."""
    mirrored = torch.rand(len(images), 1, 1, 1, device=images.device, generator=generator) < 0.5
    return torch.where(mirrored, images.flip(3), images)


AUGMENTATIONS: dict[str, Callable[[Tensor, Generator], Tensor]] = {"crop": crop, "flip": flip}


class ImageTrainLoader(TrainLoader):
    """Batches of `Images` with the augmentations above; otherwise as `TrainLoader`."""

    known = tuple(AUGMENTATIONS)

    def _drawn(self, pool: Labelled, generator: Generator) -> Labelled:
        images = pool.points
        for name in self.augmentations:
            images = AUGMENTATIONS[name](images, generator)
        return Labelled(images)
