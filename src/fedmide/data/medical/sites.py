"""Medical sites made from the data of public packages: real knowledge, no download, no patient.

Half of a site's records are from a family of tasks of its own. The other half asks, in the site's words, about
phenotypes that several sites know. So some records hold knowledge that sites have in common, and the others hold
knowledge of one site alone. The method should distinguish them. `Record.category` names the family of a record. Names
of common families begin with "common-".

The part of a concept (training, validation or test) follows from the seed and the concept alone, over all sites. So no
site trains on a concept that another site is tested on.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from numpy.random import Generator

from fedmide.data.medical import knowledge, tasks
from fedmide.data.medical.knowledge import Knowledge, Source
from fedmide.data.medical.tasks import Item
from fedmide.data.records import ClientData, Record, client_data
from fedmide.data.writing import write_clients
from fedmide.errors import DataError
from fedmide.seeds import entropy, stream

# Where each part ends, on a scale of 100 on which the concepts are spread evenly.
PART_ENDS = {"training": 60, "validation": 75, "test": 100}


SOURCES_FILE = "SOURCES.md"


SOURCES_TEXT = """# Sources

These records were derived from data in the following packages.

| package | version | license | data |
|---|---|---|---|
{rows}

They use the Human Phenotype Ontology in the version above (https://hpo.jax.org). It may be used freely if it is
acknowledged with its version; it must not be passed on in an altered form. The names of diseases are OMIM's, as the
ontology's annotations give them.

The records are for testing methods, not for advice to patients.
"""


Items = Mapping[str, Sequence[Item]]


@dataclass(frozen=True, slots=True)
class SiteRecipe:
    """A site before it has records. `copy`: the number of earlier sites of the same family."""

    name: str
    family: str
    copy: int


@dataclass(frozen=True, slots=True)
class Draw:
    """A draw of records for one site and one part. It names the random streams."""

    seed: int
    site: SiteRecipe
    part: str

    def order(self, of: str, length: int) -> list[int]:
        """An order of `length` concepts that is the same for all sites. Each site takes its share of it."""
        drawn = stream(self.seed, f"medical {of} {self.part}").permutation(length)
        return [int(index) for index in drawn]

    def own(self, purpose: str) -> Generator:
        """A stream of the site's own."""
        return stream(self.seed, f"medical {purpose} {self.part}", client=self.site.name)


def build(
    seed: int, clients: int = 8, training: int = 48, validation: int = 12, test: int = 24
) -> tuple[ClientData, ...]:
    """The sites, each with exactly the given number of records per part. Reading the packages takes 1-2 seconds.

    The first eight clients have one family each. From the ninth on, families repeat with other concepts.
    """
    sizes = {"training": training, "validation": validation, "test": test}
    _check_sizes(clients, sizes)
    return assemble(knowledge.read(), seed, clients, sizes)


def assemble(known: Knowledge, seed: int, clients: int, sizes: Mapping[str, int]) -> tuple[ClientData, ...]:
    """The sites, made from knowledge that has been read. A `DataError` names the parts for which it is not enough."""
    material = tasks.material(known)
    common = tasks.by_concept(tasks.common_items(material))
    families = {name: tasks.by_concept(make(material), common) for name, make in tasks.FAMILIES.items()}
    shared = _by_part(common, seed)
    own = {family: _by_part(items, seed) for family, items in owned(families, seed).items()}
    places = [site(number) for number in range(clients)]
    made: dict[SiteRecipe, list[list[Record]]] = {}
    problems = []
    for place in places:
        drawn = [
            _records(shared[part], own[place.family][part], size, Draw(seed, place, part))
            for part, size in sizes.items()
        ]
        made[place] = drawn
        problems += [
            f"site {place.name}: {len(records)} {part} records, expected {size}"
            for records, (part, size) in zip(drawn, sizes.items(), strict=True)
            if len(records) < size
        ]
    if problems:
        raise DataError(problems, "Ask for fewer records or fewer sites: the packages have no more concepts")
    return tuple(client_data(place.name, *parts) for place, parts in made.items())


def site(number: int) -> SiteRecipe:
    """The site with this number, counted from 0.

    >>> site(1).name, site(9).name
    ('lay-terms', 'lay-terms-2')
    """
    copy, index = divmod(number, len(tasks.FAMILIES))
    family = list(tasks.FAMILIES)[index]
    return SiteRecipe(f"{family}-{copy + 1}" if copy else family, family, copy)


def part_of(concept: str, seed: int) -> str:
    """The part of all records about a concept, at every site.

    >>> [part_of(concept, seed=0) for concept in ("HP:0001250", "OMIM:154700", "ICD10:K22")]
    ['training', 'test', 'training']
    """
    position = entropy(seed, f"medical part {concept}") % 100
    return next(part for part, end in PART_ENDS.items() if position < end)


def owned(families: Mapping[str, Items], seed: int) -> dict[str, Items]:
    """The families, with each concept left in only one of those that have it. So no two families own a concept."""
    holders: dict[str, list[str]] = {}
    for family, items in families.items():
        for concept in items:
            holders.setdefault(concept, []).append(family)
    owners = {
        concept: names[entropy(seed, f"medical owner {concept}") % len(names)] for concept, names in holders.items()
    }
    return {
        family: {concept: found for concept, found in items.items() if owners[concept] == family}
        for family, items in families.items()
    }


def write(clients: Sequence[ClientData], folder: Path) -> tuple[Path, ...]:
    """Writes the sites' folders into a new or empty folder: training.jsonl, validation.jsonl and test.jsonl in each.

    `SOURCES.md` comes last: a folder that has it is complete. Returns the sites' folders.
    """
    _check_names(clients)
    sources = sources_text(knowledge.sources()).encode()
    return write_clients(folder, {client.name: client.parts() for client in clients}, SOURCES_FILE, sources)


def sources_text(sources: Sequence[Source]) -> str:
    """The sources of the records in Markdown, with the acknowledgement that the HPO asks for."""
    rows = (f"| {entry.package} | {entry.version} | {entry.license} | {entry.data} |" for entry in sources)
    return SOURCES_TEXT.format(rows="\n".join(rows))


def _check_sizes(clients: int, sizes: Mapping[str, int]) -> None:
    least = {"clients": 1, "training": 1, "validation": 0, "test": 0}
    given = {"clients": clients, **sizes}
    problems = [
        f"{name} = {given[name]}, expected at least {least[name]}" for name in least if given[name] < least[name]
    ]
    if problems:
        raise DataError(problems)


def _by_part(items: Items, seed: int) -> dict[str, Items]:
    parts: dict[str, dict[str, Sequence[Item]]] = {part: {} for part in PART_ENDS}
    for concept in sorted(items):
        parts[part_of(concept, seed)][concept] = items[concept]
    return dict(parts)


def _records(shared: Items, own: Items, size: int, draw: Draw) -> list[Record]:
    """One part of a site: half common, half its own, shuffled. It has fewer records if there are too few concepts."""
    items = _common_items(shared, size // 2, draw) + _own_items(own, size - size // 2, draw)
    wording = draw.own("wording")
    shuffled = [items[index] for index in wording.permutation(len(items))]
    return [_record(item, item.questions[wording.integers(len(item.questions))]) for item in shuffled]


def _common_items(items: Items, count: int, draw: Draw) -> list[Item]:
    """Items about the first `count` concepts in an order common to all sites. Each site draws its own items."""
    concepts = list(items)
    first = [concepts[index] for index in draw.order("common", len(concepts))[:count]]
    pool = [item for concept in first for item in items[concept]]
    # As many items as concepts: if there are too few concepts, more items about the same ones don't fill the gap.
    return [pool[index] for index in draw.own("common").permutation(len(pool))[: len(first)]]


def _own_items(items: Items, count: int, draw: Draw) -> list[Item]:
    """One item for each of `count` concepts. Each site of a family takes its own slice of a common order."""
    concepts = list(items)
    start = draw.site.copy * count
    mine = [concepts[index] for index in draw.order(draw.site.family, len(concepts))[start : start + count]]
    choice = draw.own("item")
    return [items[concept][int(choice.integers(len(items[concept])))] for concept in mine]


def _record(item: Item, question: str) -> Record:
    instruction = question.format(subject=item.subject)
    return Record(instruction, item.response, item.context, item.category, item.concept)


def _check_names(clients: Sequence[ClientData]) -> None:
    names = [client.name for client in clients]
    problems = [f"site {name!r}: not usable as a folder's name" for name in names if not _is_file_safe(name)]
    problems += [
        f"site {name}: occurs {names.count(name)} times" for name in sorted(set(names)) if names.count(name) > 1
    ]
    if problems:
        raise DataError(problems, "Give each site a name of letters, digits, '.', '_' and '-'")


def _is_file_safe(name: str) -> bool:
    return re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name) is not None
