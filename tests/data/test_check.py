"""The check of a set of clients: by hand, and on the published data against known facts."""

import json
from dataclasses import asdict

import pytest

from fedmide.config.sections import DataConfig
from fedmide.data import load
from fedmide.data.check import Lengths, PartReport, check
from fedmide.data.leaks import Leak
from fedmide.data.records import Record, client_data
from tests.needs import PUBLISHED


def test_check_by_hand() -> None:
    client = client_data(
        "a",
        [
            Record("Why?", "So.", context="Here", category="x"),
            Record("Why?", "So.", context="Here", category="y"),
            Record("How?", "Thus.", category="y", concept="J45"),
        ],
        test=[Record("Why?", "So.", context="Here")],
    )
    report = check([client])
    assert report.clients[0].name == "a"
    assert report.clients[0].training == PartReport(
        records=3,
        duplicates=1,
        empty_contexts=1,
        categories=2,
        concepts=1,
        prompt_characters=Lengths(mean=20 / 3, longest=8),
        response_characters=Lengths(mean=11 / 3, longest=5),
        category_mix={"y": 2, "x": 1},
    )
    assert report.clients[0].validation == PartReport(0, 0, 0, 0, 0, Lengths(0.0, 0), Lengths(0.0, 0))
    assert set(report.leaks) == {Leak("a", "test", "a", kind, 1, 1) for kind in ("text", "question")}


def test_a_report_can_be_json_and_holds_no_text_of_a_record() -> None:
    secret = Record("secret-i", "secret-r", context="secret-c", category="secret-k", concept="secret-o")
    written = json.dumps(asdict(check([client_data("a", [secret], [secret], [secret])])))
    assert written.count("secret") == written.count('{"secret-k": 1}') == 3  # a category is a label, not a text
    assert json.loads(written)["clients"][0]["test"]["records"] == 1


def test_records_with_likely_identifiers_are_counted_by_kind() -> None:
    records = [
        Record("Who?", "J. Doe, j.doe@clinic.org, a.doe@clinic.org, MRN 00123456"),
        Record("Whose?", "j.doe@clinic.org"),
        Record("What?", "Asthma."),
    ]
    (client,) = check([client_data("a", records, test=records[:1])]).clients
    assert client.training.identifiers == {"e-mail address": 2, "record number": 1}
    assert client.test.identifiers == {"e-mail address": 1, "record number": 1} and not client.validation.identifiers


@pytest.mark.needs("published")
def test_the_published_data_is_as_it_is_known_to_be() -> None:
    report = check(load(DataConfig(path=str(PUBLISHED), validation_fraction=0.0), seed=0))
    assert {client.name: client.training.duplicates for client in report.clients if client.training.duplicates} == {
        "2": 2,
        "7": 1,
    }
    assert [client.training.records for client in report.clients] == [300] * 8
    assert [client.test.records for client in report.clients] == [200] * 8
    within = [leak for leak in report.leaks if leak.client == leak.training_client]
    # 4 different texts. Two of them occur twice in the test file, so 6 of its records are affected.
    assert [leak for leak in within if leak.kind == "text"] == [Leak("2", "test", "2", "text", 6, 4)]
    asked_again = [leak for leak in within if leak.kind == "question"]
    # 11 instructions of client 7 are asked again, 3 of them with another context.
    assert {leak.client: leak.distinct for leak in asked_again} == {"1": 3, "2": 11, "4": 1, "7": 8}
    assert {leak.client: leak.records for leak in asked_again} == {"1": 3, "2": 23, "4": 1, "7": 9}


@pytest.mark.needs("published")
def test_no_validation_record_of_the_published_data_shares_its_instruction_with_training() -> None:
    report = check(load(DataConfig(path=str(PUBLISHED)), seed=0))
    assert not [leak for leak in report.leaks if leak.part == "validation"]
    assert all(30 <= client.validation.records <= 34 for client in report.clients)
