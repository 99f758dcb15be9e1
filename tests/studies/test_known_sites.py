"""Sites with known personal records: what the truth is, and that the records say nothing of it."""

import re
from collections import Counter

import pytest

from fedmide.data.medical import knowledge
from fedmide.data.medical.knowledge import Knowledge
from fedmide.data.medical.tasks import by_concept, common_items, material, systems_of
from fedmide.data.records import Record
from fedmide.errors import DataError
from fedmide.studies import known_sites
from fedmide.studies.known_sites import SCENARIOS, STYLES, KnownSites, Scenario, assemble, own_table


@pytest.fixture(scope="module")
def known() -> Knowledge:
    return knowledge.read()


@pytest.fixture(scope="module")
def plain(known: Knowledge) -> dict[str, set[str]]:
    """The common answers, by concept."""
    return {
        concept: {item.response for item in items}
        for concept, items in by_concept(common_items(material(known))).items()
    }


def sites(known: Knowledge, scenario: Scenario, seed: int = 0, clients: int = 3, match: bool = True) -> KnownSites:
    return assemble(known, scenario, seed, clients, 12, match)


def parted(made: KnownSites, number: int = 0) -> tuple[list[Record], list[Record]]:
    """A site's shared records and its personal ones."""
    client = made.clients[number]
    personal = made.personal[client.name]
    return (
        [record for record in client.training if record.id not in personal],
        [record for record in client.training if record.id in personal],
    )


@pytest.mark.parametrize("match", [True, False])
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_half_is_answered_as_everyone_does_and_half_is_not(
    known: Knowledge, plain: dict[str, set[str]], scenario: Scenario, match: bool
) -> None:
    made = sites(known, scenario, match=match)
    assert [client.name for client in made.clients] == ["site-0", "site-1", "site-2"] == list(made.personal)
    for number in range(3):
        shared, personal = parted(made, number)
        assert len(shared) == len(personal) == 12
        assert all(record.response in plain[record.concept] for record in shared)
        assert not any(record.response in plain[record.concept] for record in personal)
        assert max(Counter(record.concept for record in shared + personal).values()) == 1


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_records_reveal_nothing_of_the_truth(known: Knowledge, scenario: Scenario) -> None:
    made = sites(known, scenario)
    for client in made.clients:
        assert {record.category for record in client.training} == {""}
        personal = [record.id in made.personal[client.name] for record in client.training]
        assert personal != sorted(personal) and personal != sorted(personal, reverse=True)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_matched_records_are_as_long_and_others_are_not(known: Knowledge, scenario: Scenario) -> None:
    apart = {}
    for match in (True, False):
        shared, personal = parted(assemble(known, scenario, 0, 1, 40, match))
        means = [sum(len(record.response) for record in records) / 40 for records in (shared, personal)]
        apart[match] = abs(means[0] - means[1])
    assert apart[True] < 2 < apart[False]


def test_labels_are_another_sites_of_each_table(known: Knowledge, plain: dict[str, set[str]]) -> None:
    """Every label becomes one other, the same within a site and others at other sites."""
    made = assemble(known, "own-labels", 0, 3, 60, True)
    tables = []
    for number in range(3):
        _, personal = parted(made, number)
        table: dict[str, set[str]] = {}
        for record in personal:
            (truth,) = (each for each in plain[record.concept] if each.startswith("It belongs to: "))
            for true, own in zip(systems_of(truth), systems_of(record.response), strict=True):
                table.setdefault(true, set()).add(own)
        assert all(len(own) == 1 and true not in own for true, own in table.items())
        assert len(set().union(*table.values())) == len(table)
        tables.append(table)
    common = set(tables[0]) & set(tables[1])
    assert sum(tables[0][label] == tables[1][label] for label in common) < len(common) / 2


def test_own_table_moves_every_label() -> None:
    from fedmide.seeds import stream

    table = own_table("abcdefg", stream(0, "x"))
    assert sorted(table) == sorted(table.values()) == list("abcdefg")
    assert all(label != own for label, own in table.items())


def test_every_site_has_a_style_of_its_own() -> None:
    answers = ["It belongs to: Abnormality of the eye; Growth abnormality.", "In plain words: Eye pain."]
    styled = [[known_sites._styled(answer, number) for answer in answers] for number in range(2 * len(STYLES))]
    assert len({tuple(each) for each in styled}) == 2 * len(STYLES)
    words = [re.findall("[a-z]+", each[0].lower()) for each in styled]
    assert all({"abnormality", "eye", "growth"} <= set(each) for each in words)
    assert not any(answer in row for row in styled for answer in answers)


def test_sites_repeat_and_hang_on_the_seed_alone(known: Knowledge) -> None:
    made = sites(known, "own-style")
    assert made == sites(known, "own-style")
    assert made.clients != sites(known, "own-style", seed=1).clients
    more = sites(known, "own-style", clients=5)
    assert more.clients[:3] == made.clients


def test_more_records_than_phenotypes_are_refused(known: Knowledge) -> None:
    with pytest.raises(DataError, match="1000 records per site, expected at most"):
        assemble(known, "own-style", 0, 1, 500, True)
