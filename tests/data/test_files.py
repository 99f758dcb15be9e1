"""Reading records: files that are read, files that are refused, and messages that name the place but hold no text."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmide.config.sections import DataConfig, FieldNames
from fedmide.data import load
from fedmide.data.files import read_folder, read_records, read_table
from fedmide.data.records import Record
from fedmide.data.rows import natural_order
from fedmide.errors import DataError
from fedmide.studies.given_scores import read_scores

FIELDS = FieldNames()
GOOD = {"instruction": "Why?", "response": "So."}

texts = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=8)
spoken = texts.filter(str.strip)
objects = st.lists(
    st.fixed_dictionaries(
        {"instruction": spoken, "response": spoken},
        optional={"context": st.none() | texts, "category": texts, "concept": texts, "more": st.integers(0, 9)},
    ),
    min_size=1,
    max_size=6,
)


def write_json(path: Path, values: list[dict[str, Any]]) -> Path:
    path.write_text(json.dumps(values, indent=1), encoding="utf-8")
    return path


def write_lines(path: Path, values: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(json.dumps(value, ensure_ascii=False) for value in values), encoding="utf-8", newline="")
    return path


def write_parquet(path: Path, values: list[dict[str, Any]]) -> Path:
    names = sorted({name for value in values for name in value})
    columns = {name: [value.get(name) for value in values] for name in names}
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def problems(read: Callable[[], object]) -> tuple[str, ...]:
    with pytest.raises(DataError) as caught:
        read()
    return caught.value.problems


def problems_of(path: Path) -> list[str]:
    """The problems without the folder they are in."""
    return [problem.removeprefix(f"{path.parent}/") for problem in problems(lambda: read_records(path, FIELDS))]


@settings(deadline=None)  # a file system may be slow
@given(objects)
def test_the_three_formats_give_the_same_records(
    tmp_path_factory: pytest.TempPathFactory, values: list[dict[str, Any]]
) -> None:
    folder = tmp_path_factory.getbasetemp()
    names = ("instruction", "response", "context", "category", "concept")
    expected = tuple(Record(**{name: value.get(name) or "" for name in names}) for value in values)
    assert read_records(write_json(folder / "a.json", values), FIELDS) == expected
    assert read_records(write_lines(folder / "a.jsonl", values), FIELDS) == expected
    assert read_records(write_parquet(folder / "a.parquet", values), FIELDS) == expected


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | texts | st.just('],[{}\\"'),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None)  # a file system may be slow
@given(st.lists(json_values, min_size=1, max_size=5), st.sampled_from([None, 0, 2]))
def test_every_element_of_a_list_is_placed_at_the_line_where_it_begins(
    tmp_path_factory: pytest.TempPathFactory, values: list[object], indent: int | None
) -> None:
    path = tmp_path_factory.getbasetemp() / "b.json"
    pieces = [json.dumps(value, indent=indent) for value in values]
    path.write_text(" [\r\n " + " ,\n\n".join(pieces) + "\t]\n", encoding="utf-8")
    wrong = "\n".join(problems_of(path))
    line = 2
    for piece in pieces:
        assert f"b.json:{line}: " in wrong
        line += piece.count("\n") + 2


@settings(deadline=None)  # a file system may be slow
@given(st.text(alphabet='[]{},:"\\ \n1atrue', max_size=12))
def test_only_text_that_json_refuses_is_refused(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "c.json"
    path.write_text(text, encoding="utf-8", newline="")
    try:
        well_formed = isinstance(json.loads(text), list)
    except json.JSONDecodeError:
        well_formed = not text.strip(" \n")
    assert any("broken JSON" in problem for problem in problems_of(path)) == (not well_formed)


def test_names_of_fields_are_the_users(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"q": "Why?", "a": "So.", "input": "Here.", "code": "J45", "context": 1}])
    fields = FieldNames(instruction="q", response="a", context="input", concept="code")
    assert read_records(path, fields) == (Record("Why?", "So.", "Here.", concept="J45"),)


def test_a_byte_order_mark_and_windows_line_ends_are_accepted(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\r\n\r\n" + json.dumps(GOOD).encode() + b"\r\n")
    assert read_records(path, FIELDS) == (Record("Why?", "So."),) * 2
    path = tmp_path / "a.JSON"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps([GOOD]).encode())
    assert read_records(path, FIELDS) == (Record("Why?", "So."),)


def test_a_line_separator_within_a_text_ends_no_line(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"instruction": "one\u2028two\x85three", "response": "So."}])
    assert read_records(path, FIELDS)[0].instruction == "one\u2028two\x85three"


def test_all_problems_of_a_file_are_named_with_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    lines = [
        '{"instruction": "Why?", "response": "So."}',
        '{"instruction": "Why?"}',
        '{"instruction": 7, "response": "  "}',
        "",
        '["Why?", "So."]',
        '{"instruction": "Why?", "response": "So."',
        '{"instruction": "Why?", "response": "So.", "context": ["a"], "category": null, "concept": true}',
        '{"instruction": "\\ud83d", "response": "So."}',
        "[" * 100_000,
        "1" * 5_000,
    ]
    path.write_text("\n".join(lines), encoding="utf-8")
    assert sorted(problems_of(path)) == sorted(
        [
            "a.jsonl:2: field 'response' is missing, expected text",
            "a.jsonl:3: field 'instruction' is int, expected text",
            "a.jsonl:3: field 'response' is empty, expected text",
            "a.jsonl:5: a list, expected an object",
            "a.jsonl:6: broken JSON: Expecting ',' delimiter",
            "a.jsonl:7: field 'context' is a list, expected text",
            "a.jsonl:7: field 'concept' is bool, expected text",
            "a.jsonl:8: field 'instruction' holds half of a surrogate pair, expected Unicode text",
            "a.jsonl:9: broken JSON: nested too deep or a number too long",
            "a.jsonl:10: broken JSON: nested too deep or a number too long",
        ]
    )


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.json", b"", "a.json: no records, expected at least one"),
        ("a.json", b" [ ] \n", "a.json: no records, expected at least one"),
        ("a.jsonl", b"\n\n", "a.jsonl: no records, expected at least one"),
        ("a.json", b'\n{"a": 1}\n', "a.json:2: broken JSON: expected a list (JSON lines end in .jsonl)"),
        ("a.json", b"[\n1\n", "a.json:3: broken JSON: expected ',' or ']' after an element"),
        ("a.json", b"[null,\n]", "a.json:2: broken JSON: Expecting value"),
        ("a.json", b"[null]\nx", "a.json:2: broken JSON: expected nothing after the list"),
        ("a.json", b"[\n" + b"[" * 100_000, "a.json:1: broken JSON: nested too deep or a number too long"),
        ("a.json", b"[\n'\xe9']", "a.json:2: not UTF-8, expected text in UTF-8"),
        ("a.jsonl", b"\xff\xfe{\x00", "a.jsonl:1: not UTF-8, expected text in UTF-8"),
        ("a.parquet", b"PAR1 or not", "a.parquet: not readable as Parquet"),
        ("a.parquet", b"", "a.parquet: not readable as Parquet"),
        ("a.csv", b"instruction,response", "a.csv: expected a file that ends in .json, .jsonl, .parquet"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, name: str, content: bytes, expected: str) -> None:
    (tmp_path / name).write_bytes(content)
    assert expected in problems_of(tmp_path / name)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    for name in ("a.json", "a.jsonl"):
        assert problems_of(tmp_path / name) == [f"{name}: not readable: No such file or directory"]
    assert problems_of(tmp_path / "a.parquet") == ["a.parquet: not readable as Parquet"]


def test_a_parquet_file_is_named_with_its_records(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", [GOOD, {"instruction": None, "response": " "}])
    assert problems_of(path) == [
        "a.parquet: record 2: field 'instruction' is missing, expected text",
        "a.parquet: record 2: field 'response' is empty, expected text",
    ]
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", "b"]}), path)
    assert len(problems_of(path)) == 4
    pyarrow.parquet.write_table(pyarrow.table({"instruction": pyarrow.array([], pyarrow.string())}), path)
    assert problems_of(path) == ["a.parquet: no records, expected at least one"]
    doubled = pyarrow.table([["Why?"], ["Why?"], ["So."]], names=["instruction", "instruction", "response"])
    pyarrow.parquet.write_table(doubled, path)
    assert problems_of(path) == ["a.parquet: not readable as Parquet"]


def test_columns_that_are_not_asked_for_are_not_looked_at(tmp_path: Path) -> None:
    table = pyarrow.table(
        {"instruction": ["Why?"], "response": ["So."], "at": pyarrow.array([1], pyarrow.timestamp("ns"))}
    )
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert read_records(tmp_path / "a.parquet", FIELDS) == (Record("Why?", "So."),)


def test_dictionary_encoded_columns_are_text(tmp_path: Path) -> None:
    column = pyarrow.array(["Why?", "Why?"]).dictionary_encode()
    pyarrow.parquet.write_table(pyarrow.table({"instruction": column, "response": column}), tmp_path / "a.parquet")
    assert read_records(tmp_path / "a.parquet", FIELDS) == (Record("Why?", "Why?"),) * 2


@settings(deadline=None)  # a file system may be slow
@given(st.text(alphabet='SECRET"\\{}[],: \n', max_size=40))
def test_no_message_holds_a_text(tmp_path_factory: pytest.TempPathFactory, noise: str) -> None:
    folder = tmp_path_factory.getbasetemp() / "secrets"
    folder.mkdir(exist_ok=True)
    secret = "SECRET" + noise
    (folder / "a.json").write_text(f'[{{"instruction": "{secret}"}}, {secret}', encoding="utf-8")
    write_lines(folder / "b.jsonl", [{"instruction": secret, "client": secret}, {"response": [secret]}])
    write_lines(folder / "c.jsonl", [{**GOOD, "context": {secret: secret}, "client": secret}])
    for read in (
        lambda: read_folder(folder, FIELDS),
        lambda: read_table(folder / "c.jsonl", FIELDS),
        lambda: read_scores(folder / "b.jsonl"),
    ):
        assert "SECRET" not in "\n".join(problems(read))


def test_a_folder_holds_one_file_or_one_folder_per_client(tmp_path: Path) -> None:
    write_json(tmp_path / "site10.json", [{**GOOD, "response": "ten"}])
    write_lines(tmp_path / "Site9.jsonl", [{**GOOD, "response": "nine"}])
    (tmp_path / "site1").mkdir()
    write_json(tmp_path / "site1" / "training.json", [{**GOOD, "response": "one"}])
    write_parquet(tmp_path / "site1" / "test.parquet", [{**GOOD, "response": "test"}])
    (tmp_path / "README.md").write_text("not a record")
    (tmp_path / "._site1.json").write_bytes(b"\x00\x05\x16\x07")
    (tmp_path / ".checkpoints").mkdir()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    one, nine, ten = read_folder(tmp_path, FIELDS)

    assert [one.name, nine.name, ten.name] == ["site1", "Site9", "site10"]
    assert [client.training[0].response for client in (one, nine, ten)] == ["one", "nine", "ten"]
    assert one.test is not None
    assert (one.test[0].response, one.validation, nine.validation, nine.test) == ("test", None, None, None)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_the_problems_of_all_files_of_a_folder_come_together(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    write_json(tmp_path / "a" / "training.json", [{"instruction": "Why?"}])
    write_json(tmp_path / "a" / "test.json", [{"response": "So."}])
    (tmp_path / "b.json").write_text("[")
    found = problems(lambda: read_folder(tmp_path, FIELDS))
    assert [problem.removeprefix(f"{tmp_path}/").split(" ")[0] for problem in found] == [
        "a/training.json:2:",
        "a/test.json:2:",
        "b.json:1:",
    ]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["a.json", "a.jsonl"], ": duplicate site name, whatever its case: a, a"),
        (["a.json", "A.jsonl"], ": duplicate site name, whatever its case: A, a"),
        (["a.json", "a/training.json"], ": duplicate site name, whatever its case: a, a"),
        (["a b.json"], "/a b: expected a name of 1 to 64 characters out of A-Z a-z 0-9 . _ -"),
        (["\u00e9.json"], "/\u00e9: expected a name of 1 to 64"),
        ([f"{'n' * 65}.json"], ": expected a name of 1 to 64"),
        (["...json"], ": no sites found"),
        (["a.json", "b/test.json"], "/b: no training file"),
        (
            ["a/training.json", "a/training.jsonl"],
            "/a/training.json: expected one file for each of training, validation",
        ),
        (["a/training.json", "a/tests.json"], "/a/tests.json: expected one file for each of training, validation"),
        (["training.json", "test.json"], "/training.json: a part, expected a site"),
        ([], ": no sites found"),
        (["a.csv"], ": no sites found"),
    ],
)
def test_a_folder_with_another_layout_is_refused(tmp_path: Path, names: list[str], expected: str) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (write_lines if name.endswith("l") else write_json)(tmp_path / name, [GOOD])
    assert any(expected in problem for problem in problems(lambda: read_folder(tmp_path, FIELDS)))


@settings(deadline=None)  # a file system may be slow
@given(st.lists(st.from_regex(r"[A-Za-z0-9._-]{1,8}", fullmatch=True)))
def test_natural_order_is_an_order_of_all_names(names: list[str]) -> None:
    ordered = sorted(names, key=natural_order)
    backwards = list(reversed(names))
    assert sorted(backwards, key=natural_order) == ordered
    assert sorted(map(str, range(120)), key=natural_order) == [str(number) for number in range(120)]


@pytest.mark.parametrize(
    ("suffix", "write"), [("json", write_json), ("jsonl", write_lines), ("parquet", write_parquet)]
)
def test_a_table_holds_all_clients(
    tmp_path: Path, suffix: str, write: Callable[[Path, list[dict[str, Any]]], Path]
) -> None:
    owners = [10, 9, 10, 9, 9]
    rows = [{**GOOD, "response": str(number), "client": owner} for number, owner in enumerate(owners)]
    nine, ten = read_table(write(tmp_path / f"all.{suffix}", rows), FIELDS)
    assert [nine.name, ten.name] == ["9", "10"]
    assert [record.response for record in nine.training] == ["1", "3", "4"]
    assert [record.response for record in ten.training] == ["0", "2"]
    assert (nine.validation, nine.test) == (None, None)


def test_a_field_may_name_the_part_of_each_record(tmp_path: Path) -> None:
    """Parts without a record of a client are split off later."""
    fields = FieldNames(part="split")
    parts = {"a": ["train", "test", "training"], "b": ["training", "dev", "validation"]}
    rows = [
        {**GOOD, "response": f"{client} {number}", "client": client, "split": part}
        for client, given in parts.items()
        for number, part in enumerate(given)
    ]
    write_lines(tmp_path / "all.jsonl", rows)
    folder = tmp_path / "folder"
    folder.mkdir()
    for client in parts:
        write_json(folder / f"{client}.json", [row for row in rows if row["client"] == client])
    for a, b in (read_table(tmp_path / "all.jsonl", fields), read_folder(folder, fields)):
        assert [record.response for record in a.training] == ["a 0", "a 2"]
        assert a.test is not None and [record.response for record in a.test] == ["a 1"]
        assert (a.validation, b.test) == (None, None)
        assert b.validation is not None and [record.response for record in b.validation] == ["b 1", "b 2"]
    assert [len(each.training) for each in read_table(tmp_path / "all.jsonl", FIELDS)] == [3, 3], "no field is asked"


def test_an_unknown_part_is_named_with_its_line(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{**GOOD, "client": "a", "split": part} for part in ("train", "left arm", None, 1)]
    path = write_lines(tmp_path / "all.jsonl", rows)
    found = problems(lambda: read_table(path, FieldNames(part="split")))
    expected = "field 'split' names no part, expected training, validation, test"
    assert list(found) == [f"{path}:{line}: {expected}" for line in (2, 3, 4)]


def test_a_table_names_rows_without_a_client_and_clients_that_differ_in_case(tmp_path: Path) -> None:
    owners: list[object] = ["a", "", None, 1.5, True, "..", "a/b", "A"]
    path = write_lines(tmp_path / "all.jsonl", [{**GOOD, "client": owner} for owner in owners])
    found = problems(lambda: read_table(path, FIELDS))
    assert [problem.split(":")[1] for problem in found[:-1]] == ["2", "3", "4", "5", "6", "7"]
    assert all("field 'client' does not name a site" in problem for problem in found[:-1])
    assert found[-1].endswith("duplicate site name, whatever its case: a, A")


def test_load_splits_the_clients_of_a_table_and_takes_the_first(tmp_path: Path) -> None:
    rows = [
        {"instruction": f"Question {number}?", "response": "So.", "client": f"site{site}"}
        for site in (2, 10, 1)
        for number in range(20)
    ]
    path = write_parquet(tmp_path / "all.parquet", rows)
    clients = load(DataConfig(source="table", path=str(path), clients=2, max_records=5), seed=0)
    assert [client.name for client in clients] == ["site1", "site2"]
    assert [(len(c.training), len(c.validation), len(c.test)) for c in clients] == [(5, 2, 4)] * 2
    everyone = load(DataConfig(source="table", path=str(path), max_records=5), seed=0)
    assert everyone[:2] == clients


def test_of_a_folder_a_single_client_is_read_as_it_is_among_others(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        write_json(tmp_path / f"{name}.json", [{**GOOD, "instruction": f"{name}{number}?"} for number in range(9)])
    config = DataConfig(source="files", path=str(tmp_path), clients=2)
    (among,) = [client for client in load(config, seed=0) if client.name == "b"]
    (tmp_path / "a.json").write_text("[")
    (tmp_path / "d e").mkdir()
    assert load(config, 0, "b") == (among,)
    assert [client.name for client in load(config, 0, "c")] == ["c"], "however many are wanted"
    with pytest.raises(DataError, match="no site 'z' found"):
        load(config, 0, "z")


def test_load_reports_problems_of_its_settings(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", [GOOD])
    write_json(tmp_path / "b.json", [GOOD])
    for source in ("published", "files", "table"):
        with pytest.raises(DataError, match=r"data\.path is empty"):
            load(DataConfig(source=source), seed=0)
        with pytest.raises(DataError, match=r"nowhere: no such f.*data\.path"):
            load(DataConfig(source=source, path=str(tmp_path / "nowhere")), seed=0)
    with pytest.raises(DataError, match=r"2 sites, expected at least data\.clients = 3"):
        load(DataConfig(source="files", path=str(tmp_path), clients=3), seed=0)
    with pytest.raises(DataError) as caught:
        load(DataConfig(source="files", path=str(tmp_path)), seed=0)
    assert ["site 'a'" in caught.value.problems[0], "site 'b'" in caught.value.problems[1]] == [True, True]


def test_scores_are_read_in_every_form_and_the_objects_kept(tmp_path: Path) -> None:
    path = tmp_path / "scores.jsonl"
    path.write_text(
        '{"instruction": "Why?", "personalization_score": 1.25, "score": 9}\n'
        '{"score": 1, "more": [1, 2]}\n'
        '{"local_perplexity": 8.0, "aggregated_perplexity": 10.0}\n'
        '{"nll_local": 2.0, "nll_aggregated": 2.5}\n'
        '{"score": NaN}\n{"score": Infinity}\n'
        '{"local_perplexity": Infinity, "aggregated_perplexity": 10.0}\n'
        '{"nll_local": NaN, "nll_aggregated": 2.5}\n'
        '{"nll_local": 0, "nll_aggregated": 1e6}\n',
        encoding="utf-8",
    )
    found = read_scores(path)
    assert [record.score for record in found[:4]] == [1.25, 1.0, 1.25, math.exp(0.5)]
    assert [math.isnan(record.score) for record in found[4:]] == [True, False, True, True, True]
    assert found[5].score == math.inf
    assert found[1].original == {"score": 1, "more": [1, 2]}
    (tmp_path / "scores.json").write_text('[{"score": NaN}, {"score": 1.5}]')
    assert read_scores(tmp_path / "scores.json")[1].score == 1.5


def test_problems_of_scores_are_named_with_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "scores.jsonl"
    path.write_text(
        '{"score": "1.5"}\n{"score": true}\n{"score": null}\n{"local_perplexity": 0, "aggregated_perplexity": -1}\n'
        '{"local_perplexity": 2}\n[1]\n{"nll_local": [], "nll_aggregated": 1}\n{\n'
    )
    found = [problem.removeprefix(f"{path}:") for problem in problems(lambda: read_scores(path))]
    assert found == [
        "8: broken JSON: Expecting property name enclosed in double quotes",
        "1: field 'score' is text, expected a number (NaN where the measurement failed)",
        "2: field 'score' is bool, expected a number (NaN where the measurement failed)",
        "3: field 'score' is null, expected a number (NaN where the measurement failed)",
        "4: field 'local_perplexity' is not positive, expected a perplexity",
        "4: field 'aggregated_perplexity' is not positive, expected a perplexity",
        "5: no score and no pair of likelihoods",
        "6: a list, expected an object",
        "7: field 'nll_local' is a list, expected a number (NaN where the measurement failed)",
    ]
    assert problems(lambda: read_scores(tmp_path / "scores.csv")) == (
        f"{tmp_path / 'scores.csv'}: expected a file that ends in .json or .jsonl",
    )
