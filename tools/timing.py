"""Times as ratios: what is compared runs in turn, round after round, and each round is compared with itself."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

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


def interleave(parts: dict[str, Callable[[], object]], budget: float, device: torch.device) -> Times:
    """Run the parts in turn until ``budget`` seconds have passed, but `LEAST` rounds; a round before that warms up."""

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
