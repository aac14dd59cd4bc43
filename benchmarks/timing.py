"""Times as ratios: parts run in turn, round after round, and are compared within each round."""

import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch

LEAST = 3  # rounds, whatever the budget


@dataclass(frozen=True)
class Spread:
    """Median and quartiles.

    Args:
        median: the middle value.
        low: lower quartile.
        high: upper quartile.
    """

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> "Spread":
        """Of at least two values."""
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)

    def text(self, form: str = ".3g", factor: float = 1.0) -> str:
        """As ``median (low to high)``."""
        median, low, high = (format(factor * value, form) for value in (self.median, self.low, self.high))
        return f"{median} ({low} to {high})"


@dataclass(frozen=True)
class Times:
    """Seconds of each part in each round.

    Args:
        rounds: for each round the seconds of each part.
    """

    rounds: list[dict[str, float]]

    def seconds(self, part: str) -> Spread:
        """Of a part."""
        return Spread.of([one[part] for one in self.rounds])

    def ratio(self, part: str, base: str) -> Spread:
        """Of a part over another one of the same round."""
        return Spread.of([one[part] / one[base] for one in self.rounds])

    def row(self, part: str, bases: Iterable[str]) -> dict[str, Any]:
        """A part's row of a table: milliseconds, rounds, and ratios to those of the bases that were measured too."""
        row: dict[str, Any] = {"ms": self.seconds(part).text(factor=1000), "rounds": len(self.rounds)}
        return row | {f"of {base}": self.ratio(part, base).text(".3f") for base in bases if base in self.rounds[0]}


def interleave(parts: dict[str, Callable[[], object]], budget: float, device: torch.device) -> Times:
    """Run the parts in turn until ``budget`` seconds have passed, at least `LEAST` rounds, after one that warms up."""

    def seconds(run: Callable[[], object]) -> float:
        started = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - started

    for run in parts.values():
        seconds(run)
    rounds, started = [], time.perf_counter()
    while len(rounds) < LEAST or time.perf_counter() - started < budget:
        rounds.append({name: seconds(run) for name, run in parts.items()})
    return Times(rounds)


class Aside:
    """Parts that run in a process of their own, with the settings that a fresh process has.

    Args:
        build: called there with ``args``; returns the parts by name. Importable, as the arguments can be pickled.
        args: of ``build``.
    """

    def __init__(self, build: Callable[..., dict[str, Callable[[], object]]], *args: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other, build, args), daemon=True)
        self._process.start()
        other.close()

    def part(self, name: str) -> Callable[[], None]:
        """A part, as something to call: it returns when the part has run.

        Raises:
            RuntimeError: the process has ended; what went wrong is on its stderr.
        """

        def call() -> None:
            try:
                self._pipe.send(name)
                self._pipe.recv()
            except (EOFError, BrokenPipeError) as error:
                raise RuntimeError(f"the process that runs {name!r} has ended") from error

        return call


def _serve(pipe: Connection, build: Callable[..., dict[str, Callable[[], object]]], args: tuple[Any, ...]) -> None:
    parts = build(*args)
    while True:
        try:
            name = pipe.recv()
        except EOFError:  # the other process has ended
            return
        parts[name]()
        pipe.send(None)
