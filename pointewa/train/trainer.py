"""The training loop: a run in its folder, from its current state to its end."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import pointewa.ewa as ewa
from pointewa.config import Config, save_interval
from pointewa.errors import CheckpointError, Stopped, TrainingError, counted
from pointewa.runs.description import LoadedModel
from pointewa.runs.folder import Lock, again, can_resume, start_run
from pointewa.runs.log import Logbook, read_metrics
from pointewa.runs.summary import fold_text, write_summary
from pointewa.runs.tracker import Tracker, check_tracker
from pointewa.runs.weights import LAST, Restored, restore, save_model
from pointewa.safe.files import NO_ROOM
from pointewa.train.build import task_of_run
from pointewa.train.checkpoint import load_training_state, save_state, training_state
from pointewa.train.compression import compressed
from pointewa.train.data import Data
from pointewa.train.device import environment, name_of, peak_memory
from pointewa.train.distributed import ALONE, World
from pointewa.train.optimizer import learning_rate
from pointewa.train.progress import TrainingProgress, duration, say
from pointewa.train.rng import random_state, seed_all, set_random_state
from pointewa.train.signals import StopSignals
from pointewa.train.step import Training


class Trainer(Training):
    """Trains a model by its configuration, in a run folder; resumes from a checkpoint in it.

    Args:
        config: the configuration.
        data: the batches.
        folder: of the run, see `pointewa.runs.folder.find_run`.
        console: where progress is shown.
        world: the processes that train together; the first one writes.

    Raises:
        ConfigError, CheckpointError: something cannot be built or loaded, or does not go with the data.
    """

    def __init__(self, config: Config, data: Data, folder: Path, console: Console, world: World = ALONE) -> None:
        self.data, self.folder, self.console = data, folder, console
        self.resumed = can_resume(folder, config)
        check_tracker(config.run.tracker)
        self.tracker: Tracker | None = None
        self.lock = Lock(folder) if self.resumed and world.first else None
        task = task_of_run(config, folder, data.reported)
        restored = restore(folder) if self.resumed else None
        if not restored:
            task.check_data(data.normalize)
        super().__init__(task, data.class_names, len(data.train), world, data.parts, restored and restored.model)
        if self.report:
            self._say(f"{config.train.init_from}: {counted(len(self.report.loaded), 'tensor')} loaded")
            if self.report.fresh:
                self._say(f"freshly initialised: {', '.join(self.report.fresh)}")
            if self.report.unused:
                self._say(f"left out: {', '.join(self.report.unused)}")
        # Again after building, so that all schemes have the same random stream, however much building drew.
        seed_all(config.train.seed, world.rank)
        self.rng = random_state()  # at the start
        if restored:
            self._resume(restored)
        self.look_every = 1 if self.device.type == "cpu" else 10  # reading metrics makes a GPU wait

    def _resume(self, restored: Restored) -> None:
        self.rng, processes = load_training_state(self, restored)
        if processes != self.world.size:
            note = f"{counted(processes, 'process', 'es')} trained so far, {self.world.size} resume: equally good, but "
            self._say(f"{note}not bit for bit what the same number would have given", style="yellow")
        epochs = f"{self.step // self.steps_per_epoch} of {counted(self.config.train.epochs, 'epoch')}"
        self._say(f"resuming {self.folder} after {epochs} ({counted(self.step, 'step')})")

    def fit(self) -> None:
        """Train to the end, from the run's current state.

        Raises:
            TrainingError: too many steps whose loss or gradients were non-finite.
            CheckpointError: a checkpoint cannot be written.
            Stopped: by SIGTERM or SIGINT; the current state is saved.
        """
        logbook = None
        if self.world.first:
            if not self.resumed:
                self._announce()
                self.lock = start_run(self.folder, self.config)
            with self._disk():
                logbook = Logbook(self.folder, self.step // self.steps_per_epoch, self.step)
            self.tracker = Tracker(self.folder, self.config)
        if self.world.size > 1:
            self.ddp = self.forward = DistributedDataParallel(self.model, broadcast_buffers=False)
            self.compression.attach(self.ddp)
        if self.config.train.compile:
            self.forward = torch.compile(self.ddp)
        set_random_state(self.rng)
        progress = TrainingProgress(self.console, self.task, self.config.train.epochs, self.total_steps, self.step)
        # torchrun may pass on a signal that the terminal has already sent to the processes: Ctrl-C can come twice.
        signals = StopSignals(insist="TORCHELASTIC_RUN_ID" not in os.environ)
        files = (self.lock or nullcontext(), logbook or nullcontext(), self.tracker or nullcontext())
        with self._disk(), files[0], files[1], files[2], signals, progress.bar:
            for epoch in range(self.step // self.steps_per_epoch, self.config.train.epochs):
                self._run_epoch(epoch, logbook, progress, signals)

    def _run_epoch(self, epoch: int, logbook: Logbook | None, progress: TrainingProgress, signals: StopSignals) -> None:
        started, already = time.perf_counter(), self.seconds
        saved_at, (every_steps, every_seconds) = started, save_interval(self.config.train)
        for batch in self.data.train.epoch(epoch, self.step % self.steps_per_epoch):
            self.train_step(batch)
            self.seconds = already + time.perf_counter() - started
            if self.step % self.steps_per_epoch == 0:
                break  # the end of an epoch saves after its metrics are written
            stop, save = 0, bool(every_steps) and self.step % every_steps == 0
            if self.step % self.look_every == 0:
                progress.update(epoch, self.step, self._training_metrics())
                overdue = bool(every_seconds) and time.perf_counter() - saved_at > every_seconds
                stop, overdue = self.world.largest([signals.received, overdue and self.world.first])
                save = save or stop or overdue
            if save:
                self._save()
                saved_at = time.perf_counter()
            if stop:
                self._stop(stop)
        scalars = self._training_metrics() | self._scheme_metrics() | self._validation()
        self.seconds = already + time.perf_counter() - started
        if logbook:
            logbook.write(epoch, self.step, scalars | {"seconds": self.seconds})
        if self.tracker:
            self.tracker.log(scalars | {"seconds": self.seconds}, self.step)
        progress.end_epoch(epoch, self.step, scalars, self.seconds)
        self.totals.zero_()
        self._save()
        stop = self.world.largest([signals.received])[0]
        if stop and self.step < self.total_steps:
            self._stop(stop)

    def _stop(self, signal: int) -> None:
        raise Stopped(
            signal,
            f"{self.step} of {counted(self.total_steps, 'step')} are saved in {self.folder}; resume with the same "
            f"command and RUN={self.folder.name} (run.name={self.folder.name})",
        )

    @contextmanager
    def _disk(self) -> Iterator[None]:
        """Say of a file that cannot be written how the run goes on once it can."""
        try:
            yield
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            name = error.filename or self.folder
            raise CheckpointError(f"{name}: cannot be written ({error.strerror}): {again(self.folder)}") from error

    def _training_metrics(self) -> dict[str, float]:
        """Of the epoch so far. Waits for the device, so skipped steps are noticed here too."""
        self._check_skipped()
        return self.metrics()

    def _check_skipped(self) -> None:
        """Count and report the steps that were skipped since the last call."""
        for step in self.take_skipped():
            self.skipped += 1
            epoch, number = divmod(step, self.steps_per_epoch)
            names = self.data.train.object_names(epoch, number)
            report = (
                f"the loss or a gradient is non-finite in epoch {epoch + 1}, step {step + 1} of {self.total_steps}, "
                f"with learning rate {learning_rate(step, self.steps_per_epoch, self.config.train):.3g}, on "
                f"{', '.join(names[:64])}{', ...' if len(names) > 64 else ''}"
            )
            if self.skipped > self.config.train.max_skipped:
                raise TrainingError(
                    f"{report}: {self.skipped} such steps, and train.max_skipped={self.config.train.max_skipped}; the "
                    f"last checkpoint is from before. Try a lower train.lr, train.precision=float32, or check the data"
                )
            self._say(f"step skipped, the model stays as it was: {report}", style="yellow")

    def _scheme_metrics(self) -> dict[str, float]:
        if self.config.router == "none" or not self.world.first:
            return {}
        metrics = {"ewa/share_rate": self.averaging.share_rate} if self.averaging else {}
        for name, value in ewa.disagreement(self.model).items():
            metrics[f"ewa/disagreement/{name}"] = value
        if self.foldable:
            probe = self.task.inputs(next(self.data.train.epoch(0)))
            for name, value in ewa.fold_gap(self.model, *probe).items():
                metrics[f"ewa/fold_gap/{name}"] = value
        return metrics

    def _validation(self) -> dict[str, float]:
        splits = {} if self.data.val is None else {"val": (self.evaluated, self.data.val)}
        if self.data.fold:  # the dense model, whose metrics after the last epoch the summary has
            splits["test"] = (ewa.fold(self.evaluated) if self.foldable else self.evaluated, self.data.test)
        return {
            f"{split}/{name}": value
            for split, (model, batches) in splits.items()
            for name, value in self.task.measure(self.evaluate(model, batches)).items()
        }

    def _few_shot(self) -> dict[str, Any]:
        """The few-shot fold, and the best epoch on its queries, which published figures select."""
        primary = self.task.primary()
        found = [(one[key], one["epoch"] + 1) for one in read_metrics(self.folder) if (key := f"test/{primary}") in one]
        best = max if self.task.metrics[primary].higher_is_better else min
        value, epoch = best(found, key=lambda one: one[0])
        best = {**self._rounded({primary: value}), "epoch": epoch}
        return {**self.data.fold, "classes": list(self.data.class_names), "best_on_queries": best}

    def finish(self) -> dict[str, Any]:
        """Fold, evaluate on the test split, write the model and ``summary.json``; returns the summary."""
        final = ewa.fold(self.evaluated) if self.foldable else self.evaluated
        started = time.perf_counter()
        after = self.evaluate(final, self.data.test)
        seconds = time.perf_counter() - started
        before = self.evaluate(self.evaluated, self.data.test) if self.foldable else after
        summary = self._summary(final) | {
            "test": self._rounded(self.task.measure(after)),
            "test_before_folding": self._rounded(self.task.measure(before)) if self.foldable else None,
            "evaluation_seconds": round(seconds, 3),
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            **self.task.compare(before, after),
            **self.task.detail(after, self.data.class_names),
        }
        if self.world.first:
            summary |= {"few_shot": self._few_shot()} if self.data.fold else {}
            with self._disk():
                save_model(self.folder / self.task.model_file, self.loaded(final.eval()))
                write_summary(self.folder, summary)
        if self.tracker:
            self.tracker.summarise(summary, self.step)
            self.tracker.end()
        return summary

    def _rounded(self, metrics: dict[str, float]) -> dict[str, float]:
        known = {**self.task.metrics, **self.task.further}
        return {name: round(value, known[name].digits) for name, value in metrics.items()}

    def _summary(self, final: nn.Module) -> dict[str, Any]:
        config = self.config
        return {
            "run": str(self.folder),
            "task": self.task.name,
            "dataset": config.data.name,
            "model": config.model.preset,
            "scheme": config.scheme,
            "epochs": config.train.epochs,
            **({"reported": list(self.data.reported)} if self.data.reported else {}),
            "seed": config.train.seed,
            "parameters_in_training": _count(self.model),
            "parameters": _count(final),
            "skipped_steps": self.skipped,
            "seconds": round(self.seconds, 1),
            "peak_memory_mb": round(peak_memory(self.device) / 1e6),
            **compressed(self, self.data.train),  # after the peak has been read, since this takes memory
            "precision": name_of(self.precision),
            "processes": self.world.size,
            "environment": environment(self.device),
        }

    def loaded(self, model: nn.Module) -> LoadedModel:
        """A model of this training, with what is needed to use it."""
        data = self.config.data
        classes = self.task.input_classes(self.data.class_names)
        described = (data.num_points, data.name, self.data.normalize, self.task.name, self.data.up)
        return LoadedModel(model, classes, *described)

    def _save(self) -> None:
        self._check_skipped()
        random_states = self.world.gather(random_state())
        own = self.compression.state()
        states = {"compression": self.world.gather(own)} if own else {}
        if self.world.first:
            state = training_state(self, self.loaded(self.model).description())
            save_state(self.folder / LAST, state | {"random_states": random_states} | states)

    def _announce(self) -> None:
        """Say what will run, and about how long it will take, by timing steps of a copy of the model."""
        config = self.config
        if self.data.fold:
            self._say(f"{fold_text(self.data.fold)}; classes {', '.join(self.data.class_names)}")
        count = f"{_count(self.model) / 1e6:.1f} M parameters in training"
        if (trained := sum(one.numel() for one in self.model.parameters() if one.requires_grad)) != _count(self.model):
            count += f", of which {trained / 1e6:.1f} M are trained"
        names = {"none": "dense", "random": "random partition, not averaged", "top_k": "gated MoE"}
        if self.averaging:
            names |= {"random": "EWA", "top_k": "gated MoE, averaged"}
        experts = f", {config.moe.num_experts} experts" if config.router != "none" else ""
        precision = name_of(self.precision)
        place = f"on {self.device.type}" + (f", {self.world.size} processes" if self.world.size > 1 else "")
        scheme = f"{names[config.router]}{experts}"
        few = "".join(f", {text}" for text in self.compression.description())
        self._say(f"{config.data.name}, {config.model.preset}, {scheme}: {count}, {place} in {precision}{few}")
        seconds = self._time_step() * self.total_steps
        epochs = f"{counted(config.train.epochs, 'epoch')} of {counted(self.steps_per_epoch, 'step')}"
        self._say(f"{epochs} will take about {duration(seconds)}; run folder {self.folder}")
        if self.device.type == "cpu" and seconds > 3600 and config.model.preset != "tiny":
            self._say("On a CPU, MODEL=tiny EPOCHS=10 finishes sooner.", style="yellow")

    def _time_step(self) -> float:
        """Seconds per step, timed after a first step that warms up, on the first batches."""
        twin, started, steps = self.twin(), 0.0, 4
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            for number in range(steps):
                if number == 1:
                    started = time.perf_counter()
                epoch, start = divmod(number, self.steps_per_epoch)
                twin.train_step(next(self.data.train.epoch(epoch, start)))
                twin.totals.sum().item()
        return (time.perf_counter() - started) / (steps - 1)

    def _say(self, text: str, style: str | None = None) -> None:
        say(self.console, text, style)


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
