"""Sites over an exchange: the same result as in process if all goes well; else a reason, and the round continues."""

import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest

from fedmide.config import Config
from fedmide.federation import rounds, server
from fedmide.federation.client import handle
from fedmide.federation.client_state import ClientState
from fedmide.federation.codec import (
    decode_reply,
    decode_request,
    encode_facts,
    encode_reply,
    encode_task,
    encode_trouble,
)
from fedmide.federation.messages import ClientReply, ClientTask, Facts, Hello, Trouble
from fedmide.federation.runtimes.inprocess import InProcess
from fedmide.federation.runtimes.link import Answered, LinkLostError
from fedmide.federation.runtimes.remote import REASONS, Remote, differences
from fedmide.federation.server import Delivery, RoundSummary, ServerState
from fedmide.model import adapters

FACTS = Facts("test", "", "1", "model", "prompt", {"lora.r": "8"})
NAMES = "abc"


@dataclass
class Sites:
    """Nodes 1, 2, 3 for the sites a, b, c, which work; `bend` changes what comes back, `facts` what they say."""

    config: Config
    model: Any
    states: dict[str, ClientState]
    bend: Callable[[str, int, bytes], list[Answered]] = lambda name, node, frame: [Answered(node, frame)]
    facts: dict[str, Facts] = field(default_factory=dict)
    there: list[int] = field(default_factory=lambda: [1, 2, 3])
    order: random.Random = field(default_factory=lambda: random.Random(0))
    asked: list[tuple[str, int]] = field(default_factory=list)

    def nodes(self) -> list[int]:
        return list(self.there)

    def ask(self, frames: Iterable[tuple[int, bytes]], seconds: float) -> Iterator[Answered]:
        given = list(frames)
        self.order.shuffle(given)
        for node, frame in given:
            name = NAMES[node - 1]
            request = decode_request(frame)
            if isinstance(request, Hello):
                facts = self.facts.get(name, replace(FACTS, client=name))
                yield Answered(node, encode_facts(facts))
                continue
            self.asked.append((name, request.round))
            reply, self.states[name] = handle(request, self.states[name], self.model)
            yield from self.bend(name, node, encode_reply(reply))


@pytest.fixture
def sites(fakes: Any) -> Sites:
    config = fakes.config("federation.rounds=2", "personalization.epochs=1", "warmup.rounds=1")
    return Sites(
        config, fakes.line(), {name: fakes.site(name, [1, 2, 3 + place], config) for place, name in enumerate(NAMES)}
    )


def remote(sites: Sites, **changes: Any) -> Remote:
    given: dict[str, Any] = {"deadline_seconds": 5.0, "needed": 0.0, **changes}
    return Remote(lambda: sites, FACTS, given.pop("set_sizes", dict), tell=lambda message: None, **given)


def begin(sites: Sites, fakes: Any) -> ServerState:
    return server.begin("test", NAMES, fakes.adapter(0.0), sites.config)


def one_round(sites: Sites, fakes: Any, **changes: Any) -> tuple[ServerState, RoundSummary]:
    state = begin(sites, fakes)
    return server.apply(state, remote(sites, **changes)(server.plan(state, sites.config)), sites.config)


def refusals(summary: RoundSummary) -> dict[str, str]:
    return {row.client: row.refused for row in summary.clients if row.refused}


# --- all goes well


def test_it_is_the_same_as_in_process(sites: Sites, fakes: Any) -> None:
    local = dict(sites.states)
    seen: list[list[RoundSummary]] = [[], []]
    in_process = InProcess(local, sites.model, lambda state: None)
    one = rounds.run(begin(sites, fakes), sites.config, in_process, lambda state, summary: seen[0].append(summary))
    two = rounds.run(begin(sites, fakes), sites.config, remote(sites), lambda state, summary: seen[1].append(summary))
    assert adapters.encode(one.adapter) == adapters.encode(two.adapter)
    assert {name: state.ledger for name, state in local.items()} == {
        name: state.ledger for name, state in sites.states.items()
    }
    rows = [[[replace(row, seconds=0.0) for row in summary.clients] for summary in side] for side in seen]
    assert rows[0] == rows[1], "bytes and order too"


def test_one_message_each_way_per_client_and_round(sites: Sites, fakes: Any) -> None:
    rounds.run(begin(sites, fakes), sites.config, remote(sites), lambda state, summary: None)
    assert sorted(sites.asked) == sorted((name, number) for name in NAMES for number in (-1, 0, 1))


def test_replies_that_would_take_too_much_memory_are_returned_early(
    sites: Sites, fakes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedmide.federation.runtimes.remote._EARLY_BYTES", 0)
    state = begin(sites, fakes)
    order = [delivery.client for delivery in remote(sites)(server.plan(state, sites.config))]
    assert sorted(order) == list(NAMES)
    assert order != list(NAMES), "the shuffle of this seed"


# --- replies that can't be trusted


def changed(reply: ClientReply, change: Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]) -> bytes:
    assert reply.adapter is not None
    return encode_reply(replace(reply, adapter={name: change(array) for name, array in reply.adapter.items()}))


BAD: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "truncated": (lambda frame: frame[: len(frame) // 2], "can't be read"),
    "empty": (lambda frame: b"", "can't be read"),
    "noise": (lambda frame: b"FMD1" + bytes(range(200)), "can't be read"),
    "shape": (lambda frame: changed(decode_reply(frame), lambda array: array.repeat(2, axis=0)), "shape"),
    "type": (lambda frame: changed(decode_reply(frame), lambda array: array.astype(np.float64)), "type"),
    "nan": (lambda frame: changed(decode_reply(frame), lambda array: array * np.nan), "not finite"),
    "huge": (lambda frame: changed(decode_reply(frame), lambda array: array * 1000 + 1000), "length"),
    "round": (lambda frame: encode_reply(replace(decode_reply(frame), round=7)), "answers round 7"),
    "other": (lambda frame: encode_reply(replace(decode_reply(frame), client="a")), "another client"),
    "facts": (lambda frame: encode_facts(FACTS), "not a reply to the task"),
    "trouble": (lambda frame: encode_trouble(Trouble("b", "disk")), "disk"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_reply_is_refused_with_its_reason_and_the_round_continues(kind: str, sites: Sites, fakes: Any) -> None:
    bend, reason = BAD[kind]
    sites.config = fakes.config("warmup.rounds=1", "replies.max_update_norm=100")
    without = replace(sites, states={**sites.states}, there=[1, 3])
    sites.bend = lambda name, node, frame: [Answered(node, bend(frame) if name == "b" else frame)]
    after, summary = one_round(sites, fakes)
    assert list(refusals(summary)) == ["b"]
    assert reason in refusals(summary)["b"]
    expected, _ = one_round(without, fakes, deadline_seconds=0.0)
    assert adapters.encode(after.adapter) == adapters.encode(expected.adapter), "as if b had not been there"


def test_an_update_that_is_too_long_is_clipped_where_that_is_wanted(sites: Sites, fakes: Any) -> None:
    sites.config = fakes.config("replies.max_update_norm=0.25", 'replies.oversized="clip"')
    after, summary = one_round(sites, fakes)
    assert refusals(summary) == {}
    lengths = [row.clipped_from for row in summary.clients]
    assert lengths == [1.0, pytest.approx(7 / 6), pytest.approx(8 / 6)], "half of the way to 2, 7/3, 8/3"
    assert after.adapter["line.lora_B.weight"][0, 0] == pytest.approx(0.25)
    assert after.adapter["line.lora_A.weight"][0, 0] == 1


def test_the_length_of_an_update_counts_from_where_the_round_restarted(sites: Sites, fakes: Any) -> None:
    sites.config = fakes.config("replies.max_update_norm=3")
    far = replace(begin(sites, fakes), round=0, adapter=fakes.adapter(50.0))
    start = server._start("a", far, sites.config)
    assert adapters.encode(start) == adapters.encode(adapters.fresh(adapters.shapes(far.adapter), sites.config.seed))


def test_a_second_reply_and_one_that_nobody_asked_for_do_not_count(sites: Sites, fakes: Any) -> None:
    told: list[str] = []
    sites.bend = lambda name, node, frame: [Answered(node, frame), Answered(node, frame), Answered(99, frame)]
    way = replace(remote(sites), tell=told.append)
    state = begin(sites, fakes)
    deliveries = list(way(server.plan(state, sites.config)))
    assert [delivery.client for delivery in deliveries] == list(NAMES)
    assert len(told) == 6


def test_a_site_that_is_late_is_left_out(sites: Sites, fakes: Any) -> None:
    sites.bend = lambda name, node, frame: [] if name == "b" else [Answered(node, frame)]
    _, summary = one_round(sites, fakes, deadline_seconds=0.5)
    assert refusals(summary) == {"b": "no answer within 0.5 s"}
    assert sites.asked.count(("b", -1)) == 1


# --- who may take part


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"version": "2"}, "fedmide is '2' there and '1' here"),
        ({"model": "other"}, "the base model is 'other' there"),
        ({"prompt": "other"}, "the prompt is 'other' there"),
        ({"knobs": {"lora.r": "4"}, "federation": "x"}, "lora.r is 4 there and 8 here"),
        ({"knobs": {}, "federation": "x"}, "lora.r is None there and 8 here"),
        ({"federation": "x"}, "another federation"),
    ],
)
def test_a_site_that_differs_is_refused_before_it_works(
    change: dict[str, Any], reason: str, sites: Sites, fakes: Any
) -> None:
    sites.facts = {"b": replace(FACTS, client="b", **change)}
    _, summary = one_round(sites, fakes)
    assert reason in refusals(summary)["b"]
    assert ("b", -1) not in sites.asked
    assert len(sites.asked) == 2


def test_a_federation_of_one_run_is_recognized_by_its_beginning() -> None:
    assert list(differences(replace(FACTS, federation="test-0001"), FACTS, None)) == []


def test_a_site_whose_ledger_is_not_the_reported_one_is_refused(sites: Sites, fakes: Any) -> None:
    sites.facts = {name: replace(FACTS, client=name, shared=2, personal=1) for name in NAMES}
    _, summary = one_round(sites, fakes, set_sizes=lambda: {"a": (2, 1), "b": (3, 0)})
    assert list(refusals(summary)) == ["b"]
    assert "ledger" in refusals(summary)["b"]


def test_a_node_is_the_site_of_its_key(sites: Sites, fakes: Any) -> None:
    sites.facts = {"b": replace(FACTS, client="a")}
    _, summary = one_round(sites, fakes, bound={1: "a", 2: "b"})
    assert "names another site" in refusals(summary)["b"]
    assert "c" in refusals(summary), "its node has no key of the consortium's"
    assert sites.asked == [("a", -1)]


def test_two_nodes_are_not_one_site(sites: Sites, fakes: Any) -> None:
    sites.facts = {"b": replace(FACTS, client="a")}
    _, summary = one_round(sites, fakes)
    assert list(refusals(summary)) == ["b"]
    assert len(sites.asked) == 2


def test_a_site_that_comes_back_as_another_node_is_greeted_again(sites: Sites, fakes: Any) -> None:
    way, state = remote(sites), begin(sites, fakes)
    state, _ = server.apply(state, way(server.plan(state, sites.config)), sites.config)
    sites.there = [1, 3]
    state, summary = server.apply(state, way(server.plan(state, sites.config)), sites.config)
    assert refusals(summary) == {"b": "it is not connected"}
    sites.there = [1, 2, 3]
    state, summary = server.apply(state, way(server.plan(state, sites.config)), sites.config)
    assert refusals(summary) == {}


def test_a_round_waits_for_those_that_are_needed(sites: Sites, fakes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sites.there = [1]

    def later(seconds: float) -> None:
        sites.there = [1, 2, 3]

    monkeypatch.setattr("fedmide.federation.runtimes.remote.time.sleep", later)
    _, summary = one_round(sites, fakes)
    assert refusals(summary) == {}, "the first round waits for all"


# --- the connection is lost


def test_a_lost_connection_is_opened_again_and_only_the_rest_is_asked_again(sites: Sites, fakes: Any) -> None:
    class Losing(Sites):
        def ask(self, frames: Iterable[tuple[int, bytes]], seconds: float) -> Iterator[Answered]:
            for number, answer in enumerate(super().ask(frames, seconds)):
                if number == 1 and self.asked and len(opened) < 3:
                    raise LinkLostError("lost")
                yield answer

    opened: list[int] = []
    losing = Losing(sites.config, sites.model, sites.states)

    def connect() -> Sites:
        opened.append(1)
        return losing

    way = Remote(connect, FACTS, dict, 5.0, lambda message: None)
    state = begin(sites, fakes)
    _, summary = server.apply(state, way(server.plan(state, sites.config)), sites.config)
    assert refusals(summary) == {}
    assert len(opened) == 3
    assert {client for client, _ in losing.asked} == set(NAMES)


def test_a_connection_that_is_lost_again_and_again_ends_the_round(sites: Sites, fakes: Any) -> None:
    class Gone(Sites):
        def nodes(self) -> list[int]:
            raise LinkLostError("lost")

    state = begin(sites, fakes)
    way = remote(Gone(sites.config, sites.model, sites.states))
    _, summary = server.apply(state, way(server.plan(state, sites.config)), sites.config)
    assert len(refusals(summary)) == 3


def test_a_connection_lost_after_the_last_answer_is_not_opened_again_in_this_round(sites: Sites, fakes: Any) -> None:
    class Losing(Sites):
        def ask(self, frames: Iterable[tuple[int, bytes]], seconds: float) -> Iterator[Answered]:
            yield from super().ask(frames, seconds)
            if self.asked:
                raise LinkLostError("lost")

    opened: list[Sites] = []

    def connect() -> Sites:
        opened.append(Losing(sites.config, sites.model, sites.states))
        return opened[-1]

    way, state = Remote(connect, FACTS, dict, 5.0, lambda message: None), begin(sites, fakes)
    _, summary = server.apply(state, way(server.plan(state, sites.config)), sites.config)
    assert refusals(summary) == {}
    assert len(opened) == 1


def test_no_site_is_asked_without_a_task() -> None:
    assert list(Remote(lambda: pytest.fail("connected"), FACTS, dict, 5.0, lambda message: None)([])) == []


def test_every_code_has_its_reason() -> None:
    from typing import get_args

    from fedmide.federation.messages import TroubleCode

    assert set(REASONS) == set(get_args(TroubleCode))


def test_a_delivery_reports_the_bytes_of_both_ways(sites: Sites, fakes: Any) -> None:
    state = begin(sites, fakes)
    tasks = server.plan(state, sites.config)
    deliveries: list[Delivery] = list(remote(sites)(tasks))
    assert [delivery.bytes_down for delivery in deliveries] == [len(encode_task(task)) for task in tasks]
    assert all(delivery.reply and delivery.bytes_up == len(encode_reply(delivery.reply)) for delivery in deliveries)
    assert isinstance(tasks[0], ClientTask)
