"""Patterns of identifiers: text that they find, text that they ignore, and linear time on any text."""

import time

import pytest

from fedmide.data.identifiers import KINDS, kinds


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("Write to jane.doe+lab@uni-klinik.example.org today", "e-mail address"),
        ("Tel. +49 30 1234567", "phone number"),
        ("call (555) 123-4567", "phone number"),
        ("call 555-123-4567", "phone number"),
        ("call 555.123.4567.", "phone number"),
        ("+15551234567", "phone number"),
        ("MRN: 00123456", "record number"),
        ("Patient ID AB-12345", "record number"),
        ("medical record number 4432 1", "record number"),
        ("case no. 77812", "record number"),
        ("SSN 123-45-6789", "record number"),
        ("DOB: 03/05/1961", "date of birth"),
        ("She was born on 3 May 1961", "date of birth"),
        ("born on May 3rd, 1961", "date of birth"),
        ("Date of birth is 1961-05-03", "date of birth"),
    ],
)
def test_an_identifier_is_found(text: str, kind: str) -> None:
    assert kind in kinds(text) and kinds(text) <= set(KINDS)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "BP 120/80 mmHg, pulse 72, SpO2 98 %, 37.2 C",
        "HP:0001250 and OMIM:154700, ORPHA 558, ICD-10 J45.909, E11.65",
        "2020-01-31 to 2021-02-28, seen on 12.05.2019 and 03/04/2020",
        "Give 500 mg 2-3 times a day for 10-14 days, then 250 mg",
        "born at 32 weeks; birth weight 1 850 g",
        "the patient, no. 3 of five",
        "A 45-year-old man with 10 000 000 cells",
        "mail at work @ noon",
    ],
)
def test_clinical_text_is_ignored(text: str) -> None:
    assert kinds(text) == frozenset()


@pytest.mark.parametrize("piece", ["1 ", "12-", "(12) ", "a@", "a.", "+1", "born on ", "MRN 1 ", "3 May "])
def test_a_hostile_text_is_read_in_linear_time(piece: str) -> None:
    begun = time.perf_counter()
    assert kinds(piece * 5_000) <= set(KINDS)
    assert time.perf_counter() - begun < 5.0  # hundredths of a second; a pattern that backtracks takes minutes
