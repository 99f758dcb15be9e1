"""A file of scores is split by the rule, written out as it was read, and never written over."""

import json
import math
from pathlib import Path

import pytest

from fedmide.errors import DataError
from fedmide.studies.given_scores import read_scores, split_file

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


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"score": 1.0, "text": "\\ud800"}', "half of a surrogate pair, expected Unicode text"),
        ('{"score": ' + "9" * 400 + "}", "field 'score' is too large, expected a number that a float can hold"),
        ('{"score": "1.0"}', "field 'score' is text, expected a number (NaN where the measurement failed)"),
    ],
)
def test_a_line_that_can_not_be_read_is_refused_before_anything_is_written(
    tmp_path: Path, line: str, problem: str
) -> None:
    path = tmp_path / "scores.jsonl"
    path.write_text('{"score": 0.5}\n' + line + "\n")
    with pytest.raises(DataError) as caught:
        split_file(path, "median", tmp_path / "out")
    assert caught.value.problems == (f"{path}:2: {problem}",)
    assert not (tmp_path / "out").exists()


def test_a_score_from_likelihoods_is_the_ratio_of_perplexities(tmp_path: Path) -> None:
    pairs = [(2.0, 1.0), (1.0, 2.0), (0.0, 1e6), (math.inf, 2.0)]
    lines = [json.dumps({"nll_local": local, "nll_aggregated": aggregated}) + "\n" for local, aggregated in pairs]
    (tmp_path / "scores.jsonl").write_text("".join(lines))
    scores = [record.score for record in read_scores(tmp_path / "scores.jsonl")]
    assert scores[:2] == [math.exp(-1), math.exp(1)] and all(math.isnan(score) for score in scores[2:])
