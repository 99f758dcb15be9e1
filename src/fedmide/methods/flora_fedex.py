"""Methods with an exact mean of the products: the server stacks the factors, which are merged into the base.

    stack       A = rows of the A_k, B = columns of the p_k B_k, so that B A = sum p_k B_k A_k
    FLoRA       every round trains a fresh adapter on the base into which all earlier stacks are merged.
                Wang et al. 2024, arXiv:2409.05976
    FedEx-LoRA  A and B are averaged as in fedavg. Their product misses sum p_k B_k A_k - mean(B) mean(A). This rest is
                a stack too, with -mean(B) and mean(A) as one more pair, and is merged.
                Singhal et al. 2025, arXiv:2410.09432

A stack travels once to each client, when the client is next asked to train. So the server keeps each stack that a
client may lack, and the last round that each client answered. A site keeps the sum of its merged stacks (`base_delta`).
This sum is a change of the base weights, in addition to the adapter.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from fedmide.config import Config
from fedmide.methods.method import Common, Contribution, Method, Trained, Visit, learn, mean
from fedmide.model import adapters
from fedmide.model.adapters import (
    DELTA,
    Shapes,
    deltas,
    factors,
    joined,
    layers,
    prefixed,
    shapes,
    under,
    without_deltas,
)
from fedmide.model.interface import Adapter, LocalModel
from fedmide.seeds import entropy


# --- on a site
def _merged(visit: Visit) -> tuple[Adapter, Adapter]:
    """The change of the base weights with every received stack merged, and the method state to keep."""
    known = int(visit.method_state["rounds"][0]) if visit.method_state else 0
    base = dict(deltas(visit.method_state))
    for number in range(known, visit.round):
        if stack := under(_name(number), visit.received):
            base = _added(base, product(stack, visit.config))
    return base, {**base, "rounds": _number(visit.round)}


def _from_fresh(visit: Visit, model: LocalModel) -> Trained:
    base, method_state = _merged(visit)
    begin = model.fresh(_fresh_seed(visit.config, visit.round))
    work = learn(visit, model, {**begin, **base})
    return Trained(without_deltas(work.adapter), work, method_state)


def _fresh_seed(config: Config, round_number: int) -> int:
    """The seed of a round's fresh adapter, the same on all sites."""
    return entropy(config.seed, "fresh", round_number)


def _from_mean(visit: Visit, model: LocalModel) -> Trained:
    base, method_state = _merged(visit)
    work = learn(visit, model, {**under("adapter", visit.received), **base})
    return Trained(without_deltas(work.adapter), work, method_state)


def _merged_only(visit: Visit, model: LocalModel) -> Adapter:
    return {**model.fresh(visit.config.seed), **_merged(visit)[0]}


def _mean_and_merged(visit: Visit, model: LocalModel) -> Adapter:
    return {**under("adapter", visit.received), **_merged(visit)[0]}


# --- on the server
def _begin(adapter: Adapter, clients: Sequence[str], config: Config) -> Common:
    """The common model has a change of the base weights, which is zero at first."""
    zeros = {
        f"{layer}{DELTA}": np.zeros((len(b), a.shape[1]), np.float32)
        for layer in layers(adapter)
        for a, b in [factors(adapter, layer)]
    }
    return Common(tuple(clients), 0, {**adapter, **zeros})


def _stacks_down(common: Common, client: str, config: Config) -> Adapter:
    """The stacks that the client has not received."""
    since = int(common.method_state.get(_seen(client), _number(0))[0])
    return {
        name: array
        for number in range(since, common.round)
        for name, array in prefixed(_name(number), under(_name(number), common.method_state)).items()
    }


def _mean_and_stacks_down(common: Common, client: str, config: Config) -> Adapter:
    return {**prefixed("adapter", without_deltas(common.adapter)), **_stacks_down(common, client, config)}


def _adapter_up(common: Common, client: str, config: Config) -> Shapes:
    return shapes(without_deltas(common.adapter))


def _fresh_adapter(common: Common, client: str, config: Config) -> Adapter:
    return adapters.fresh(_adapter_up(common, client, config), _fresh_seed(config, common.round))


def _mean_alone(common: Common, client: str, config: Config) -> Adapter:
    return without_deltas(common.adapter)


def _stack(common: Common, answers: Iterable[Contribution], config: Config) -> Common | None:
    given = list(answers)
    if not given:
        return None
    return _with_stack(common, stacked(given), given, config)


def _average_and_stack(common: Common, answers: Iterable[Contribution], config: Config) -> Common | None:
    given = list(answers)
    averaged = mean(common, given, config)
    if averaged is None:
        return None
    residual = stacked(given, minus=averaged.adapter)
    adapter = {**averaged.adapter, **deltas(common.adapter)}
    return _with_stack(replace(common, adapter=adapter), residual, given, config)


def stacked(answers: Sequence[Contribution], minus: Adapter | None = None) -> Adapter:
    """Factors whose product is the weighted mean of the answers' products, minus the product of `minus`."""
    total = sum(answer.num_records for answer in answers)
    parts = [(answer.arrays, answer.num_records / total) for answer in answers]
    if minus is not None:
        parts.append((minus, -1.0))
    return joined(parts)


def product(stack: Adapter, config: Config) -> Adapter:
    """The factors' product as a change of the base weights, (out, in) per layer."""
    scale = config.lora.alpha / config.lora.r
    return {
        f"{layer}{DELTA}": (scale * (b.astype(np.float64) @ a.astype(np.float64))).astype(np.float32)
        for layer in layers(stack)
        for a, b in [factors(stack, layer)]
    }


def _with_stack(common: Common, stack: Adapter, answers: Sequence[Contribution], config: Config) -> Common:
    """The common state with the stack merged; the stack is kept until every client has received it."""
    base = _added(deltas(common.adapter), product(stack, config))
    answered = {_seen(answer.client): _number(common.round) for answer in answers}
    seen = {_seen(client): common.method_state.get(_seen(client), _number(0)) for client in common.clients} | answered
    first = min(int(array[0]) for array in seen.values())
    kept = {
        name: array
        for number in range(first, common.round)
        for name, array in prefixed(_name(number), under(_name(number), common.method_state)).items()
    }
    method_state = {**kept, **prefixed(_name(common.round), stack), **seen}
    return replace(common, adapter={**without_deltas(common.adapter), **base}, method_state=method_state)


def _added(one: Adapter, two: Adapter) -> dict[str, np.ndarray[tuple[int, ...], np.dtype[np.float32]]]:
    return {name: one[name] + array if name in one else array for name, array in two.items()}


def _name(round_number: int) -> str:
    return f"stack-{round_number:03d}"


def _seen(client: str) -> str:
    return f"seen {client}"


def _number(value: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    return np.array([value], np.float32)


FLORA = Method(
    "flora",
    "a fresh adapter in each round; the sites' stack, an exact mean, is merged into the base",
    "Wang et al. 2024, arXiv:2409.05976",
    traffic="up A and B, down each stack of all sites' A and B once",
    local=_from_fresh,
    remembers=True,
    own=_merged_only,
    begin=_begin,
    down=_stacks_down,
    up=_adapter_up,
    measured_from=_fresh_adapter,
    combine=_stack,
)


FEDEX_LORA = Method(
    "fedex-lora",
    "fedavg; the mean of the products minus the product of the means is merged into the base",
    "Singhal et al. 2025, arXiv:2410.09432",
    traffic="up A and B, down their means, and each stack of all sites' A and B once",
    local=_from_mean,
    remembers=True,
    own=_mean_and_merged,
    begin=_begin,
    down=_mean_and_stacks_down,
    up=_adapter_up,
    measured_from=_mean_alone,
    combine=_average_and_stack,
)
