"""The split of a client's records: properties that hold for every client, and the leaks that are found."""

from collections import Counter
from dataclasses import replace
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmide.config.sections import DataConfig
from fedmide.data.leaks import Leak, leaks
from fedmide.data.records import ClientData, Record, RecordId, client_data
from fedmide.data.split import SourceParts, grouped, limit, normalized, split
from fedmide.errors import DataError
from fedmide.seeds import entropy

texts = st.sampled_from(["What is it?", "what  is it?", "Why?", "How?", "Who?", "When?", "Where?", "caf\u00e9"])
records = st.builds(
    Record,
    instruction=texts,
    response=st.sampled_from(["yes", "no", "maybe"]),
    context=st.sampled_from(["", "", "", "one", "two", "ONE "]),
    concept=st.sampled_from([""] * 9 + ["J45", "j45", "E11"]),
)
files = st.lists(records, min_size=12, max_size=60).filter(lambda found: len(set(grouped(found))) >= 3)
seeds = st.integers(0, 1000)
configs = st.builds(
    DataConfig,
    validation_fraction=st.floats(0, 0.99),
    test_fraction=st.floats(0, 0.99),
)


def plain(part: tuple[Record, ...]) -> list[Record]:
    return [replace(record, id=RecordId("")) for record in part]


def slow_groups(found: list[Record]) -> list[frozenset[int]]:
    """For each record, the records that are tied to it, grown until nothing is added."""
    contexts: dict[str, set[str]] = {}
    for record in found:
        contexts.setdefault(normalized(record.instruction), set()).add(normalized(record.context))

    def tied(one: Record, two: Record) -> bool:
        instruction = normalized(one.instruction)
        same = instruction == normalized(two.instruction)
        same_context = len(contexts[instruction]) == 1 or normalized(one.context) == normalized(two.context)
        concept = normalized(one.concept)
        return (same and same_context) or (concept != "" and concept == normalized(two.concept))

    grown = []
    for start in range(len(found)):
        group = {start}
        while more := {n for n in range(len(found)) if any(tied(found[each], found[n]) for each in group)} - group:
            group |= more
        grown.append(frozenset(group))
    return grown


@given(st.lists(records, max_size=25))
def test_groups_are_the_records_that_are_tied_together(found: list[Record]) -> None:
    names, slow = grouped(found), slow_groups(found)
    assert [frozenset(n for n, other in enumerate(names) if other == name) for name in names] == slow


def test_the_same_text_under_two_concepts_is_in_one_part() -> None:
    found = [Record(f"question {number // 2}", "answer", concept=f"C{number}") for number in range(60)]
    client = split(SourceParts("a", tuple(found)), DataConfig(), seed=0)
    assert client.validation and client.test
    assert leaks([client]) == ()


def test_an_instruction_is_one_question_per_context() -> None:
    found = [Record("Sum up the report.", "short", context=f"report {number // 2}") for number in range(60)]
    assert len(set(grouped(found))) == 30
    assert len(set(grouped([*found, Record("sum up  the REPORT.", "nothing")]))) == 31
    client = split(SourceParts("a", tuple(found)), DataConfig(test_fraction=0.2, validation_fraction=0.1), seed=0)
    assert [len(client.test), len(client.validation), len(client.training)] == [12, 6, 42]
    assert leaks([client]) == ()


def slow_split(given_records: list[Record], config: DataConfig, seed: int) -> dict[str, list[Record]]:
    """The same, one group at a time."""
    group_of = dict(enumerate(grouped(given_records)))
    rest = dict(enumerate(given_records))
    fractions = {"test": config.test_fraction, "validation": config.validation_fraction}
    wanted = [part for part in ("test", "validation") if fractions[part]]
    parts: dict[str, list[Record]] = {"test": [], "validation": []}
    while wanted:
        part = wanted[0]
        target = max(1, round(fractions[part] * len(rest)))
        held: list[int] = []
        while len(held) < target and len({group_of[number] for number in rest}) > len(wanted):
            first = min({group_of[number] for number in rest}, key=lambda name: entropy(seed, "split", client=name))
            held += [number for number in rest if group_of[number] == first]
            rest = {number: record for number, record in rest.items() if group_of[number] != first}
        parts[part] = [given_records[number] for number in sorted(held)]
        wanted = wanted[1:]
    return {"training": list(rest.values()), **parts}


@given(files, configs, seeds)
def test_split_equals_the_slow_way(found: list[Record], config: DataConfig, seed: int) -> None:
    client = split(SourceParts("a", tuple(found)), config, seed)
    expected = slow_split(found, config, seed)
    assert plain(client.training) == expected["training"]
    assert plain(client.validation) == expected["validation"]
    assert plain(client.test) == expected["test"]


@given(files, configs, seeds)
def test_nothing_is_lost_and_no_group_is_in_two_parts(found: list[Record], config: DataConfig, seed: int) -> None:
    client = split(SourceParts("a", tuple(found)), config, seed)
    parts = (client.training, client.validation, client.test)
    assert Counter(record for part in parts for record in plain(part)) == Counter(found)
    names = grouped([record for part in parts for record in part])
    places = [place for place, part in enumerate(parts) for _ in part]
    assert len(set(zip(names, places, strict=True))) == len(set(names))
    assert client.training
    assert bool(client.validation) == (config.validation_fraction > 0)
    assert bool(client.test) == (config.test_fraction > 0)
    assert not any(leak.kind == "concept" for leak in leaks([client]))


@given(files, configs, seeds, st.randoms(use_true_random=False))
def test_neither_the_order_of_the_file_nor_the_name_of_the_client_moves_a_record(
    found: list[Record], config: DataConfig, seed: int, random: Random
) -> None:
    shuffled = sorted(found, key=lambda _: random.random())
    one, other = (
        split(SourceParts("a", tuple(found)), config, seed),
        split(SourceParts("b", tuple(shuffled)), config, seed),
    )
    for part in ("training", "validation", "test"):
        assert Counter(plain(getattr(one, part))) == Counter(plain(getattr(other, part)))
        assert {record.id[:16] for record in getattr(one, part)} == {record.id[:16] for record in getattr(other, part)}
    assert split(SourceParts("a", tuple(found)), config, seed) == one


def test_a_part_holds_its_fraction_in_whole_groups() -> None:
    found = tuple(Record(f"question {number // 2}", f"answer {number}") for number in range(100))
    client = split(SourceParts("a", found), DataConfig(test_fraction=0.2, validation_fraction=0.1), seed=3)
    assert [len(client.test), len(client.validation), len(client.training)] == [20, 8, 72]


def test_another_seed_holds_out_other_groups() -> None:
    parts = SourceParts("a", tuple(Record(f"question {number}", "answer") for number in range(50)))
    assert split(parts, DataConfig(), seed=0).test != split(parts, DataConfig(), seed=1).test


def test_sites_that_share_concepts_hold_out_the_same_ones() -> None:
    here = tuple(Record(f"What is {number}?", "a", concept=f"C{number}") for number in range(40))
    there = tuple(Record(f"Describe {number}.", "b", concept=f"c{number}") for number in range(40))
    clients = [split(SourceParts(name, found), DataConfig(), 0) for name, found in (("a", here), ("b", there))]
    assert {record.concept for record in clients[0].test} == {record.concept.upper() for record in clients[1].test}
    assert leaks(clients) == ()


def test_given_parts_stay_as_they_are_and_only_the_others_are_split_off() -> None:
    found = tuple(Record(f"question {number}", "answer") for number in range(10))
    test = (Record("a test", "answer"),)
    client = split(SourceParts("a", found, test=test), DataConfig(validation_fraction=0.3), seed=0)
    assert plain(client.test) == list(test)
    assert (len(client.validation), len(client.training)) == (3, 7)
    client = split(SourceParts("a", found, validation=test, test=()), DataConfig(), seed=0)
    assert (plain(client.training), plain(client.validation), client.test) == (list(found), list(test), ())


def test_fraction_zero_gives_an_empty_part() -> None:
    client = split(
        SourceParts("a", (Record("q", "a"),)), DataConfig(test_fraction=0.0, validation_fraction=0.0), seed=0
    )
    assert (len(client.training), client.validation, client.test) == (1, (), ())


def test_too_few_groups_name_the_client_and_the_remedy() -> None:
    two = (Record("Why?", "a"), Record(" WHY?", "b"), Record("How?", "c"))
    with pytest.raises(DataError) as caught:
        split(SourceParts("north", two), DataConfig(), seed=0)
    assert len(caught.value.problems) == 1
    assert "site 'north'" in caught.value.problems[0]
    assert "2, expected at least 3" in caught.value.problems[0]
    assert "data.test_fraction = 0 and data.validation_fraction = 0" in caught.value.remedy
    assert "data.fields.context" in caught.value.remedy
    assert split(SourceParts("north", two), DataConfig(validation_fraction=0.0), seed=0).test


def test_a_client_without_training_records_is_refused() -> None:
    with pytest.raises(DataError, match="site 'north': no training records"):
        split(SourceParts("north", ()), DataConfig(test_fraction=0.0, validation_fraction=0.0), seed=0)


def numbered(name: str, count: int) -> ClientData:
    return client_data(
        name,
        *([Record(f"{part} {number}", "a") for number in range(count)] for part in ("train", "check", "test")),
    )


@given(st.integers(0, 30), st.integers(0, 12), seeds)
def test_limit_draws_records_in_order_with_their_ids(count: int, most: int, seed: int) -> None:
    client = numbered("a", count)
    config = DataConfig(max_records=most, max_validation_records=most, max_test_records=most)
    limited = limit(client, config, seed)
    for part in ("training", "validation", "test"):
        all_of, some = getattr(client, part), getattr(limited, part)
        assert len(some) == (min(count, most) if most else count)
        assert list(some) == [record for record in all_of if record in set(some)]
    assert limit(client, config, seed) == limited


def test_limits_of_other_parts_and_clients_change_no_draw() -> None:
    client = numbered("a", 40)
    alone = limit(client, DataConfig(max_records=10), seed=0)
    together = limit(client, DataConfig(max_records=10, max_test_records=5), seed=0)
    assert alone.training == together.training
    other = limit(numbered("b", 40), DataConfig(max_records=10), seed=0)
    assert {record.id for record in alone.training} != {record.id for record in other.training}
    assert limit(client, DataConfig(max_records=10), seed=1).training != alone.training


def test_a_limit_draws_every_record_equally_often() -> None:
    client = numbered("a", 10)
    drawn = Counter(
        record.id for seed in range(600) for record in limit(client, DataConfig(max_records=5), seed).training
    )
    assert all(240 < drawn[record.id] < 360 for record in client.training)  # 300 expected, standard deviation 12


def test_leaks_by_hand() -> None:
    a = client_data(
        "a",
        [Record("Why?", "So.", concept="J45"), Record("How?", "Thus.")],
        validation=[Record("Why?", "So.")],
        test=[
            Record("how? ", "Other."),
            Record("Why?", "So."),
            Record("Why?", "So."),
            Record("New?", "x", concept="j45"),
        ],
    )
    b = client_data("b", [Record("Why?", "So.", concept="J45"), Record("how?", "y")], test=[Record("How?", "Thus.")])
    assert set(leaks([a, b])) == {
        Leak("a", "validation", "a", "text", 1, 1),
        Leak("a", "validation", "a", "question", 1, 1),
        Leak("a", "test", "a", "text", 2, 1),
        Leak("a", "test", "a", "question", 3, 2),
        Leak("a", "test", "a", "concept", 1, 1),
        Leak("b", "test", "b", "question", 1, 1),
        Leak("a", "test", "b", "text", 2, 1),
        Leak("a", "test", "b", "concept", 1, 1),
        Leak("b", "test", "a", "text", 1, 1),
    }


def test_records_without_a_concept_share_none() -> None:
    assert leaks([client_data("a", [Record("Why?", "x")], test=[Record("How?", "y")])]) == ()
