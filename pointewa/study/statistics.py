"""Statistics of a few seeds."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Paired:
    """The mean of paired differences.

    Args:
        mean: of the differences.
        low: lower end of the confidence interval (Student's t).
        high: its upper end.
        p: of a two-sided paired t test; NaN if all differences are equal, so that their spread is unknown.
        pairs: number of pairs.
    """

    mean: float
    low: float
    high: float
    p: float
    pairs: int


def mean_std(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (n - 1); NaN where there are too few values."""
    count = len(values)
    mean = math.fsum(values) / count if count else math.nan
    if count < 2:
        return mean, math.nan
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1))


def holm(p: Sequence[float]) -> list[float]:
    """p values corrected for their number by Holm's method (1979), in their order."""
    corrected, largest = [0.0] * len(p), 0.0
    for rank, index in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        largest = max(largest, min(1.0, (len(p) - rank) * p[index]))
        corrected[index] = largest
    return corrected


def paired(values: Sequence[float], baseline: Sequence[float]) -> Paired | None:
    """Compare two series of equal length, pair by pair; None with fewer than two pairs.

    Raises:
        ValueError: they have different lengths.
    """
    if len(values) != len(baseline):
        raise ValueError(f"expected pairs, found {len(values)} and {len(baseline)} values")
    if len(values) < 2:
        return None
    # Accuracies have few decimals: without rounding, equal differences would differ in their last bits.
    differences = [round(value - base, 9) for value, base in zip(values, baseline, strict=True)]
    mean = mean_std(differences)[0]
    if len(set(differences)) == 1:
        return Paired(mean, mean, mean, math.nan, len(differences))
    from scipy.stats import ttest_rel  # slow to import

    test = ttest_rel(values, baseline)
    low, high = test.confidence_interval(CONFIDENCE)
    return Paired(mean, float(low), float(high), float(test.pvalue), len(differences))
