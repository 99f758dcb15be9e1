"""The loop of the federation: plan, run, apply, commit."""

from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

from fedmide.config import Config
from fedmide.federation.messages import ClientTask
from fedmide.federation.server import Delivery, RoundSummary, ServerState, apply, plan

Runtime: TypeAlias = Callable[[Sequence[ClientTask]], Iterator[Delivery]]
"""Brings tasks to clients, and their replies back: in process, over a network, or from a list in a test."""


Commit: TypeAlias = Callable[[ServerState, RoundSummary], None]
"""Makes a round permanent: after it returns, the round is never run again."""


def run(state: ServerState, config: Config, runtime: Runtime, commit: Commit) -> ServerState:
    """The state after the last federated round; begins with the round of the given state."""
    while state.round < config.federation.rounds:
        state, summary = apply(state, runtime(plan(state, config)), config)
        commit(state, summary)
    return state
