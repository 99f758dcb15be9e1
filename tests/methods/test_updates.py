"""The length of an update: measured from the real start of the site's training, for every method."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

import numpy as np
import pytest

from fedmide import methods
from fedmide.config import Config, parse
from fedmide.config.sections import MethodName
from fedmide.errors import ConfigError
from fedmide.federation import server
from fedmide.federation.messages import ClientReply
from fedmide.federation.server import Delivery, RoundSummary, ServerState
from fedmide.methods import Method, registry
from fedmide.methods.method import Common, Contribution
from fedmide.model import adapters
from fedmide.model.adapters import encode
from fedmide.model.interface import Adapter, TrainingPlan
from fedmide.runs.resident import Resident

TRAVELLING = [name for name in get_args(MethodName) if methods.METHODS[name].travels]
OPTIONS = {"flexlora": ["flexlora.ranks=[4, 1, 2]"]}


@dataclass
class Seen:
    """A federation that was run, and what each site's training began with by round and client."""

    done: Any
    begun: dict[tuple[int, str], Adapter]

    def unchanged(self, state: ServerState, client: str) -> Adapter:
        """The reply of a site whose training changed nothing."""
        begun = self.begun[state.round, client]
        sent = self.done.replies(state.round)[client]
        plain = {name: begun.get(name.removeprefix("adapter."), np.zeros_like(array)) for name, array in sent.items()}
        return adapters.cut_like(plain, sent)  # of two adapters that train as one, the own one stands first


@pytest.fixture(params=TRAVELLING)
def seen(request: pytest.FixtureRequest, run_federation: Any, monkeypatch: pytest.MonkeyPatch) -> Seen:
    begun: dict[tuple[int, str], Adapter] = {}
    train = Resident.train

    def watched(self: Resident, adapter: Adapter, examples: Sequence[Any], plan: TrainingPlan) -> Any:
        begun.setdefault((plan.round_number, plan.client), adapter)  # the first training of a round is what travels
        return train(self, adapter, examples, plan)

    monkeypatch.setattr(Resident, "train", watched)
    failing = [(1, "b")]  # whose local adapter continues from an earlier round
    done = run_federation(request.param, "federation.rounds=3", *OPTIONS.get(request.param, []), failing=failing)
    return Seen(done, begun)


def limited(config: Config, length: float, oversized: str = "refuse") -> Config:
    replies = config.replies.model_copy(update={"max_update_norm": length, "oversized": oversized})
    return config.model_copy(update={"replies": replies})


def far(start: Adapter, length: float) -> Adapter:
    """Arrays at this distance from others."""
    draw = np.random.default_rng(0)
    moves = {name: draw.normal(size=array.shape) for name, array in start.items()}
    whole = sum(float((move**2).sum()) for move in moves.values()) ** 0.5
    return {name: (array + moves[name] * (length / whole)).astype(np.float32) for name, array in start.items()}


def one_reply(state: ServerState, client: str, arrays: Adapter, config: Config) -> RoundSummary:
    reply = ClientReply("f", client, state.round, arrays, 3)
    return server.apply(state, [Delivery(client, reply)], config)[1]


def test_an_update_is_measured_from_what_the_training_began_with(seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    config = seen.done.config
    method, counted = methods.of(config), list[Contribution]()

    def combine(common: Common, answers: Any, config: Config) -> None:
        counted.extend(answers)

    monkeypatch.setattr(methods, "of", lambda config: replace(method, combine=combine))
    for state in seen.done.states[:-1]:
        for client in seen.done.replies(state.round):
            start = seen.unchanged(state, client)
            (row,) = one_reply(state, client, start, limited(config, 1e-9)).clients
            assert row.refused == "", "nothing was added"
            (row,) = one_reply(state, client, far(start, 5.0), limited(config, 4.99)).clients
            assert row.refused == "its update has length 5, more than replies.max_update_norm"
            counted.clear()
            (row,) = one_reply(state, client, far(start, 5.0), limited(config, 2.0, "clip")).clients
            assert (row.refused, row.clipped_from) == ("", pytest.approx(5.0, rel=1e-5))
            (answer,) = counted
            assert adapters.distance(answer.arrays, start) == pytest.approx(2.0, rel=1e-5)
            assert adapters.distance(answer.arrays, far(start, 2.0)) < 1e-5, "nearer, in the same direction"


def test_a_limit_that_nobody_reaches_changes_nothing(seen: Seen) -> None:
    for state, after in zip(seen.done.states[:-1], seen.done.states[1:], strict=True):
        given = [each for each in seen.done.deliveries if not each.reply or each.reply.round == state.round]
        found, summary = server.apply(state, given, limited(seen.done.config, 1e30, "clip"))
        assert (encode(found.adapter), encode(found.method_state)) == (
            encode(after.adapter),
            encode(after.method_state),
        )
        assert not any(row.clipped_from for row in summary.clients)


def test_a_method_without_a_start_of_its_updates_has_no_limit_on_them(
    fakes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "_OWN", {})
    silent = Method("own:silent", "sends what it never got", "nowhere", down=lambda common, client, config: {})
    methods.register(silent)
    plain = parse({"method": "own:silent"})
    assert server.begin("f", "ab", fakes.adapter(0.0), plain).round == 0
    with pytest.raises(ConfigError, match=r"max_update_norm: method 'own:silent' does not say what an update of 'line"):
        server.begin("f", "ab", fakes.adapter(0.0), limited(plain, 1.0))
    methods.register(replace(silent, measured_from=lambda common, client, config: common.adapter))
    assert server.begin("f", "ab", fakes.adapter(0.0), limited(plain, 1.0)).round == 0
