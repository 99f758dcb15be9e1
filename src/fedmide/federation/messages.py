"""All that may cross the wire: a task to a client and its reply, the greeting before them, and trouble.

Privacy by type: no field of a reply can hold a text, a record id or a per-record score. Its numbers are sums over
records, under names from a closed list. A frame is a magic word, a JSON header of bounded length and the adapter as
safetensors; nothing is unpickled.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from fedmide.model.interface import Adapter

MAX_RECORDS = 2**29 - 1
"""A float32 times this number is exact in float64; see `aggregation`."""


MetricName = Literal[
    "loss",  # sum of the training loss in nats; count: trained tokens
    "validation_loss",  # the same on the validation records, at the kept epoch
    "shared",  # records in the shared set
    "personal",  # records in the personal set
    "enrolled",  # records that moved in this round
    "not_finite",  # records whose score was not a finite number
    "warnings",  # verdicts given without a threshold
    "steps",  # optimizer steps
    "epoch",  # the epoch of the tuning that was kept
    "beta",  # the share of that tuning that was kept, if there was a choice
    "trained_tokens",  # tokens that the loss counted
    "scored_tokens",  # tokens whose NLL was computed
]


TroubleCode = Literal[
    "federation",  # it is not a member of this federation: other code, model, prompt or settings
    "message",  # the task can't be read
    "round",  # it has already done a later round
    "ledger",  # its ledger can't be read or does not fit its records
    "disk",  # what it must keep can't be written
    "site",  # its records, model or configuration can't be used
    "worker",  # no process there works on tasks
    "failed",  # anything else
]
"""The reason why a site does not answer, and all that it sends: the details are in its own log."""


@dataclass(frozen=True, slots=True)
class Metric:
    """A figure that adds up over clients: a sum over `count` things."""

    sum: float
    count: int = 1


@dataclass(frozen=True)
class ClientTask:
    """The server's request to a client in a round.

    `round`: -W .. -1 warm-up, 0 .. T-1 federated, T personalization. `restart`: train from the fresh adapter that the
    configuration's seed gives; `adapter` is then used for scoring only. `train` false: score only.
    """

    federation: str
    client: str
    round: int
    adapter: Adapter
    restart: bool = False
    train: bool = True


@dataclass(frozen=True)
class ClientReply:
    """A client's reply: its adapter, the number of records that trained it, and sums.

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
    """The server's first request to a site: to identify itself, and to report its state before a round."""

    federation: str
    round: int


@dataclass(frozen=True)
class Facts:
    """A site's report on itself: versions and hashes that must agree, and the sizes of its two sets.

    `federation` is the site's own hash of all that must agree; `knobs` are the settings among that. Sizes of -1: the
    site has no ledger.
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
    """The reason why a site does not answer."""

    client: str
    code: TroubleCode


SiteAnswer: TypeAlias = ClientReply | Facts | Trouble
"""All that may come back from a site."""
