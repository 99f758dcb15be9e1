"""A record, its id, and the records of one client.

A record id is a hash of the record's canonical text, and the number of times that text occurred before in the client.
So duplicates have different ids, and the order of a file matters only to duplicates. Ids stay on the site, like the
records.
"""

import hashlib
import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal, NewType, get_args

RecordId = NewType("RecordId", str)


Part = Literal["training", "validation", "test"]


PARTS: tuple[Part, ...] = get_args(Part)


@dataclass(frozen=True, slots=True)
class Record:
    """One record: an instruction, its context (may be empty), and the response.

    `concept` names the subject of the record (a disease, a code), if the source knows it. Records of one concept
    are never split over training, validation and test.
    """

    instruction: str
    response: str
    context: str = ""
    category: str = ""
    concept: str = ""
    id: RecordId = RecordId("")


@dataclass(frozen=True, slots=True)
class ClientData:
    """The records of one client, split into three parts, with ids assigned."""

    name: str
    training: tuple[Record, ...]
    validation: tuple[Record, ...] = ()
    test: tuple[Record, ...] = ()

    def parts(self) -> dict[Part, tuple[Record, ...]]:
        """The records of each part, in the order of `PARTS`."""
        return {"training": self.training, "validation": self.validation, "test": self.test}


def canonical_text(record: Record) -> str:
    """The text that identifies a record: Unicode NFC, newlines as line ends, a control character between fields."""
    fields = (record.instruction, record.context, record.response)
    return "\x1f".join(unicodedata.normalize("NFC", field).replace("\r\n", "\n") for field in fields)


def with_ids(records: Iterable[Record], seen: Counter[str] | None = None) -> tuple[Record, ...]:
    """The same records with ids. `seen` carries the counts of occurrences over from the client's other parts.

    >>> twice = with_ids([Record("q", "a"), Record("q", "a")])
    >>> twice[0].id[:16] == twice[1].id[:16], twice[0].id[-2:], twice[1].id[-2:]
    (True, '-0', '-1')
    """
    seen = Counter() if seen is None else seen
    identified = []
    for record in records:
        digest = hashlib.sha256(canonical_text(record).encode()).hexdigest()[:16]
        identified.append(replace(record, id=RecordId(f"{digest}-{seen[digest]}")))
        seen[digest] += 1
    return tuple(identified)


def client_data(
    name: str, training: Iterable[Record], validation: Iterable[Record] = (), test: Iterable[Record] = ()
) -> ClientData:
    """A client's data with ids that are unique across its three parts."""
    seen: Counter[str] = Counter()
    return ClientData(name, with_ids(training, seen), with_ids(validation, seen), with_ids(test, seen))
