"""The parts that objects consist of, by category."""

from dataclasses import dataclass

import torch
from torch import Tensor

EVERY = -1  # in place of a category: the part belongs to all of them


@dataclass(frozen=True)
class Parts:
    """The parts of all categories, numbered through, as point labels count them.

    Args:
        names: M names.
        classes: for each part the number of the category that it belongs to, or `EVERY`.

    Raises:
        ValueError: no parts, another number of categories than of names, or a category below `EVERY`.
    """

    names: tuple[str, ...]
    classes: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.names or len(self.names) != len(self.classes):
            raise ValueError(f"parts: expected a category for each, found {len(self.names)} names and "
                             f"{len(self.classes)} categories")  # fmt: skip
        if min(self.classes) < EVERY:
            raise ValueError(
                f"parts: expected the numbers of categories, or {EVERY} for all, found {min(self.classes)}"
            )

    def __len__(self) -> int:
        return len(self.names)

    def mask(self, num_classes: int) -> Tensor:
        """Which parts a category has, bool ``[num_classes, M]``.

        Raises:
            ValueError: a part of a category that is not there.
        """
        if max(self.classes) >= num_classes:
            raise ValueError(f"parts: expected categories below {num_classes}, found {max(self.classes)}")
        classes = torch.tensor(self.classes)
        return (classes == torch.arange(num_classes).unsqueeze(1)) | (classes == EVERY)


def predicted_parts(logits: Tensor, allowed: Tensor | None) -> Tensor:
    """The most probable part of each point, int64 ``[B, P]``.

    Args:
        logits: ``[B, P, M]``.
        allowed: the parts among which it is sought, bool ``[B, M]``; None: all of them.
    """
    if allowed is not None:
        logits = logits.masked_fill(~allowed.unsqueeze(1), -torch.inf)
    return logits.argmax(-1)
