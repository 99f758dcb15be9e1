"""Scores in bins: every record is in exactly one, and records in a bin can't be distinguished."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmide.data.records import RecordId
from fedmide.federation.ledger import Entry, Ledger
from fedmide.report.scores import ScoreRound, edges, grid, histogram, score_rounds


def entry(number: int, score: float | None, tokens: int, threshold: float | None = 1.0, **more: object) -> Entry:
    is_shared = score is not None and threshold is not None and score < threshold
    made = Entry(
        round=0,
        record_id=RecordId(f"record-{number}"),
        num_tokens=tokens,
        nll_local=1.0,
        nll_aggregated=1.0,
        score=score,
        set="shared" if is_shared else "personal",
        reason="below-threshold" if is_shared else "at-or-above-threshold",
        threshold=threshold,
        local_round=-1,
    )
    return replace(made, **more)  # type: ignore[arg-type]


def name(number: int) -> str:
    return f"round-{number}"


def one_round(scores: list[float], tokens: list[int]) -> ScoreRound:
    ledger: Ledger = tuple(entry(i, score, count) for i, (score, count) in enumerate(zip(scores, tokens, strict=True)))
    (found,) = score_rounds(ledger, name)
    return found


SCORES = st.lists(st.tuples(st.floats(0.0, 1e6), st.integers(1, 500)), min_size=1, max_size=40)


def test_rounds_are_those_with_verdicts_and_the_first_is_the_split() -> None:
    ledger = (
        entry(0, None, 5, reason="own-nll", round=-1, threshold=None),
        entry(1, None, 5, reason="not-finite", threshold=1.25),
        entry(2, 0.5, 6, threshold=1.25),
        entry(2, 2.0, 7, threshold=1.25),
        entry(1, 0.9, 5, round=3),
    )
    split, later = score_rounds(ledger, name)
    assert (split.title, split.is_split, split.threshold, split.num_not_finite) == ("round-0", True, 1.25, 1)
    assert split.logs.tolist() == pytest.approx([math.log(0.5), math.log(2)])
    assert split.is_shared.tolist() == [True, False] and split.num_tokens.tolist() == [6, 7]
    assert (later.title, later.is_split, later.threshold) == ("round-3", False, 1.0)


def test_a_ledger_without_verdicts_has_no_rounds() -> None:
    assert score_rounds((entry(0, None, 5, reason="own-nll", round=-1),), name) == ()
    assert len(edges({})) > 2


@given(SCORES)
def test_a_histogram_has_every_record_in_one_bin(records: list[tuple[float, int]]) -> None:
    scores = one_round([score for score, _ in records], [tokens for _, tokens in records])
    bins = edges({"a": [scores]})
    counts = histogram(scores, bins)
    assert sum(counts.shared) == int(scores.is_shared.sum())
    assert sum(counts.personal) == len(records) - sum(counts.shared)
    assert np.diff(bins) == pytest.approx(np.full(len(bins) - 1, bins[1] - bins[0])) and (bins[1] > bins[0])
    assert np.abs(bins).min() == 0.0  # a score of 1 is where one bin ends
    assert bins[0] < 0 < bins[-1]


@given(SCORES)
def test_a_grid_has_every_record_in_one_cell(records: list[tuple[float, int]]) -> None:
    scores = one_round([score for score, _ in records], [tokens for _, tokens in records])
    cells = grid(scores, edges({"a": [scores]}, 10))
    assert sum(cell.shared for cell in cells) == int(scores.is_shared.sum())
    assert sum(cell.shared + cell.personal for cell in cells) == len(records)
    assert all(cell.shortest <= cell.longest and cell.low < cell.high for cell in cells)
    assert all(cell.shared + cell.personal > 0 for cell in cells)


def test_a_grid_by_hand() -> None:
    scores = one_round([0.5, 0.5, 2.0, 2.0], [10, 10, 10, 90])
    bins = np.log([0.25, 1.0, 4.0])
    assert [(c.shortest, c.longest, c.shared, c.personal) for c in grid(scores, bins)] == [
        (10, 90, 2, 0),
        (10, 90, 0, 2),
    ]


def test_the_correlation_with_length_is_of_ranks() -> None:
    assert one_round([0.1, 0.9, 30.0], [90, 20, 10]).spearman == pytest.approx(-1.0)
    assert one_round([0.1, 0.9], [90, 20]).spearman is None
