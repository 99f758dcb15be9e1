"""FedALT: a client's local adapter, trained from its last state, is mixed with a frozen mean of all others' adapters.

    client: trains A, B and a router per layer; output g_1 own(x) + g_2 world(x), per token g = softmax(router x)
    server: world_k = mean of the local adapters of all other clients; routers stay on the sites

Bian et al. 2026, arXiv:2503.11880. Routers begin at zero, so both adapters count half. The server keeps each client's
latest adapter, so a client that sits out still counts for the others. Before another client has answered, the world's
adapter is zero.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from fedmide.config import Config
from fedmide.methods.aggregation import weighted_mean
from fedmide.methods.feddpa import own_share
from fedmide.methods.method import (
    Common,
    Contribution,
    Method,
    Sizes,
    Trained,
    Visit,
    learn,
    num_values,
    twice_the_rank,
)
from fedmide.model import adapters
from fedmide.model.adapters import ROUTER, A, layers, prefixed, stacked, under, unstacked
from fedmide.model.interface import Adapter, LocalModel, Terms


def _local(visit: Visit, model: LocalModel) -> Trained:
    own, _, _ = _parts(visit, model)
    work = learn(visit, model, _routed(visit, model), Terms(share=own_share(own, 1.0)))
    trained = unstacked(work.adapter, own)[0]
    routers = {name: array for name, array in work.adapter.items() if name.endswith(ROUTER)}
    return Trained(trained, work, {**prefixed("own", trained), **prefixed("router", routers)})


def _routed(visit: Visit, model: LocalModel) -> Adapter:
    """Both adapters as one of the summed rank, and the routers."""
    own, world, routers = _parts(visit, model)
    return {**stacked(own, world), **routers}


def _parts(visit: Visit, model: LocalModel) -> tuple[Adapter, Adapter, Adapter]:
    """The local adapter, the mean of all others', and the routers."""
    fresh = model.fresh(visit.config.seed)
    own = under("own", visit.method_state) or fresh
    world = visit.received or {name: np.zeros_like(array) for name, array in fresh.items()}
    zeros = {layer + ROUTER: np.zeros((2, fresh[layer + A].shape[1]), np.float32) for layer in layers(fresh)}
    return own, world, under("router", visit.method_state) or zeros


def _down(common: Common, client: str, config: Config) -> Adapter:
    return _mean(common.method_state, [other for other in common.clients if other != client])


def _latest(common: Common, client: str, config: Config) -> Adapter:
    """The start of the client's training: the adapter of its last answer, or a fresh one before any answer."""
    return under(_name(client), common.method_state) or adapters.fresh(adapters.shapes(common.adapter), config.seed)


def _combine(common: Common, answers: Iterable[Contribution], config: Config) -> Common | None:
    latest = {
        name: array for answer in answers for name, array in prefixed(_name(answer.client), answer.arrays).items()
    }
    if not latest:
        return None
    method_state = {**common.method_state, **latest}
    return replace(common, adapter=_mean(method_state, common.clients), method_state=method_state)


def _mean(method_state: Adapter, clients: Sequence[str]) -> Adapter:
    """The mean of these clients' latest adapters; empty if none has answered yet."""
    present = [adapter for client in clients if (adapter := under(_name(client), method_state))]
    return weighted_mean((adapter, 1) for adapter in present) or {}


def _name(client: str) -> str:
    return f"client {client}"


def _routed_sizes(adapter: Adapter, clients: Sequence[str], config: Config) -> Sizes:
    """The local adapter and the routers train; weights per token can't be merged."""
    size, routers = num_values(adapter), sum(2 * adapter[layer + A].shape[1] for layer in layers(adapter))
    return Sizes(size + routers, 2 * size + routers)


FEDALT = Method(
    "fedalt",
    "each site's adapter plus a frozen mean of all others', mixed per token by a trained router",
    "Bian et al. 2026, arXiv:2503.11880",
    traffic="up the site's A and B, down the mean of all other sites'",
    local=_local,
    remembers=True,
    own=_routed,
    down=_down,
    measured_from=_latest,
    combine=_combine,
    sizes=_routed_sizes,
    rank=twice_the_rank,
)
