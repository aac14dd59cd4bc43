"""Point-BERT's pre-training: predict the tokens of masked patches, and tell apart mixtures of clouds."""

import copy
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pointewa.models.backbone import PointTransformer
from pointewa.models.dvae import DiscreteVAE
from pointewa.models.layers import Mlp, at_least_float32
from pointewa.models.masked_autoencoder import Reconstruction
from pointewa.models.patch_embed import Patches, make_patches
from pointewa.models.presets import Architecture
from pointewa.ops import group

FEATURES = 512  # of a cloud, in the contrast


class MaskedPointTransformer(PointTransformer):
    """The trunk with a class token, a learned token in the place of masked patches, and two heads.

    Args:
        architecture: its ``head`` is not used.
        codebook_size: V, the tokens that are told apart.
    """

    def __init__(self, architecture: Architecture, codebook_size: int) -> None:
        super().__init__(architecture, class_token=True)
        width = architecture.width
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.lm_head = nn.Linear(width, codebook_size)
        self.cls_head = nn.Sequential(nn.Linear(width, FEATURES), nn.GELU(), nn.Linear(FEATURES, FEATURES))
        self.initialize()
        nn.init.trunc_normal_(self.mask_token, std=0.02)

    def masked(self, patches: Tensor, centers: Tensor, mask: Tensor) -> Tensor:
        """Tokens ``[B, 1 + G, C]`` of patches ``[B, G, K, 3]`` with centres ``[B, G, 3]``, the class token first.

        Masked patches, bool ``[B, G]``, are not seen, but their centres are.
        """
        tokens = torch.where(mask.unsqueeze(-1), self.mask_token, self.embed(patches))
        return self.transform(tokens, centers)

    def forward(self, patches: Tensor, centers: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Features ``[B, 512]`` of norm 1, and logits ``[M, V]`` of the M masked patches, in the order of the mask.

        The arguments are those of `masked`; both results are at least in float32.
        """
        x = self.masked(patches, centers, mask)
        return self.features_of(x), at_least_float32(self.lm_head(x[:, 1:][mask]))

    def features_of(self, tokens: Tensor) -> Tensor:
        """Of tokens of `masked` ``[B, 1 + G, C]`` the features ``[B, 512]``, of norm 1."""
        return F.normalize(at_least_float32(self.cls_head(tokens[:, 0])), dim=1)


class Losses(NamedTuple):
    """Of a batch, each ``[]``.

    Args:
        masked: cross-entropy of the tokens of masked patches.
        mixed: the same of mixed clouds.
        contrast: see `mixing_contrast`.
        plain: the contrast of the clouds that are not mixed, as in MoCo; 0 unless it is wanted.
        accuracy: fraction of the masked tokens that are predicted, of clouds that are not mixed.
    """

    masked: Tensor
    mixed: Tensor
    contrast: Tensor
    plain: Tensor
    accuracy: Tensor


class PointBert(nn.Module):
    """Point-BERT's model for pre-training (Yu et al., CVPR 2022), with the parameter names of its checkpoints.

    The trunk of its student ``transformer_q`` loads into the classifier (`pointewa.models.load_weights`). Its momentum
    encoder ``transformer_k`` gives the keys of the contrast; the frozen ``dvae`` gives the tokens. It differs from the
    published code in this: the tokenizer is in evaluation mode throughout, whereas theirs normalises by the statistics
    of the batch and changes its own, and at least one patch of a cloud is masked.

    Between two optimizer steps call `follow`.

    Args:
        architecture: of the student. Its patches, and its patch encoder, must be those of the tokenizer.
        dvae: the tokenizer. Its patch encoder is copied into the student.
        queue_size: number of keys of former batches; 16,384 as published.
        mask_ratio: limits of the fraction of the patches that is masked, which is rounded down.
        mask_rand: mask each patch by itself, with one ratio for a batch, instead of a block.
        plain_contrast: whether `forward` also gives the contrast without mixing.
        temperature: of the contrasts.
        momentum: of ``transformer_k``.

    Raises:
        ValueError: an argument out of range, or of an architecture that does not fit the tokenizer's.
    """

    def __init__(
        self,
        architecture: Architecture,
        dvae: DiscreteVAE,
        queue_size: int = 16384,
        mask_ratio: tuple[float, float] = (0.25, 0.45),
        mask_rand: bool = False,
        plain_contrast: bool = False,
        temperature: float = 0.07,
        momentum: float = 0.999,
    ) -> None:
        super().__init__()
        if not 0 < mask_ratio[0] <= mask_ratio[1] < 1:
            raise ValueError(f"mask_ratio must rise from above 0 to below 1, got {list(mask_ratio)}")
        if queue_size < 1:
            raise ValueError(f"queue_size must be at least 1, got {queue_size}")
        if not temperature > 0 or not 0 <= momentum <= 1:
            raise ValueError(f"temperature must be above 0 and momentum from 0 to 1, got {temperature} and {momentum}")
        self.architecture, self.mask_ratio, self.mask_rand = architecture, mask_ratio, mask_rand
        self.plain_contrast, self.temperature, self.momentum = plain_contrast, temperature, momentum
        self.transformer_q = MaskedPointTransformer(architecture, dvae.codebook_size)
        _check_fits(architecture, self.transformer_q.encoder, dvae)
        self.transformer_q.encoder.load_state_dict(dvae.encoder.state_dict())
        self.transformer_k = copy.deepcopy(self.transformer_q).requires_grad_(False)
        self.dvae = dvae.requires_grad_(False).eval()
        self.register_buffer("queue", F.normalize(torch.randn(FEATURES, queue_size), dim=0))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.int64))
        self._keys: list[Tensor] = []  # of the forward passes since the last optimizer step

    def train(self, mode: bool = True) -> "PointBert":
        """As of any module, but the tokenizer stays in evaluation mode."""
        super().train(mode)
        self.dvae.eval()
        return self

    def is_ffn(self, name: str, module: nn.Module) -> bool:
        """Which modules `pointewa.ewa.to_moe` may make experts of: the student's FFNs.

        The momentum encoder, which is never trained, stays dense, and follows the experts' mean.
        """
        return name.startswith("transformer_q.blocks.") and isinstance(module, Mlp)

    def forward(self, points: Tensor) -> Losses:
        """``points [B, P, 3]`` -> the losses; what is masked and mixed is drawn anew at each call.

        In training mode the keys are kept for `follow`.

        Raises:
            ValueError: a wrong shape or an empty cloud; in evaluation mode also non-finite values.
        """
        cut, tokens = self._tokenized(points)
        mask = self.draw_mask(cut.centers)
        features, logits = self.transformer_q(cut.patches, cut.centers, mask)
        mixed = mix(cut.patches, cut.centers, tokens)
        mixed_mask = self.draw_mask(mixed.centers)
        mixed_features, mixed_logits = self.transformer_q(mixed.patches, mixed.centers, mixed_mask)
        with torch.no_grad():
            key_tokens = self.transformer_k.masked(cut.patches, cut.centers, self.draw_mask(cut.centers))
            keys = self.transformer_k.features_of(key_tokens)
        if self.training:
            self._keys.append(keys)
        targets = tokens[mask]
        contrast = mixing_contrast(mixed_features, keys, self.queue, mixed.ratio, self.temperature)
        plain = torch.zeros_like(contrast)
        if self.plain_contrast:
            plain = plain_contrast(features, keys, self.queue, self.temperature)
        return Losses(
            F.cross_entropy(logits, targets),
            F.cross_entropy(mixed_logits, mixed.tokens[mixed_mask]),
            contrast,
            plain,
            (logits.argmax(1) == targets).float().mean(),
        )

    def predict(self, points: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """For each cloud of ``points [B, P, 3]`` how well its masked tokens are predicted, all ``[B]``.

        Returns:
            The sum of their cross-entropies, how many are predicted, and how many there are.
        """
        cut, tokens = self._tokenized(points)
        mask = self.draw_mask(cut.centers)
        _, logits = self.transformer_q(cut.patches, cut.centers, mask)
        targets, cloud = tokens[mask], mask.nonzero()[:, 0]
        losses, hits = F.cross_entropy(logits, targets, reduction="none"), logits.argmax(1) == targets
        sums = [losses.new_zeros(len(points)).index_add(0, cloud, one.to(losses)) for one in (losses, hits)]
        return sums[0], sums[1].long(), mask.sum(1)

    def features(self, points: Tensor) -> Tensor:
        """``points [B, P, 3] -> features [B, 2 * width]``: the class token, and the maximum over the patches' tokens,
        unmasked, as the classifier has them."""
        cut = self._cut(points)
        x = self.transformer_q.transform(self.transformer_q.embed(cut.patches), cut.centers)
        return torch.cat([x[:, 0], x[:, 1:].amax(1)], dim=-1)

    @torch.no_grad()
    def reconstruct(self, points: Tensor) -> Reconstruction:
        """Mask clouds, predict the tokens, and decode them, for pictures. Call ``eval()`` first.

        Of each cloud ``points [B, P, 3]`` a block is masked of the middle size between the limits of ``mask_ratio``.

        Raises:
            ValueError: as `forward`.
        """
        cut, tokens = self._tokenized(points)
        count = max(1, int(sum(self.mask_ratio) / 2 * self.architecture.num_groups))
        rank = _block(cut.centers)
        mask = rank < count
        _, logits = self.transformer_q(cut.patches, cut.centers, mask)
        tokens[mask] = logits.argmax(1)
        decoded = self.dvae.decode(tokens, cut.centers)
        order = rank.argsort(1)
        masked, visible = order[:, :count], order[:, count:]

        def placed(patches: Tensor, index: Tensor) -> Tensor:
            return group(patches, index) + group(cut.centers, index).unsqueeze(2)

        return Reconstruction(placed(cut.patches, visible), placed(decoded, masked), placed(cut.patches, masked))

    def draw_mask(self, centers: Tensor) -> Tensor:
        """Which patches are masked, bool ``[B, G]``, by their centres ``[B, G, 3]``; at least one of each cloud."""
        return (random_mask if self.mask_rand else block_mask)(centers, *self.mask_ratio)

    def forget(self) -> None:
        """Forget the keys of forward passes that no optimizer step has followed."""
        self._keys.clear()

    @torch.no_grad()
    def follow(self, gather: Callable[[Tensor], Tensor] = lambda rows: rows) -> None:
        """After an optimizer step: move the momentum encoder, and put the keys of the step into the queue.

        Of experts in the place of an FFN the momentum encoder follows the mean.

        Args:
            gather: from this process's keys ``[B, 512]`` to those of all processes, the same on each.
        """
        for key, query in self._followed():
            key.lerp_(query, 1 - self.momentum)
        keys = gather(torch.cat(self._keys))
        self.forget()
        size = self.queue.shape[1]
        place = (self.queue_ptr + torch.arange(len(keys), device=keys.device)) % size  # (B,), over the end if need be
        # Where there are more keys than places, only the last ones can stay.
        self.queue[:, place[-size:]] = keys[-size:].T.to(self.queue)
        self.queue_ptr.copy_((self.queue_ptr + len(keys)) % size)

    def _followed(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The parameters of the momentum encoder, each with the student's; experts are stacked along a dimension."""
        student = {name.replace(".experts.", "."): one for name, one in self.transformer_q.named_parameters()}
        for name, key in self.transformer_k.named_parameters():
            query = student[name]
            yield key, query if query.ndim == key.ndim else query.mean(0)

    def _cut(self, points: Tensor) -> Patches:
        arch = self.architecture
        return make_patches(points, arch.num_groups, arch.group_size, check_finite=not self.training)

    @torch.no_grad()
    def _tokenized(self, points: Tensor) -> tuple[Patches, Tensor]:
        """The patches of clouds ``[B, P, 3]`` and their tokens, int64 ``[B, G]``, which no precision of the training
        may change."""
        cut = self._cut(points)
        with torch.autocast(points.device.type, enabled=False):
            return cut, self.dvae.tokens(cut.patches, cut.centers)


class Mixed(NamedTuple):
    """Clouds whose patches are partly their own and partly their partners'.

    Args:
        patches, centers, tokens: as of other clouds.
        ratio: drawn share of their own, ``[B]``.
    """

    patches: Tensor
    centers: Tensor
    tokens: Tensor
    ratio: Tensor


def mix(patches: Tensor, centers: Tensor, tokens: Tensor) -> Mixed:
    """Point-patch mixing: each patch is kept with a probability drawn for its cloud, else it is the partner's.

    The partner of a cloud is the one at its place from the end of the batch. A patch goes with its centre and token.

    Args:
        patches: ``[B, G, K, 3]``.
        centers: ``[B, G, 3]``.
        tokens: int64 ``[B, G]``.
    """
    ratio = torch.rand(len(patches), device=patches.device)
    own = torch.rand(tokens.shape, device=patches.device) < ratio.unsqueeze(1)
    parts = [
        torch.where(own.view(*own.shape, *[1] * (one.ndim - 2)), one, one.flip(0)) for one in (patches, centers, tokens)
    ]
    return Mixed(*parts, ratio.to(patches.dtype))


def block_mask(centers: Tensor, low: float, high: float) -> Tensor:
    """A random patch of each cloud and those nearest to it by their centres ``[B, G, 3]``, bool ``[B, G]``.

    Their fraction is drawn for each cloud between ``low`` and ``high``; their number is rounded down, to at least 1.
    """
    batch, groups, _ = centers.shape
    ratio = low + (high - low) * torch.rand(batch, device=centers.device)
    count = (ratio * groups).long().clamp(min=1)
    return _block(centers) < count.unsqueeze(1)


def _block(centers: Tensor) -> Tensor:
    """For each patch how many are nearer to a random patch of its cloud, int64 ``[B, G]``."""
    batch, groups, _ = centers.shape
    start = torch.randint(groups, (batch, 1), device=centers.device)
    distance = (centers - group(centers, start)).square().sum(-1)
    return distance.argsort(1).argsort(1)


def random_mask(centers: Tensor, low: float, high: float) -> Tensor:
    """Each patch by itself with a probability drawn for the batch, bool ``[B, G]``; at least one of each cloud."""
    drawn = torch.rand(centers.shape[:2], device=centers.device)
    ratio = low + (high - low) * torch.rand((), device=centers.device)
    return drawn <= torch.maximum(drawn.amin(1, keepdim=True), ratio)


def mixing_contrast(features: Tensor, keys: Tensor, queue: Tensor, ratio: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of mixed clouds: among all keys their own has the target ``ratio``, their partner's the rest.

    Args:
        features: of the mixed clouds, ``[B, F]``, of norm 1.
        keys: of the clouds, ``[B, F]``, of norm 1.
        queue: keys of other clouds, ``[F, Q]``.
        ratio: ``[B]``.
        temperature: by which the products are divided.

    Returns:
        The mean ``[]``.
    """
    with torch.autocast(features.device.type, enabled=False):  # products in bfloat16 are too coarse for a temperature
        scores = torch.cat([features @ keys.T, features @ queue], dim=1) / temperature
    own = torch.arange(len(features), device=features.device)
    of_own, of_partner = (F.cross_entropy(scores, target, reduction="none") for target in (own, own.flip(0)))
    return (ratio * of_own + (1 - ratio) * of_partner).mean()


def plain_contrast(features: Tensor, keys: Tensor, queue: Tensor, temperature: float) -> Tensor:
    """MoCo's cross-entropy: each cloud's own key against the queue; the arguments are `mixing_contrast`'s."""
    with torch.autocast(features.device.type, enabled=False):
        scores = torch.cat([(features * keys).sum(1, keepdim=True), features @ queue], dim=1) / temperature
    return F.cross_entropy(scores, torch.zeros(len(features), dtype=torch.int64, device=features.device))


def _check_fits(architecture: Architecture, encoder: nn.Module, dvae: DiscreteVAE) -> None:
    """Refuse a student whose patches, or whose patch encoder, are not the tokenizer's."""
    for name in ("num_groups", "group_size"):
        if getattr(architecture, name) != getattr(dvae, name):
            raise ValueError(f"{name} must be the tokenizer's {getattr(dvae, name)}, got {getattr(architecture, name)}")
    mine, theirs = (
        [layer.out_channels for layer in one.modules() if isinstance(layer, nn.Conv1d)]
        for one in (encoder, dvae.encoder)
    )
    if mine != theirs:
        name = "patch_width" if mine[0] != theirs[0] else "patch_out"
        raise ValueError(
            f"{name} must be such that the patch encoder has the tokenizer's widths {theirs}, of which it starts as a "
            f"copy, got {mine}"
        )
