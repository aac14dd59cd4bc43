"""A training and one step of it, for dense models and mixtures of experts alike."""

import copy
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

import pointewa.ewa as ewa
from pointewa.errors import ConfigError, counted
from pointewa.models.parts import Parts
from pointewa.tasks.base import Batch, Outputs, Task, evaluating
from pointewa.train.build import build_averaging, build_ema, build_model
from pointewa.train.device import select_device, select_precision
from pointewa.train.distributed import ALONE, World
from pointewa.train.optimizer import build_optimizer, learning_rate


class Training:
    """The model, everything that updates it, and the progress so far.

    Args:
        task: what is learned.
        class_names: of the data set.
        steps_per_epoch: batches in an epoch.
        world: the processes that train together.
        parts: of the data set's objects.
        saved: the model of the checkpoint that the training resumes from; None for one from the start.

    Raises:
        ConfigError, CheckpointError: what cannot be built or loaded.

    Attributes:
        report: of ``train.init_from``; None without it.
        step: number of steps done.
        seconds: that they took.
        skipped: how many of them changed nothing, as reported by `take_skipped`.
    """

    def __init__(
        self,
        task: Task,
        class_names: tuple[str, ...],
        steps_per_epoch: int,
        world: World = ALONE,
        parts: Parts | None = None,
        saved: nn.Module | None = None,
    ) -> None:
        config = task.config.train
        self.task, self.config, self.world, self.steps_per_epoch = task, task.config, world, steps_per_epoch
        self.device = select_device(config.device)
        self.precision = select_precision(config.precision, self.device)
        self.total_steps = config.epochs * steps_per_epoch
        if config.batch_size % (config.accumulate * world.size):
            raise ConfigError(
                f"train.batch_size: expected a multiple of train.accumulate x processes "
                f"({config.accumulate} x {world.size}), found {config.batch_size}"
            )
        torch.manual_seed(config.seed)  # the same weights on every process
        model, self.report = build_model(task, class_names, parts, saved)
        self.model: nn.Module = model.to(self.device)
        for module in self.model.modules():
            if hasattr(module, "activation_checkpointing"):
                module.activation_checkpointing = config.activation_checkpointing
        self.optimizer = build_optimizer(self.model, config)
        self.averaging = build_averaging(self.config, self.model, self.optimizer, self.optimizer_steps)
        self.ema = build_ema(self.model, config.ema_decay)
        self.step, self.seconds, self.skipped = 0, 0.0, 0
        self.sums = ("loss", *task.train_metrics, "grad_norm", "objects")
        self.totals = torch.zeros(len(self.sums), device=self.device)  # over the epoch so far
        self.nonfinite: list[Tensor] = []  # for each step since the last look: was it skipped?
        self.ddp = self.forward = self.model

    @property
    def optimizer_steps(self) -> int:
        """Those of the whole training."""
        return self.total_steps * self.config.train.steps_per_batch

    @property
    def foldable(self) -> bool:
        """Whether there are experts that fold into one FFN."""
        return self.config.router == "random"

    @property
    def evaluated(self) -> nn.Module:
        """The model whose metrics count: the one in training, or the average of its weights."""
        return self.ema.module if self.ema else self.model

    def train_step(self, batch: Batch) -> None:
        """One iteration on a batch (with several processes, on this one's part of it).

        Gradients, optimizer, averaging. If the loss or a gradient is non-finite, the model stays as it was.
        """
        config, world = self.config.train, self.world
        for group in self.optimizer.param_groups:
            group["lr"] = group["lr_scale"] * learning_rate(self.step, self.steps_per_epoch, config)
        # The steps that are timed before a short training may be more than it has.
        self.task.before_step(self.model, min(1.0, self.step / self.total_steps))
        statistics = _statistics(self.model)
        before = _flat(statistics, self.device)
        sums, parts = torch.zeros(len(self.sums) - 2, device=self.device), config.accumulate
        for number, part in enumerate(batch.chunk(parts), 1):
            with self._reduce_gradients(number == parts):
                with torch.autocast(self.device.type, self.precision, enabled=self.precision != torch.float32):
                    loss, logged = self._loss(part)
                balance = (
                    self.config.moe.balance * ewa.balance_loss(self.model) if self.config.router == "top_k" else 0.0
                )
                ((loss + balance) / parts).backward()
            metrics = [logged[name] for name in self.task.train_metrics]
            sums += torch.stack([loss.detach() * len(part.labels), *metrics])
        early = config.steps_per_batch == 2
        norm = self._clip(early)
        # The processes have the same gradients now. Their batch norms' statistics are averaged at each step, so that
        # a checkpoint or an evaluation does not depend on when it is made.
        after = world.sum_(torch.cat([_flat(statistics, self.device), sums]))
        after, sums = after.split([len(before), len(sums)])
        nonfinite = ~(norm.isfinite() & sums[0].isfinite())
        _unflatten(torch.where(nonfinite, before, after / world.size), statistics)
        size = float(len(batch.labels) * world.size)
        objects = torch.full((1,), size, device=self.device)  # created on the device: no wait
        self.totals += torch.where(nonfinite, 0, torch.cat([sums, norm * objects, objects]))
        self.nonfinite.append(nonfinite)
        self.optimizer.found_inf = nonfinite.float()  # makes the optimizer and the averaging after it skip the step
        if early:
            self.optimizer.step()
            self._clip()
        self.optimizer.step()
        self.optimizer.zero_grad()
        follows = type(self.task).after_step is not Task.after_step
        if (self.ema or follows) and not nonfinite:  # waits for the device, as torch's average does anyway
            self.task.after_step(self.model, world.concatenate)
            if self.ema:
                self.ema.update_parameters(self.model)
        self.step += 1

    def _loss(self, part: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        try:
            return self.task.loss(self.forward, part)
        except ValueError as error:
            if len(part.labels) > 1 or "more than 1 value per channel" not in str(error):  # torch's words
                raise
            train, size = self.config.train, self.world.size
            raise ConfigError(
                "train.batch_size: a batch norm over objects, as in most heads, needs at least 2 at a time, found 1: "
                f"train.batch_size={train.batch_size} in train.accumulate={train.accumulate} parts on "
                f"{counted(size, 'process', 'es')}: set a larger batch or fewer parts"
            ) from error

    def _clip(self, only_measure: bool = False) -> Tensor:
        """The norm of the gradients, which are then at most ``clip_norm``, unless they are only to be measured."""
        largest = torch.inf if only_measure else self.config.train.clip_norm or torch.inf
        return torch.nn.utils.clip_grad_norm_(self.model.parameters(), largest)

    def _reduce_gradients(self, now: bool) -> AbstractContextManager:
        """Gradients are reduced over the processes once per step, with the last part of the batch."""
        return nullcontext() if now or self.world.size == 1 else self.ddp.no_sync()

    def take_skipped(self) -> list[int]:
        """The steps that were skipped since the last call. Waits for the device."""
        flags = torch.stack(self.nonfinite).tolist() if self.nonfinite else []
        self.nonfinite.clear()
        return [step for step, skipped in enumerate(flags, self.step - len(flags)) if skipped]

    def metrics(self) -> dict[str, float]:
        """The mean loss, training metrics and gradient norm of the epoch so far. Waits for the device."""
        *sums, objects = self.totals.tolist()
        objects = objects or float("nan")  # every step skipped
        means = {f"train/{name}": value / objects for name, value in zip(self.sums, sums, strict=False)}
        return means | {"train/lr": self.optimizer.param_groups[0]["lr"]}

    def evaluate(self, model: nn.Module, batches: Iterable[Batch]) -> Outputs:
        """The task's outputs on a whole split, of which this process has ``batches``."""
        with evaluating(model):
            found = self.task.outputs(model, batches)
        return {name: self.world.concatenate(rows) for name, rows in found.items()}

    def twin(self) -> "Training":
        """A copy for trying steps, in a single process."""
        twin = copy.copy(self)
        twin.world, twin.nonfinite, twin.totals, twin.ema = ALONE, [], self.totals.clone(), None
        twin.model = twin.ddp = twin.forward = copy.deepcopy(self.model)
        twin.optimizer = build_optimizer(twin.model, self.config.train)
        twin.averaging = build_averaging(self.config, twin.model, twin.optimizer, self.optimizer_steps)
        return twin


def _statistics(model: nn.Module) -> list[Tensor]:
    """What a forward pass changes: the statistics of the batch norms, unless those are frozen."""
    norms = (one for one in model.modules() if isinstance(one, nn.modules.batchnorm._NormBase) and one.training)
    return [buffer for norm in norms for buffer in norm.buffers(recurse=False) if buffer.is_floating_point()]


def _flat(tensors: list[Tensor], device: torch.device) -> Tensor:
    return torch.cat([torch.empty(0, device=device), *(tensor.flatten() for tensor in tensors)])


def _unflatten(flat: Tensor, tensors: list[Tensor]) -> None:
    for tensor, values in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(values.view_as(tensor))
