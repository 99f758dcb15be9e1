"""Public sets in the forms in which they are published, by hand. Problems of a file are reported without its texts."""

import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from fedmide.data.questions import FORMS, SETS, Question, SetName, fingerprint, read_questions
from fedmide.errors import DataError

LETTERS = ("A", "B", "C", "D")
WORDS = ("heart", "liver {x}", "lung", "skin")
MEDQA: dict[str, Any] = {
    "question": "Which organ makes bile?",
    "answer": "liver {x}",
    "options": dict(zip(LETTERS, WORDS, strict=True)),
    "meta_info": "step1",
    "answer_idx": "B",
}
MEDQA_HUB = {
    "id": "train-1",
    "sent1": "Which organ makes bile?",
    "sent2": "",
    **{f"ending{number}": word for number, word in enumerate(WORDS)},
    "label": 1,
}
OPTIONS = dict(zip(("opa", "opb", "opc", "opd"), WORDS, strict=True))
MEDMCQA = [
    {"question": f"Question {number}?", **OPTIONS, "cop": number, "choice_type": "single"} for number in range(4)
]
CAREQA = {
    "exam_id": 1,
    "question": "Which organ makes bile?",
    **{f"op{number}": word for number, word in enumerate(WORDS, 1)},
    "cop": 4,
}
PUBMEDQA = {"QUESTION": "Does it help?", "CONTEXTS": ["We asked.", "It did."], "final_decision": "maybe"}
PUBMEDQA_HUB = {
    "pubid": 1,
    "question": "Does it help?",
    "context": {"contexts": ["We asked.", "It did."], "labels": ["A", "B"]},
    "final_decision": "maybe",
}
LISTED = "A. heart\nB. liver {x}\nC. lung\nD. skin\nAnswer:"
BILE = Question(f"Question: Which organ makes bile?\n{LISTED}", LETTERS, 1)
HELP = Question("Abstract: We asked.\nIt did.\nQuestion: Does it help?\nAnswer:", ("yes", "no", "maybe"), 2)


def write(path: Path, rows: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        path.write_text(json.dumps(rows))
    return path


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet"])
@pytest.mark.parametrize(
    ("name", "row", "expected"),
    [
        ("medqa", MEDQA, BILE),
        ("medqa", MEDQA_HUB, BILE),
        (
            "careqa",
            CAREQA,
            Question(f"Question: Which organ makes bile?\nChoices:\n{LISTED}", LETTERS, 3),
        ),
        ("pubmedqa", PUBMEDQA, HELP),
        ("pubmedqa", PUBMEDQA_HUB, HELP),
    ],
)
def test_every_form_is_asked_in_the_same_words(
    name: SetName, row: Any, expected: Question, suffix: str, tmp_path: Path
) -> None:
    assert read_questions(name, write(tmp_path / f"x{suffix}", [row])) == (expected,)


@pytest.mark.parametrize("first", [0, 1])
def test_medmcqa_counts_from_0_on_the_hub_and_from_1_at_its_authors(first: int, tmp_path: Path) -> None:
    rows = [{**row, "cop": row["cop"] + first} for row in MEDMCQA]
    found = read_questions("medmcqa", write(tmp_path / "dev.json", rows))
    assert [question.answer for question in found] == [0, 1, 2, 3]
    assert found[0].prompt == f"Question: Question 0?\nChoices:\n{LISTED}"


@pytest.mark.parametrize("answers", [[1, 2], [0, 4], [3]])
def test_medmcqa_that_may_count_from_either_is_refused(answers: list[int], tmp_path: Path) -> None:
    rows = [{**MEDMCQA[0], "cop": answer} for answer in answers]
    with pytest.raises(DataError, match="not clear where it begins"):
        read_questions("medmcqa", write(tmp_path / "dev.json", rows))


def test_medmcqas_test_part_has_no_answers(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="validation part"):
        read_questions("medmcqa", write(tmp_path / "test.json", [{**MEDMCQA[0], "cop": -1}]))


def test_pubmedqa_as_one_object(tmp_path: Path) -> None:
    assert read_questions("pubmedqa", write(tmp_path / "ori_pqal.json", {"21645374": PUBMEDQA})) == (HELP,)


@pytest.mark.parametrize(
    ("name", "files", "taken"),
    [
        ("medqa", ["data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"], 1),
        ("medqa", ["phrases_no_exclude_test.jsonl", "phrases_no_exclude_train.jsonl"], 0),
        ("medqa", ["data/test-00000-of-00002.parquet", "data/test-00001-of-00002.parquet"], 0),
        ("medmcqa", ["data/validation-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"], 0),
        ("pubmedqa", ["pqa_labeled/train-00000-of-00001.parquet", "pqa_artificial/train-00000-of-00001.parquet"], 0),
        ("careqa", ["CareQA_en.json", "CareQA_es.json", "CareQA_en_open.json"], 0),
    ],
)
def test_of_a_folder_the_test_part_is_read(name: SetName, files: list[str], taken: int, tmp_path: Path) -> None:
    one = {"medqa": MEDQA, "medmcqa": MEDMCQA[0], "pubmedqa": PUBMEDQA_HUB, "careqa": CAREQA}[name]
    key = "QUESTION" if "QUESTION" in one else "question"
    for number, file in enumerate(files):
        write(tmp_path / file, [{**one, key: f"file {number}"}])
    found = read_questions(name, tmp_path)
    shards = sum("of-00002" in file for file in files) or 1
    assert [f"Question: file {taken + shard}" in found[shard].prompt for shard in range(shards)] == [True] * shards
    assert len(found) == shards


@pytest.mark.parametrize(
    "files", [[], ["train.json"], ["a_test.json", "b_test.json"], ["test-00000-of-00002.json"], ["test.csv"]]
)
def test_a_folder_without_one_test_part_is_refused(files: list[str], tmp_path: Path) -> None:
    for file in files:
        write(tmp_path / file, [MEDQA])
    with pytest.raises(DataError, match="expected one file of the test part of medqa, found"):
        read_questions("medqa", tmp_path)


@pytest.fixture
def offline_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a snapshot of owner/name in the cache of the hub client."""
    repository, commit = tmp_path / "hub" / "datasets--owner--name", "0" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit, encoding="utf-8")
    (repository / "snapshots" / commit / "data").mkdir(parents=True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return repository / "snapshots" / commit / "data"


def test_a_hub_id_is_the_cached_snapshot(offline_hub: Path) -> None:
    write(offline_hub / "test-00000-of-00001.jsonl", [MEDQA])
    said: list[str] = []
    found = read_questions("medqa", Path("owner/name"), said.append)
    assert found == read_questions("medqa", offline_hub.parent)
    assert said == ["looking up owner/name on the hub"]


def test_of_a_repository_only_the_test_part_is_fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub.utils import filter_repo_objects

    kept = {}
    offered = [
        *("README.md", "train-00000-of-00001.parquet", "data/validation-00000-of-00001.parquet", "dev.json"),
        *("pqa_labeled/train-00000-of-00001.parquet", "pqa_artificial/train-00000-of-00001.parquet"),
        *("en/CareQA_en.json", "es/CareQA_es.json", "data/test-00000-of-00001.parquet", "weights_test.bin"),
    ]

    def download(name: str, repo_type: str, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        kept[name] = (repo_type, list(filter_repo_objects(offered, allow_patterns=allow_patterns)))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    for name in SETS:
        with pytest.raises(DataError, match="found none"):
            read_questions(name, Path(f"owner/{name}"))
    test = "data/test-00000-of-00001.parquet"
    assert kept == {
        "owner/medqa": ("dataset", [test]),
        "owner/medmcqa": ("dataset", ["data/validation-00000-of-00001.parquet", "dev.json"]),
        "owner/pubmedqa": ("dataset", ["pqa_labeled/train-00000-of-00001.parquet", test]),
        "owner/careqa": ("dataset", ["en/CareQA_en.json", test]),
    }


def test_a_set_that_the_hub_does_not_give_is_refused(offline_hub: Path) -> None:
    with pytest.raises(DataError, match="no such file or folder here, and the hub didn't give it: "):
        read_questions("medqa", Path("owner/other"))


@pytest.mark.parametrize("path", ["none.json", "copies/none.jsonl", "/nowhere/medqa", "a/b/c"])
def test_a_path_that_is_not_there_is_refused_and_no_hub_is_asked(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedmide.hub.snapshot", lambda *given: pytest.fail("the hub was asked"))
    with pytest.raises(DataError, match="no such file or folder"):
        read_questions("medqa", Path(path))


@pytest.mark.parametrize(
    ("name", "row", "fault"),
    [
        ("medqa", 7, "int, expected an object"),
        ("medqa", {**MEDQA, "question": " "}, "field 'question' is empty"),
        ("medqa", {**MEDQA, "answer_idx": "E"}, "field 'answer_idx' names no option"),
        ("medqa", {**MEDQA, "options": {**MEDQA["options"], "E": "ear"}}, "5 options, expected 4"),
        ("medqa", {**MEDQA, "options": {"A": "a"}}, "field 'B' is missing"),
        ("medqa", {**MEDQA_HUB, "label": 4}, "field 'label' names no option, expected a number from 0 to 3"),
        ("medqa", {**MEDQA_HUB, "label": True}, "field 'label' names no option"),
        ("careqa", {**CAREQA, "cop": 0}, "field 'cop' names no option, expected a number from 1 to 4"),
        ("careqa", {**CAREQA, "op3": None}, "field 'op3' is missing"),
        ("medmcqa", {**MEDMCQA[0], "cop": "a"}, "field 'cop' names no option"),
        ("pubmedqa", {**PUBMEDQA, "CONTEXTS": []}, "no contexts"),
        ("pubmedqa", {**PUBMEDQA, "CONTEXTS": [7]}, "no contexts"),
        ("pubmedqa", {**PUBMEDQA, "final_decision": "perhaps"}, "expected one of yes, no, maybe"),
        ("pubmedqa", {**PUBMEDQA_HUB, "context": "We asked."}, "no contexts"),
        ("pubmedqa", [], "a list, expected an object"),
    ],
)
def test_a_bad_row_is_reported_with_its_place_and_without_its_text(
    name: SetName, row: Any, fault: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "x.jsonl", [row])
    with pytest.raises(DataError) as refused:
        read_questions(name, path)
    assert f"{path}:1: " in str(refused.value)
    assert fault in str(refused.value)
    assert "bile" not in str(refused.value) and "asked" not in str(refused.value)


def test_a_row_without_a_question_is_left_out_and_reported(tmp_path: Path) -> None:
    path, said = write(tmp_path / "x.json", [CAREQA, {**CAREQA, "question": None}]), []
    assert len(read_questions("careqa", path, said.append)) == 1
    assert said == [f"{path}: 1 of 2 rows have no question and are left out"]


def test_rows_without_any_question_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no row has a question"):
        read_questions("medmcqa", write(tmp_path / "x.json", [{**MEDMCQA[0], "question": None}]))


def test_all_problems_at_once(tmp_path: Path) -> None:
    path = write(tmp_path / "x.json", [{**CAREQA, "cop": 9}, CAREQA, {**CAREQA, "op1": ""}])
    with pytest.raises(DataError) as refused:
        read_questions("careqa", path)
    assert len(refused.value.problems) == 2


def test_broken_json_is_reported(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("[{")
    with pytest.raises(DataError, match="broken JSON"):
        read_questions("medqa", tmp_path / "x.json")


def test_hashes_distinguish_prompts_and_questions() -> None:
    assert len({FORMS[name].hash for name in ("medqa", "medmcqa", "pubmedqa")}) == 3
    assert FORMS["careqa"].hash == FORMS["medmcqa"].hash
    assert set(FORMS) == set(SETS)
    assert fingerprint([BILE]) != fingerprint([HELP]) != fingerprint([HELP, HELP])
