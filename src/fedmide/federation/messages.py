"""All that may cross the wire: a task to a client, a reply from it, and their bytes.

Privacy by type: no field of a reply can hold a text, a record id or a per-record score. Its numbers are sums over
records, under names from a closed list. A frame is a magic word, a JSON header of bounded length and the adapter as
safetensors; nothing is unpickled.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from fedmide.model.interface import Adapter

MAX_RECORDS = 2**29 - 1
"""A float32 times so many is exact in float64; see `aggregation`."""


MetricName = Literal[
    "loss",  # training loss: nats over trained tokens, count of those
    "validation_loss",  # the same on the validation records, at the epoch that was kept
    "shared",  # records in the shared set
    "personal",  # records in the personal set
    "enrolled",  # records that moved in this round
    "not_finite",  # records whose score was no number
    "warnings",  # verdicts given without a threshold
    "steps",  # optimiser steps
    "epoch",  # the personalisation epoch that was kept
    "beta",  # how much of that tuning was kept, where there was a choice
    "trained_tokens",  # tokens that the loss counted
    "scored_tokens",  # tokens whose likelihood was computed
]


TroubleCode = Literal[
    "federation",  # it is no member of this federation: other code, model, prompt or settings
    "message",  # the task can't be read
    "round",  # it has already done a later round
    "ledger",  # its ledger can't be read or does not fit its records
    "disk",  # what it must keep can't be written
    "site",  # its records, model or configuration can't be used
    "worker",  # nothing that works on tasks is running there
    "failed",  # anything else
]
"""Why a site does not answer, which is all that it says: the details are in its own log."""


@dataclass(frozen=True, slots=True)
class Metric:
    """A figure that adds up over clients: a sum over so many things."""

    sum: float
    count: int = 1


@dataclass(frozen=True)
class ClientTask:
    """What the server asks of a client in a round.

    `round`: -W .. -1 warm-up, 0 .. T-1 federated, T personalisation. `restart`: train from the fresh adapter that the
    configuration's seed gives, not from `adapter` (which is then only scored with). `train` false: score only.
    """

    federation: str
    client: str
    round: int
    adapter: Adapter
    restart: bool = False
    train: bool = True


@dataclass(frozen=True)
class ClientReply:
    """What a client answers: its adapter, how many records trained it, and sums.

    No adapter and 0 records: the client did not train for the common model in this round.
    """

    federation: str
    client: str
    round: int
    adapter: Adapter | None
    num_records: int
    metrics: Mapping[MetricName, Metric] = field(default_factory=dict)


@dataclass(frozen=True)
class Hello:
    """What the server asks of a site before anything else: who it is, and where it stands before a round."""

    federation: str
    round: int


@dataclass(frozen=True)
class Facts:
    """What a site says of itself: versions and hashes that must agree, and how large its two sets are.

    `federation` is its own hash of all that must agree, `knobs` are the settings among that. -1, -1: it has no ledger.
    """

    federation: str
    client: str
    version: str
    model: str
    prompt: str
    knobs: Mapping[str, str]
    shared: int = -1
    personal: int = -1


@dataclass(frozen=True)
class Trouble:
    """Why a site does not answer."""

    client: str
    code: TroubleCode


SiteAnswer: TypeAlias = ClientReply | Facts | Trouble
"""What may come back from a site."""
