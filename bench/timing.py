"""Stopwatches: medians of repeats, alternating where two things are compared."""

import statistics
import time
from collections.abc import Callable, Mapping


def seconds(work: Callable[[], object], repeats: int, warm: int = 1) -> list[float]:
    """How long the work took each time, after `warm` times that do not count."""
    for _ in range(warm):
        work()
    return [once(work) for _ in range(repeats)]


def alternating(works: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """How long each took, A, B, A, B, ..., so that a machine's drift meets all alike."""
    found: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            found[name].append(once(work))
    return found


def once(work: Callable[[], object]) -> float:
    """How long the work took."""
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def ratios(slow: list[float], fast: list[float]) -> list[float]:
    """How many times faster the second was, pair by pair."""
    return [one / two for one, two in zip(slow, fast, strict=True)]


def figure(runs: list[float], digits: int = 3) -> dict[str, object]:
    """A figure and the runs that it is the median of."""
    return {"value": round(statistics.median(runs), digits), "runs": [round(each, digits + 1) for each in runs]}
