"""The architectures, as data."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Architecture:
    """What defines a point transformer, apart from the number of classes.

    Args:
        width: token dimension.
        depth: number of blocks.
        heads: attention heads.
        num_groups: patches per cloud, which become the tokens.
        group_size: points per patch.
        drop_path: stochastic depth of the last block, rising linearly from 0 at the first.
        patch_width: width of the mini-PointNet's first layer; those of the next two are 2 and 4 times that.
        patch_out: width of its output; if it is not ``width``, a linear layer ``reduce_dim`` follows.
        head: "point_mae" (two hidden layers with batch norm), "point_bert" (one hidden layer) or "linear".
        mlp_ratio: hidden width of the FFNs as a multiple of ``width``.

    Raises:
        ValueError: a field out of range.
    """

    width: int = 384
    depth: int = 12
    heads: int = 6
    num_groups: int = 64
    group_size: int = 32
    drop_path: float = 0.1
    patch_width: int = 128
    patch_out: int = 384
    head: str = "point_mae"
    mlp_ratio: float = 4.0

    def __post_init__(self) -> None:
        for name in ("width", "depth", "heads", "num_groups", "group_size", "patch_width", "patch_out"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.width % self.heads:
            raise ValueError(f"width must be a multiple of heads, got {self.width} and {self.heads}")
        if not 0 < self.mlp_ratio <= 100 or self.width * self.mlp_ratio < 1:
            raise ValueError(f"mlp_ratio must be above 0 and at most 100, got {self.mlp_ratio}")
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"drop_path must be in [0, 1), got {self.drop_path}")
        if self.head not in ("point_mae", "point_bert", "linear"):
            raise ValueError(f'head must be "point_mae", "point_bert" or "linear", got {self.head!r}')


PRESETS = {
    "tiny": Architecture(
        width=192, depth=6, heads=3, num_groups=32, group_size=16, drop_path=0.05, patch_width=64, patch_out=192
    ),
    "small": Architecture(
        width=256, depth=8, heads=4, num_groups=64, group_size=16, drop_path=0.1, patch_width=64, patch_out=256
    ),
    "point_mae": Architecture(),  # Pang et al., ECCV 2022: 22,099,752 parameters with 40 classes
    "point_bert": Architecture(patch_out=256, head="point_bert"),  # Yu et al., CVPR 2022: 22,065,960
}
