"""The round as fedmide does it, with its steps: `server.plan`, `client.handle`, codec, `server.apply`."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from threading import Lock
from typing import Any

import torch

from bench.workload import Workload
from fedmide.config.knobs import fingerprint
from fedmide.federation import server
from fedmide.federation.client_state import ClientState
from fedmide.federation.ledger import Entry
from fedmide.federation.runtimes.inprocess import InProcess


@dataclass(frozen=True)
class Federation:
    """Sites before round 1. The first half of each site's records is personal."""

    work: Workload

    @cached_property
    def state(self) -> server.ServerState:
        """The server's state before round 1."""
        inputs = self.work.inputs
        adapter = inputs.fresh_adapter()
        return server.ServerState(fingerprint(self.work.config), tuple(inputs.clients), 1, adapter)

    def sites(self) -> dict[str, ClientState]:
        """The sites. Their ledgers name the personal half, with its NLL under the local adapter."""
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
        state = self.state
        runtime = InProcess(self.sites(), self.work.inputs.resident, lambda site: None)
        after, _ = server.apply(state, runtime(server.plan(state, self.work.config)), self.work.config)
        return after


def _entries(record: Any, is_personal: bool) -> Iterator[Entry]:
    """The split's result and, for a personal record, its NLL under the local adapter, too low for it to be enrolled."""
    which = "personal" if is_personal else "shared"
    judged = Entry(0, record, 5, 0.0, 1.0, 2.7, which, "below-threshold", 1.0, -1)  # type: ignore[arg-type]
    yield judged
    if is_personal:
        yield replace(judged, nll_aggregated=None, score=None, reason="own-nll", threshold=None, local_round=0)


class Busy:
    """A stopwatch: the seconds in which at least one worker was in a watched function."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._inside, self._since, self._lock = 0, 0.0, Lock()

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._since = time.perf_counter()
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self.seconds += time.perf_counter() - self._since


@contextmanager
def timed_work(model: Any) -> Iterator[Busy]:
    """The seconds that the model spends in forward, backward and optimizer while this context is open."""
    busy = Busy()
    kind = type(model)
    own = {name: getattr(kind, name) for name in ("nll", "backpropagate")}
    step = torch.optim.AdamW.step

    def watched(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **named: Any) -> Any:
            with busy:
                return function(*args, **named)

        return call

    for name, function in own.items():
        setattr(kind, name, watched(function))
    torch.optim.AdamW.step = watched(step)  # type: ignore[method-assign]
    try:
        yield busy
    finally:
        for name, function in own.items():
            setattr(kind, name, function)
        torch.optim.AdamW.step = step  # type: ignore[method-assign]
