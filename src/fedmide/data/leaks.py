"""Leaks: held-out records that also occur in training."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal

from fedmide.data.records import ClientData, Record, canonical_text
from fedmide.data.split import HeldOut, normalized

LeakKind = Literal["text", "question", "concept"]


KeyCounts = Mapping[LeakKind, Counter[str]]


@dataclass(frozen=True, slots=True)
class Leak:
    """The overlap of one client's held-out part with a training part, its own or another client's.

    `records` counts held-out records, `distinct` counts the texts, questions or concepts that they repeat.
    """

    client: str
    part: HeldOut
    training_client: str
    kind: LeakKind
    records: int
    distinct: int


def leaks(clients: Sequence[ClientData]) -> tuple[Leak, ...]:
    """The leaks of the held-out parts into training: first within each client, then into other clients.

    Within a client they are found by exact text, question (instruction and context) and concept.
    Across clients only test is compared, by exact text and concept, because sites may well ask the same question.
    Only leaks that occur are listed.
    """
    training = {client.name: _keys(client.training) for client in clients}
    validation = {client.name: _keys(client.validation) for client in clients}
    test = {client.name: _keys(client.test) for client in clients}
    within = (
        leak
        for name in training
        for leak in (
            *_leaks(name, "validation", validation[name], name, training[name]),
            *_leaks(name, "test", test[name], name, training[name]),
        )
    )
    across = (
        leak
        for name, other in product(training, training)
        if name != other
        for leak in _leaks(name, "test", test[name], other, training[other])
        if leak.kind != "question"
    )
    return (*within, *across)


def _keys(records: Sequence[Record]) -> KeyCounts:
    """The occurrences of each text, question and concept. A record without a concept counts for no concept."""
    key_of: dict[LeakKind, Callable[[Record], str]] = {
        "text": canonical_text,
        "question": lambda record: f"{normalized(record.instruction)}\x1f{normalized(record.context)}",
        "concept": lambda record: normalized(record.concept),
    }
    return {kind: Counter(key for key in map(of, records) if key) for kind, of in key_of.items()}


def _leaks(client: str, part: HeldOut, held_out: KeyCounts, owner: str, training: KeyCounts) -> Iterator[Leak]:
    for kind, counts in held_out.items():
        common = counts.keys() & training[kind].keys()
        if common:
            yield Leak(client, part, owner, kind, sum(counts[key] for key in common), len(common))
