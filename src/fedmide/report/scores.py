"""A client's scores as counts in bins. A report may show these counts of a ledger, but no id and no single score."""

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedmide.evaluation.over_clients import spearman
from fedmide.federation.ledger import Entry, Ledger

NUM_BINS = 24
"""Bins of scores in a histogram."""


NUM_LENGTHS = 8
"""Bins of lengths in a grid, at most."""


NUM_LEVELS = 10
"""Bins of scores in a grid."""


OUTER_PERCENT = 1.0
"""This percentage of the scores at either end may lie outside the bins. The outermost bins count them."""


@dataclass(frozen=True)
class ScoreRound:
    """The finite scores of one client's verdicts in one round, one per record. `histogram` and `grid` bin them.

    `logs`: natural logarithms of the scores. `num_not_finite`: records without a finite score.
    """

    title: str
    is_split: bool
    logs: npt.NDArray[np.float64]
    num_tokens: npt.NDArray[np.int64]
    is_shared: npt.NDArray[np.bool_]
    num_not_finite: int
    threshold: float | None

    @property
    def spearman(self) -> float | None:
        """Rank correlation of score and length; None if undefined."""
        return spearman(self.logs, self.num_tokens)


@dataclass(frozen=True)
class Histogram:
    """Counts by score; `edges` are natural logarithms, one more than there are bins."""

    edges: tuple[float, ...]
    shared: tuple[int, ...]
    personal: tuple[int, ...]


@dataclass(frozen=True)
class Cell:
    """Number of records within a range of lengths (tokens) and a range of scores (natural logarithms)."""

    shortest: int
    longest: int
    low: float
    high: float
    shared: int
    personal: int


def score_rounds(ledger: Ledger, name: Callable[[int], str]) -> tuple[ScoreRound, ...]:
    """The rounds of a ledger in which verdicts were given, in order."""
    rounds: dict[int, list[Entry]] = {}
    for entry in ledger:
        if entry.reason != "own-nll":
            rounds.setdefault(entry.round, []).append(entry)
    return tuple(_round(entries, name(number), number == min(rounds)) for number, entries in sorted(rounds.items()))


def edges(clients: Mapping[str, Sequence[ScoreRound]], num_bins: int = NUM_BINS) -> npt.NDArray[np.float64]:
    """Bins of equal width in the logarithm, for all but the outermost scores. Score 1 is the edge of a bin."""
    logs = np.concatenate([each.logs for rounds in clients.values() for each in rounds] or [np.zeros(0)])
    low, high = np.percentile(logs, [OUTER_PERCENT, 100 - OUTER_PERCENT]) if len(logs) else (0.0, 0.0)
    # Rounded outward, because an end could be a record's own score.
    low, high = min(math.floor(50 * low) / 50, -0.02), max(math.ceil(50 * high) / 50, 0.02)
    width = (high - low) / (num_bins - 1)
    below = math.ceil(-low / width)
    return width * np.arange(-below, num_bins - below + 1, dtype=np.float64)


def histogram(scores: ScoreRound, bins: npt.NDArray[np.float64]) -> Histogram:
    """The counts of one round. The outermost bins include scores beyond them."""
    logs = np.clip(scores.logs, bins[0], bins[-1])
    shared, _ = np.histogram(logs[scores.is_shared], bins)
    personal, _ = np.histogram(logs[~scores.is_shared], bins)
    return Histogram(tuple(bins.tolist()), tuple(shared.tolist()), tuple(personal.tolist()))


def grid(scores: ScoreRound, bins: npt.NDArray[np.float64]) -> tuple[Cell, ...]:
    """The counts of one round by length and score, without empty cells. Bins of length have about equal counts."""
    if not len(scores.logs):
        return ()
    quantiles = np.quantile(scores.num_tokens, np.linspace(0, 1, NUM_LENGTHS + 1), method="lower")
    lengths = np.unique(quantiles)
    rows = np.clip(np.searchsorted(lengths, scores.num_tokens, side="right") - 1, 0, max(len(lengths) - 2, 0))
    columns = np.clip(np.searchsorted(bins, scores.logs, side="right") - 1, 0, len(bins) - 2)
    cells = []
    for row, column in sorted(set(zip(rows.tolist(), columns.tolist(), strict=True))):
        inside = (rows == row) & (columns == column)
        tokens = scores.num_tokens[rows == row]
        shared = int((inside & scores.is_shared).sum())
        cells.append(
            Cell(
                int(tokens.min()),
                int(tokens.max()),
                float(bins[column]),
                float(bins[column + 1]),
                shared,
                int(inside.sum()) - shared,
            )
        )
    return tuple(cells)


def _round(entries: Sequence[Entry], title: str, is_split: bool) -> ScoreRound:
    scored = [(entry, entry.score) for entry in entries if entry.score is not None]
    return ScoreRound(
        title=title,
        is_split=is_split,
        logs=np.array([math.log(max(score, sys.float_info.min)) for _, score in scored], dtype=np.float64),
        num_tokens=np.array([entry.num_tokens for entry, _ in scored], dtype=np.int64),
        is_shared=np.array([entry.set == "shared" for entry, _ in scored], dtype=np.bool_),
        num_not_finite=len(entries) - len(scored),
        threshold=entries[0].threshold,
    )
