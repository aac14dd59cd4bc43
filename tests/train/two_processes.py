"""What torchrun starts for test_distributed.py: `-m tests.train.two_processes WHAT FOLDER`, WHAT a function below."""

import copy
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.parallel import DistributedDataParallel

import pointewa.ewa as ewa
from pointewa.compression import GradientExchange
from pointewa.errors import DataError
from pointewa.ewa import experts
from pointewa.models.point_bert import PointBert
from pointewa.tasks.base import Batch
from pointewa.tasks.classification import evaluate
from pointewa.tools import cli
from pointewa.train.distributed import process_group
from pointewa.train.trainer import Trainer
from tests.conftest import build_trainer
from tests.tasks.test_masked_point_modeling import write_tokenizer

EXACT = ("model.drop_path=0", "ewa.share_rate=0.4", "train.weight_decay=0.1", "run.name=exact")
MODELING = ("train.task=masked_point_modeling", "train.epochs=1", "task.queue_size=50", "run.name=modeling")
KILLED = ("run.name=killed", "train.save_every=3")


class Joined:
    """Batches in float64; of several loaders one after another, as a single process sees those of several."""

    def __init__(self, *loaders):
        self.loaders = loaders

    def __len__(self):
        return len(self.loaders[0])

    def epoch(self, epoch, start=0):
        for parts in zip(*(loader.epoch(epoch, start) for loader in self.loaders), strict=True):
            points, labels, _ = zip(*parts, strict=True)
            yield Batch(torch.cat(points).double(), torch.cat(labels))

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
    shared = trainer.evaluate(trainer.model, trainer.data.test)
    trainer.data.test.world_size, trainer.data.test.rank = 1, 0
    whole = evaluate(trainer.model, trainer.data.test)
    rows = world.concatenate(torch.full((3 * world.rank, 2), world.rank))
    told = world.broadcast("first" if world.first else "second")
    largest = world.largest([world.rank, -world.rank, 7])
    order = world.gather(world.rank)
    try:
        world.first_then_others(lambda: fail() if world.first else None)
    except DataError as error:
        failed = str(error)
    except SystemExit as error:
        failed = f"exit {error.code}"
    torch.save(
        {"shared": shared["logits"], "labels": shared["labels"], "whole": whole.logits, "whole_labels": whole.labels,
         "rows": rows, "told": told, "largest": largest, "order": order, "failed": failed},
        folder / f"rank{world.rank}.pt",
    )  # fmt: skip


def fail():
    raise DataError("damaged")


def killed(world, folder):
    """A training whose second process is killed after the eighth step, unless it has been started again."""
    trainer = build_trainer(folder, *KILLED, world=world)
    step = Trainer.train_step

    def deadly(self, batch):
        step(self, batch)
        if (self.step, world.rank, os.environ["TORCHELASTIC_RESTART_COUNT"]) == (8, 1, "0"):
            os.kill(os.getpid(), signal.SIGKILL)

    if os.environ.get("KILL"):
        Trainer.train_step = deadly
    trainer.fit()
    trainer.finish()


def exchanged(world, folder):
    """20 steps with gradients in 8 bits; a training with error feedback, whole, and interrupted and resumed."""
    few = ("compress.gradients=8", "compress.error_feedback=true")
    exchanges = {"exact": None, "plain": GradientExchange(), "feedback": GradientExchange(error_feedback=True)}
    found = {name: encoder_after_20_steps(world, exchange) for name, exchange in exchanges.items()}
    for name, keys in {"whole": (), "part": ("train.save_every=3",)}.items():
        trainer = build_trainer(folder, *few, *keys, f"run.name={name}", world=world)
        if name == "part":
            step = Trainer.train_step

            def stopped(self, batch, step=step):
                if self.step == 8 and self.folder.exists() and self.world.size == 2:
                    raise KeyboardInterrupt
                step(self, batch)

            Trainer.train_step = stopped
            try:
                trainer.fit()
            except KeyboardInterrupt:
                Trainer.train_step = step
            trainer = build_trainer(folder, *few, *keys, f"run.name={name}", world=world)
            found["resumed from"] = trainer.step
        trainer.fit()
        found[name] = flat(trainer.model)
    found["bytes"] = (exchanges["plain"].sent, exchanges["plain"].plain)
    torch.save(found, folder / f"rank{world.rank}.pt")


def encoder_after_20_steps(world, exchange):
    """How far a transformer, without batch norms, which amplify any difference, has moved by SGD."""
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(64, 4, 256, dropout=0.0, batch_first=True)
    model = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    ddp, start = DistributedDataParallel(model), flat(model)
    if exchange:
        exchange.attach(ddp)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    generator = torch.Generator().manual_seed(world.rank)
    for _ in range(20):
        x = torch.randn(8, 16, 64, generator=generator)
        (ddp(x) - x.roll(1, 1)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return flat(model) - start


def flat(model):
    return torch.cat([one.detach().flatten().clone() for one in model.parameters()])


def sharded(world, folder):
    """Five steps under FSDP2 with the experts split along their output dimension, beside a model that is not split."""
    torch.manual_seed(0)
    dense = torch.nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    whole = ewa.to_moe(torch.nn.TransformerEncoder(dense, 4, enable_nested_tensor=False), num_experts=4)
    split = copy.deepcopy(whole)
    experts_ = set(ewa.stacked_parameters(split).values())
    for module in (*split.layers, split):
        fully_shard(module, shard_placement_fn=lambda parameter: Shard(1) if parameter in experts_ else Shard(0))
    averagings = []
    for model in (whole, split):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        averagings.append(ewa.ExpertAveraging(model, 0.3).attach(optimizer))
        for seed in range(5):
            torch.manual_seed(seed)  # on every process the same tokens and partition
            model(torch.randn(4, 8, 32)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    with CommDebugMode() as messages:
        averagings[1].step()
    averagings[0].step()
    gathered = {name: parameter.full_tensor() for name, parameter in split.named_parameters()}
    difference = max((gathered[name] - value).abs().max().item() for name, value in whole.named_parameters())
    parameter = split.get_parameter("layers.1.linear1.experts.linear1.weight")
    for module in (by_expert := copy.deepcopy(whole)).layers:
        fully_shard(module)  # by default along the first dimension: the experts themselves
    try:
        ewa.ExpertAveraging(by_expert, 0.3).step()
        refused = ""
    except ValueError as error:
        refused = str(error)
    torch.save(
        {"messages": messages.get_total_counts(), "difference": difference, "whole": parameter.shape,
         "local": parameter.to_local().shape, "refused": refused},
        folder / f"rank{world.rank}.pt",
    )  # fmt: skip


def queues(world, folder):
    """Ten steps of masked point modelling; the model, and the keys that this process gave in its last step."""
    given, follow = [], PointBert.follow

    def recorded(self, gather):
        given.append(torch.cat(self._keys))
        follow(self, gather)

    PointBert.follow = recorded
    tokenizer = world.first_then_others(lambda: write_tokenizer(folder / "tok") if world.first else folder / "tok")
    trainer = build_trainer(folder, *MODELING, f"task.tokenizer={tokenizer}", world=world)
    trainer.fit()
    torch.save({"model": trainer.model.state_dict(), "given": given[-1]}, folder / f"rank{world.rank}.pt")


def main():
    with process_group() as world:
        globals()[sys.argv[1]](world, Path(sys.argv[2]))


if __name__ == "__main__":
    cli.run(main)
