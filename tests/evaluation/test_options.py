"""Records that list options, and the option that the reference names."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmide.data.records import Record
from fedmide.evaluation.options import listed
from tests.needs import PUBLISHED

ORGANS = ("Heart", "Liver", "Bile duct", "Duct")
ASKED = "Which organ makes bile?\nA. Heart\nB. Liver\nC. Bile duct\nD. Duct"


@pytest.mark.parametrize(
    ("reference", "answer"),
    [
        ("B. Liver", 1),
        ("B", 1),
        (" **B** ", 1),
        ("A cause is unknown.", None),
        ("Bile is made by the liver.", 1),
        ("It is **A. Heart**.", 0),
        ("It is the liver (Option B).", 1),
        ("The answer is D: the common one.", 3),
        ("Therefore choice C fits.", 2),
        ("It is A. Heart or B. Liver.", None),
        ("The answer is B, the heart.", None),
        ("The bile duct.", None),
        ("The livers.", None),
        ("Option E.", None),
        ("Nobody knows.", None),
    ],
)
def test_the_answer_is_named_or_repeated_or_not_clear(reference: str, answer: int | None) -> None:
    found = listed(Record(ASKED, reference))
    assert found is not None
    assert found.texts == ORGANS
    assert found.answer == answer


@pytest.mark.parametrize("form", ["{letter}. {text}", "({letter}) {text}", " {letter}) {text} ", "{letter}: {text}"])
@pytest.mark.parametrize("in_context", [True, False])
def test_forms_of_lists(form: str, in_context: bool) -> None:
    lines = "\n".join(form.format(letter="ABCD"[number], text=text) for number, text in enumerate(ORGANS))
    asked = Record("Which?", "B.", context=lines) if in_context else Record(f"Which?\n{lines}", "B.")
    found = listed(asked)
    assert found is not None and found.texts == ORGANS


@pytest.mark.parametrize(
    "instruction",
    [
        "Which organ?",
        "Which organ? A. Heart B. Liver",
        "Which?\nA. Heart",
        "Which?\nB. Heart\nC. Liver",
        "Which?\nA. Heart\nC. Liver",
        "Which?\nA. Heart\nB. Heart",
        "Which?\nA. \nB. Heart",
    ],
)
def test_texts_that_list_no_options(instruction: str) -> None:
    assert listed(Record(instruction, "A.")) is None


@given(st.text(), st.text(), st.text())
def test_any_text_is_read(instruction: str, context: str, response: str) -> None:
    found = listed(Record(instruction, response, context))
    assert found is None or (len(found.texts) >= 2 and (found.answer is None or found.answer < len(found.texts)))


@pytest.mark.needs("published")
def test_of_the_published_records_46_list_options_and_each_names_one() -> None:
    rows = json.loads((PUBLISHED / "8" / "local_test_4.json").read_text("utf-8"))
    records = [Record(row["instruction"], row["response"], row["context"]) for row in rows]
    found = [options for record in records if (options := listed(record))]
    assert len(found) == 46
    assert sum(options.answer is None for options in found) == 0
    assert {len(options.texts) for options in found} == {4, 5}
