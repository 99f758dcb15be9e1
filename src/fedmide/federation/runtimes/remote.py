"""Sites in other processes or on other machines: a runtime over any `Exchange`.

A node is greeted before it gets a task. Its version, model, prompt and settings must be the server's, and its ledger
must be the one that the server knows. Otherwise it is refused with the reason.
One message travels each way per client and round.
Replies are returned in the tasks' order, so that sums repeat to the bit. If early replies fill `_EARLY_BYTES`, they are
returned out of order.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from fedmide.config.knobs import differing
from fedmide.errors import MessageError
from fedmide.federation.codec import decode_answer, encode_hello, encode_tasks
from fedmide.federation.messages import ClientReply, ClientTask, Facts, Hello, SiteAnswer, Trouble, TroubleCode
from fedmide.federation.runtimes.link import Answered, Exchange, LinkLostError
from fedmide.federation.server import Delivery

_EARLY_BYTES = 2**30
"""The most bytes of replies that wait for an earlier task's reply."""


_LOOK_SECONDS = 1.0


_MAX_LOST = 5
"""Losses of the connection to the sites after which a round asks no more."""


REASONS: Mapping[TroubleCode, str] = {
    "federation": "it belongs to another federation",
    "message": "it can't read the task",
    "round": "it has already done a later round",
    "ledger": "its ledger can't be used",
    "disk": "its disk is full or can't be written to",
    "site": "its records, model or configuration can't be used",
    "worker": "nothing works on tasks there",
    "failed": "its work failed",
}


@dataclass
class Remote:
    """A runtime: call it with tasks. Every problem with a site becomes the reason in its delivery.

    `connect` opens a connection to the sites, again if it was lost. `own` are the server's facts. `set_sizes` gives the
    numbers of shared and personal records that sites have reported. `bound` maps nodes to sites by their keys; without
    it, the name that a node gives is trusted.
    """

    connect: Callable[[], Exchange]
    own: Facts
    set_sizes: Callable[[], Mapping[str, tuple[int, int]]]
    deadline_seconds: float
    tell: Callable[[str], None]
    bound: Mapping[int, str] | None = None
    needed: float = 1.0
    """Share of the asked sites that must be connected for a round to begin before its deadline."""
    _exchange: Exchange | None = None
    _node_of: dict[str, int] = field(default_factory=dict)
    _refused: dict[int, str] = field(default_factory=dict)
    _met: bool = False

    def __call__(self, tasks: Sequence[ClientTask]) -> Iterator[Delivery]:
        """The replies, in the tasks' order as long as early ones take little memory."""
        open_tasks = {task.client: task for task in tasks}
        ordered = _InOrder([task.client for task in tasks])
        num_lost = 0
        while open_tasks and num_lost < _MAX_LOST:  # no open task: no site is asked
            try:
                for delivery in self._ask(open_tasks):
                    del open_tasks[delivery.client]
                    yield from ordered.add(delivery)
                break
            except LinkLostError as error:
                self.tell(f"{error}; connecting again")
                self._exchange = None
                num_lost += 1
        missed = f"no answer within {self.deadline_seconds:g} s"
        for client in open_tasks:
            yield from ordered.add(Delivery(client, None, self._absence(client) or missed))

    def _ask(self, tasks: Mapping[str, ClientTask]) -> Iterator[Delivery]:
        exchange = self._exchange = self._exchange or self.connect()
        self._gather(exchange, tasks)
        begun = time.monotonic()
        asked = {self._node_of[client]: client for client in tasks if client in self._node_of}
        sizes: dict[str, int] = {}

        def frames() -> Iterator[tuple[int, bytes]]:
            to_ask = list(asked.items())  # answers may come before all are asked
            encoded = encode_tasks(tasks[client] for _, client in to_ask)
            for (node, client), frame in zip(to_ask, encoded, strict=True):
                sizes[client] = len(frame)
                yield node, frame

        for answer in exchange.ask(frames(), self.deadline_seconds):
            client = asked.pop(answer.node, None)
            if client is None:
                self.tell(f"node {answer.node}: an answer that nobody asked for")
                continue
            seconds = time.monotonic() - begun
            yield _delivery(client, answer, sizes[client], seconds)

    def _gather(self, exchange: Exchange, tasks: Mapping[str, ClientTask]) -> None:
        """Greets the connected nodes; waits for all sites before the first round, later for the needed share."""
        until = time.monotonic() + self.deadline_seconds
        round_number = next(iter(tasks.values())).round
        told = False
        while True:
            self._meet(exchange, round_number)
            absent = [client for client in tasks if client not in self._node_of]
            enough = len(tasks) - len(absent) >= (self.needed if self._met else 1.0) * len(tasks)
            if enough or time.monotonic() >= until or len(self._refused) >= len(absent) > 0:
                break
            if not told:
                self.tell(f"waiting for {', '.join(absent[:8])}{' and others' if len(absent) > 8 else ''}")
                told = True
            time.sleep(_LOOK_SECONDS)
        self._met = True

    def _meet(self, exchange: Exchange, round_number: int) -> None:
        """Greets new nodes, and forgets those that are gone."""
        there = exchange.nodes()
        self._node_of = {name: node for name, node in self._node_of.items() if node in there}
        self._refused = {node: reason for node, reason in self._refused.items() if node in there}
        new = [node for node in there if node not in self._node_of.values() and node not in self._refused]
        hello = encode_hello(Hello(self.own.federation, round_number))
        set_sizes = self.set_sizes() if new else {}
        for answer in exchange.ask(((node, hello) for node in new), self.deadline_seconds):
            name, problems = self._judged(answer, set_sizes)
            if problems:
                self._refused[answer.node] = "; ".join(problems)
                self.tell(f"site {name or answer.node} is refused: {'; '.join(problems)}")
            else:
                self._node_of[name] = answer.node

    def _judged(self, answer: Answered, set_sizes: Mapping[str, tuple[int, int]]) -> tuple[str, list[str]]:
        """The site that a node is, and the reasons why it can't take part."""
        known = "" if self.bound is None else self.bound.get(answer.node, "")
        facts = _decoded(answer)
        if not isinstance(facts, Facts):
            return known, [facts if isinstance(facts, str) else "it does not name its site"]
        if self.bound is not None and facts.client != known:
            return known, [f"its key belongs to {known or 'no site'}, but it names another site"]
        if facts.client in self._node_of:
            return facts.client, ["another node is already connected as this site"]
        return facts.client, list(differences(self.own, facts, set_sizes.get(facts.client)))

    def _absence(self, client: str) -> str:
        """The reason why a site was not asked; empty if it was."""
        if client in self._node_of:
            return ""
        named = {} if self.bound is None else {name: node for node, name in self.bound.items()}
        reason = self._refused.get(named.get(client, -1))
        return reason or "; ".join(self._refused.values()) or "it is not connected"


def differences(own: Facts, site: Facts, set_sizes: tuple[int, int] | None) -> Iterator[str]:
    """The reasons why a site with these facts can't take part; none if it can."""
    for what, theirs, ours in (
        ("fedmide", site.version, own.version),
        ("the base model", site.model, own.model),
        ("the prompt", site.prompt, own.prompt),
    ):
        if theirs != ours:
            yield f"{what} is {theirs!r} there and {ours!r} here"
    for name, there, here in sorted(differing(site.knobs, own.knobs)):
        yield f"{name} is {there} there and {here} here"
    if site.federation != own.federation.partition("-")[0]:
        yield "it belongs to another federation"
    elif set_sizes is not None and (site.shared, site.personal) != set_sizes:
        yield "its ledger is not the one that its last round left: restore that one"


@dataclass
class _InOrder:
    """Deliveries in the order of their clients, as long as early ones take little memory."""

    clients: list[str]
    early: dict[str, Delivery] = field(default_factory=dict)

    def add(self, delivery: Delivery) -> Iterator[Delivery]:
        """The deliveries whose turn it is now."""
        self.early[delivery.client] = delivery
        while self.clients and self.clients[0] in self.early:
            yield self.early.pop(self.clients.pop(0))
        while sum(each.bytes_up for each in self.early.values()) > _EARLY_BYTES:
            client = next(iter(self.early))
            self.clients.remove(client)
            yield self.early.pop(client)


def _decoded(answer: Answered) -> SiteAnswer | str:
    """A node's answer, or the reason why it can't be used."""
    if answer.problem:
        return answer.problem
    try:
        decoded = decode_answer(answer.frame)
    except MessageError as error:
        return f"its answer can't be read: {error}"
    return REASONS[decoded.code] if isinstance(decoded, Trouble) else decoded


def _delivery(client: str, answer: Answered, bytes_down: int, seconds: float) -> Delivery:
    reply = _decoded(answer)
    bytes_up = len(answer.frame)
    if isinstance(reply, ClientReply):
        return Delivery(client, reply, "", bytes_down, bytes_up, seconds)
    problem = reply if isinstance(reply, str) else "its answer is not a reply to the task"
    return Delivery(client, None, problem, bytes_down, bytes_up, seconds)
