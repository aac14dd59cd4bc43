"""A plain twin of Point-MAE's classifier and training step, in the form in which the published code does it.

Float32, one operation after another: sampling and neighbours anew at every step, convolutions on the expanded
concatenation, attention that keeps its matrix, augmentation cloud by cloud, an optimizer that goes tensor by tensor,
loss and accuracy read from the device at every step.

As published, and unlike our training, a random subset takes the same positions for the whole batch. Unlike the
published code, which needs CUDA extensions for both: farthest point sampling is a loop in
torch, on a GPU slower than their kernel (and unlike that kernel it keeps points near the origin), and
neighbours come from `torch.cdist`. Where a cloud has no more points than the model is to see, nothing is drawn; the
published loop then shuffles it.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pointewa.models import Architecture


def farthest_point_sample(points: Tensor, num_samples: int) -> Tensor:
    """``points [B, N, 3] -> indices [B, num_samples]``, from index 0 on; ``num_samples`` distinct points or more."""
    batch = torch.arange(len(points), device=points.device)
    picks = torch.zeros(len(points), num_samples, dtype=torch.int64, device=points.device)
    distance = torch.full(points.shape[:2], torch.inf, dtype=points.dtype, device=points.device)
    for i in range(1, num_samples):
        last = points[batch, picks[:, i - 1]].unsqueeze(1)  # (B, 1, 3)
        distance = torch.minimum(distance, ((points - last) ** 2).sum(-1))
        picks[:, i] = distance.argmax(1)
    return picks


def knn(queries: Tensor, points: Tensor, num_neighbors: int) -> Tensor:
    """``[B, G, 3], [B, N, 3] -> indices [B, G, num_neighbors]`` by the full matrix of distances."""
    # By differences, as the published kernel: a matrix product would follow the GPU's TF32 setting.
    distance = torch.cdist(queries, points, compute_mode="donot_use_mm_for_euclid_dist")
    return distance.topk(num_neighbors, largest=False).indices


def gather(points: Tensor, index: Tensor) -> Tensor:
    """``[B, N, 3], [B, ...] -> [B, ..., 3]``."""
    batch = torch.arange(len(points), device=points.device).view(-1, *[1] * (index.ndim - 1))
    return points[batch, index]


class PatchEncoder(nn.Module):
    """The mini-PointNet, on ``[patches, channels, points]``."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.first_conv = _two_convolutions(3, width, 2 * width)
        self.second_conv = _two_convolutions(4 * width, 4 * width, out)

    def forward(self, patches: Tensor) -> Tensor:
        """``[B, G, K, 3] -> [B, G, out]``."""
        batch, num_groups, group_size, _ = patches.shape
        x = self.first_conv(patches.reshape(batch * num_groups, group_size, 3).transpose(1, 2))  # (BG, 2w, K)
        of_patch = x.max(2, keepdim=True)[0]
        x = torch.cat([of_patch.expand(-1, -1, group_size), x], 1)  # (BG, 4w, K), the first half K times the same
        return self.second_conv(x).max(2)[0].reshape(batch, num_groups, -1)


def _two_convolutions(into: int, hidden: int, out: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv1d(into, hidden, 1), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True), nn.Conv1d(hidden, out, 1)
    )


class Attention(nn.Module):
    """Self-attention with its matrix written out."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.scale = heads, (width // heads) ** -0.5
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.attn_drop = nn.Dropout(0.0)
        self.proj = nn.Linear(width, width)
        self.proj_drop = nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, T, C] -> [B, T, C]``."""
        batch, tokens, width = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, T, C/heads) each
        weights = self.attn_drop(((q @ k.transpose(2, 3)) * self.scale).softmax(-1))
        return self.proj_drop(self.proj((weights @ v).transpose(1, 2).reshape(batch, tokens, width)))


class Mlp(nn.Module):
    """The FFN."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, width)
        self.drop = nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, T, C] -> [B, T, C]``."""
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


class DropPath(nn.Module):
    """Stochastic depth."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """``[B, T, C] -> [B, T, C]``."""
        if self.rate == 0 or not self.training:
            return x
        keep = torch.rand(len(x), 1, 1, device=x.device) < 1 - self.rate
        return x / (1 - self.rate) * keep


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = Mlp(width, int(width * mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, T, C] -> [B, T, C]``."""
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class Encoder(nn.Module):
    """The blocks; the position is added before each."""

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        rates = [arch.drop_path * i / max(arch.depth - 1, 1) for i in range(arch.depth)]
        self.blocks = nn.ModuleList(Block(arch.width, arch.heads, arch.mlp_ratio, rate) for rate in rates)

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        """``[B, T, C], [B, T, C] -> [B, T, C]``."""
        for block in self.blocks:
            x = block(x + position)
        return x


class PlainClassifier(nn.Module):
    """The classifier, with the parameter names of `pointewa.models.PointTransformerClassifier` and fresh weights by
    torch's defaults (published scratch runs have these too).

    Args:
        architecture: as for ours.
        num_classes: size of the output.
    """

    def __init__(self, architecture: Architecture, num_classes: int) -> None:
        super().__init__()
        arch = self.architecture = architecture
        self.encoder = PatchEncoder(arch.patch_width, arch.patch_out)
        self.reduce_dim = nn.Identity() if arch.patch_out == arch.width else nn.Linear(arch.patch_out, arch.width)
        self.cls_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, arch.width), std=0.02))
        self.cls_pos = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, arch.width), std=0.02))
        self.pos_embed = nn.Sequential(nn.Linear(3, 128), nn.GELU(), nn.Linear(128, arch.width))
        self.blocks = Encoder(arch)
        self.norm = nn.LayerNorm(arch.width)
        if arch.head == "point_bert":
            hidden = [nn.Linear(2 * arch.width, 256), nn.ReLU(inplace=True), nn.Dropout(0.5)]
        else:
            hidden = [
                layer
                for width in (2 * arch.width, 256)
                for layer in (nn.Linear(width, 256), nn.BatchNorm1d(256), nn.ReLU(inplace=True), nn.Dropout(0.5))
            ]
        self.cls_head_finetune = nn.Sequential(*hidden, nn.Linear(256, num_classes))

    def forward(self, points: Tensor) -> Tensor:
        """``points [B, N, 3] -> logits [B, num_classes]``."""
        arch, batch = self.architecture, len(points)
        centers = gather(points, farthest_point_sample(points, arch.num_groups))
        patches = gather(points, knn(centers, points, arch.group_size)) - centers.unsqueeze(2)
        tokens = self.reduce_dim(self.encoder(patches))  # (B, G, C)
        x = torch.cat([self.cls_token.expand(batch, -1, -1), tokens], 1)
        position = torch.cat([self.cls_pos.expand(batch, -1, -1), self.pos_embed(centers)], 1)
        x = self.norm(self.blocks(x, position))
        return self.cls_head_finetune(torch.cat([x[:, 0], x[:, 1:].max(1)[0]], -1))


def random_subset(points: Tensor, num_points: int) -> Tensor:
    """``[B, N, 3] -> [B, num_points, 3]``: the farthest 1200 for 1024 (in this ratio, at most N), then a random
    subset, of the same positions for the whole batch, from NumPy's global generator."""
    pool = min(points.shape[1], num_points * 1200 // 1024)
    picks = farthest_point_sample(points, pool)
    return gather(points, picks[:, np.random.choice(pool, num_points, replace=False)])


def augment(points: Tensor) -> Tensor:
    """``[B, N, 3] -> [B, N, 3]``: each axis of each cloud scaled by U(2/3, 3/2) and shifted by U(-0.2, 0.2), one cloud
    after another, drawn on the CPU from NumPy's global generator."""
    points = points.clone()
    for i in range(len(points)):
        scale, shift = np.random.uniform(2 / 3, 3 / 2, 3), np.random.uniform(-0.2, 0.2, 3)
        points[i] = points[i] * torch.from_numpy(scale).to(points) + torch.from_numpy(shift).to(points)
    return points


def plain_optimizer(model: nn.Module, lr: float = 5e-4, weight_decay: float = 0.05) -> torch.optim.AdamW:
    """AdamW without weight decay on 1-D parameters, biases and names with "token"."""
    decay, rest = [], []
    for name, parameter in model.named_parameters():
        (rest if parameter.ndim == 1 or name.endswith(".bias") or "token" in name else decay).append(parameter)
    groups = [{"params": decay, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, fused=False, foreach=False)  # as torch had it when that code was written


def plain_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, points: Tensor, labels: Tensor, num_points: int = 1024
) -> tuple[float, float]:
    """One iteration: subset (where there are more than ``num_points``), augmentation, loss, gradients, clip, update.

    Args:
        model: in training mode.
        optimizer: see `plain_optimizer`.
        points: ``[B, N, 3]``; all are used where N <= ``num_points``. Not changed.
        labels: int64 ``[B]``.
        num_points: points that the model sees.

    Returns:
        Loss, and accuracy in percent.
    """
    if points.shape[1] > num_points:
        points = random_subset(points, num_points)
    logits = model(augment(points))
    loss = F.cross_entropy(logits, labels)
    accuracy = 100 * (logits.argmax(-1) == labels).float().mean()
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 10)
    optimizer.step()
    return loss.item(), accuracy.item()
