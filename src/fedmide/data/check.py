"""The report on a set of clients as plain data: sizes, duplicates, leaks and warnings.

It holds the names of categories, but nothing of a record's text.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from fedmide.data.identifiers import KINDS, kinds
from fedmide.data.leaks import Leak, leaks
from fedmide.data.records import ClientData, Record, canonical_text


@dataclass(frozen=True, slots=True)
class Lengths:
    """The mean and the longest length of texts, in characters."""

    mean: float
    longest: int


@dataclass(frozen=True, slots=True)
class PartReport:
    """One part of a client's records.

    `duplicates`: records whose text occurred before in the part.
    `prompt_characters`: a prompt is instruction and context, without the template.
    `category_mix`: number of records by category, the most frequent first.
    `identifiers`: number of records that seem to hold a phone number or the like, by kind; a warning, never a promise.
    """

    records: int
    duplicates: int
    empty_contexts: int
    categories: int
    concepts: int
    prompt_characters: Lengths
    response_characters: Lengths
    category_mix: Mapping[str, int] = field(default_factory=dict)
    identifiers: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ClientReport:
    """One client's three parts."""

    name: str
    training: PartReport
    validation: PartReport
    test: PartReport


@dataclass(frozen=True, slots=True)
class Report:
    """All clients, and the held-out records that also occur in training. `dataclasses.asdict` makes JSON of it."""

    clients: tuple[ClientReport, ...]
    leaks: tuple[Leak, ...]


def check(clients: Sequence[ClientData]) -> Report:
    """The report on the clients, in their order."""
    return Report(tuple(_client(client) for client in clients), leaks(clients))


def _client(client: ClientData) -> ClientReport:
    return ClientReport(client.name, **{part: _part(records) for part, records in client.parts().items()})


def _part(records: Sequence[Record]) -> PartReport:
    return PartReport(
        records=len(records),
        duplicates=len(records) - len({canonical_text(record) for record in records}),
        empty_contexts=sum(not record.context.strip() for record in records),
        categories=len({record.category for record in records} - {""}),
        concepts=len({record.concept for record in records} - {""}),
        prompt_characters=_lengths([len(record.instruction) + len(record.context) for record in records]),
        response_characters=_lengths([len(record.response) for record in records]),
        category_mix=dict(Counter(record.category for record in records if record.category).most_common()),
        identifiers=_identifiers(records),
    )


def _identifiers(records: Sequence[Record]) -> dict[str, int]:
    """The number of records that seem to hold each kind of identifier, without kinds that no record holds."""
    counts = Counter(kind for record in records for kind in kinds(canonical_text(record)))
    return {kind: counts[kind] for kind in KINDS if counts[kind]}


def _lengths(counts: Sequence[int]) -> Lengths:
    return Lengths(sum(counts) / len(counts) if counts else 0.0, max(counts, default=0))
