"""FedDPA: a common adapter G and a local one L_k, whose outputs are mixed.

    client, variant T: L_k with G frozen, output a L + (1 - a) G; then G alone, as fedavg
    client, variant F: G as fedavg; after the last round L_k, with G frozen
    server: fedavg on G
    at inference: w L + (1 - w) G with w = most * mean_i cos(h(x), h(x_i)) over a few training records x_i; h is the
    last layer's state at the last token of the prompt, under L_k

Yang et al. 2024, arXiv:2403.19211. In T, L_k begins as the client's G after its first round, which trains no L_k, as
in the authors' code. In F, it begins as the last common G. w is clipped to 0 .. most. Two mixed adapters are one
adapter of the summed rank, so the same passes serve. Dropout then draws one mask for both; two separate adapters would
draw two.
"""

from collections.abc import Sequence

import numpy as np

from fedmide.config import Config
from fedmide.methods.method import Method, Sizes, Trained, Visit, learn, num_values, twice_the_rank
from fedmide.model.adapters import COMMON, MOST, OWN, REFERENCES, B, prefixed, rank_axis, stacked, unstacked
from fedmide.model.interface import Adapter, LocalModel, Terms
from fedmide.seeds import stream


def own_share(like: Adapter, weight: float) -> Adapter:
    """Shares for training a stack: all of its first adapter trains, seen with this weight; the second is frozen."""
    result = {}
    for name, array in like.items():
        own = np.full_like(array, weight if name.endswith(B) else 1.0)
        result[name] = np.concatenate([own, np.zeros_like(array)], axis=rank_axis(name))
    return result


def _local_then_common(visit: Visit, model: LocalModel) -> Trained:
    most, own = visit.config.training.max_steps, visit.config.feddpa.max_steps
    if not visit.method_state:
        common = learn(visit, model, visit.received, max_steps=most and most + own)
        return Trained(common.adapter, common, common.adapter)
    common = learn(visit, model, visit.received)
    local = learn(visit, model, _mixed(visit, model), _tuning(visit), "local adapter", max_steps=own or most)
    return Trained(common.adapter, common, _own_of(local.adapter, visit), local)


def _mixed(visit: Visit, model: LocalModel) -> Adapter:
    """The local and the common adapter as one, mixed as in training."""
    weight = visit.config.feddpa.weight
    return stacked(visit.method_state or visit.received, visit.received, weight, 1 - weight)


def _own_of(stack: Adapter, visit: Visit) -> Adapter:
    weight = visit.config.feddpa.weight
    return unstacked(stack, visit.received, weight, 1 - weight)[0]


def _tuning(visit: Visit) -> Terms:
    return Terms(share=own_share(visit.received, visit.config.feddpa.weight))


def _for_records(visit: Visit, model: LocalModel, stack: Adapter) -> Adapter:
    """Both adapters, and the states that a record is compared with to weight them."""
    own, config = _own_of(stack, visit), visit.config.feddpa
    draw = stream(visit.config.seed, "references", 0, visit.client)
    count = min(config.references, len(visit.examples))
    drawn = (
        [visit.examples[row] for row in sorted(draw.choice(len(visit.examples), count, replace=False))] if count else []
    )
    return {
        **prefixed(OWN, own),
        **prefixed(COMMON, visit.received),
        REFERENCES: model.states(own, drawn),
        MOST: np.array([config.most], np.float32),
    }


def _both_in_turn(adapter: Adapter, clients: Sequence[str], config: Config) -> Sizes:
    """Both adapters train in a round; weights per record can't be merged."""
    return Sizes(2 * num_values(adapter), 2 * num_values(adapter))


def _one_after_the_other(adapter: Adapter, clients: Sequence[str], config: Config) -> Sizes:
    """The common adapter trains in the rounds, the local one afterwards."""
    return Sizes(num_values(adapter), 2 * num_values(adapter))


FEDDPA_T = Method(
    "feddpa-t",
    "a common and a local adapter, trained in turn in each round, weighted per record at inference",
    "Yang et al. 2024, arXiv:2403.19211",
    traffic="A and B of the common adapter, each way",
    local=_local_then_common,
    trainings=2,
    remembers=True,
    own=_mixed,
    finish=_for_records,
    sizes=_both_in_turn,
    rank=twice_the_rank,
)


FEDDPA_F = Method(
    "feddpa-f",
    "fedavg, then a local adapter next to the common one, weighted per record at inference",
    "Yang et al. 2024, arXiv:2403.19211",
    traffic="A and B of the common adapter, each way",
    own=_mixed,
    tuning=_tuning,
    finish=_for_records,
    sizes=_one_after_the_other,
    rank=twice_the_rank,
)
