"""The trunk that every point transformer here stands on: from the patches of clouds to tokens."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pointewa.models.layers import Encoder, init_weights
from pointewa.models.patch_embed import PatchEncoder
from pointewa.models.presets import Architecture


class PointTransformer(nn.Module):
    """A plain ViT on point patches, without a head, with the parameter names of Point-MAE's and Point-BERT's code.

    A new trunk has torch's default initialisation: the model that stands on it calls `initialize` on itself once all
    its layers are there.

    Args:
        architecture: see `pointewa.models.PRESETS`; the trunk does not use its ``head``.
        class_token: put a learned token, with a learned position, before those of the patches.
    """

    def __init__(self, architecture: Architecture, class_token: bool = False) -> None:
        super().__init__()
        arch = self.architecture = architecture
        self.encoder = PatchEncoder(arch.patch_width, arch.patch_out)
        self.reduce_dim = nn.Identity() if arch.patch_out == arch.width else nn.Linear(arch.patch_out, arch.width)
        for name in ("cls_token", "cls_pos"):
            self.register_parameter(name, nn.Parameter(torch.zeros(1, 1, arch.width)) if class_token else None)
        self.pos_embed = position_embedding(arch.width)
        self.blocks = Encoder(arch.width, arch.depth, arch.heads, arch.mlp_ratio, arch.drop_path)
        self.norm = nn.LayerNorm(arch.width)

    def initialize(self) -> None:
        """Give all layers, those of subclasses included, their initial weights; see `init_weights`."""
        self.apply(init_weights)
        for token in (self.cls_token, self.cls_pos):
            if token is not None:
                nn.init.trunc_normal_(token, std=0.02)

    def forward(self, patches: Tensor, centers: Tensor) -> Tensor:
        """Patches ``[B, G, K, 3]`` relative to their centres ``[B, G, 3]`` -> tokens ``[B, G, C]``.

        With a class token that one comes first: ``[B, 1 + G, C]``.
        """
        return self.transform(self.embed(patches), centers)

    def embed(self, patches: Tensor) -> Tensor:
        """Patches ``[B, G, K, 3]`` -> what enters the first block ``[B, G, C]``, each patch by itself."""
        return self.reduce_dim(self.encoder(patches))

    def transform(self, tokens: Tensor, centers: Tensor) -> Tensor:
        """Tokens of `embed` ``[B, G, C]`` and their centres ``[B, G, 3]`` -> what `forward` returns."""
        return self.norm(self.blocks(*self._with_class_token(tokens, centers)))

    def levels(self, tokens: Tensor, centers: Tensor, numbers: Sequence[int]) -> list[Tensor]:
        """As `transform`, but the outputs of the blocks with these numbers, from 0, each through the same norm."""
        return [self.norm(x) for x in self.blocks.outputs(*self._with_class_token(tokens, centers), numbers)]

    def _with_class_token(self, tokens: Tensor, centers: Tensor) -> tuple[Tensor, Tensor]:
        """What the blocks take: tokens and their positions, those of the class token first if there is one."""
        position = self.pos_embed(centers)
        if self.cls_token is not None:
            batch = tokens.shape[0]  # not len(tokens), which tracing would make a constant
            tokens = torch.cat([self.cls_token.expand(batch, -1, -1), tokens], dim=1)
            position = torch.cat([self.cls_pos.expand(batch, -1, -1), position], dim=1)
        return tokens, position


def position_embedding(width: int) -> nn.Sequential:
    """The two layers that turn the centre of a patch ``[..., 3]`` into its position embedding ``[..., width]``."""
    return nn.Sequential(nn.Linear(3, 128), nn.GELU(), nn.Linear(128, width))
