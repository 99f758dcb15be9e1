"""FedMIDE's server side: FedAvg, and the counts with which a site leaves its own adapter out of the common one.

Its sites choose the records that train (`enrolls`): see `federation/fedmide_rounds.py`.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

import numpy as np

from fedmide.config import Config
from fedmide.methods.method import Common, Contribution, Method, mean, plain
from fedmide.model.interface import Adapter

PROVENANCE = "fedmide.behind"
"""Array (3,) sent with the adapter: the number of records that trained it, of this client's among them, the round."""


_ROUND, _RECORDS = "round", "records."


def without_own(received: Adapter, kept: Mapping[int, Adapter]) -> Adapter:
    """The received adapter without the client's own part: (N theta - n theta_own) / (N - n).

    `kept`: the client's local adapters by round. If the client had no part, or the only one, the result is the received
    adapter.

    >>> theta = {"x": np.array([3.0], np.float32), PROVENANCE: np.array([4, 1, 0], np.float32)}
    >>> without_own(theta, {0: {"x": np.array([0.0], np.float32)}})
    {'x': array([4.], dtype=float32)}
    """
    theta = adapter_alone(received)
    total, number, trained = received.get(PROVENANCE, np.zeros(3)).astype(np.float64)
    own = kept.get(int(trained))
    if own is None or not 0 < number < total:
        return theta
    return {
        name: ((array.astype(np.float64) * total - own[name] * number) / (total - number)).astype(np.float32)
        for name, array in theta.items()
    }


def adapter_alone(received: Adapter) -> Adapter:
    """The received adapter without its provenance."""
    return {name: array for name, array in received.items() if name != PROVENANCE}


def _down(common: Common, client: str, config: Config) -> Adapter:
    """The adapter, with its provenance for a client that will score and whose records trained it."""
    number = common.method_state.get(_RECORDS + client)
    if number is None or not 0 <= common.round < config.federation.rounds:
        return common.adapter
    total = sum(float(each[0]) for name, each in common.method_state.items() if name.startswith(_RECORDS))
    return {**common.adapter, PROVENANCE: np.array([total, number[0], common.method_state[_ROUND][0]], np.float32)}


def _combine(common: Common, answers: Iterable[Contribution], config: Config) -> Common | None:
    """FedAvg's mean; the server remembers the number of records per client."""
    counts: dict[str, int] = {}

    def counted() -> Iterator[Contribution]:
        for answer in answers:
            counts[answer.client] = answer.num_records
            yield answer

    combined = mean(common, counted(), config)
    if combined is None or not config.scoring.without_own:
        return combined
    method_state = {_RECORDS + client: np.array([number], np.float32) for client, number in counts.items()}
    return replace(combined, method_state={**method_state, _ROUND: np.array([common.round], np.float32)})


FEDMIDE = Method(
    "fedmide",
    "dynamic enrollment: a client trains the common model on its shared records, then tunes it",
    "FedMIDE, github.com/XiangLi02/FedMIDE",
    enrolls=True,
    tuning=plain,
    down=_down,
    combine=_combine,
)
