"""Cases that every method survives: one client, sampled participation, a client that fails, a round handled again."""

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from fedmide import methods
from fedmide.config import Config, apply_overrides, parse
from fedmide.config.config import METHOD_TABLES
from fedmide.config.knobs import flat, for_method, used
from fedmide.config.sections import MethodName
from fedmide.errors import ConfigError
from fedmide.federation import server
from fedmide.federation.client import handle
from fedmide.federation.messages import ClientReply
from fedmide.federation.server import Delivery
from fedmide.methods.method import Contribution
from fedmide.model import adapters
from fedmide.studies.entrants import budget_of, within

BUDGETED = ("training.", "federation.", "warmup.", "personalization.", "ditto.", "feddpa.")
ALL = [name for name in get_args(MethodName) if name != "central"]


def test_every_method_has_a_summary() -> None:
    assert tuple(methods.METHODS) == get_args(MethodName)
    for name, method in methods.METHODS.items():
        assert method.name == name
        assert method.summary and method.source and method.traffic and len(method.summary) < 110


def test_every_method_has_its_box_in_the_documents() -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "methods.md").read_text("utf-8")
    titles = re.findall(r"^## (.+)$", text, re.MULTILINE)
    assert {name for title in titles for name in title.split(", ")} == set(get_args(MethodName))


def test_a_table_of_another_method_is_refused() -> None:
    for table, users in METHOD_TABLES.items():
        for name in get_args(MethodName):
            if name in users:
                parse({"method": name, table: {}})
            else:
                with pytest.raises(ConfigError, match=f"{table} = .*: method '{name}' has no use for this table"):
                    parse({"method": name, table: {}})
                assert table not in for_method({"method": users[0], table: {}}, name)


def test_an_unknown_method_is_refused_with_all_other_problems() -> None:
    with pytest.raises(ConfigError) as caught:
        parse({"method": "fedavgg", "fedprox": {"nu": 1}})
    assert len(caught.value.problems) == 2
    assert "fedavgg" in caught.value.problems[0] and "fedprox.nu" in caught.value.problems[1]


def test_only_fedmide_has_a_warm_up() -> None:
    given = {"warmup": {"rounds": 3}, "personalization": {"records": "personal", "epochs": 4}}
    config = parse({**given, "method": "fedavg-ft"})
    assert (config.warmup.rounds, config.personalization.records, config.personalization.epochs) == (0, "all", 4)
    assert parse(given).warmup.rounds == 3


@pytest.mark.parametrize("name", ALL)
def test_it_survives_a_client_that_fails_and_sampled_participation(run_federation: Any, name: str) -> None:
    done = run_federation(
        name, "federation.participation=0.6", "federation.rounds=3", failing=[(0, "a"), (1, "b"), (1, "c"), (2, "a")]
    )
    assert adapters.is_finite(done.adapter)
    for client in "abc":
        assert adapters.is_finite(done.own(client))
        assert all(
            np.isfinite(nll.sum) for nll in done.resident.nll(done.own(client), done.sites[client].validation, "all")
        )
    assert not any(row.refused for summary in done.summaries for row in summary.clients if "reached" not in row.refused)


@pytest.mark.parametrize("name", ALL)
def test_it_survives_a_client_that_trained_and_whose_reply_was_lost(run_federation: Any, name: str) -> None:
    done = run_federation(name, "federation.rounds=3", lost=[(0, "a"), (1, "a"), (1, "b")])
    assert adapters.is_finite(done.adapter)
    for client in "abc":
        held_out = done.sites[client].validation
        assert all(np.isfinite(nll.sum) for nll in done.resident.nll(done.own(client), held_out, "all"))
    refused = {row.refused for summary in done.summaries for row in summary.clients}
    assert refused == {"", "no reply arrived"}


@pytest.mark.parametrize("name", ALL)
def test_it_survives_being_alone(run_federation: Any, name: str) -> None:
    done = run_federation(name, sizes=(7,))
    assert adapters.is_finite(done.adapter) and adapters.is_finite(done.own("a"))
    held_out = done.sites["a"].validation
    assert all(np.isfinite(nll.sum) for nll in done.resident.nll(done.own("a"), held_out, "all"))
    assert not any(row.refused for summary in done.summaries for row in summary.clients)


MEAN_STEP = ("beta1=0", "tau=1e4")
"""Settings that make a step of the server's optimizer a step to the mean: the divisor is tau alone, and equals eta."""


@pytest.mark.parametrize(
    ("name", "knobs"),
    [
        ("fedavg", ()),
        ("fedprox", ("fedprox.mu=0",)),
        ("fedavgm", ("fedavgm.beta=0",)),
        *(
            (name, tuple(f"{name}.{each}" for each in (*MEAN_STEP, f"eta={eta}", *decay)))
            for name, eta, decay in (
                ("fedadagrad", 2e4, ()),
                ("fedadam", 1e4, ("beta2=0",)),
                ("fedyogi", 2e4, ()),
            )
        ),
        ("ditto", ()),
        ("feddpa-t", ()),
        ("feddpa-f", ()),
    ],
    ids=str,
)
def test_the_common_model_of_one_client_is_training_alone(
    run_federation: Any, product: Callable[..., Any], name: str, knobs: tuple[str, ...]
) -> None:
    """Some methods end with another adapter in addition to the common one; their own modules test it."""
    alone = product(run_federation("local", "personalization.epochs=0", sizes=(7,)).own("a"))
    for layer, change in product(run_federation(name, *knobs, sizes=(7,)).adapter).items():
        assert np.allclose(change, alone[layer], atol=1e-5)


@pytest.mark.parametrize("name", [name for name in ALL if methods.METHODS[name].travels])
def test_equal_adapters_are_a_fixed_point(product: Callable[..., Any], name: str) -> None:
    """If every client sends back the common model, it stays the same; on layers that are not square."""
    config = parse({"method": name, "lora": {"r": 2, "alpha": 4.0}})
    draw = np.random.default_rng(0)
    sizes = {"q.lora_A.weight": (2, 5), "q.lora_B.weight": (6, 2), "v.lora_A.weight": (2, 5), "v.lora_B.weight": (3, 2)}
    same = {key: draw.normal(size=size).astype(np.float32) for key, size in sizes.items()}
    method = methods.of(config)
    merges = name == "flora"  # every round begins with an adapter that changes nothing
    begun = {key: array * np.float32(not merges or ".lora_A." in key) for key, array in same.items()}
    common = method.begin(begun, ("a", "b"), config)
    arrays = {
        key: same.get(key.removeprefix("adapter."), np.zeros(size, np.float32))
        for key, size in method.up(common, "a", config).items()
    }
    answers = [Contribution("a", arrays, 3), Contribution("b", arrays, 5)]
    after = method.combine(common, answers, config)
    assert after is not None
    if name == "fedsa-lora":  # the server has no B, so no product
        assert all(np.allclose(after.adapter[key], same[key]) for key in answers[0].arrays)
        return
    changes = product(adapters.without_deltas(after.adapter))
    for key, delta in adapters.deltas(after.adapter).items():
        changes[key.removesuffix(adapters.DELTA)] += delta / 2  # alpha / r
    for layer, change in product(same).items():
        assert np.allclose(changes[layer], change, atol=1e-5)


@pytest.mark.parametrize("options", [(name, ()) for name in ALL] + [("fedmide", ("warmup.folds=2",))], ids=str)
def test_a_comparison_gives_each_client_the_same_steps(run_federation: Any, options: tuple[str, Sequence[str]]) -> None:
    """Counted in the training loop; an odd number, because some methods train twice per round."""
    name, overrides = options
    values = {"training": {"max_steps": 3}, "federation": {"rounds": 2}, "personalization": {"epochs": 1}}
    given = for_method(apply_overrides(values, overrides), name)
    config = within(budget_of(values), given, name)
    knobs = [f"{knob}={json.dumps(value)}" for knob, value in flat(used(config)).items() if knob.startswith(BUDGETED)]
    done = run_federation(name, *knobs, "lora.r=2")
    steps = Counter(dict.fromkeys("abc", 0))
    for delivery in done.deliveries:
        steps[delivery.client] += int(delivery.reply.metrics["steps"].sum) if "steps" in delivery.reply.metrics else 0
    assert steps == dict.fromkeys("abc", 4 * 3)


@pytest.mark.parametrize("name", ALL)
def test_a_round_handled_again_gives_the_same_bytes(run_federation: Any, name: str) -> None:
    done = run_federation(name)
    states = done.states[-2], done.states[-1]
    for state in states:
        site = done.sites["a"]
        (task,) = [task for task in server.plan(state, done.config) if task.client == "a"]
        first, after = handle(task, site, done.resident)
        second, again = handle(task, after, done.resident)
        assert told(first) == told(second)
        assert [(each.round, adapters.encode(each.arrays)) for each in after.method_state] == [
            (each.round, adapters.encode(each.arrays)) for each in again.method_state
        ]
        sent = [each.reply for each in done.deliveries if each.client == "a" and each.reply.round == state.round]
        assert told(first) == told(sent[0])


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("name", [name for name in ALL if methods.METHODS[name].remembers])
def test_a_training_that_diverged_once_is_not_remembered(
    run_federation: Any, running_off: Callable[[str, int], None], name: str, number: int
) -> None:
    running_off("a", number)
    done = run_federation(name, f"federation.rounds={number + 2}")
    before, after = (server.plan(done.states[each], done.config)[0] for each in (number, number + 1))
    site = replace(done.sites["a"], method_state=(), adapter=None)
    for state in done.states[:number]:
        _, site = handle(server.plan(state, done.config)[0], site, done.resident)
    earlier = site.method_state[-1].arrays if site.method_state else {}
    _, site = handle(before, site, done.resident)
    assert site.method_state[-1].round == number, "or it would be taken for lost"
    if name not in ("flora", "fedex-lora"):  # these remember what came, and not what was trained
        assert adapters.encode(site.method_state[-1].arrays) == adapters.encode(earlier)
    reply, site = handle(after, site, done.resident)
    assert reply.adapter is None or adapters.is_finite(reply.adapter)
    assert adapters.is_finite(site.method_state[-1].arrays) and site.method_state[-1].arrays
    assert adapters.is_finite(done.own("a"))


def told(reply: ClientReply) -> Any:
    return None if reply.adapter is None else adapters.encode(reply.adapter), reply.num_records, reply.metrics


@pytest.mark.parametrize("name", ALL)
def test_a_reply_that_is_not_what_the_method_lets_travel_is_refused(run_federation: Any, name: str) -> None:
    done = run_federation(name, "federation.rounds=1")
    state, config = done.states[-2], done.config
    whole = {"a.lora_A.weight": np.zeros((2, 2), np.float32)}
    reply = ClientReply("f", "a", state.round, whole, 3)
    _, summary = server.apply(state, [Delivery("a", reply)], config)
    assert "arrays unknown" in summary.clients[0].refused
    for delivery in done.deliveries:
        if delivery.client == "a" and delivery.reply.round == state.round and delivery.reply.adapter is not None:
            odd = {key: np.full_like(array, np.nan) for key, array in delivery.reply.adapter.items()}
            bad = replace(delivery, reply=replace(delivery.reply, adapter=odd))
            _, summary = server.apply(state, [bad], config)
            assert "not finite" in summary.clients[0].refused


def test_the_default_is_fedmide() -> None:
    assert methods.of(Config()).name == "fedmide"
