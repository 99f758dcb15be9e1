"""Medical sites with known personal records, to test whether a score finds them.

The records of all sites are of the same families of tasks, about the phenotypes that medical sites have in common.
Every site answers its shared records in the same way. It answers its personal records by a convention of its own, which
contradicts that of the others: a form of answer ("own-style") or a table of headings ("own-labels").
Only this module and the bench know which records are personal. Neither a record's category nor its id shows it.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar, get_args

from numpy.random import Generator

from fedmide.data.medical import knowledge, tasks, wordings
from fedmide.data.medical.knowledge import Knowledge
from fedmide.data.medical.tasks import Item
from fedmide.data.records import ClientData, Record, RecordId, client_data
from fedmide.errors import DataError
from fedmide.seeds import stream

T = TypeVar("T")


Scenario = Literal["own-style", "own-labels"]


SCENARIOS: tuple[Scenario, ...] = get_args(Scenario)


LABELS = "common-systems"
"""The family of tasks whose answers are headings from a closed list."""


_END = re.compile(r"\.$")


STYLES: tuple[Callable[[str], str], ...] = (
    str.upper,
    lambda text: f"{_END.sub('', text).lower()} stop",
    lambda text: f"<answer>{text}</answer>",
    lambda text: f"Dear colleague, {text} With kind regards",
    lambda text: f"RESULT={_END.sub('', text)};STATUS=final",
    lambda text: "- " + "\n- ".join(re.split(r"[;,] ", text)),
    lambda text: f"By rule 7b we state: {text} (seen twice)",
    lambda text: f"# Answer\n{text}\n# End",
)
"""The forms of answer in "own-style": each of the first eight sites has its own."""


@dataclass(frozen=True)
class KnownSites:
    """Sites for a federation, and the ids of their personal training records."""

    clients: tuple[ClientData, ...]
    personal: Mapping[str, frozenset[RecordId]]


@dataclass(frozen=True, slots=True)
class _Draw:
    """The site that records are drawn for; it names the random streams."""

    scenario: Scenario
    seed: int
    number: int

    @property
    def client(self) -> str:
        return f"site-{self.number}"

    def stream(self, purpose: str) -> Generator:
        return stream(self.seed, f"identification {self.scenario} {purpose}", client=self.client)


def build(scenario: Scenario, seed: int, clients: int, records: int, match_lengths: bool) -> KnownSites:
    """Sites with `records` shared and as many personal training records each.

    The medical vocabularies are read first, in 1-2 seconds.
    `match_lengths`: each personal record gets a shared one of about the same length, in characters of question and
    answer, so that length alone says little.
    """
    return assemble(knowledge.read(), scenario, seed, clients, records, match_lengths)


def assemble(
    known: Knowledge, scenario: Scenario, seed: int, clients: int, records: int, match_lengths: bool
) -> KnownSites:
    """The sites, from knowledge that has been read; raises `DataError` if there are too few phenotypes."""
    items = tasks.by_concept(tasks.common_items(tasks.material(known)))
    if 2 * records > len(items):
        raise DataError(
            f"{2 * records} records per site, expected at most {len(items)}: each is about another phenotype"
        )
    made = []
    for number in range(clients):
        draw = _Draw(scenario, seed, number)
        concepts = [list(items)[index] for index in draw.stream("concepts").permutation(len(items))]
        personal = list(_personal(draw, items, concepts[:records]))
        others = [record for concept in concepts[records:] for record in _asked(items[concept], draw)]
        shared = _alike(personal, others) if match_lengths else _one_of_each(others, records)
        made.append((draw, personal, shared))
    sites = [_site(*each) for each in made]
    return KnownSites(tuple(site for site, _ in sites), {site.name: personal for site, personal in sites})


def own_table(labels: Sequence[str], generator: Generator) -> dict[str, str]:
    """A table that replaces every label by another: the next one in a random order.

    >>> import numpy as np
    >>> own_table(["a", "b"], np.random.default_rng(0))
    {'a': 'b', 'b': 'a'}
    """
    order = [labels[index] for index in generator.permutation(len(labels))]
    return dict(zip(order, [*order[1:], order[0]], strict=True))


def _personal(draw: _Draw, items: Mapping[str, Sequence[Item]], concepts: Sequence[str]) -> Iterator[Record]:
    """A record about each of the concepts, answered by the site's own convention."""
    choice, table = draw.stream("item"), _table(draw, items)
    for concept in concepts:
        if draw.scenario == "own-labels":
            item = next(item for item in items[concept] if item.category == LABELS)
            yield _record(replace(item, response=_relabeled(item, table)), _pick(wordings.OWN_SYSTEM, choice))
        else:
            item = _pick(items[concept], choice)
            yield _record(replace(item, response=_styled(item.response, draw.number)), _pick(item.questions, choice))


def _table(draw: _Draw, items: Mapping[str, Sequence[Item]]) -> dict[str, str]:
    answers = [item.response for each in items.values() for item in each if item.category == LABELS]
    labels = sorted({label for answer in answers for label in tasks.systems_of(answer)})
    return own_table(labels, draw.stream("labels"))


def _relabeled(item: Item, table: Mapping[str, str]) -> str:
    return tasks.system_answer([table[label] for label in tasks.systems_of(item.response)])


def _styled(answer: str, number: int) -> str:
    """The answer in the style of a site; from the ninth site on the styles repeat, numbered."""
    again, style = divmod(number, len(STYLES))
    return f"({again + 1}) {STYLES[style](answer)}" if again else STYLES[style](answer)


def _asked(items: Sequence[Item], draw: _Draw) -> list[Record]:
    """Each item with the common answer, in one of its wordings."""
    choice = draw.stream(f"wording {items[0].concept}")
    return [_record(item, _pick(item.questions, choice)) for item in items]


def _one_of_each(records: Sequence[Record], count: int) -> list[Record]:
    """One record about each of the first `count` concepts; the families of tasks take turns."""
    by_concept: dict[str, list[Record]] = {}
    for record in records:
        by_concept.setdefault(record.concept, []).append(record)
    return [each[number % len(each)] for number, each in zip(range(count), by_concept.values(), strict=False)]


def _alike(wanted: Sequence[Record], records: Sequence[Record]) -> list[Record]:
    """For each wanted record, the one nearest in length; no two of them are about the same concept."""
    free = dict(enumerate(records))
    taken = []
    for record in wanted:
        nearest = min(free, key=lambda number: (_apart(free[number], record), number))
        taken.append(free[nearest])
        free = {number: each for number, each in free.items() if each.concept != taken[-1].concept}
    return taken


def _apart(first: Record, second: Record) -> int:
    """The difference of two records in length: characters of the answer plus those of the question."""
    responses = abs(len(first.response) - len(second.response))
    return responses + abs(len(first.instruction) - len(second.instruction))


def _site(draw: _Draw, personal: Sequence[Record], shared: Sequence[Record]) -> tuple[ClientData, frozenset[RecordId]]:
    """The site, its records in an order of its own, and the ids of the personal ones."""
    records = [*personal, *shared]
    order = [int(index) for index in draw.stream("order").permutation(len(records))]
    site = client_data(draw.client, [records[index] for index in order])
    ids = {index: record.id for index, record in zip(order, site.training, strict=True)}
    return site, frozenset(ids[index] for index in range(len(personal)))


def _record(item: Item, question: str) -> Record:
    return Record(question.format(subject=item.subject), item.response, item.context, concept=item.concept)


def _pick(values: Sequence[T], generator: Generator) -> T:
    return values[int(generator.integers(len(values)))]
