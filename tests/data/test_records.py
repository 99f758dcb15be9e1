"""Records: the parts that enter an id, and those that do not."""

import hashlib
from dataclasses import replace
from random import Random

from hypothesis import given
from hypothesis import strategies as st

from fedmide.data.records import Record, canonical_text, client_data, with_ids

short_texts = st.text(alphabet="ab\u00e9\n", max_size=3)
records = st.lists(
    st.builds(Record, instruction=short_texts, response=short_texts, context=short_texts, category=short_texts),
    max_size=12,
)


def test_an_id_is_the_hash_of_the_fields_and_an_occurrence_number() -> None:
    (record,) = with_ids([Record("Why?", "So.", context="Here.")])
    assert record.id == hashlib.sha256(b"Why?\x1fHere.\x1fSo.").hexdigest()[:16] + "-0"


def test_unicode_form_and_line_ends_do_not_make_another_text() -> None:
    composed, decomposed = Record("caf\u00e9", "a\nb"), Record("cafe\u0301", "a\r\nb")
    assert canonical_text(composed) == canonical_text(decomposed)
    assert [record.id[-2:] for record in with_ids([composed, decomposed])] == ["-0", "-1"]


def test_fields_do_not_run_into_each_other() -> None:
    assert canonical_text(Record("ab", "c")) != canonical_text(Record("a", "bc"))
    assert canonical_text(Record("a", "b", context="")) != canonical_text(Record("a", "", context="b"))


@given(records)
def test_ids_are_unique_and_leave_all_else_as_it_was(given_records: list[Record]) -> None:
    identified = with_ids(given_records)
    assert len({record.id for record in identified}) == len(given_records)
    assert [replace(record, id=original.id) for record, original in zip(identified, given_records, strict=True)] == (
        given_records
    )


@given(records, st.randoms(use_true_random=False))
def test_the_order_of_a_file_changes_no_set_of_ids(given_records: list[Record], random: Random) -> None:
    shuffled = sorted(given_records, key=lambda _: random.random())
    assert {record.id for record in with_ids(shuffled)} == {record.id for record in with_ids(given_records)}


@given(records, st.text(max_size=3), st.text(max_size=3))
def test_category_and_concept_do_not_enter_the_id(given_records: list[Record], category: str, concept: str) -> None:
    labeled = [replace(record, category=category, concept=concept) for record in given_records]
    assert [record.id for record in with_ids(labeled)] == [record.id for record in with_ids(given_records)]


@given(records, records, records)
def test_ids_are_unique_over_the_parts_of_a_client(
    training: list[Record], validation: list[Record], test: list[Record]
) -> None:
    client = client_data("a", training, validation, test)
    ids = [record.id for part in (client.training, client.validation, client.test) for record in part]
    assert len(set(ids)) == len(training) + len(validation) + len(test)
    assert client.training == with_ids(training)
