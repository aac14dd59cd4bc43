"""The training loop, for dense and EWA models alike."""

import copy
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

import pointewa.ewa as ewa
from pointewa.config import Config, build_architecture
from pointewa.engine.checkpoint import LAST, MODEL, LoadedModel, init_from, restore, save_model, save_state
from pointewa.engine.device import environment, select_device, select_precision
from pointewa.engine.evaluate import Evaluation, evaluate
from pointewa.engine.optim import build_optimizer, learning_rate
from pointewa.engine.runs import Logbook, start_run, write_summary
from pointewa.errors import CheckpointError, ConfigError, TrainingError, first_line
from pointewa.models import PointTransformerClassifier

_REPORT_EVERY = 10  # iterations between looks at the device's figures: each makes a GPU wait


class TrainBatches(Protocol):
    """Batches of an epoch, entered anywhere; see `datasets.loader.TrainLoader`."""

    def __len__(self) -> int: ...

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches from number ``start`` on."""
        ...


@dataclass(frozen=True)
class Data:
    """What is trained and evaluated on, on the device of the training.

    Args:
        train: the batches of training.
        val: those of the validation split; None without one.
        test: those of the test split.
        class_names: C names.
        normalize: what was done to the clouds, see `pointewa.engine.LoadedModel`.
    """

    train: TrainBatches
    val: Iterable[tuple[Tensor, Tensor]] | None
    test: Iterable[tuple[Tensor, Tensor]]
    class_names: tuple[str, ...]
    normalize: str = "unit_sphere"


class Trainer:
    """Trains a model as its configuration says, in a run folder.

    Args:
        config: the configuration; ``run.resume`` goes on from the folder's checkpoint.
        data: the batches.
        folder: of the run, see `pointewa.engine.runs.find_run`.
        console: where progress is shown.

    Raises:
        ConfigError, CheckpointError: what cannot be built or loaded.
    """

    def __init__(self, config: Config, data: Data, folder: Path, console: Console) -> None:
        self.config, self.data, self.folder, self.console = config, data, folder, console
        self.device = select_device(config.train.device)
        self.precision = select_precision(config.train.precision, self.device)
        self.steps_per_epoch = len(data.train)
        self.total_steps = config.train.epochs * self.steps_per_epoch
        torch.manual_seed(config.train.seed)
        self.model = self._build_model().to(self.device)
        self.optimizer = build_optimizer(self.model, config.train)
        self.averaging = self._build_averaging()
        self.forward = torch.compile(self.model) if config.train.compile else self.model
        self.step, self.seconds = 0, 0.0
        self.totals = torch.zeros(4, device=self.device)  # sums over the epoch: loss, hits, objects, gradient norm
        self.rng: tuple[Tensor, list[Tensor]] | None = None  # to go on with; None: from the seed
        if config.run.resume:
            self._resume()

    def _build_model(self) -> torch.nn.Module:
        train, scheme = self.config.train, self.config.ewa
        model = PointTransformerClassifier(build_architecture(self.config.model), len(self.data.class_names))
        if train.init_from and not self.config.run.resume:
            report = init_from(model, train.init_from)
            self._say(f"{train.init_from}: {len(report.loaded)} tensors loaded")
            if report.fresh:
                self._say(f"freshly initialised: {', '.join(report.fresh)}")
        if not scheme.enabled:
            return model
        init = ("copy" if train.init_from else "independent") if scheme.init == "auto" else scheme.init
        try:
            return ewa.to_moe(model, scheme.num_experts, scheme.layers, init, inplace=True)
        except (ValueError, TypeError) as error:
            raise ConfigError(f"ewa: {error}") from None

    def _build_averaging(self) -> ewa.ExpertAveraging | None:
        scheme = self.config.ewa
        if not scheme.enabled:
            return None
        try:
            rise = self.total_steps if scheme.schedule == "linear" else 0
            schedule = ewa.ShareRate(scheme.share_rate, rise)
            if scheme.until != 1:
                schedule = ewa.until(schedule, scheme.until, self.total_steps)
            return ewa.ExpertAveraging(self.model, schedule).attach(self.optimizer)
        except ValueError as error:
            raise ConfigError(f"ewa: {error}") from None

    def fit(self) -> None:
        """Train to the end, from wherever the run is.

        Raises:
            TrainingError: the loss or a gradient is no longer finite.
            CheckpointError: a checkpoint cannot be written.
        """
        epochs = self.config.train.epochs
        if self.step == 0:
            self._announce()
            start_run(self.folder, self.config)
        self._set_rng()
        logbook = Logbook(self.folder, self.step // self.steps_per_epoch, self.step)
        probe = next(self.data.train.epoch(0))[0] if self.averaging else None
        with self._progress() as report:
            for epoch in range(self.step // self.steps_per_epoch, epochs):
                started, already = time.perf_counter(), self.seconds
                for points, labels in self.data.train.epoch(epoch, self.step % self.steps_per_epoch):
                    self.train_step(points, labels)
                    self.seconds = already + time.perf_counter() - started
                    if self.step % _REPORT_EVERY == 0:
                        report(epoch, self._figures())
                    if self.config.train.save_every and self.step % self.config.train.save_every == 0:
                        self._save()
                scalars = self._figures() | self._scheme_figures(probe) | self._validation()
                self.seconds = already + time.perf_counter() - started
                logbook.write(epoch, self.step, scalars | {"seconds": self.seconds})
                report(epoch, scalars, end=True)
                self.totals.zero_()
                self._save()
        logbook.close()

    def train_step(self, points: Tensor, labels: Tensor) -> None:
        """One iteration on a batch ``[B, P, 3]``, ``[B]``: gradients, optimizer, averaging."""
        config = self.config.train
        self.model.train()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.steps_per_epoch, config)
        parts = config.accumulate
        for part, truth in zip(points.chunk(parts), labels.chunk(parts), strict=True):
            with torch.autocast(self.device.type, self.precision, enabled=self.precision != torch.float32):
                logits = self.forward(part)
            logits = logits.float()
            loss = F.cross_entropy(logits, truth, label_smoothing=config.label_smoothing)
            (loss / parts).backward()
            self.totals[0] += loss.detach() * len(truth)
            self.totals[1] += (logits.argmax(1) == truth).sum()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.clip_norm or torch.inf)
        self.totals[2] += len(labels)
        self.totals[3] += norm * len(labels)
        self.optimizer.step()  # and the averaging after it
        self.optimizer.zero_grad()
        self.step += 1

    def _check_finite(self) -> None:
        if not self.totals.isfinite().all():
            epoch = (self.step - 1) // self.steps_per_epoch + 1
            raise TrainingError(
                f"the loss or a gradient is not finite, in epoch {epoch} at step {self.step} of {self.total_steps} or "
                f"up to {_REPORT_EVERY} before, with learning rate {self._learning_rate():.3g}: try a lower train.lr "
                "or train.precision=float32"
            )

    def _learning_rate(self) -> float:
        return self.optimizer.param_groups[0]["lr"]

    def _figures(self) -> dict[str, float]:
        """Of the epoch so far. Waits for the device, so it is also where a broken run is noticed."""
        self._check_finite()
        loss, hits, objects, norm = self.totals.tolist()
        return {
            "train/loss": loss / objects,
            "train/oa": 100 * hits / objects,
            "train/grad_norm": norm / objects,
            "train/lr": self._learning_rate(),
        }

    def _scheme_figures(self, probe: Tensor | None) -> dict[str, float]:
        if self.averaging is None:
            return {}
        figures = {"ewa/share_rate": self.averaging.share_rate}
        for name, value in ewa.disagreement(self.model).items():
            figures[f"ewa/disagreement/{name}"] = value
        for name, value in ewa.fold_gap(self.model, probe).items():
            figures[f"ewa/fold_gap/{name}"] = value
        return figures

    def _validation(self) -> dict[str, float]:
        if self.data.val is None:
            return {}
        result = evaluate(self.model, self.data.val)
        return {"val/loss": result.loss, "val/oa": result.oa, "val/macc": result.macc}

    def finish(self) -> dict[str, Any]:
        """Fold, evaluate on the test split, write the dense model and ``summary.json``; returns the summary."""
        config = self.config
        in_training = evaluate(self.model, self.data.test)
        dense = ewa.fold(self.model) if self.averaging else self.model
        result = evaluate(dense, self.data.test) if self.averaging else in_training
        save_model(self.folder / MODEL, self._loaded(dense.eval()))
        summary = {
            "run": str(self.folder),
            "dataset": config.data.name,
            "model": config.model.preset,
            "ewa": config.ewa.enabled,
            "epochs": config.train.epochs,
            "seed": config.train.seed,
            "test": _test_figures(result),
            "test_before_folding": _test_figures(in_training) if self.averaging else None,
            "largest_logit_difference": (result.logits - in_training.logits).abs().max().item(),
            "parameters_in_training": _count(self.model),
            "parameters": _count(dense),
            "seconds": round(self.seconds, 1),
            "precision": str(self.precision).removeprefix("torch."),
            "environment": environment(self.device),
        }
        write_summary(self.folder, summary)
        return summary

    def _loaded(self, model: torch.nn.Module) -> LoadedModel:
        data = self.config.data
        return LoadedModel(model, self.data.class_names, data.num_points, data.name, self.data.normalize)

    def _save(self) -> None:
        self._check_finite()  # do not put a broken state in the place of a sound one
        scheme = self.config.ewa
        state = {
            "description": self._loaded(self.model).description(),
            "ewa": {"num_experts": scheme.num_experts, "layers": scheme.layers} if self.averaging else None,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "averaging": self.averaging.state_dict() if self.averaging else None,
            "step": self.step,
            "seconds": self.seconds,
            "totals": self.totals,
            "rng": torch.get_rng_state(),
            "rng_cuda": torch.cuda.get_rng_state_all() if self.device.type == "cuda" else [],
        }
        save_state(self.folder / LAST, state)

    def _resume(self) -> None:
        model, state = restore(self.folder)
        try:
            self.model.load_state_dict(model.state_dict())
            self.optimizer.load_state_dict(state["optimizer"])
            if self.averaging:
                self.averaging.load_state_dict(state["averaging"])
            self.step, self.seconds = state["step"], state["seconds"]
            self.totals.copy_(state["totals"])
            self.rng = state["rng"], state["rng_cuda"]
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"{self.folder / LAST}: does not fit the run ({first_line(error)}): start over with run.overwrite=true"
            ) from None
        epoch = self.step // self.steps_per_epoch
        self._say(f"going on with {self.folder} after {epoch} of {self.config.train.epochs} epochs")

    def _set_rng(self) -> None:
        if self.rng is None:
            # Again, after building: so dense and EWA models meet the same stream, however much building them drew.
            torch.manual_seed(self.config.train.seed)
            return
        torch.set_rng_state(self.rng[0])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state_all(self.rng[1])

    def _announce(self) -> None:
        """Say what is about to run, and about how long it will take, by timing steps of a copy of the model."""
        config = self.config
        count = f"{_count(self.model) / 1e6:.1f} M parameters in training"
        scheme = f"EWA, {config.ewa.num_experts} experts" if self.averaging else "dense"
        precision = str(self.precision).removeprefix("torch.")
        self._say(f"{config.data.name}, {config.model.preset}, {scheme}: {count}, on {self.device.type} in {precision}")
        seconds = self._time_step() * self.total_steps
        epochs = f"{config.train.epochs} epochs of {self.steps_per_epoch} steps"
        self._say(f"{epochs} will take about {duration(seconds)}; run folder {self.folder}")
        if self.device.type == "cpu" and seconds > 3600 and config.model.preset != "tiny":
            self._say("On a CPU MODEL=tiny EPOCHS=10 is the choice that finishes.", style="yellow")

    def _time_step(self) -> float:
        trainer = copy.copy(self)
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            trainer.model = trainer.forward = copy.deepcopy(self.model)
            trainer.optimizer = build_optimizer(trainer.model, self.config.train)
            trainer.averaging = trainer._build_averaging()
            trainer.totals = self.totals.clone()
            batches = self.data.train.epoch(0)
            for count, (points, labels) in enumerate(batches):
                if count == 1:  # the first step warms up
                    started = time.perf_counter()
                trainer.train_step(points, labels)
                trainer.totals.sum().item()
                if count == 3:
                    break
        return (time.perf_counter() - started) / count if count else 0.0

    def _say(self, text: str, style: str | None = None) -> None:
        self.console.print(text, style=style, highlight=False, soft_wrap=True)

    @contextmanager
    def _progress(self) -> Iterator[Any]:
        """A bar on a terminal, and a line an epoch; yields a function that shows figures."""
        columns = (
            TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"),
            TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
        )  # fmt: skip
        epochs = self.config.train.epochs
        with Progress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal) as bar:
            task = bar.add_task("training", total=self.total_steps, completed=self.step)

            def report(epoch: int, scalars: dict[str, float], end: bool = False) -> None:
                text = f"epoch {epoch + 1}/{epochs}  loss {scalars['train/loss']:.3f}  acc {scalars['train/oa']:.1f} %"
                bar.update(task, completed=self.step, description=text)
                if end:
                    val = f"  val {scalars['val/oa']:.1f} %" if "val/oa" in scalars else ""
                    left = self.seconds / self.step * (self.total_steps - self.step)
                    self._say(f"{text}{val}  {duration(left)} left")

            yield report


def _test_figures(result: Evaluation) -> dict[str, float]:
    return {"oa": round(result.oa, 4), "macc": round(result.macc, 4), "loss": round(result.loss, 6)}


def _count(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
