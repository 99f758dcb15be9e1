"""FlexLoRA: clients of different ranks; the server cuts the mean of their products to each client's rank.

    server: M = sum p_k B_k A_k;  M = U S V^T;  client k gets B = U S, A = V^T, cut to its r_k largest singular values

Bai et al. 2024, arXiv:2402.11505. M is never formed. With the QR decompositions Q_B R_B and Q_A R_A of the stacked
factors, the singular values of M are those of the small R_B R_A^T (as HLoRA does). The scale alpha / r is the same for
every rank, so an adapter means the same after it is cut.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from fedmide.config import Config
from fedmide.methods.flora_fedex import stacked
from fedmide.methods.method import Common, Contribution, Method, Sizes, num_values
from fedmide.model import adapters
from fedmide.model.adapters import A, B, Shapes, factors, layers, shapes
from fedmide.model.interface import Adapter


def rank_of(client: str, clients: tuple[str, ...], config: Config) -> int:
    """A client's rank: the configured ranks in the clients' order, from the first again after the last."""
    ranks = config.flexlora.ranks or [config.lora.r]
    return ranks[clients.index(client) % len(ranks)]


def highest_rank(config: Config) -> int:
    """The rank of the common adapter."""
    return max(config.flexlora.ranks or [config.lora.r])


def cut(adapter: Adapter, rank: int) -> Adapter:
    """The adapter cut to its first ranks, which belong to its largest singular values."""
    return {name: array[:rank] if name.endswith(A) else array[:, :rank] for name, array in adapter.items()}


def decomposed(stack: Adapter, rank: int) -> Adapter:
    """The nearest adapter of this rank to a stack: B = U S, A = V^T; zeros fill up ranks that the stack lacks."""
    result: dict[str, NDArray[np.float32]] = {}
    for layer in layers(stack):
        a, b = (each.astype(np.float64) for each in factors(stack, layer))
        q_a, r_a = np.linalg.qr(a.T)  # (in, m), (m, sum r)
        q_b, r_b = np.linalg.qr(b)  # (out, n), (n, sum r)
        u, s, vt = np.linalg.svd(r_b @ r_a.T, full_matrices=False)
        size = min(rank, len(s))
        right, left = np.zeros((rank, a.shape[1])), np.zeros((b.shape[0], rank))
        right[:size], left[:, :size] = vt[:size] @ q_a.T, (q_b @ u[:, :size]) * s[:size]
        result[layer + A] = right.astype(np.float32)
        result[layer + B] = left.astype(np.float32)
    return result


def _down(common: Common, client: str, config: Config) -> Adapter:
    return cut(common.adapter, rank_of(client, common.clients, config))


def _up(common: Common, client: str, config: Config) -> Shapes:
    return shapes(_down(common, client, config))


def _begin(fresh: Adapter, clients: Sequence[str], config: Config) -> Common:
    """The fresh adapter, of the highest rank."""
    rank = highest_rank(config)
    whole = {name: (rank, size[1]) if name.endswith(A) else (size[0], rank) for name, size in shapes(fresh).items()}
    return Common(tuple(clients), 0, adapters.fresh(whole, config.seed))


def _combine(common: Common, answers: Iterable[Contribution], config: Config) -> Common | None:
    """The mean of the products. Ranks that no answer has get rows of the common A and B = 0, so that they can train."""
    given = list(answers)
    if not given:
        return None
    weightless = Contribution("", common.adapter, 0)
    return replace(common, adapter=decomposed(stacked([*given, weightless]), highest_rank(config)))


def _sizes(adapter: Adapter, clients: Sequence[str], config: Config) -> Sizes:
    """The counts for the clients' mean rank."""
    ranks = [rank_of(client, tuple(clients), config) for client in clients]
    return Sizes(round(num_values(adapter) * sum(ranks) / (len(ranks) * config.lora.r)))


FLEXLORA = Method(
    "flexlora",
    "each site has its own rank; the mean of the products is cut to it by singular values",
    "Bai et al. 2024, arXiv:2402.11505",
    traffic="A and B of the site's rank, each way",
    begin=_begin,
    rank=highest_rank,
    sizes=_sizes,
    down=_down,
    up=_up,
    combine=_combine,
)
