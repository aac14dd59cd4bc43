"""What torchrun starts for test_distributed.py: `-m tests.engine.two_processes WHAT FOLDER`, WHAT a function below."""

import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import torch

from pointewa.engine import Trainer, evaluate
from pointewa.engine.distributed import process_group
from pointewa.errors import DataError
from pointewa.ewa import experts
from tests.conftest import build_trainer
from tools import cli

EXACT = ("model.drop_path=0", "ewa.share_rate=0.4", "train.weight_decay=0.1", "run.name=exact")
KILLED = ("run.name=killed", "train.save_every=3")


class Joined:
    """Batches in float64; of several loaders one after another, as a single process sees those of several."""

    def __init__(self, *loaders):
        self.loaders = loaders

    def __len__(self):
        return len(self.loaders[0])

    def epoch(self, epoch, start=0):
        for parts in zip(*(loader.epoch(epoch, start) for loader in self.loaders), strict=True):
            points, labels = zip(*parts, strict=True)
            yield torch.cat(points).double(), torch.cat(labels)

    def object_names(self, epoch, number):
        return self.loaders[0].object_names(epoch, number)


def exact(trainer, *loaders):
    """The trainer in float64 and without dropout, on joined loaders."""
    trainer.model.double()
    for module in trainer.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    trainer.data = replace(trainer.data, train=Joined(*loaders))
    return trainer


def equality(world, folder):
    """20 steps; what this process ends with, and the partitions it drew."""
    partitions, draw = [], experts.random_partition

    def recorded(*arguments):
        partitions.append(draw(*arguments))
        return partitions[-1]

    experts.random_partition = recorded
    trainer = build_trainer(folder, *EXACT, world=world)
    exact(trainer, trainer.data.train).fit()
    state = {"model": trainer.model.state_dict(), "optimizer": trainer.optimizer.state_dict()["state"]}
    torch.save(state | {"partition": partitions[-1][1], "totals": trainer.totals}, folder / f"rank{world.rank}.pt")


def metrics(world, folder):
    """Evaluation of a set that cannot be shared equally, and what the processes tell each other."""
    trainer = build_trainer(folder, world=world)
    clouds = trainer.data.test.clouds.take(range(59))
    trainer.data.test.clouds = clouds
    shared = evaluate(trainer.model, trainer.data.test, world)
    trainer.data.test.world_size, trainer.data.test.rank = 1, 0
    whole = evaluate(trainer.model, trainer.data.test)
    rows = world.concatenate(torch.full((3 * world.rank, 2), world.rank))
    told = world.tell("first" if world.first else "second")
    largest = world.largest([world.rank, -world.rank, 7])
    order = world.gather(world.rank)
    try:
        world.first_then_others(lambda: fail() if world.first else None)
    except DataError as error:
        failed = str(error)
    except SystemExit as error:
        failed = f"exit {error.code}"
    torch.save(
        {"shared": shared.logits, "labels": shared.labels, "whole": whole.logits, "whole_labels": whole.labels,
         "rows": rows, "told": told, "largest": largest, "order": order, "failed": failed},
        folder / f"rank{world.rank}.pt",
    )  # fmt: skip


def fail():
    raise DataError("damaged")


def killed(world, folder):
    """A training whose second process is killed after the eighth step, unless it has been started again."""
    trainer = build_trainer(folder, *KILLED, world=world)
    step = Trainer.train_step

    def deadly(self, points, labels):
        step(self, points, labels)
        if (self.step, world.rank, os.environ["TORCHELASTIC_RESTART_COUNT"]) == (8, 1, "0"):
            os.kill(os.getpid(), signal.SIGKILL)

    if os.environ.get("KILL"):
        Trainer.train_step = deadly
    trainer.fit()
    trainer.finish()


def main():
    with process_group() as world:
        globals()[sys.argv[1]](world, Path(sys.argv[2]))


if __name__ == "__main__":
    cli.run(main)
