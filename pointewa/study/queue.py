"""A queue of trainings, each a process of its own: several at a time, stopped and resumed at any moment."""

import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from pointewa.errors import CheckpointError, counted
from pointewa.runs.folder import Lock
from pointewa.runs.weights import LAST, PREVIOUS
from pointewa.study.definition import StudyRun, time_left
from pointewa.tasks import task_of
from pointewa.train.progress import duration, say
from pointewa.train.signals import StopSignals

POLL, PATIENCE = 0.2, 120  # seconds: between polls, and for a training to save and end after a signal


@dataclass
class Outcome:
    """The outcome of a queue.

    Args:
        failures: of runs that failed, by name: what happened.
        signal: number of the signal that stopped the queue, 0 for none.
        out_of_time: the budget is used up.
    """

    failures: dict[str, str] = field(default_factory=dict)
    signal: int = 0
    out_of_time: bool = False


class QueueProgress:
    """The progress of a queue: lines, and on a terminal a bar for all runs and one for each that trains.

    Args:
        console: where to show it.
        name: of the study.
        runs: all that count, finished ones included.
        parallel: how many train at a time.
    """

    def __init__(self, console: Console, name: str, runs: Sequence[StudyRun], parallel: int = 1) -> None:
        self.console, self.runs, self.parallel = console, runs, parallel
        count = TextColumn("{task.completed}/{task.total} {task.fields[note]}")
        columns = (TextColumn("{task.description}"), BarColumn(), count)
        self.bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._all = self.bar.add_task(name, total=len(runs), note="runs")
        self._tasks: dict[str, TaskID] = {}
        self.failed: set[str] = set()
        self._looked = float("-inf")

    def __enter__(self) -> Self:
        self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.stop()

    def say(self, text: str, style: str | None = None) -> None:
        """Print a line."""
        say(self.console, text, style)

    def state(self) -> str:
        """How many runs are done, and how long the rest will take."""
        done, left = self._done_and_left()
        text = f"{done} of {counted(len(self.runs), 'run')} done"
        text += f", {len(self.failed)} failed" if self.failed else ""
        return text + (f", about {duration(left)} left" if left else "")

    def _done_and_left(self) -> tuple[int, float | None]:
        left = time_left([run for run in self.runs if run.name not in self.failed], self.parallel)
        return sum(run.summary() is not None for run in self.runs), left

    def watch(self, running: Sequence[StudyRun]) -> None:
        """Show the runs that train now."""
        if self.bar.disable or time.monotonic() - self._looked < 1:
            return
        self._looked = time.monotonic()
        done, left = self._done_and_left()
        self.bar.update(self._all, completed=done, note=f"runs, about {duration(left)} left" if left else "runs")
        for name in self._tasks.keys() - {run.name for run in running}:
            self.bar.remove_task(self._tasks.pop(name))
        for run in running:
            if run.name not in self._tasks:
                self._tasks[run.name] = self.bar.add_task(f"  {run.name}", total=run.config.train.epochs, note="epochs")
            self.bar.update(self._tasks[run.name], completed=len(run.epochs()))


def work(
    runs: Iterable[StudyRun],
    command: Sequence[str],
    progress: QueueProgress,
    budget: float | None = None,
    keep_state: bool = True,
) -> Outcome:
    """Train the runs that are not finished. SIGTERM, SIGINT and the end of the budget make trainings save and end.

    Trainings also end when this process is killed. If another process trains in a run's folder, its end is awaited.

    Args:
        runs: in this order, ``progress.parallel`` at a time.
        command: of a training, to which a run's arguments are added.
        progress: shows what happens.
        budget: seconds.
        keep_state: leave the training states of finished runs, which nothing needs any more, where they are.
    """
    runs = list(runs)
    for run in () if keep_state else runs:
        _remove_state(run)
    waiting, running, outcome = [run for run in runs if run.summary() is None], {}, Outcome()
    until, told = time.monotonic() + (float("inf") if budget is None else budget), set()
    with StopSignals() as signals:
        try:
            while (waiting or running) and not signals.received and time.monotonic() < until:
                for run in list(waiting):
                    if len(running) == progress.parallel:
                        break
                    if _locked(run):
                        if run.name not in told:
                            progress.say(f"{run.name}: another process trains in {run.folder}: waiting for it")
                            told.add(run.name)
                        continue
                    waiting.remove(run)
                    if run.summary() is None:  # it may have been finished by another process
                        progress.say(f"{run.name}: {'resumes' if run.folder.exists() else 'starts'}")
                        running[run] = _start(run, command, progress.parallel)
                time.sleep(POLL)
                for run in _collect(running, outcome, progress):
                    if not keep_state:
                        _remove_state(run)
                progress.watch(list(running))
            outcome.signal, outcome.out_of_time = signals.received, bool(waiting or running) and not signals.received
        finally:
            _stop(list(running.values()))
    return outcome


def _remove_state(run: StudyRun) -> None:
    """Remove the training state of a finished run."""
    if run.summary() is not None:
        for name in (LAST, PREVIOUS):
            (run.folder / name).unlink(missing_ok=True)


def _collect(
    running: dict[StudyRun, subprocess.Popen], outcome: Outcome, progress: QueueProgress
) -> Iterator[StudyRun]:
    """Remove the trainings that have ended from those that run, and report their outcome; yields them."""
    for run, process in list(running.items()):
        code = process.poll()
        if code is None:
            continue
        del running[run]
        yield run
        summary = run.summary() if code == 0 else None
        if summary:
            task = task_of(summary)
            figure = task.metrics[task.primary()].text(summary["test"][task.primary()])
            progress.say(f"{run.name}: done, {figure} on the test split; {progress.state()}")
        else:
            lines = run.log.read_text(errors="replace").split("\n")
            last = next((line.strip() for line in reversed(lines) if line.strip()), "it printed nothing")
            failure = f"exit code {code if code >= 0 else 128 - code}: {last[:1000]} ({run.log})"
            outcome.failures[run.name] = failure
            progress.failed.add(run.name)
            progress.say(f"{run.name}: failed, {failure}", "red")


def _start(run: StudyRun, command: Sequence[str], parallel: int) -> subprocess.Popen:
    run.log.parent.mkdir(parents=True, exist_ok=True)
    threads = {"OMP_NUM_THREADS": str(max((os.cpu_count() or 1) // parallel, 1))}
    settings = threads | os.environ | {"PYTHONUNBUFFERED": "1"}
    prctl, parent = getattr(ctypes.CDLL(None), "prctl", None), os.getpid()

    def end_with_parent() -> None:
        pr_set_pdeathsig = 1  # of linux/prctl.h
        if prctl and (prctl(pr_set_pdeathsig, signal.SIGTERM) or os.getppid() != parent):
            os._exit(1)

    with open(run.log, "a") as log:
        return subprocess.Popen(
            [*command, *run.arguments],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=settings, preexec_fn=end_with_parent,
        )  # fmt: skip


def _stop(processes: list[subprocess.Popen]) -> None:
    try:
        for process in processes:
            process.terminate()
        until = time.monotonic() + PATIENCE
        for process in processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(until - time.monotonic(), 0))
    finally:  # also after a second Ctrl-C
        for process in processes:
            process.kill()
            process.wait()


def _locked(run: StudyRun) -> bool:
    try:
        Lock(run.folder).release()
    except CheckpointError:
        return True
    except OSError:  # it does not exist yet; or the training will report what is wrong with it
        return False
    return False
