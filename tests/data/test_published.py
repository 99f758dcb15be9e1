"""The published layout: any number of clients in it, and the published data itself."""

import json
from collections import Counter
from pathlib import Path

import pytest

from fedmide.config.sections import DataConfig, FieldNames
from fedmide.data import load
from fedmide.data.files import read_records
from fedmide.data.published import read_published
from fedmide.data.records import canonical_text
from fedmide.errors import DataError
from fedmide.studies.given_scores import read_scores
from tests.needs import PUBLISHED

FIELDS = FieldNames()
needs_published = pytest.mark.needs("published")


def write(folder: Path, part: str, client: object, count: int = 1) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    records = [{"instruction": f"{client} {part} {number}?", "response": "So."} for number in range(count)]
    (folder / f"local_{part}_{client}.json").write_text(json.dumps(records))


def refused(path: Path) -> list[str]:
    with pytest.raises(DataError) as caught:
        read_published(path, FIELDS)
    return [problem.removeprefix(str(path)) for problem in caught.value.problems]


def test_clients_are_named_and_ordered_by_their_numbers(tmp_path: Path) -> None:
    for number in (10, 2, 0, 33):
        write(tmp_path, "training", number, count=2)
    write(tmp_path, "test", 2)
    (tmp_path / "local_training_0.jsonl").write_text("not looked at")
    clients = read_published(tmp_path, FIELDS)
    assert [client.name for client in clients] == ["0", "2", "10", "33"]
    assert [client.training[0].instruction for client in clients][2:] == ["10 training 0?", "33 training 0?"]
    assert [client.test is None for client in clients] == [True, False, True, True]
    assert [client.validation for client in clients] == [None] * 4


def test_the_numbered_folder_below_is_found(tmp_path: Path) -> None:
    write(tmp_path / "3", "training", 0)
    (tmp_path / "8").mkdir()
    write(tmp_path / "old", "training", 0)
    assert len(read_published(tmp_path, FIELDS)) == 1
    write(tmp_path / "8", "training", 0)
    assert refused(tmp_path) == [": several numbered folders hold records (3, 8), expected one"]


def test_another_layout_is_refused(tmp_path: Path) -> None:
    assert refused(tmp_path / "nowhere") == [": no such folder"]
    assert refused(tmp_path) == [": no local_training_{i}.json, in it or in a numbered folder in it"]
    write(tmp_path, "training", "a")
    write(tmp_path, "training", "01")
    write(tmp_path, "training", 1)
    write(tmp_path, "test", 2)
    (tmp_path / "local_training_1.json").write_text("[{}]")
    assert refused(tmp_path) == [
        "/local_training_01.json: expected a whole number for the site",
        "/local_training_a.json: expected a whole number for the site",
        "/local_test_2.json: no local_training_2.json next to it",
        "/local_training_1.json:1: field 'instruction' is missing, expected text",
        "/local_training_1.json:1: field 'response' is missing, expected text",
    ]


def test_validation_files_are_read_and_files_that_the_original_leaves_behind_are_not(tmp_path: Path) -> None:
    write(tmp_path, "training", 0, count=2)
    write(tmp_path, "validation", 0, count=3)
    for name in ("0_v1", "0_v2", "0_v3", "1_v2", "1_v2_v3"):
        write(tmp_path, "training", name)
    (client,) = read_published(tmp_path, FIELDS)
    assert (client.name, len(client.training), len(client.validation or ()), client.test) == ("0", 2, 3, None)
    write(tmp_path, "validation", 1)
    assert refused(tmp_path) == ["/local_validation_1.json: no local_training_1.json next to it"]


def test_load_splits_off_the_test_records_of_a_client_without_a_test_file(tmp_path: Path) -> None:
    write(tmp_path, "training", 0, count=20)
    write(tmp_path, "training", 1, count=20)
    write(tmp_path, "test", 1, count=3)
    sizes = [(len(c.training), len(c.validation), len(c.test)) for c in load(DataConfig(path=str(tmp_path)), seed=0)]
    assert sizes == [(14, 2, 4), (18, 2, 3)]


@needs_published
def test_the_published_data_is_read_from_its_folder_and_from_the_one_above() -> None:
    above, within = read_published(PUBLISHED, FIELDS), read_published(PUBLISHED / "8", FIELDS)
    assert above == within
    assert [(client.name, len(client.training), len(client.test or ())) for client in above] == [
        (str(number), 300, 200) for number in range(8)
    ]
    for client in above:
        original = json.loads((PUBLISHED / "8" / f"local_training_{client.name}.json").read_text(encoding="utf-8"))
        assert [record.instruction for record in client.training] == [value["instruction"] for value in original]
        assert [record.category for record in client.training] == [value["category"] for value in original]


@needs_published
def test_fewer_clients_and_records_leave_the_others_as_they_are() -> None:
    everyone = load(DataConfig(path=str(PUBLISHED), max_records=50, max_test_records=20), seed=1)
    some = load(DataConfig(path=str(PUBLISHED), max_records=50, max_test_records=20, clients=3), seed=1)
    assert some == everyone[:3]
    assert [(len(client.training), len(client.test)) for client in everyone] == [(50, 20)] * 8


@needs_published
def test_the_published_sets_are_partitions_of_the_published_training_records() -> None:
    for number in range(8):
        name = f"local_training_{number}.json"
        folders = [PUBLISHED / "8", *(PUBLISHED / "8" / kind / "8" for kind in ("local1", "global1", "remain1"))]
        training, scored, shared, personal = (
            Counter(map(canonical_text, read_records(folder / name, FIELDS))) for folder in folders
        )
        assert training == scored == shared + personal


@needs_published
@pytest.mark.parametrize("number", [0, 1, 2, 4, 5, 7])
def test_scores_from_perplexities_are_the_published_scores(number: int) -> None:
    """Scores are joined by the index of the training record, because the scored files are in another order."""
    records = read_records(PUBLISHED / "8" / f"local_training_{number}.json", FIELDS)
    measured = read_scores(PUBLISHED / "8" / f"perplexities_{number}.jsonl")
    by_text = {canonical_text(records[int(str(each.original["index"]))]): each.score for each in measured}
    folder = PUBLISHED / "8" / "local1" / "8"
    published = read_records(folder / f"local_training_{number}.json", FIELDS)
    scores = [record.score for record in read_scores(folder / f"local_training_{number}.json")]
    found = [by_text[canonical_text(record)] for record in published]
    different = Counter(canonical_text(record) for record in published)
    assert len(measured) == len(published) == 300
    for record, ours, theirs in zip(published, found, scores, strict=True):
        if different[canonical_text(record)] == 1:  # a text cannot distinguish two equal records
            assert ours == pytest.approx(theirs, rel=0, abs=1e-12)
    computed = sorted(record.score for record in read_scores(PUBLISHED / "8" / f"perplexities_{number}.jsonl"))
    scored = read_scores(PUBLISHED / "8" / "local1" / "8" / f"local_training_{number}.json")
    assert computed == pytest.approx(sorted(record.score for record in scored), rel=0, abs=1e-12)
    assert [record.score for record in scored] == sorted((record.score for record in scored), reverse=True)
