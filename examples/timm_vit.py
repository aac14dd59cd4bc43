"""EWA on a ViT of timm's, in a training loop of one's own: small images of gratings, made on the spot.

.venv/bin/python examples/timm_vit.py            # a minute or two on two CPU cores
.venv/bin/python examples/timm_vit.py --steps 20 --bits 4  # what is kept for the backward pass in 4 bits

Needs timm (pip install timm).
"""

import argparse

import timm
import torch
import torch.nn.functional as F
from torch import Tensor

import pointewa.ewa as ewa
from pointewa import compression

CLASSES = 8  # orientations of the grating


def images(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Noisy gratings ``[count, 3, 32, 32]`` and the number of their orientation ``[count]``."""
    labels = torch.randint(CLASSES, (count,), generator=generator)
    angle = (labels + 0.6 * torch.rand(count, generator=generator) - 0.3) * torch.pi / CLASSES
    frequency = 0.4 + 0.6 * torch.rand(count, generator=generator)
    phase = 2 * torch.pi * torch.rand(count, generator=generator)
    y, x = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    along = x * angle.cos().view(-1, 1, 1) + y * angle.sin().view(-1, 1, 1)
    grating = (frequency.view(-1, 1, 1) * along + phase.view(-1, 1, 1)).sin()
    colour = torch.rand(count, 3, 1, 1, generator=generator)
    return grating.unsqueeze(1) * colour + 0.7 * torch.randn(count, 3, 32, 32, generator=generator), labels


def main() -> None:
    """Train with EWA, fold, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument(
        "--bits", type=int, default=32, choices=(2, 4, 8, 16, 32), help="of activations; 32: as they are"
    )
    args = parser.parse_args()
    steps = args.steps
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    vit = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=4, embed_dim=96, depth=6, num_heads=3, num_classes=CLASSES
    )

    model = ewa.to_moe(vit, num_experts=4, layers="every_other")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps)
    ewa.ExpertAveraging(model, ewa.linear(0.3, steps)).attach(optimizer)
    compressed = compression.activations(model, bits=args.bits, attention_bits=max(args.bits, 8))

    for step in range(steps):
        x, y = images(64, generator)
        with compressed:
            loss = F.cross_entropy(model(x), y)
        kept = compressed.nbytes
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if (step + 1) % 50 == 0:
            apart = max(ewa.disagreement(model).values())
            print(f"step {step + 1}/{steps}  loss {loss:.3f}  experts apart by {apart:.1e}")
    print(f"kept for the backward pass: {kept / 1e6:.1f} MB")

    dense = ewa.fold(model)
    x, y = images(1000, torch.Generator().manual_seed(1))
    with torch.no_grad():
        mixture, folded = model.eval()(x), dense.eval()(x)
    print(f"accuracy {100 * (folded.argmax(1) == y).float().mean():.1f} % of {len(y)} new images")
    print(f"largest difference of logits, mixture and folded: {(mixture - folded).abs().max():.1e}")
    assert dense.state_dict().keys() == vit.state_dict().keys()  # the ViT that timm made, parameter for parameter
    print(f"parameters: {_count(model):,} in training, {_count(dense):,} now")


def _count(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


if __name__ == "__main__":
    main()
