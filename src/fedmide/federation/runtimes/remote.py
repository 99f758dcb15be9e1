"""Sites in other processes or places: a runtime over any `Exchange`.

A node is greeted before it gets a task: its version, model, prompt and settings must be the server's, and its ledger
the one that the server knows of; otherwise it is refused with the reason. One message goes each way per client and
round. Replies are passed on in the tasks' order where they come close enough together, so that sums repeat to the bit.
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
"""How much may wait for an earlier task's reply."""


_LOOK_SECONDS = 1.0


_MAX_LOST = 5
"""How often in a row the way to the sites may be lost within one round."""


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
    """A runtime: call it with tasks. Whatever goes wrong with a site becomes the reason in its delivery.

    `connect` opens a way to the sites, anew where one was lost. `own` are the server's facts; `set_sizes` says how many
    shared and personal records a site has told of, where it has. `bound` are the sites that nodes are known to be by
    their keys; without it a node is who it says.
    """

    connect: Callable[[], Exchange]
    own: Facts
    set_sizes: Callable[[], Mapping[str, tuple[int, int]]]
    deadline_seconds: float
    tell: Callable[[str], None]
    bound: Mapping[int, str] | None = None
    needed: float = 1.0
    """Part of the asked sites that must be there for a round to begin before its deadline."""
    _exchange: Exchange | None = None
    _node_of: dict[str, int] = field(default_factory=dict)
    _refused: dict[int, str] = field(default_factory=dict)
    _met: bool = False

    def __call__(self, tasks: Sequence[ClientTask]) -> Iterator[Delivery]:
        """The replies, in the tasks' order as far as that needs no long store."""
        open_tasks = {task.client: task for task in tasks}
        ordered = _InOrder([task.client for task in tasks])
        num_lost = 0
        while open_tasks and num_lost < _MAX_LOST:  # without a task, or with every one answered, nobody is to be asked
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
        """Meets who is there; before the first round waits for all, later for as many as are needed."""
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
        """Greets nodes that are new, and forgets those that are gone."""
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
        """Which site a node is, and why it can't take part."""
        known = "" if self.bound is None else self.bound.get(answer.node, "")
        facts = _decoded(answer)
        if not isinstance(facts, Facts):
            return known, [facts if isinstance(facts, str) else "it does not say who it is"]
        if self.bound is not None and facts.client != known:
            return known, [f"its key is that of {known or 'no site'}, and it says that it is another"]
        if facts.client in self._node_of:
            return facts.client, ["another node is that site already"]
        return facts.client, list(differences(self.own, facts, set_sizes.get(facts.client)))

    def _absence(self, client: str) -> str:
        """Why a site was not asked; empty if it was."""
        if client in self._node_of:
            return ""
        named = {} if self.bound is None else {name: node for node, name in self.bound.items()}
        reason = self._refused.get(named.get(client, -1))
        return reason or "; ".join(self._refused.values()) or "it is not connected"


def differences(own: Facts, site: Facts, set_sizes: tuple[int, int] | None) -> Iterator[str]:
    """Why a site with these facts can't take part; nothing if it can."""
    for what, theirs, ours in (
        ("fedmide", site.version, own.version),
        ("the base model", site.model, own.model),
        ("the prompt", site.prompt, own.prompt),
    ):
        if theirs != ours:
            yield f"{what} is {theirs!r} there and {ours!r} here"
    for name, there, here in differing(site.knobs, own.knobs):
        yield f"{name} is {there} there and {here} here"
    if site.federation != own.federation.partition("-")[0]:
        yield "it belongs to another federation"
    elif set_sizes is not None and (site.shared, site.personal) != set_sizes:
        yield "its ledger is not the one that its last round left: bring it back"


@dataclass
class _InOrder:
    """Deliveries put into the order of their clients, as long as those that are early take little memory."""

    clients: list[str]
    early: dict[str, Delivery] = field(default_factory=dict)

    def add(self, delivery: Delivery) -> Iterator[Delivery]:
        """Those whose turn it is now."""
        self.early[delivery.client] = delivery
        while self.clients and self.clients[0] in self.early:
            yield self.early.pop(self.clients.pop(0))
        while sum(each.bytes_up for each in self.early.values()) > _EARLY_BYTES:
            client = next(iter(self.early))
            self.clients.remove(client)
            yield self.early.pop(client)


def _decoded(answer: Answered) -> SiteAnswer | str:
    """What a node answered, or the reason why that can't be used."""
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
    problem = reply if isinstance(reply, str) else "it answers something else"
    return Delivery(client, None, problem, bytes_down, bytes_up, seconds)
