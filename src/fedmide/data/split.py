"""The split of a client's records into training, validation and test.

A group is never split over two parts. Its records share a concept or a question, directly or through other records.
An instruction that comes with several contexts, such as "Sum up the report", counts as one question per context.
The order in which groups are held out follows from the seed and their names (concept, instruction) alone. So sites
that share a concept tend to hold it out together.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Literal
from unicodedata import normalize

import numpy as np

from fedmide.config.sections import DataConfig
from fedmide.data.records import ClientData, Record, client_data
from fedmide.errors import DataError
from fedmide.seeds import entropy, stream

HeldOut = Literal["validation", "test"]


@dataclass(frozen=True, slots=True)
class SourceParts:
    """A client as its source gave it. A part that is None is still to be split off the training records."""

    name: str
    training: tuple[Record, ...]
    validation: tuple[Record, ...] | None = None
    test: tuple[Record, ...] | None = None


def normalized(text: str) -> str:
    """The text in Unicode NFC, without case, with single spaces.

    >>> normalized("  What IS\\n asthma? ")
    'what is asthma?'
    """
    return " ".join(normalize("NFC", text).casefold().split())


def grouped(records: Sequence[Record]) -> list[str]:
    """The group's name of each record. A group shares a concept or a question, directly or through other records.

    Case, spacing and Unicode form do not matter.

    >>> tied = [Record("What?", "x", concept="J45"), Record("what? ", "y"), Record("Why?", "z", concept="j45")]
    >>> len(set(grouped(tied)))
    1
    >>> len(set(grouped([Record("Sum up.", "x", context="one"), Record("Sum up.", "y", context="two")])))
    2
    """
    parent: dict[str, str] = {}

    def root(key: str) -> str:
        while parent.setdefault(key, key) != key:
            parent[key] = parent[parent[key]]
            key = parent[key]
        return key

    keys = _group_keys(records)
    for first, *others in keys:
        for other in others:
            low, high = sorted((root(first), root(other)))
            parent[high] = low
    return [root(first) for first, *_ in keys]


def split(parts: SourceParts, config: DataConfig, seed: int) -> ClientData:
    """The client's data. Parts that were not given are split off its training records, test first.

    A held-out part has at least `round(fraction * n)` records, in whole groups. It has fewer if nothing would be left
    for training or for the next part. A fraction of 0 gives an empty part. Raises `DataError` if there are too few
    groups.
    """
    groups = grouped(parts.training)
    held_out = _held_out_groups(parts, Counter(groups), config, seed)

    def of(wanted: HeldOut | None) -> tuple[Record, ...]:
        return tuple(
            record for record, name in zip(parts.training, groups, strict=True) if held_out.get(name) == wanted
        )

    validation = of("validation") if parts.validation is None else parts.validation
    test = of("test") if parts.test is None else parts.test
    return client_data(parts.name, of(None), validation, test)


def limit(client: ClientData, config: DataConfig, seed: int) -> ClientData:
    """The client with at most the configured number of records per part. Drawn records keep their order and ids."""

    def drawn(part: str, records: tuple[Record, ...], most: int) -> tuple[Record, ...]:
        return _drawn(records, most, stream(seed, f"limit-{part}", client=client.name))

    return replace(
        client,
        training=drawn("training", client.training, config.max_records),
        validation=drawn("validation", client.validation, config.max_validation_records),
        test=drawn("test", client.test, config.max_test_records),
    )


def _group_keys(records: Sequence[Record]) -> list[tuple[str, ...]]:
    """The keys that tie each record to others: its concept, if it has one, and its question."""
    asked = [(normalized(record.instruction), normalized(record.context)) for record in records]
    num_contexts = Counter(instruction for instruction, _ in set(asked))
    keys = []
    # The key of an instruction with a single context leaves the context out. The group's name is one of the keys,
    # and it decides when the group is held out.
    for record, (instruction, context) in zip(records, asked, strict=True):
        question = (
            ("instruction", instruction, context) if num_contexts[instruction] > 1 else ("instruction", instruction)
        )
        concept = normalized(record.concept)
        tied = [("concept", concept), question] if concept else [question]
        keys.append(tuple("\x1f".join(each) for each in tied))
    return keys


def _held_out_groups(parts: SourceParts, sizes: Counter[str], config: DataConfig, seed: int) -> dict[str, HeldOut]:
    """The part of each group that leaves the training records."""
    fractions = _fractions(parts, config)
    if len(sizes) <= len(fractions):
        raise _too_few_groups(parts.name, len(sizes), tuple(fractions))
    order = sorted(sizes, key=lambda name: (entropy(seed, "split", client=name), name))
    held_out: dict[str, HeldOut] = {}
    for kept_back, (part, fraction) in zip(range(len(fractions), 0, -1), fractions.items(), strict=True):
        enough = _groups_for([sizes[name] for name in order], fraction)
        number = min(enough, len(order) - kept_back)
        held_out |= dict.fromkeys(order[:number], part)
        order = order[number:]
    return held_out


def _fractions(parts: SourceParts, config: DataConfig) -> dict[HeldOut, float]:
    """The fraction of each part that is still missing, in the order in which the parts are split off."""
    wanted: dict[HeldOut, float] = {}
    if parts.test is None and config.test_fraction > 0:
        wanted["test"] = config.test_fraction
    if parts.validation is None and config.validation_fraction > 0:
        wanted["validation"] = config.validation_fraction
    return wanted


def _groups_for(sizes: Sequence[int], fraction: float) -> int:
    """The number of first groups that hold at least the fraction of all records, and at least one record."""
    target = max(1, round(fraction * sum(sizes)))
    return next(number for number, total in enumerate(accumulate(sizes), start=1) if total >= target)


def _too_few_groups(client: str, number: int, parts: Sequence[HeldOut]) -> DataError:
    if not number:
        return DataError(f"site '{client}': no training records, expected at least one")
    knobs = " and ".join(f"data.{part}_fraction = 0" for part in parts)
    return DataError(
        f"site '{client}': groups of training records that share no question and no concept: {number}, "
        f"expected at least {len(parts) + 1} to split off {' and '.join(parts)}",
        f"Give the site its own {' and '.join(parts)} records, or set {knobs}. If records of one instruction "
        "differ in another field, set data.fields.context to its name",
    )


def _drawn(records: tuple[Record, ...], most: int, generator: np.random.Generator) -> tuple[Record, ...]:
    if not most or len(records) <= most:
        return records
    chosen = generator.choice(len(records), size=most, replace=False)
    return tuple(records[position] for position in sorted(chosen))
