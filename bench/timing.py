"""Stopwatches: medians of repeats, in alternation if two things are compared."""

import statistics
import time
from collections.abc import Callable, Mapping


def seconds(work: Callable[[], object], repeats: int, warm: int = 1) -> list[float]:
    """The seconds of each repeat of the work, after `warm` repeats that do not count."""
    for _ in range(warm):
        work()
    return [once(work) for _ in range(repeats)]


def alternating(works: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """The seconds of each work in the order A, B, A, B, ..., so that the machine's drift affects all equally."""
    found: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            found[name].append(once(work))
    return found


def once(work: Callable[[], object]) -> float:
    """The seconds that the work took."""
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def ratios(slow: list[float], fast: list[float]) -> list[float]:
    """The factors by which the second was faster, pair by pair."""
    return [one / two for one, two in zip(slow, fast, strict=True)]


def figure(runs: list[float], digits: int = 3) -> dict[str, object]:
    """A figure, which is the median of the runs, and the runs."""
    return {"value": round(statistics.median(runs), digits), "runs": [round(each, digits + 1) for each in runs]}
