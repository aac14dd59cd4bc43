"""The training loop, for dense and EWA models alike."""

import copy
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import pointewa.ewa as ewa
from pointewa.config import Config, save_interval
from pointewa.errors import ConfigError, Stopped, TrainingError
from pointewa.runs.description import LoadedModel
from pointewa.runs.folder import Claim, can_resume, start_run
from pointewa.runs.log import Logbook
from pointewa.runs.summary import write_summary
from pointewa.runs.weights import LAST, MODEL, save_model
from pointewa.tasks.base import Batch
from pointewa.tasks.classification import Evaluation, evaluate
from pointewa.train.build import build_averaging, build_ema, build_model
from pointewa.train.checkpoint import save_state
from pointewa.train.device import environment, peak_memory, select_device, select_precision
from pointewa.train.distributed import ALONE, World
from pointewa.train.optimizer import build_optimizer, learning_rate
from pointewa.train.progress import TrainingProgress, duration, say
from pointewa.train.resume import load_training_state, training_state
from pointewa.train.rng import random_state, seed_all, set_random_state
from pointewa.train.signals import StopSignals


class TrainBatches(Protocol):
    """Batches of an epoch, entered anywhere; see `datasets.loader.TrainLoader`."""

    def __len__(self) -> int: ...

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """This process's parts of the batches from number ``start`` on."""
        ...

    def object_names(self, epoch: int, number: int) -> list[str]:
        """What is in a whole batch."""
        ...


@dataclass(frozen=True)
class Data:
    """What is trained and evaluated on, on the device of the training. With several processes, this one's part of it.

    Args:
        train: the batches of training.
        val: those of the validation split; None without one.
        test: those of the test split.
        class_names: C names.
        normalize: what was done to the clouds, see `pointewa.runs.description.LoadedModel`.
    """

    train: TrainBatches
    val: Iterable[Batch] | None
    test: Iterable[Batch]
    class_names: tuple[str, ...]
    normalize: str = "unit_sphere"


class Trainer:
    """Trains a model as its configuration says, in a run folder; goes on from a checkpoint that is there.

    Args:
        config: the configuration.
        data: the batches.
        folder: of the run, see `pointewa.runs.folder.find_run`.
        console: where progress is shown.
        world: the processes that train together; the first one writes.

    Raises:
        ConfigError, CheckpointError: what cannot be built or loaded.
    """

    def __init__(self, config: Config, data: Data, folder: Path, console: Console, world: World = ALONE) -> None:
        self.config, self.data, self.folder, self.console, self.world = config, data, folder, console, world
        self.device = select_device(config.train.device)
        self.precision = select_precision(config.train.precision, self.device)
        self.steps_per_epoch = len(data.train)
        self.total_steps = config.train.epochs * self.steps_per_epoch
        if config.train.batch_size % (config.train.accumulate * world.size):
            raise ConfigError(
                f"train.batch_size: expected a multiple of train.accumulate x processes "
                f"({config.train.accumulate} x {world.size}), found {config.train.batch_size}"
            )
        self.resumed = can_resume(folder, config)
        self.claim = Claim(folder) if self.resumed and world.first else None
        torch.manual_seed(config.train.seed)  # the same weights on every process
        self.model = self._build_model().to(self.device)
        self.model.blocks.activation_checkpointing = config.train.activation_checkpointing
        self.optimizer = build_optimizer(self.model, config.train)
        self.averaging = build_averaging(config, self.model, self.optimizer, self.total_steps)
        self.ema = build_ema(self.model, config.train.ema_decay)
        self.step, self.seconds, self.skipped = 0, 0.0, 0
        self.totals = torch.zeros(4, device=self.device)  # sums over the epoch: loss, hits, objects, gradient norm
        self.unsound: list[Tensor] = []  # for each step since the last look: was it skipped?
        # Again, after building: so dense and EWA models meet the same stream, however much building them drew.
        seed_all(config.train.seed, world.rank)
        self.rng = random_state()  # to start with
        if self.resumed:
            load_training_state(self)
            epoch = self.step // self.steps_per_epoch
            self._say(f"going on with {folder} after {epoch} of {config.train.epochs} epochs ({self.step} steps)")
        self.ddp = self.forward = self.model
        self.look_every = 1 if self.device.type == "cpu" else 10  # a look makes a GPU wait

    def _build_model(self) -> torch.nn.Module:
        model, report = build_model(self.config, len(self.data.class_names), load=not self.resumed)
        if report:
            self._say(f"{self.config.train.init_from}: {len(report.loaded)} tensors loaded")
            if report.fresh:
                self._say(f"freshly initialised: {', '.join(report.fresh)}")
        return model

    def fit(self) -> None:
        """Train to the end, from wherever the run is.

        Raises:
            TrainingError: too many steps whose loss or gradients were not finite.
            CheckpointError: a checkpoint cannot be written.
            Stopped: SIGTERM or SIGINT came; the state of the moment is saved.
        """
        logbook = None
        if self.world.first:
            if not self.resumed:
                self._announce()
                self.claim = start_run(self.folder, self.config)
            logbook = Logbook(self.folder, self.step // self.steps_per_epoch, self.step)
        if self.world.size > 1:
            self.ddp = self.forward = DistributedDataParallel(self.model, broadcast_buffers=False)
        if self.config.train.compile:
            self.forward = torch.compile(self.ddp)
        set_random_state(self.rng)
        progress = TrainingProgress(self.console, self.config.train.epochs, self.total_steps, self.step)
        # torchrun may pass on what the terminal has sent to the processes already: one Ctrl-C can come twice.
        signals = StopSignals(insist="TORCHELASTIC_RUN_ID" not in os.environ)
        with self.claim or nullcontext(), signals, progress.bar:
            for epoch in range(self.step // self.steps_per_epoch, self.config.train.epochs):
                self._run_epoch(epoch, logbook, progress, signals)

    def _run_epoch(self, epoch: int, logbook: Logbook | None, progress: TrainingProgress, signals: StopSignals) -> None:
        started, already = time.perf_counter(), self.seconds
        saved_at, (every_steps, every_seconds) = started, save_interval(self.config.train)
        for batch in self.data.train.epoch(epoch, self.step % self.steps_per_epoch):
            self.train_step(batch)
            self.seconds = already + time.perf_counter() - started
            if self.step % self.steps_per_epoch == 0:
                break  # the end of an epoch saves by itself, when its figures are written
            stop, save = 0, bool(every_steps) and self.step % every_steps == 0
            if self.step % self.look_every == 0:
                progress.update(epoch, self.step, self._figures())
                overdue = bool(every_seconds) and time.perf_counter() - saved_at > every_seconds
                stop, overdue = self.world.largest([signals.received, overdue and self.world.first])
                save = save or stop or overdue
            if save:
                self._save()
                saved_at = time.perf_counter()
            if stop:
                self._stop(stop)
        scalars = self._figures() | self._scheme_figures() | self._validation()
        self.seconds = already + time.perf_counter() - started
        if logbook:
            logbook.write(epoch, self.step, scalars | {"seconds": self.seconds})
        progress.end_epoch(epoch, self.step, scalars, self.seconds)
        self.totals.zero_()
        self._save()
        stop = self.world.largest([signals.received])[0]
        if stop and self.step < self.total_steps:
            self._stop(stop)

    def _stop(self, signal: int) -> None:
        raise Stopped(
            signal,
            f"{self.step} of {self.total_steps} steps are saved in {self.folder}; go on with the same command and "
            f"RUN={self.folder.name} (run.name={self.folder.name})",
        )

    def train_step(self, batch: Batch) -> None:
        """One iteration on a batch (with several processes, on this one's part of it).

        Gradients, optimizer, averaging. Where the loss or a gradient is not finite the model stays as it was.
        """
        config, world = self.config.train, self.world
        self.model.train()
        if config.freeze_backbone:  # its batch norms keep their statistics, nothing is dropped
            self.model.eval().cls_head_finetune.train()
        for group in self.optimizer.param_groups:
            group["lr"] = group["lr_scale"] * learning_rate(self.step, self.steps_per_epoch, config)
        statistics = [buffer for buffer in self.model.buffers() if buffer.is_floating_point()]  # of the batch norms
        before = _flat(statistics)
        sums, parts = torch.zeros(2, device=self.device), config.accumulate
        for number, (part, truth) in enumerate(
            zip(batch.points.chunk(parts), batch.labels.chunk(parts), strict=True), 1
        ):
            with self._reduce_gradients(number == parts):
                with torch.autocast(self.device.type, self.precision, enabled=self.precision != torch.float32):
                    output = self.forward(part)
                loss, hits = self._loss(output, truth)
                balance = self.config.ewa.balance * ewa.balance_loss(self.model) if self.gated else 0.0
                ((loss + balance) / parts).backward()
            sums += torch.stack([loss.detach() * len(truth), hits])
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.clip_norm or torch.inf)
        # The processes have the same gradients now. The batch norms' statistics become the mean of theirs: each step,
        # so that what is saved or evaluated does not depend on when.
        after = world.sum_(torch.cat([_flat(statistics), sums]))
        loss, hits = after[-2:]
        unsound = ~(norm.isfinite() & loss.isfinite())
        _unflatten(torch.where(unsound, before, after[:-2] / world.size), statistics)
        size = float(len(batch.labels) * world.size)
        objects = torch.full((), size, device=self.device)  # made there: no wait
        self.totals += torch.where(unsound, 0, torch.stack([loss, hits, objects, norm * objects]))
        self.unsound.append(unsound)
        self.optimizer.found_inf = unsound.float()  # the fused optimizer and the averaging after it then skip the step
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.ema:
            self.ema.update_parameters(self.model)
        self.step += 1

    def _loss(self, output: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The mean loss of a part of the batch, and the number of objects recognised."""
        logits = output.to(torch.promote_types(output.dtype, torch.float32))  # a softmax wants more than bfloat16
        loss = F.cross_entropy(logits, labels, label_smoothing=self.config.train.label_smoothing)
        return loss, (logits.argmax(1) == labels).sum()

    def _reduce_gradients(self, now: bool) -> AbstractContextManager:
        """Gradients are summed over the processes once a step, with the last part of the batch."""
        return nullcontext() if now or self.world.size == 1 else self.ddp.no_sync()

    def _check_skipped(self) -> None:
        """Count and report the steps that were skipped since the last look."""
        flags = torch.stack(self.unsound).tolist() if self.unsound else []
        self.unsound.clear()
        for step, skipped in enumerate(flags, self.step - len(flags)):
            if not skipped:
                continue
            self.skipped += 1
            epoch, number = divmod(step, self.steps_per_epoch)
            names = self.data.train.object_names(epoch, number)
            report = (
                f"the loss or a gradient is not finite in epoch {epoch + 1}, step {step + 1} of {self.total_steps}, "
                f"with learning rate {learning_rate(step, self.steps_per_epoch, self.config.train):.3g}, on "
                f"{', '.join(names[:64])}{', ...' if len(names) > 64 else ''}"
            )
            if self.skipped > self.config.train.max_skipped:
                raise TrainingError(
                    f"{report}: {self.skipped} such steps, and train.max_skipped={self.config.train.max_skipped}; the "
                    f"last checkpoint is from before. Try a lower train.lr, train.precision=float32, or see to the data"
                )
            self._say(f"step skipped, the model stays as it was: {report}", style="yellow")

    def _figures(self) -> dict[str, float]:
        """Of the epoch so far. Waits for the device, so it is also where steps that were skipped are noticed."""
        self._check_skipped()
        loss, hits, objects, norm = self.totals.tolist()
        objects = objects or float("nan")  # every step skipped
        return {
            "train/loss": loss / objects,
            "train/oa": 100 * hits / objects,
            "train/grad_norm": norm / objects,
            "train/lr": self.optimizer.param_groups[0]["lr"],
        }

    def _scheme_figures(self) -> dict[str, float]:
        if self.averaging is None or not self.world.first:
            return {}
        figures = {"ewa/share_rate": self.averaging.share_rate}
        for name, value in ewa.disagreement(self.model).items():
            figures[f"ewa/disagreement/{name}"] = value
        if not self.gated:
            probe = next(self.data.train.epoch(0)).points
            for name, value in ewa.fold_gap(self.model, probe).items():
                figures[f"ewa/fold_gap/{name}"] = value
        return figures

    def _validation(self) -> dict[str, float]:
        if self.data.val is None:
            return {}
        result = evaluate(self.evaluated, self.data.val, self.world)
        return {"val/loss": result.loss, "val/oa": result.oa, "val/macc": result.macc}

    def finish(self) -> dict[str, Any]:
        """Fold, evaluate on the test split, write the model and ``summary.json``; returns the summary."""
        final = ewa.fold(self.evaluated) if self.foldable else self.evaluated
        started = time.perf_counter()
        result = evaluate(final, self.data.test, self.world)
        seconds = time.perf_counter() - started
        in_training = evaluate(self.evaluated, self.data.test, self.world) if self.foldable else result
        summary = self._summary(final) | {
            "test": _test_figures(result),
            "test_before_folding": _test_figures(in_training) if self.foldable else None,
            "evaluation_seconds": round(seconds, 3),
            "largest_logit_difference": (result.logits - in_training.logits).abs().max().item(),
        }
        if self.world.first:
            save_model(self.folder / MODEL, self.loaded(final.eval()))
            write_summary(self.folder, summary)
        return summary

    def _summary(self, final: torch.nn.Module) -> dict[str, Any]:
        config = self.config
        return {
            "run": str(self.folder),
            "dataset": config.data.name,
            "model": config.model.preset,
            "ewa": config.ewa.enabled,
            "epochs": config.train.epochs,
            "seed": config.train.seed,
            "parameters_in_training": _count(self.model),
            "parameters": _count(final),
            "skipped_steps": self.skipped,
            "seconds": round(self.seconds, 1),
            "peak_memory_mb": round(peak_memory(self.device) / 1e6),
            "precision": str(self.precision).removeprefix("torch."),
            "processes": self.world.size,
            "environment": environment(self.device),
        }

    @property
    def gated(self) -> bool:
        """Whether the experts are behind a router, and stay."""
        return self.config.ewa.enabled and self.config.ewa.router == "top_k"

    @property
    def foldable(self) -> bool:
        """Whether there are experts that fold into one."""
        return self.config.ewa.enabled and not self.gated

    @property
    def evaluated(self) -> torch.nn.Module:
        """The model whose figures count: the one in training, or the average of its weights."""
        return self.ema.module if self.ema else self.model

    def loaded(self, model: torch.nn.Module) -> LoadedModel:
        """A model of this training with what must be known to use it."""
        data = self.config.data
        return LoadedModel(model, self.data.class_names, data.num_points, data.name, self.data.normalize)

    def _save(self) -> None:
        self._check_skipped()
        random_states = self.world.gather(random_state())
        if self.world.first:
            save_state(self.folder / LAST, training_state(self) | {"random_states": random_states})

    def _announce(self) -> None:
        """Say what is about to run, and about how long it will take, by timing steps of a copy of the model."""
        config = self.config
        count = f"{_count(self.model) / 1e6:.1f} M parameters in training"
        kind = "gated MoE" if self.gated else "EWA"
        scheme = f"{kind}, {config.ewa.num_experts} experts" if self.averaging else "dense"
        precision = str(self.precision).removeprefix("torch.")
        place = f"on {self.device.type}" + (f", {self.world.size} processes" if self.world.size > 1 else "")
        self._say(f"{config.data.name}, {config.model.preset}, {scheme}: {count}, {place} in {precision}")
        seconds = self._time_step() * self.total_steps
        epochs = f"{config.train.epochs} epochs of {self.steps_per_epoch} steps"
        self._say(f"{epochs} will take about {duration(seconds)}; run folder {self.folder}")
        if self.device.type == "cpu" and seconds > 3600 and config.model.preset != "tiny":
            self._say("On a CPU MODEL=tiny EPOCHS=10 is the choice that finishes.", style="yellow")

    def _time_step(self) -> float:
        trainer = copy.copy(self)
        trainer.world, trainer.unsound, trainer.totals = ALONE, [], self.totals.clone()
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            trainer.model = trainer.ddp = trainer.forward = copy.deepcopy(self.model)
            trainer.optimizer = build_optimizer(trainer.model, self.config.train)
            trainer.averaging = build_averaging(self.config, trainer.model, trainer.optimizer, self.total_steps)
            trainer.ema = None
            batches = self.data.train.epoch(0)
            for count, batch in enumerate(batches):
                if count == 1:  # the first step warms up
                    started = time.perf_counter()
                trainer.train_step(batch)
                trainer.totals.sum().item()
                if count == 3:
                    break
        return (time.perf_counter() - started) / count if count else 0.0

    def _say(self, text: str, style: str | None = None) -> None:
        say(self.console, text, style)


def _flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


def _unflatten(flat: Tensor, tensors: list[Tensor]) -> None:
    for tensor, values in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(values.view_as(tensor))


def _test_figures(result: Evaluation) -> dict[str, float]:
    return {"oa": round(result.oa, 4), "macc": round(result.macc, 4), "loss": round(result.loss, 6)}


def _count(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
