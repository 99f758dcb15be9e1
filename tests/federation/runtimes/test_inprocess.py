"""The in-process runtime: the codec of the wire, its bytes, and a site's state before its reply."""

from typing import Any

import pytest

from fedmide.errors import MessageError
from fedmide.federation.client import handle
from fedmide.federation.client_state import ClientState
from fedmide.federation.codec import encode_reply, encode_task
from fedmide.federation.messages import ClientReply, ClientTask
from fedmide.federation.runtimes.inprocess import InProcess
from fedmide.model import adapters


def tasks(fakes: Any, names: str) -> list[ClientTask]:
    return [ClientTask("test", name, -1, fakes.adapter(float(place))) for place, name in enumerate(names)]


def told(reply: ClientReply | None) -> bytes:
    assert reply is not None
    return encode_reply(reply)


def test_bytes_are_the_lengths_of_the_frames_and_replies_those_of_the_sites(fakes: Any) -> None:
    config, model = fakes.config(), fakes.line()
    sites = {name: fakes.site(name, [1, 2], config) for name in "ab"}
    asked = tasks(fakes, "ba")
    expected = [handle(task, sites[task.client], model) for task in asked]
    deliveries = list(InProcess(dict(sites), model, lambda state: None)(asked))
    assert [delivery.client for delivery in deliveries] == ["b", "a"]
    assert [delivery.bytes_down for delivery in deliveries] == [len(encode_task(task)) for task in asked]
    assert [delivery.bytes_up for delivery in deliveries] == [len(encode_reply(reply)) for reply, _ in expected]
    assert [told(delivery.reply) for delivery in deliveries] == [encode_reply(reply) for reply, _ in expected]
    assert all(delivery.problem == "" and delivery.seconds >= 0 for delivery in deliveries)


def test_a_site_is_kept_before_its_reply_is_seen_and_none_works_ahead(fakes: Any) -> None:
    config = fakes.config()
    sites = {name: fakes.site(name, [1, 2], config) for name in "ab"}
    saved: list[ClientState] = []
    deliveries = InProcess(sites, fakes.line(), saved.append)(tasks(fakes, "ab"))
    assert (next(deliveries).client, [state.name for state in saved]) == ("a", ["a"])
    assert sites["a"] is saved[0]
    assert saved[0].ledger
    assert not sites["b"].ledger
    assert (next(deliveries).client, [state.name for state in saved]) == ("b", ["a", "b"])


def test_nothing_is_shared_in_memory_between_server_and_site(fakes: Any) -> None:
    """Each site receives a copy: if it writes into its adapter, no other adapter changes."""

    class Scribbler:
        def __getattr__(self, name: str) -> Any:
            return getattr(fakes.line(), name)

        def nll(self, adapter: Any, examples: Any, positions: Any) -> Any:
            for array in adapter.values():
                array.fill(9.0)
            return fakes.line().nll(adapter, examples, positions)

    config = fakes.config()
    sites = {"a": fakes.site("a", [1, 2], config)}
    task = ClientTask("test", "a", 0, fakes.adapter(1.0))
    before = adapters.encode(task.adapter)
    list(InProcess(sites, Scribbler(), lambda state: None)([task]))
    assert adapters.encode(task.adapter) == before


def test_a_site_of_another_federation_refuses(fakes: Any) -> None:
    sites = {"a": fakes.site("a", [1, 2], fakes.config())}
    with pytest.raises(MessageError):
        list(InProcess(sites, fakes.line(), lambda state: None)([ClientTask("other", "a", 0, fakes.adapter(0.0))]))
