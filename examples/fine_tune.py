"""Fine-tune a trained point transformer on other classes with EWA, in a loop of one's own.

.venv/bin/python examples/fine_tune.py    # 2 minutes on two CPU cores
.venv/bin/python examples/fine_tune.py --checkpoint runs/x

Trains on 12 of the 17 procedural classes first, unless a checkpoint is given, then fine-tunes on the other five with
four objects of each.
"""

import argparse

import torch
import torch.nn.functional as F

import pointewa.ewa as ewa
from pointewa import datasets
from pointewa.datasets.transforms import scale_shift
from pointewa.models import PRESETS, PointTransformerClassifier, load_weights
from pointewa.runs.weights import load_model


def fit(model: torch.nn.Module, points: torch.Tensor, labels: torch.Tensor, steps: int, lr: float) -> None:
    """A plain loop; EWA is put on the model before it and runs by itself after each optimizer step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    if ewa.moe_layers(model):
        ewa.ExpertAveraging(model, ewa.linear(0.3, steps)).attach(optimizer)
    generator = torch.Generator().manual_seed(0)
    model.train()
    for _ in range(steps):
        batch = torch.randint(len(points), (16,), generator=generator)
        F.cross_entropy(model(scale_shift(points[batch], generator)), labels[batch]).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


def main() -> None:
    """Train, fine-tune, fold, compare with training from scratch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", help="a run of the preset tiny; default: train one here first")
    parser.add_argument("--steps", type=int, default=400, help="of the first training; fine-tuning takes a quarter")
    args = parser.parse_args()
    torch.manual_seed(0)
    train, test = (datasets.load("shapes", "", split, 512) for split in ("train", "test"))
    few = torch.cat([(train.labels == label).nonzero().squeeze(1)[:4] for label in range(12, 17)])
    new, held_out = train.take(few), test.take((test.labels >= 12).nonzero().squeeze(1))

    def classifier(classes: int) -> PointTransformerClassifier:
        return PointTransformerClassifier(PRESETS["tiny"], classes)

    if args.checkpoint:
        trained = load_model(args.checkpoint).model
    else:
        old = train.take((train.labels < 12).nonzero().squeeze(1))
        trained = classifier(12)
        fit(trained, old.points[:, :512], old.labels, args.steps, lr=1e-3)
    for name in ("from scratch", "fine-tuned with EWA"):
        torch.manual_seed(0)
        model = classifier(5)
        if name != "from scratch":
            report = load_weights(model, trained.state_dict())
            print(f"{len(report.loaded)} tensors loaded; the head of another size starts afresh")
            model = ewa.to_moe(model, init="copy")  # every expert starts as the trained FFN
        fit(model, new.points[:, :512], new.labels - 12, args.steps // 4, lr=5e-4)
        dense = (ewa.fold(model) if ewa.moe_layers(model) else model).eval()
        with torch.no_grad():
            hits = dense(held_out.points[:, :512]).argmax(1) == held_out.labels - 12
        print(f"{name}: {100 * hits.float().mean():.1f} % of {len(held_out)} objects of the five new classes")


if __name__ == "__main__":
    main()
