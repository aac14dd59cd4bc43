"""timm's ViTs, with the values that they are built again from."""

import importlib.util
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

from torch import nn

from pointewa.errors import ConfigError

_MODULES = ("vision_transformer", "deit")  # of timm.models; their ViTs take all the fields below
_MOST_BLOCKS, _MOST = 1000, 2**14  # a file may say anything


@dataclass(frozen=True)
class TimmArchitecture:
    """A ViT of timm's and what is overridden of it; None for its own value.

    Args:
        name: as in ``timm.create_model``, such as "vit_tiny_patch16_224".
        img_size: side of the images.
        patch_size: side of the patches.
        embed_dim: token dimension.
        depth: number of blocks.
        num_heads: attention heads.
        mlp_ratio: hidden width of the FFNs as a multiple of ``embed_dim``.
        drop_path_rate: stochastic depth of the last block, rising linearly from 0 at the first.

    Raises:
        ValueError: a field of a wrong type or out of range.
    """

    name: str
    img_size: int | None = None
    patch_size: int | None = None
    embed_dim: int | None = None
    depth: int | None = None
    num_heads: int | None = None
    mlp_ratio: float | None = None
    drop_path_rate: float | None = None

    def __post_init__(self) -> None:
        if type(self.name) is not str or not re.fullmatch(r"[a-z0-9_]{1,100}", self.name):
            raise ValueError("name: expected that of a ViT of timm's, such as vit_tiny_patch16_224")
        for one in fields(self)[1:]:
            value = getattr(self, one.name)
            whole = one.type == int | None
            most = _MOST_BLOCKS if one.name == "depth" else _MOST if whole else 100
            low = one.name == "drop_path_rate"  # from 0 to less than 1
            if value is None:
                continue
            if type(value) not in ((int,) if whole else (int, float)):
                raise ValueError(f"{one.name}: expected a number, found {type(value).__name__}")
            if not ((0 <= value < 1) if low else (0 < value <= most)):
                raise ValueError(f"{one.name}: expected {'0 to 1' if low else f'more than 0, at most {most}'}, "
                                 f"found {value}")  # fmt: skip

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """From the values of a file.

        Raises:
            ValueError: an unknown key, or a field of a wrong type or out of range.
        """
        if unknown := [repr(str(key)[:40]) for key in values if key not in {one.name for one in fields(cls)}]:
            raise ValueError(f"timm: unknown keys {', '.join(unknown[:3])}")
        return cls(**({"name": None} | dict(values)))


def need_timm() -> None:
    """Refuse to go on without timm.

    Raises:
        ConfigError: it is not installed.
    """
    if importlib.util.find_spec("timm") is None:
        raise ConfigError("model.preset: a ViT of timm's needs timm, which is not installed: pip install timm")


def timm_vit(architecture: TimmArchitecture, num_classes: int) -> nn.Module:
    """The ViT with fresh weights, of timm's class and with its parameter names; ``architecture`` becomes an attribute.

    Raises:
        ValueError: no ViT of timm's, or values that do not go together.
        ConfigError: timm is not installed.
    """
    need_timm()
    import timm
    from timm.models import is_model_in_modules

    if not is_model_in_modules(architecture.name, _MODULES):
        near = [name for name in timm.list_models("vit_*") if "patch" in name][:3]
        raise ValueError(f"name: expected a ViT of timm's ({', '.join(near)}, ...), found {architecture.name!r}")
    overrides = {key: value for key, value in asdict(architecture).items() if key != "name" and value is not None}
    width, heads = architecture.embed_dim, architecture.num_heads
    if width and heads and width % heads:
        raise ValueError(f"embed_dim: expected a multiple of num_heads, found {width} and {heads}")
    size, patch = architecture.img_size, architecture.patch_size
    if size and patch and size % patch:
        raise ValueError(f"img_size: expected a multiple of patch_size, found {size} and {patch}")
    try:
        model = timm.create_model(architecture.name, pretrained=False, num_classes=num_classes, **overrides)
    except AssertionError as error:  # values that do not go with the ViT's own
        raise ValueError(f"timm refuses {overrides}: {error}") from error
    model.architecture = architecture
    return model
