"""The server: the tasks of a round, and the state after its replies. Pure; it knows no transport and no model.

It trusts no reply. A reply with other keys, shapes or types, or with a value that is not finite, is refused with the
reason. The round continues without that client.
"""

from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from fedmide import methods
from fedmide.config import Config
from fedmide.errors import ConfigError
from fedmide.federation.messages import MAX_RECORDS, ClientReply, ClientTask, Metric, MetricName
from fedmide.methods.method import Common, Contribution
from fedmide.model import adapters
from fedmide.model.interface import Adapter
from fedmide.seeds import stream

Stage = Literal["warmup", "train", "personalize"]


@dataclass(frozen=True)
class ServerState:
    """The federation between two rounds: `round` is the next one, `adapter` the common adapter that it starts from.

    `method_state` are the other arrays that the method keeps on the server.
    """

    federation: str
    clients: tuple[str, ...]
    round: int
    adapter: Adapter
    method_state: Adapter = field(default_factory=dict)

    @property
    def common(self) -> Common:
        """The part that the method works on."""
        return Common(self.clients, self.round, self.adapter, self.method_state)


@dataclass(frozen=True)
class Delivery:
    """The result of a runtime for one task: a reply or the reason why there is none, and the cost."""

    client: str
    reply: ClientReply | None
    problem: str = ""
    bytes_down: int = 0
    bytes_up: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class ClientRow:
    """One client's part in a round. `refused` is the reason why its reply did not count, empty if it did.

    `clipped_from` is the length of its update if that was shortened, else 0.
    """

    client: str
    num_records: int
    metrics: Mapping[MetricName, Metric]
    bytes_down: int
    bytes_up: int
    seconds: float
    refused: str = ""
    clipped_from: float = 0.0


@dataclass(frozen=True)
class RoundSummary:
    """A round in figures. `aggregated` false: no reply with training counted, so the adapter stays as it was."""

    round: int
    stage: Stage
    aggregated: bool
    clients: tuple[ClientRow, ...] = field(default=())


def begin(federation: str, clients: Iterable[str], adapter: Adapter, config: Config) -> ServerState:
    """The state before the first round, from a fresh adapter."""
    common = methods.of(config).begin(adapter, tuple(clients), config)
    state = ServerState(federation, common.clients, -config.warmup.rounds, common.adapter, common.method_state)
    if config.replies.max_update_norm:
        _check_measurable(state, config)
    return state


def stage_of(round_number: int, config: Config) -> Stage:
    """The stage that a round belongs to."""
    if round_number < 0:
        return "warmup"
    return "train" if round_number < config.federation.rounds else "personalize"


def plan(state: ServerState, config: Config) -> tuple[ClientTask, ...]:
    """The tasks of the next round, in client order."""
    down, restart = methods.of(config).down, _restarts(state.round, config)
    return tuple(
        ClientTask(state.federation, client, state.round, down(state.common, client, config), restart, trains)
        for client, trains in asked(state, config).items()
    )


def asked(state: ServerState, config: Config) -> dict[str, bool]:
    """The clients that the next round asks, in client order: true if a client is to train, false if only to score.

    All clients take part in warm-up and personalization, and in round 0 after a warm-up. That round brings the adapter
    for the split; clients that are not drawn for it only score.
    """
    drawn = _participants(state, config) if stage_of(state.round, config) == "train" else frozenset(state.clients)
    everyone = _follows_warmup(state.round, config)
    return {client: client in drawn for client in state.clients if client in drawn or everyone}


def apply(state: ServerState, deliveries: Iterable[Delivery], config: Config) -> tuple[ServerState, RoundSummary]:
    """The state after the round; replies are checked and folded in as they arrive."""
    rows: list[ClientRow] = []
    combined = methods.of(config).combine(state.common, _accepted(state, deliveries, rows, config), config)
    summary = RoundSummary(state.round, stage_of(state.round, config), combined is not None, tuple(rows))
    after = state.common if combined is None else combined
    return replace(state, round=state.round + 1, adapter=after.adapter, method_state=after.method_state), summary


def refusal(reply: ClientReply, state: ServerState, config: Config) -> str:
    """The reason why a reply must not count; empty if it may."""
    if (reply.federation, reply.round) != (state.federation, state.round):
        return f"it answers round {reply.round} of {reply.federation!r}"
    if reply.client not in state.clients:
        return f"there is no client {reply.client!r}"
    if not 0 <= reply.num_records <= MAX_RECORDS:
        return f"{reply.num_records} is not a valid number of records"
    if (reply.adapter is None) != (reply.num_records == 0):
        return f"{reply.num_records} records, but {'no' if reply.adapter is None else 'an'} adapter"
    if reply.adapter is None:
        return ""
    expected = methods.of(config).up(state.common, reply.client, config)
    return "; ".join(adapters.problems(reply.adapter, expected))


def _accepted(
    state: ServerState, deliveries: Iterable[Delivery], rows: list[ClientRow], config: Config
) -> Iterator[Contribution]:
    """The contributions that count, one at a time, so that one adapter is held. Each delivery adds a row to `rows`."""
    trains, answered = asked(state, config), set[str]()
    for delivery in deliveries:
        reply, reason = delivery.reply, _reason(delivery, state, config, trains, answered)
        arrays, too_long = (None, 0.0) if reason or not reply else _bounded(reply, state, config)
        if too_long and config.replies.oversized == "refuse":
            reason = f"its update has length {too_long:.4g}, more than replies.max_update_norm"
        rows.append(_row(delivery, reason, too_long))
        if reason or reply is None:
            continue
        answered.add(delivery.client)
        if arrays is not None:
            yield Contribution(reply.client, arrays, reply.num_records)


def _reason(
    delivery: Delivery, state: ServerState, config: Config, trains: Mapping[str, bool], answered: Container[str]
) -> str:
    """The reason why a delivery does not count, apart from its update's length; empty if it counts."""
    reply = delivery.reply
    if reply is None:
        return delivery.problem
    if reason := refusal(reply, state, config):
        return reason
    if delivery.client in answered or reply.client != delivery.client:
        return "it answers for another client, or twice"
    if reply.client not in trains or (reply.adapter is not None and not trains[reply.client]):
        return "it was not asked to train in this round"
    return ""


def _bounded(reply: ClientReply, state: ServerState, config: Config) -> tuple[Adapter | None, float]:
    """The reply's arrays, with the update cut to the longest allowed, and its length before; 0 if it was not cut."""
    most = config.replies.max_update_norm
    if reply.adapter is None or not most:
        return reply.adapter, 0.0
    start = _start(reply.client, state, config)
    length = adapters.distance(reply.adapter, start)
    return (adapters.between(start, reply.adapter, most / length), length) if length > most else (reply.adapter, 0.0)


def _start(client: str, state: ServerState, config: Config) -> Adapter:
    """The arrays that a client's update of this round is measured from, by the names of the arrays it sends."""
    if _restarts(state.round, config):
        return adapters.fresh(adapters.shapes(state.adapter), config.seed)
    method = methods.of(config)
    return (method.measured_from or method.down)(state.common, client, config)


def _check_measurable(state: ServerState, config: Config) -> None:
    """Refuses a limit on updates if the method does not say what they are measured from: they have no length then."""
    for client in state.clients:
        start, up = _start(client, state, config), methods.of(config).up(state.common, client, config)
        if unknown := [name for name, shape in up.items() if name not in start or start[name].shape != shape]:
            raise ConfigError(
                f"replies.max_update_norm: method {config.method!r} does not say what an update of {unknown[0]!r} is "
                "measured from",
                "Set it to 0, or define the method's `measured_from`",
            )


def _row(delivery: Delivery, refused: str, too_long: float) -> ClientRow:
    reply = None if refused else delivery.reply
    return ClientRow(
        delivery.client,
        reply.num_records if reply else 0,
        reply.metrics if reply else {},
        delivery.bytes_down,
        delivery.bytes_up,
        delivery.seconds,
        refused,
        0.0 if refused else too_long,
    )


def _follows_warmup(round_number: int, config: Config) -> bool:
    """True if a round is the first federated one after a warm-up."""
    return round_number == 0 and config.warmup.rounds > 0 and config.federation.rounds > 0


def _restarts(round_number: int, config: Config) -> bool:
    """True if a round's training begins with a fresh adapter instead of the common one."""
    return _follows_warmup(round_number, config) and config.warmup.reset


def _participants(state: ServerState, config: Config) -> frozenset[str]:
    """The clients that train in this round, drawn in each round: those with the lowest draws of their own streams."""
    number = max(1, round(config.federation.participation * len(state.clients)))
    draws = {name: stream(config.seed, "participation", state.round, name).random() for name in state.clients}
    return frozenset(sorted(draws, key=draws.__getitem__)[:number])
