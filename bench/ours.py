"""The same round as fedmide does it, and its parts: `server.plan`, `client.handle`, codec, `server.apply`."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from bench.timing import once
from bench.workload import Workload
from fedmide import server
from fedmide.client import ClientState
from fedmide.config import fingerprint
from fedmide.ledger import Entry
from fedmide.runtimes.inprocess import InProcess


@dataclass(frozen=True)
class Federation:
    """Sites whose first half of records is personal, before round 1."""

    work: Workload

    def state(self) -> server.ServerState:
        """The server's state before round 1."""
        inputs = self.work.inputs
        adapter = inputs.fresh_adapter()
        return server.ServerState(fingerprint(self.work.config), tuple(inputs.clients), 1, adapter)

    def sites(self) -> dict[str, ClientState]:
        """The sites: their ledgers say which half is personal and what their own adapter made of it."""
        name_of = fingerprint(self.work.config)
        found = {}
        for name, examples in self.work.inputs.examples.items():
            half = len(examples.training) // 2
            entries = [
                entry
                for number, example in enumerate(examples.training)
                for entry in _entries(example.id, number < half)
            ]
            training = {example.id: example for example in examples.training}
            found[name] = ClientState(name, name_of, self.work.config, training, examples.validation, tuple(entries))
        return found

    def round(self) -> server.ServerState:
        """One federated round of all sites, every message encoded and decoded."""
        state = self.state()
        runtime = InProcess(self.sites(), self.work.inputs.resident, lambda site: None)
        after, _ = server.apply(state, runtime(server.plan(state, self.work.config)), self.work.config)
        return after


def _entries(record: Any, is_personal: bool) -> Iterator[Entry]:
    """The split's verdict and, for a personal record, the own adapter's measurement: so low that none is enrolled."""
    which = "personal" if is_personal else "shared"
    judged = Entry(0, record, 5, 0.0, 1.0, 2.7, which, "below-threshold", 1.0, -1)  # type: ignore[arg-type]
    yield judged
    if is_personal:
        yield replace(judged, nll_aggregated=None, score=None, reason="own-nll", threshold=None, local_round=0)


@contextmanager
def timed_work(model: Any) -> Iterator[list[float]]:
    """The seconds that go into forward, backward and optimiser, while the model works within."""
    spent: list[float] = []
    kind = type(model)
    own = {name: getattr(kind, name) for name in ("nll", "backpropagate")}
    step = torch.optim.AdamW.step

    def watched(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **named: Any) -> Any:
            result: list[Any] = []
            spent.append(once(lambda: result.append(function(*args, **named))))
            return result[0]

        return call

    for name, function in own.items():
        setattr(kind, name, watched(function))
    torch.optim.AdamW.step = watched(step)  # type: ignore[method-assign]
    try:
        yield spent
    finally:
        for name, function in own.items():
            setattr(kind, name, function)
        torch.optim.AdamW.step = step  # type: ignore[method-assign]
