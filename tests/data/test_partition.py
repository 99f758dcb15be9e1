"""Clients made from one data set: every record in one place, groups whole, shares as asked, stable draws."""

import json
from collections import Counter
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from fedmide.config.sections import DataConfig, FieldNames
from fedmide.data import load, partition_svg
from fedmide.data.leaks import leaks
from fedmide.data.partition import (
    Labeled,
    Rule,
    counts,
    deal,
    dirichlet_shares,
    parse_rule,
    read_labeled,
    write,
)
from fedmide.data.records import Record
from fedmide.data.split import normalized
from fedmide.errors import DataError, UsageError

IID = Rule("iid")
HELD_OUT: dict[Any, float] = {"test": 0.2, "validation": 0.1}
NONE: dict[Any, float] = {}

rules = st.sampled_from(
    [IID, Rule("dirichlet", "x", 0.1), Rule("dirichlet", "x", 5.0), Rule("size", "", 1.5), Rule("field", "x")]
)
labeled = st.builds(
    lambda question, concept, label: Labeled(Record(question, "answer", concept=concept), label),
    st.integers(0, 40).map(lambda number: f"Question {number}?"),
    st.sampled_from([""] * 4 + [f"C{number}" for number in range(12)]),
    st.sampled_from("pqr"),
)


def distinct(count: int, labels: str = "pqrs") -> list[Labeled]:
    return [Labeled(Record(f"Question {n}?", f"answer {n}"), labels[n % len(labels)]) for n in range(count)]


def slow_groups(records: list[Record]) -> set[frozenset[int]]:
    """The groups of records that are tied together, grown until nothing is added."""
    groups = []
    for start in range(len(records)):
        group = {start}
        while True:
            asked = {normalized(records[number].instruction) for number in group}
            about = {normalized(records[number].concept) for number in group} - {""}
            more = {
                number
                for number, record in enumerate(records)
                if normalized(record.instruction) in asked or normalized(record.concept) in about
            }
            if more == group:
                break
            group = more
        groups.append(frozenset(group))
    return set(groups)


@given(st.lists(labeled, min_size=12, max_size=80), rules, st.integers(1, 4), st.integers(0, 3))
def test_every_record_is_in_one_part_of_one_client_and_no_group_is_split(
    rows: list[Labeled], rule: Rule, clients: int, seed: int
) -> None:
    numbered = [Labeled(Record(e.record.instruction, f"{n}", concept=e.record.concept), e.label)
                for n, e in enumerate(rows)]  # fmt: skip
    try:
        dealt = deal(numbered, rule, clients, seed, HELD_OUT)
    except DataError as refused:
        assert "expected at least" in str(refused)
        assume(False)
        return
    places = {
        each.record.response: (name, part) for name, parts in dealt.items() for part in parts for each in parts[part]
    }
    assert sorted(places) == sorted(str(n) for n in range(len(rows)))
    assert sum(len(parts[part]) for parts in dealt.values() for part in parts) == len(rows)
    for group in slow_groups([each.record for each in numbered]):
        assert len({places[str(n)] for n in group}) == 1
    assert list(dealt) == [f"site-{number}" for number in range(1, clients + 1)]
    assert all(parts[part] for parts in dealt.values() for part in ("training", "validation", "test"))
    if rule.kind == "field":
        assert all(
            len({places[str(n)][0] for n, each in enumerate(rows) if each.label == label and alone(rows, n)}) <= 1
            for label in "pqr"
        )


def alone(rows: list[Labeled], number: int) -> bool:
    """True if a record shares its group with no other."""
    return any(group == {number} for group in slow_groups([each.record for each in rows]))


@given(rules.filter(lambda rule: rule.kind != "field"), st.integers(1, 6), st.integers(0, 3))
def test_the_client_of_a_record_depends_on_no_order(rule: Rule, clients: int, seed: int) -> None:
    rows = distinct(60)
    dealt, turned = deal(rows, rule, clients, seed, HELD_OUT), deal(rows[::-1], rule, clients, seed, HELD_OUT)
    for name, parts in dealt.items():
        for part, records in parts.items():
            assert list(turned[name][part]) == list(records)[::-1]


def test_even_clients_are_even_and_mixed() -> None:
    dealt = deal(distinct(400), IID, 8, 0, NONE)
    for values in counts(dealt).values():
        assert sum(values.values()) == 50
        # of 50 draws of 4 values without replacement: 12.5 each, standard deviation below 3
        assert all(2 <= values[label] <= 24 for label in "pqrs")


def test_sizes_fall_by_their_exponent() -> None:
    dealt = deal(distinct(1000), Rule("size", strength=1.0), 4, 0, NONE)
    whole = sum(1 / rank for rank in (1, 2, 3, 4))
    sizes = [sum(values.values()) for values in counts(dealt).values()]
    assert sizes == pytest.approx([1000 / rank / whole for rank in (1, 2, 3, 4)], abs=1)


@pytest.mark.parametrize("alpha", [0.5, 5.0])
def test_shares_of_a_value_are_those_drawn(alpha: float) -> None:
    names = [f"site-{number}" for number in range(1, 5)]
    dealt = deal(distinct(2000), Rule("dirichlet", "x", alpha), 4, 1, NONE)
    for label in "pqrs":
        shares = dirichlet_shares(alpha, label, names, 1)
        whole = sum(shares.values())
        for name in names:
            assert counts(dealt)[name][label] == pytest.approx(500 * shares[name] / whole, abs=1)


def test_shares_have_the_mean_and_variance_of_dirichlet() -> None:
    names, alpha = ["a", "b", "c"], 0.7
    drawn = np.array([list(dirichlet_shares(alpha, "x", names, seed).values()) for seed in range(3000)])
    drawn /= drawn.sum(axis=1, keepdims=True)
    variance = (1 / 3) * (2 / 3) / (3 * alpha + 1)
    assert drawn.mean(axis=0) == pytest.approx([1 / 3] * 3, abs=0.03)
    assert drawn.var(axis=0) == pytest.approx([variance] * 3, rel=0.12)


@given(st.floats(1e-3, 1e3), st.integers(0, 5))
def test_another_client_leaves_the_others_proportions(alpha: float, seed: int) -> None:
    few, more = (dirichlet_shares(alpha, "x", names, seed) for names in ("abc", "abcd"))
    assert all(np.isfinite(list(more.values()))) and max(few.values()) == 1.0
    first = max(few, key=lambda name: few[name])
    if more[first] > 0:
        assert [more[name] / more[first] for name in "abc"] == pytest.approx([few[name] / few[first] for name in "abc"])


def test_a_small_alpha_leaves_no_client_without_parts() -> None:
    dealt = deal(distinct(60), Rule("dirichlet", "x", 0.01), 10, 0, HELD_OUT)
    assert all(len(parts[part]) >= 1 for parts in dealt.values() for part in parts)


def test_a_field_makes_a_client_of_each_value_or_deals_the_values() -> None:
    rows = distinct(90, "ppppqqr")
    each = counts(deal(rows, Rule("field", "x"), 0, 0, NONE))
    assert [set(values) for values in each.values()] == [{"p"}, {"q"}, {"r"}]
    two = counts(deal(rows, Rule("field", "x"), 2, 0, NONE))
    assert [set(values) for values in two.values()] == [{"p"}, {"q", "r"}]


def test_held_out_parts_have_their_fractions() -> None:
    for parts in deal(distinct(400), IID, 4, 0, HELD_OUT).values():
        assert {part: len(records) for part, records in parts.items()} == {
            "training": 70,
            "test": 20,
            "validation": 10,
        }


@pytest.mark.parametrize(
    ("rows", "rule", "clients"),
    [
        (distinct(5), IID, 2),
        ([Labeled(Record("Same?", str(n)), "p") for n in range(50)], IID, 2),
        (distinct(50, "p" * 49 + "q"), Rule("field", "x"), 2),
        (distinct(50, "p"), Rule("field", "x"), 2),
    ],
)
def test_too_few_groups_are_refused(rows: list[Labeled], rule: Rule, clients: int) -> None:
    with pytest.raises(
        DataError, match=r"groups of records that share no question and no concept: \d+, expected at least"
    ):
        deal(rows, rule, clients, 0, HELD_OUT)


@pytest.mark.parametrize("rule", [Rule("field", "hospitl"), Rule("dirichlet", "hospitl", 1.0)])
def test_a_field_that_no_record_has_is_refused(rule: Rule) -> None:
    with pytest.raises(DataError, match="no record has a value in the field 'hospitl'"):
        deal(distinct(50, [""]), rule, 2, 0, HELD_OUT)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("iid", IID),
        ("field:hospital", Rule("field", "hospital")),
        ("dirichlet:1e-1:category", Rule("dirichlet", "category", 0.1)),
        ("size:1.5", Rule("size", strength=1.5)),
    ],
)
def test_rules_are_parsed(text: str, rule: Rule) -> None:
    assert parse_rule(text) == rule


@pytest.mark.parametrize(
    "text", ["", "iid:1", "field", "field:", "dirichlet:0.5", "dirichlet:0:x", "dirichlet:nan:x", "size:-1", "size:a"]
)
def test_a_text_that_is_not_a_rule_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"is not a rule\. Expected iid, field:NAME"):
        parse_rule(text)


# --- files


def file_of(rows: list[dict[str, Any]], path: Path) -> Path:
    path.write_text(json.dumps(rows))
    return path


ROWS = [
    {"instruction": f"Question {n}?", "response": f"answer {n}", "concept": f"C{n // 2}", "hospital": n % 3}
    for n in range(60)
]


def test_written_parts_are_read_as_clients_and_nothing_leaks(tmp_path: Path) -> None:
    rows = read_labeled(file_of(ROWS, tmp_path / "all.json"), FieldNames(), "hospital")
    assert {each.label for each in rows} == {"0", "1", "2"}
    dealt = deal(rows, IID, 3, 0, HELD_OUT)
    write(dealt, tmp_path / "out", "<svg/>")
    clients = load(DataConfig(source="files", path=str(tmp_path / "out")), 0)
    assert [client.name for client in clients] == ["site-1", "site-2", "site-3"]
    for client in clients:
        for part, records in dealt[client.name].items():
            found = getattr(client, part)
            assert [(r.instruction, r.response, r.concept) for r in found] == [
                (e.record.instruction, e.record.response, e.record.concept) for e in records
            ]
    assert leaks(clients) == ()
    assert (tmp_path / "out" / "partition.svg").read_text() == "<svg/>"


def test_same_seed_same_bytes(tmp_path: Path) -> None:
    rows = read_labeled(file_of(ROWS, tmp_path / "all.json"), FieldNames(), "hospital")
    contents = []
    for out, seed in (("a", 0), ("b", 0), ("c", 1)):
        write(deal(rows, Rule("dirichlet", "hospital", 0.5), 3, seed, HELD_OUT), tmp_path / out, "")
        files = sorted(path for path in (tmp_path / out).rglob("*") if path.is_file())
        contents.append({str(path.relative_to(tmp_path / out)): path.read_bytes() for path in files})
    assert contents[0] == contents[1] != contents[2]


def test_all_bad_rows_are_reported(tmp_path: Path) -> None:
    rows = [{"instruction": "Secret?", "response": ""}, {**ROWS[0], "hospital": [1]}, ROWS[1], 7]
    with pytest.raises(DataError) as refused:
        read_labeled(file_of(rows, tmp_path / "all.json"), FieldNames(), "hospital")
    assert len(refused.value.problems) == 3
    assert "field 'hospital' has no plain value" in str(refused.value) and "Secret" not in str(refused.value)


@pytest.mark.parametrize("name", ["none.json", "none.parquet", "folder", "notes.txt", "empty.jsonl"])
def test_without_records_the_error_asks_for_a_file_of_them(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    for there in ("notes.txt", "empty.jsonl"):
        (tmp_path / there).touch()
    with pytest.raises(DataError, match=r"Give one file of records: \.json, \.jsonl or \.parquet$"):
        read_labeled(tmp_path / name, FieldNames(), "")


# --- the picture


def test_the_picture_has_a_bar_for_every_value_in_scale() -> None:
    held = {"site-1": Counter({"<A&B>": 30, "": 10}), "site-2": Counter({"<A&B>": 20})}
    root = ElementTree.fromstring(partition_svg.bars_svg(held, "all.json & <more>"))
    name = "{http://www.w3.org/2000/svg}"
    bars = {
        rect[0].text: float(rect.attrib["width"]) for rect in root.iter(f"{name}rect") if len(rect)
    }  # those with a title
    assert bars == {"<A&B>: 30": pytest.approx(420), "(none): 10": pytest.approx(140), "<A&B>: 20": pytest.approx(280)}
    texts = [text.text for text in root.iter(f"{name}text")]
    assert texts == ["all.json & <more>", "site-1", "40", "site-2", "20", "<A&B>", "(none)"]


def test_more_values_than_colors_are_shown_as_other() -> None:
    held = {"site-1": Counter({f"value {n:02}": 20 - n for n in range(12)})}
    root = ElementTree.fromstring(partition_svg.bars_svg(held, "x"))
    texts = [text.text for text in root.iter("{http://www.w3.org/2000/svg}text")]
    assert texts[3:] == [*(f"value {n:02}" for n in range(len(partition_svg.COLORS))), "other"]
