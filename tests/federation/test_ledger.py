"""The ledger: exact on disk, joined by id, and the only thing that the sets follow from."""

import json
import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmide.data.records import RecordId
from fedmide.errors import RunFolderError
from fedmide.federation import ledger
from fedmide.federation.enrollment import Verdict
from fedmide.federation.ledger import (
    Entry,
    OwnNll,
    Standing,
    before,
    from_lines,
    measurements,
    scores,
    standing,
    to_lines,
)
from fedmide.model.interface import Nll

A, B, C = RecordId("a"), RecordId("b"), RecordId("c")

figures = st.one_of(st.none(), st.floats(allow_nan=False, allow_infinity=False))
entries = st.builds(
    Entry,
    round=st.integers(-3, 50),
    record_id=st.text(min_size=1, max_size=5).map(RecordId),
    num_tokens=st.integers(0, 10_000),
    nll_local=figures,
    nll_aggregated=figures,
    score=figures,
    set=st.sampled_from(["shared", "personal"]),
    reason=st.sampled_from(["below-threshold", "at-or-above-threshold", "no-threshold", "not-finite", "own-nll"]),
    threshold=figures,
    local_round=st.integers(-3, 50),
)
ledgers = st.lists(entries, max_size=8).map(tuple)
nlls = st.builds(Nll, st.one_of(st.floats(0, 100), st.just(math.nan), st.just(math.inf)), st.integers(0, 40))

ENTRY = Entry(3, A, 7, 1.5, 2.0, math.exp(0.5), "personal", "at-or-above-threshold", 1.0, 1)


# --- lines


@given(ledgers)
def test_lines_are_read_back_exactly(given_ledger: tuple[Entry, ...]) -> None:
    text = to_lines(given_ledger)
    assert from_lines(text, "here") == given_ledger
    assert to_lines(from_lines(text, "here")) == text


def test_a_line_names_round_record_figures_set_and_reason() -> None:
    assert json.loads(to_lines([ENTRY])) == {
        "round": 3,
        "record_id": "a",
        "num_tokens": 7,
        "nll_local": 1.5,
        "nll_aggregated": 2.0,
        "score": math.exp(0.5),
        "set": "personal",
        "reason": "at-or-above-threshold",
        "threshold": 1.0,
        "local_round": 1,
    }


def test_a_value_that_is_not_a_number_is_null_and_never_nan_in_a_line() -> None:
    missing = replace(ENTRY, nll_local=None, score=None)
    assert '"nll_local": null' in to_lines([missing])
    assert from_lines(to_lines([missing]), "here") == (missing,)
    with pytest.raises(ValueError, match="not JSON compliant"):
        to_lines([replace(ENTRY, score=math.nan)])


LINE = to_lines([ENTRY])


@pytest.mark.parametrize(
    "broken",
    [
        LINE[:40],
        "",
        "[]",
        "null",
        LINE.replace('"round": 3', '"round": "3"'),
        LINE.replace('"round": 3', '"round": 3.5'),
        LINE.replace('"round": 3, ', ""),
        LINE.replace('"round": 3', '"round": 3, "text": "secret"'),
        LINE.replace("1.5", "NaN"),
        LINE.replace("1.5", "1e999"),
        LINE.replace("at-or-above-threshold", "because"),
        LINE.replace('"personal"', '"private"'),
    ],
)
def test_a_broken_line_is_named_by_its_number_and_not_repeated(broken: str) -> None:
    with pytest.raises(RunFolderError, match=r"^ledger\.jsonl:2: not a ledger line") as caught:
        from_lines(LINE + broken.rstrip("\n") + "\n" + LINE, "ledger.jsonl")
    assert "secret" not in str(caught.value)


def test_a_ledger_that_was_cut_off_is_refused_in_its_last_line() -> None:
    with pytest.raises(RunFolderError, match=r":2: "):
        from_lines((LINE + LINE)[:-20], "ledger.jsonl")


# --- the standing


def test_all_is_shared_and_unsplit_to_begin_with() -> None:
    assert standing((), [A, B]) == Standing({A: "shared", B: "shared"}, {}, is_split=False)


def test_the_last_entry_places_a_record_and_the_last_own_nll_is_its_reference() -> None:
    own = Entry(0, A, 7, 2.5, None, None, "personal", "own-nll", None, 0)
    told = (
        replace(own, round=-1, local_round=-1, nll_local=9.0, set="shared"),
        replace(ENTRY, round=0, local_round=-1),
        own,
        replace(ENTRY, round=1, set="shared", reason="below-threshold", local_round=0),
    )
    now = standing(told, [B, A])
    assert now == Standing({B: "shared", A: "shared"}, {A: OwnNll(2.5, 7, 0)}, True, {A: told[3]})
    assert standing(told[:3], [B, A]).personal == (A,)
    assert standing(told[:3], [B, A]).shared == (B,)
    assert not standing(told[:1], [B, A]).is_split


def test_an_own_nll_that_was_no_number_stands_as_nan() -> None:
    now = standing([Entry(0, A, 7, None, None, None, "personal", "own-nll", None, 0)], [A])
    assert math.isnan(now.own[A].nll)


def test_a_record_that_is_not_in_the_training_data_is_refused_without_naming_it() -> None:
    with pytest.raises(RunFolderError, match="round 3 names a record that is not in the training data"):
        standing([replace(ENTRY, record_id=RecordId("0123456789abcdef-0"))], [A])


@given(ledgers)
def test_the_sets_are_a_partition_of_the_training_records(given_ledger: tuple[Entry, ...]) -> None:
    records = {entry.record_id for entry in given_ledger} | {C}
    now = standing(given_ledger, sorted(records))
    assert sorted((*now.shared, *now.personal)) == sorted(records)


@given(ledgers, st.integers(-3, 50))
def test_before_leaves_earlier_rounds_as_they_were(given_ledger: tuple[Entry, ...], number: int) -> None:
    kept = before(given_ledger, number)
    assert list(kept) == [entry for entry in given_ledger if entry.round < number]
    assert before(kept, number) == kept


# --- entries


def test_measurements_store_means_per_token() -> None:
    found = measurements(
        4, {A: Nll(6.0, 4), B: Nll(math.inf, 4), C: Nll(0.0, 0)}, {A: "personal", B: "shared", C: "shared"}
    )
    assert [(entry.record_id, entry.nll_local, entry.num_tokens, entry.set) for entry in found] == [
        (A, 1.5, 4, "personal"),
        (B, None, 4, "shared"),
        (C, None, 0, "shared"),
    ]
    assert {(entry.round, entry.local_round, entry.reason, entry.score) for entry in found} == {(4, 4, "own-nll", None)}


def test_verdicts_store_scores_and_their_age() -> None:
    judged = {A: Verdict("personal", "at-or-above-threshold", 1.0), B: Verdict("personal", "not-finite", 1.0)}
    own = {A: OwnNll(1.5, 4, 2), B: OwnNll(math.nan, 4, 5)}
    aggregated = {A: Nll(8.0, 4), B: Nll(8.0, 4)}
    first, second = ledger.verdicts(7, aggregated, own, ledger.scores(aggregated, own), judged)
    assert first == Entry(7, A, 4, 1.5, 2.0, math.exp(0.5), "personal", "at-or-above-threshold", 1.0, 2)
    assert second == Entry(7, B, 4, None, 2.0, None, "personal", "not-finite", 1.0, 5)
    assert first.round - first.local_round == 5


# --- the original's first bug: it zipped two files that were shuffled differently


def shuffled(values: dict[Any, Any], random: Any) -> dict[Any, Any]:
    keys = list(values)
    random.shuffle(keys)
    return {key: values[key] for key in keys}


@given(
    st.dictionaries(st.text(min_size=1, max_size=3).map(RecordId), st.tuples(nlls, nlls), max_size=12),
    st.randoms(use_true_random=False),
)
def test_scores_are_joined_by_id_and_never_by_position(pairs: dict[RecordId, tuple[Nll, Nll]], random: Any) -> None:
    aggregated = {record: pair[0] for record, pair in pairs.items()}
    own = {record: OwnNll(pair[1].mean, pair[1].num_tokens, 0) for record, pair in pairs.items()}
    expected = {record: repr(value) for record, value in scores(aggregated, own).items()}
    found = scores(shuffled(aggregated, random), shuffled(own, random))
    assert {record: repr(value) for record, value in found.items()} == expected
    for record, (nll_aggregated, nll_local) in pairs.items():
        one = scores({record: nll_aggregated}, {record: OwnNll(nll_local.mean, 1, 0)})
        assert repr(one[record]) == expected[record]
