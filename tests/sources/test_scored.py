"""A file of scores is split by the rule, written out as it was read, and never written over."""

import json
from pathlib import Path

import pytest

from fedmide.errors import DataError
from fedmide.sources.scored import split_file

RECORDS = [{"score": 1.2, "text": "kept as it is"}, {"score": 0.9}, {"score": 1.25}, {"score": 0.95}]


@pytest.fixture
def scores(tmp_path: Path) -> Path:
    path = tmp_path / "shared.json"  # the name of an output
    path.write_text(json.dumps(RECORDS), "utf-8")
    return path


def test_the_sets_are_written_as_they_were_read_in_the_files_order(scores: Path, tmp_path: Path) -> None:
    found = split_file(scores, "otsu-exact", tmp_path / "out")
    assert found == {"threshold": 1.075, "shared": 2, "personal": 2, "rule": "otsu-exact", "not_finite": 0}
    assert json.loads((tmp_path / "out" / "shared.json").read_text()) == [RECORDS[1], RECORDS[3]]
    assert json.loads((tmp_path / "out" / "personal.json").read_text()) == [RECORDS[0], RECORDS[2]]


def test_nothing_is_written_over(scores: Path) -> None:
    before = scores.read_bytes()
    with pytest.raises(DataError, match=r"shared\.json exists already"):
        split_file(scores, "otsu-exact", scores.parent)
    assert scores.read_bytes() == before and not (scores.parent / "personal.json").exists()


def test_without_a_folder_nothing_is_written(scores: Path) -> None:
    split_file(scores, "median")
    assert [path.name for path in scores.parent.iterdir()] == ["shared.json"]
