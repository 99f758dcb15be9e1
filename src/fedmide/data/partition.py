"""Clients made from one data set: by a field, evenly, by Dirichlet shares of a field's values, or of skewed sizes.

Groups of records (`split.grouped`) are dealt whole. So no concept and no duplicate is ever in two clients, nor in two
parts of one client. Partitioners of libraries (flwr-datasets) deal single rows and bring 28 packages. Here a rule takes
a few lines.

Reference: T.-M. H. Hsu et al., Measuring the effects of non-identical data distribution, arXiv 1909.06335 (Dirichlet).
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from fedmide.config.sections import FieldNames
from fedmide.data.files import NEEDED, checked_record
from fedmide.data.records import Part, Record
from fedmide.data.rows import Reading, Row, gathered, rows_of, sound
from fedmide.data.split import grouped
from fedmide.data.writing import write_clients
from fedmide.errors import DataError, UsageError
from fedmide.seeds import entropy, stream

RULES = "Expected iid, field:NAME, dirichlet:ALPHA:NAME (such as dirichlet:0.5:category) or size:EXPONENT (size:1.5)"


Kind = Literal["iid", "field", "dirichlet", "size"]


@dataclass(frozen=True, slots=True)
class Rule:
    """A rule by which records are dealt. `strength`: Dirichlet's alpha, or the exponent of the sizes."""

    kind: Kind
    field: str = ""
    strength: float = 0.0


@dataclass(frozen=True, slots=True)
class Labeled:
    """A record and its value in the field that it is dealt or shown by. `label` is empty without a value."""

    record: Record
    label: str


Dealt = Mapping[str, Mapping[Part, tuple[Labeled, ...]]]
"""The records of each part of each client, in the file's order."""


def parse_rule(text: str) -> Rule:
    """The rule that a text such as "dirichlet:0.5:category" describes. Raises `UsageError` for any other text.

    >>> parse_rule("dirichlet:0.5:category")
    Rule(kind='dirichlet', field='category', strength=0.5)
    """
    match text.split(":"):
        case ["iid"]:
            return Rule("iid")
        case ["field", field] if field:
            return Rule("field", field)
        case ["dirichlet", strength, field] if field and _positive(strength):
            return Rule("dirichlet", field, float(strength))
        case ["size", strength] if _positive(strength):
            return Rule("size", strength=float(strength))
    raise UsageError(f"--by {text!r} is not a rule", RULES)


def read_labeled(path: Path, fields: FieldNames, label: str) -> tuple[Labeled, ...]:
    """The records in a file, each with its value of the field `label`. Raises one `DataError` with all problems."""
    rows = rows_of(path, dict.fromkeys((*fields.model_dump().values(), label)))
    found = gathered((_labeled(row, fields, label) for row in rows.values), rows.problems)
    return sound(found, NEEDED if rows.values else "Give one file of records: .json, .jsonl or .parquet")


def deal(
    records: Sequence[Labeled], rule: Rule, clients: int, seed: int, held_out: Mapping[Part, float]
) -> dict[str, dict[Part, tuple[Labeled, ...]]]:
    """The records of each client (site-1, site-2, ...) and part. Every record is in exactly one part of one client.

    `clients`: 0 with the rule "field" means one client per value.
    `held_out`: the fractions of each client's records for validation and for test. A part gets whole groups, and at
    least one group unless its fraction is 0.
    A client with too few groups for its parts takes some from the client with most groups, unless the rule is "field".
    Raises `DataError` if there are too few groups.
    """
    groups = grouped([each.record for each in records])
    labels = _labels(records, groups)
    if rule.field and set(labels.values()) == {""}:
        raise DataError(f"no record has a value in the field '{rule.field}'", "Name a field of the file in --by")
    names = [f"site-{number}" for number in range(1, 1 + (clients or len(set(labels.values()))))]
    parts: list[Part] = [part for part, fraction in held_out.items() if fraction > 0]
    sizes, least = Counter(groups), 1 + len(parts)
    if len(sizes) < len(names) * least:
        raise _too_few(f"groups of records that share no question and no concept: {len(sizes)}", len(names) * least)
    owners = _owners(rule, names, labels, sizes, seed)
    if rule.kind != "field":
        owners = _filled(owners, names, sizes, least)
    dealt = {}
    for name in names:
        own = {group: sizes[group] for group in sizes if owners[group] == name}
        if len(own) < least:
            raise _too_few(f"{name}: groups of records that share no question and no concept: {len(own)}", least)
        part_of = _held_out(own, {part: held_out[part] for part in parts}, seed)
        placed = [(part_of[group], each) for each, group in zip(records, groups, strict=True) if group in own]
        dealt[name] = {part: tuple(each for place, each in placed if place == part) for part in ("training", *parts)}
    return dealt


def write(dealt: Dealt, out: Path, picture: str) -> None:
    """Writes a folder that `data.source = "files"` reads, with one subfolder per client, and its picture in SVG.

    The picture is written last: a folder that has it is complete. Raises `RunFolderError` if writing fails.
    """
    clients = {
        name: {part: [each.record for each in found] for part, found in parts.items()} for name, parts in dealt.items()
    }
    write_clients(out, clients, "partition.svg", picture.encode())


def counts(dealt: Dealt) -> dict[str, Counter[str]]:
    """The number of each client's records per value, over all its parts."""
    return {name: Counter(each.label for part in parts.values() for each in part) for name, parts in dealt.items()}


def _owners(
    rule: Rule, names: Sequence[str], labels: Mapping[str, str], sizes: Mapping[str, int], seed: int
) -> dict[str, str]:
    """The client of each group."""
    order = _order(sizes, seed, "partition")
    even = dict.fromkeys(names, 1.0)
    if rule.kind == "field":
        totals: Counter[str] = Counter()
        for group in order:
            totals[labels[group]] += sizes[group]
        largest_first = sorted(totals, key=lambda label: (-totals[label], label))
        owner_of = _dealt(largest_first, totals, even)
        return {group: owner_of[labels[group]] for group in order}
    if rule.kind == "dirichlet":
        owners: dict[str, str] = {}
        for label in sorted(set(labels.values())):
            shares = dirichlet_shares(rule.strength, label, names, seed)
            owners |= _dealt([group for group in order if labels[group] == label], sizes, shares)
        return owners
    exponent = rule.strength if rule.kind == "size" else 0.0
    return _dealt(order, sizes, {name: (rank + 1) ** -exponent for rank, name in enumerate(names)})


def dirichlet_shares(alpha: float, label: str, names: Iterable[str], seed: int) -> dict[str, float]:
    """Each client's share of a value's records, drawn from Dirichlet(alpha, ..., alpha), up to a common factor.

    The draws are logarithms of gamma variates, from one random stream per client. So an additional client leaves the
    proportions of the others unchanged, and a small alpha causes no underflow.
    """
    logs = {}
    for name in names:
        generator = stream(seed, f"partition dirichlet {label}", client=name)
        # Gamma(alpha) is Gamma(alpha + 1) * U^(1 / alpha)
        logs[name] = float(np.log(generator.gamma(alpha + 1)) + np.log1p(-generator.random()) / alpha)
    highest = max(logs.values())
    return {name: float(np.exp(value - highest)) for name, value in logs.items()}


def _dealt(order: Sequence[str], sizes: Mapping[str, int], shares: Mapping[str, float]) -> dict[str, str]:
    """The client of each group. In turn, each group goes to the client that is furthest below its share of records."""
    total, whole = sum(sizes[group] for group in order), sum(shares.values())
    room = {name: total * share / whole for name, share in shares.items()}
    owners = {}
    for group in order:
        name = max(room, key=room.__getitem__)  # the first of equals
        owners[group] = name
        room[name] -= sizes[group]
    return owners


def _filled(owners: Mapping[str, str], names: Sequence[str], sizes: Mapping[str, int], least: int) -> dict[str, str]:
    """The owners after every client has at least `least` groups, taken from the client with most groups."""
    held: dict[str, list[str]] = {name: [] for name in names}
    for group, name in owners.items():
        held[name].append(group)
    for name in names:
        while len(held[name]) < least:
            most = max(names, key=lambda each: len(held[each]))
            smallest = min(held[most], key=lambda group: (sizes[group], group))
            held[most].remove(smallest)
            held[name].append(smallest)
    return {group: name for name, groups in held.items() for group in groups}


def _held_out(sizes: Mapping[str, int], fractions: Mapping[Part, float], seed: int) -> dict[str, Part]:
    """The part of each of a client's groups. Each held-out part is filled up to its fraction; the rest is training."""
    order = _order(sizes, seed, "partition parts")
    part_of: dict[str, Part] = dict.fromkeys(order, "training")
    total = sum(sizes.values())
    for left, part in zip(range(len(fractions), 0, -1), fractions, strict=True):
        taken = 0
        while len(order) > left and taken < max(1, round(fractions[part] * total)):
            group = order.pop(0)
            part_of[group] = part
            taken += sizes[group]
    return part_of


def _order(groups: Iterable[str], seed: int, purpose: str) -> list[str]:
    """A random order that follows from the seed and each group alone."""
    return sorted(groups, key=lambda group: (entropy(seed, purpose, client=group), group))


def _labels(records: Sequence[Labeled], groups: Sequence[str]) -> dict[str, str]:
    """The most frequent value of each group; among equally frequent ones, the first by name."""
    found: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for each, group in zip(records, groups, strict=True):
        found[group][each.label] += 1
    return {group: min(seen, key=lambda label: (-seen[label], label)) for group, seen in found.items()}


def _labeled(row: Row, fields: FieldNames, label: str) -> Reading[Labeled]:
    found = checked_record(row, fields)
    if not found.values or not isinstance(row.value, dict):
        return Reading(problems=found.problems)
    value = row.value.get(label)
    if value is not None and not isinstance(value, str | int):
        return Reading(problems=(f"{row.place}: field '{label}' has no plain value, expected text or a whole number",))
    return Reading((Labeled(found.values[0], "" if value is None else str(value)),))


def _positive(text: str) -> bool:
    try:
        return 0 < float(text) < 1e6
    except ValueError:
        return False


def _too_few(found: str, expected: int) -> DataError:
    return DataError(
        f"{found}, expected at least {expected}: one for each part of each site",
        "Ask for fewer sites, or set --validation-fraction 0 or --test-fraction 0",
    )
