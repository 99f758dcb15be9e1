"""A client's append-only account of every score and every move; the sets are derived from it and from nothing else.

It stays on the site. An entry belongs to a round; warm-up rounds are numbered -W .. -1, federated ones 0 .. T-1. To
handle a round again, the site drops the entries from that round on and writes them again. So handling a round is
idempotent.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from operator import attrgetter
from typing import ClassVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from fedmide.atomic import lines_of
from fedmide.config.sections import ScoreKind
from fedmide.data.records import RecordId
from fedmide.errors import RunFolderError
from fedmide.federation.enrollment import SCORES, Reason, SetName, Verdict, members
from fedmide.model.interface import Nll


@dataclass(frozen=True, slots=True)
class Entry:
    """One score with its verdict; or, with reason "own-nll", one NLL measured under the local adapter.

    NLLs are nats per token over `num_tokens` predicted tokens. `local_round` is the round in which `nll_local` was
    measured, so `round - local_round` is its age. A number that was not finite is None, null in JSON.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    round: int
    record_id: RecordId
    num_tokens: int
    nll_local: float | None
    nll_aggregated: float | None
    score: float | None
    set: SetName
    reason: Reason
    threshold: float | None
    local_round: int


@dataclass(frozen=True, slots=True)
class OwnNll:
    """A record's NLL under the local adapter (NaN if it was not finite), and the round of the measurement."""

    nll: float
    num_tokens: int
    round: int


@dataclass(frozen=True)
class Standing:
    """The state that follows from a ledger: each training record's set, and its last NLL under the local adapter.

    `is_split`: the split by score is done.
    """

    sets: Mapping[RecordId, SetName]
    own: Mapping[RecordId, OwnNll] = field(default_factory=dict)
    is_split: bool = False
    judged: Mapping[RecordId, Entry] = field(default_factory=dict)
    """The last verdict on each record that has one."""

    @property
    def shared(self) -> Sequence[RecordId]:
        """Records that train the common model."""
        return members(self.sets, "shared")

    @property
    def personal(self) -> Sequence[RecordId]:
        """Records held back."""
        return members(self.sets, "personal")


Ledger = tuple[Entry, ...]


def standing(ledger: Iterable[Entry], records: Iterable[RecordId]) -> Standing:
    """The standing of the training records: shared until an entry says otherwise."""
    sets: dict[RecordId, SetName] = dict.fromkeys(records, "shared")
    own: dict[RecordId, OwnNll] = {}
    judged: dict[RecordId, Entry] = {}
    for entry in ledger:
        if entry.record_id not in sets:
            raise RunFolderError(
                f"a ledger of round {entry.round} names a record that is not in the training data",
                "The data changed since the run began; start a new run",
            )
        sets[entry.record_id] = entry.set
        if entry.reason == "own-nll":
            nll = math.nan if entry.nll_local is None else entry.nll_local
            own[entry.record_id] = OwnNll(nll, entry.num_tokens, entry.round)
        else:
            judged[entry.record_id] = entry
    return Standing(sets, own, bool(judged), judged)


def before(ledger: Ledger, round_number: int) -> Ledger:
    """The entries of earlier rounds."""
    return tuple(entry for entry in ledger if entry.round < round_number)


def measurements(round_number: int, values: Mapping[RecordId, Nll], sets: Mapping[RecordId, SetName]) -> Ledger:
    """Entries that store the NLLs of records under the client's local adapter."""
    return tuple(
        Entry(
            round=round_number,
            record_id=record,
            num_tokens=nll.num_tokens,
            nll_local=_finite(nll.mean),
            nll_aggregated=None,
            score=None,
            set=sets[record],
            reason="own-nll",
            threshold=None,
            local_round=round_number,
        )
        for record, nll in values.items()
    )


def scores(
    aggregated: Mapping[RecordId, Nll], own: Mapping[RecordId, OwnNll], kind: ScoreKind = "ratio"
) -> dict[RecordId, float]:
    """Each record's score, joined by its id."""
    return {record: SCORES[kind](nll.mean, own[record].nll) for record, nll in aggregated.items()}


def verdicts(
    round_number: int,
    aggregated: Mapping[RecordId, Nll],
    own: Mapping[RecordId, OwnNll],
    values: Mapping[RecordId, float],
    judged: Mapping[RecordId, Verdict],
) -> Ledger:
    """Entries that store the verdict on each record, and its score."""
    return tuple(
        Entry(
            round=round_number,
            record_id=record,
            num_tokens=nll.num_tokens,
            nll_local=_finite(own[record].nll),
            nll_aggregated=_finite(nll.mean),
            score=_finite(values[record]),
            set=judged[record].set,
            reason=judged[record].reason,
            threshold=judged[record].threshold,
            local_round=own[record].round,
        )
        for record, nll in aggregated.items()
    )


def to_lines(ledger: Iterable[Entry]) -> str:
    """The entries as JSON lines."""
    named = (dict(zip(_FIELDS, _values(entry), strict=True)) for entry in ledger)  # `asdict` takes ten times as long
    return "".join(json.dumps(each, allow_nan=False) + "\n" for each in named)


def from_lines(text: str, where: str) -> Ledger:
    """The entries that `to_lines` wrote; raises `RunFolderError` with the first line that is not one."""
    entries = []
    for number, line in enumerate(lines_of(text), 1):
        try:
            entries.append(_ENTRY.validate_json(line))
        except ValidationError:
            raise RunFolderError(f"{where}:{number}: not a ledger line", "Start a new run") from None
    return tuple(entries)


_ENTRY = TypeAdapter(Entry)


_FIELDS = tuple(each.name for each in fields(Entry))


_values = attrgetter(*_FIELDS)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
