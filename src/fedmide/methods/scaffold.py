"""SCAFFOLD: control variates remove from each client's gradient the part that is special to its records.

    client: SGD with theta <- theta - lr (g - c_k + c), from theta^t
            c_k' = c_k - c + (theta^t - theta_k) / sum of the steps' rates
    server: theta <- theta + server_rate (sum p_k theta_k - theta);  c <- c + 1 / N sum (c_k' - c_k)

Karimireddy et al. 2020, arXiv:1910.06378, Algorithm 1, option II. N counts all clients. Only with SGD is the change of
theta a sum of gradients, so AdamW is not offered. Gradients are clipped before they are corrected. So c_k' is the mean
of the clipped gradients of the client's steps.

c stays the mean of the c_k only if both sides agree on the changes that count. But an answer may be lost, late or
refused after the client has trained. So the server sends the round of the client's last answer that counted, with c.
The client keeps c_k and c_k' of its last round, and takes c_k' only if that round counted. One exception remains:
if `replies.max_update_norm` shortens a change, the client keeps the whole change, and c is not quite the mean.
"""

from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from fedmide.config import Config
from fedmide.methods.aggregation import weighted_mean
from fedmide.methods.method import Common, Contribution, Method, Trained, Visit, learn
from fedmide.model.adapters import Shapes, prefixed, shapes, under
from fedmide.model.interface import Adapter, LocalModel, Terms, rate_at

COUNTED = "counted"
"""Array (1,) sent with the variates: the round of the client's last answer that counted, -1 before there is any."""


_ROUND = "round"


def _local(visit: Visit, model: LocalModel) -> Trained:
    start, c = under("adapter", visit.received), under("control", visit.received)
    c_k = _variate(visit) or {name: np.zeros_like(array) for name, array in start.items()}
    push = {name: c[name] - c_k[name] for name in c}
    rate = visit.config.scaffold.learning_rate
    work = learn(visit, model, start, Terms(push=push, optimizer="sgd"), learning_rate=rate)
    settings = visit.config.training.model_copy(update={"learning_rate": rate})
    rates = sum(rate_at(step, work.steps, settings) for step in range(work.steps))
    after = {name: (start[name] - work.adapter[name]) / np.float32(rates) - push[name] for name in c}
    change = {name: after[name] - c_k[name] for name in c}
    kept = {**prefixed("before", c_k), **prefixed("after", after), _ROUND: np.array([visit.round], np.float32)}
    return Trained({**prefixed("adapter", work.adapter), **prefixed("control", change)}, work, kept)


def _variate(visit: Visit) -> Adapter:
    """c_k as the server knows it; empty before the first round."""
    if _ROUND not in visit.method_state:
        return {}
    has_counted = np.array_equal(visit.method_state[_ROUND], visit.received[COUNTED])
    return under("after" if has_counted else "before", visit.method_state)


def _down(common: Common, client: str, config: Config) -> Adapter:
    counted = common.method_state.get(_name(client), np.array([-1], np.float32))
    return {**prefixed("adapter", common.adapter), **prefixed("control", _control(common)), COUNTED: counted}


def _up(common: Common, client: str, config: Config) -> Shapes:
    return shapes({**prefixed("adapter", common.adapter), **prefixed("control", common.adapter)})


def _before_training(common: Common, client: str, config: Config) -> Adapter:
    """The start of a client's update. Only the change of the variate travels back, and it begins at zero."""
    zeros = {name: np.zeros_like(array) for name, array in common.adapter.items()}
    return {**prefixed("adapter", common.adapter), **prefixed("control", zeros)}


def _combine(common: Common, answers: Iterable[Contribution], config: Config) -> Common | None:
    given = list(answers)
    mean = weighted_mean((under("adapter", answer.arrays), answer.num_records) for answer in given)
    change = weighted_mean((under("control", answer.arrays), 1) for answer in given)
    if mean is None or change is None:
        return None
    part, rate = np.float32(len(given) / len(common.clients)), np.float32(config.scaffold.server_rate)
    control = {name: array + part * change[name] for name, array in _control(common).items()}
    adapter = {name: array + rate * (mean[name] - array) for name, array in common.adapter.items()}
    counted = {_name(answer.client): np.array([common.round], np.float32) for answer in given}
    return replace(
        common, adapter=adapter, method_state={**common.method_state, **prefixed("control", control), **counted}
    )


def _control(common: Common) -> Adapter:
    return under("control", common.method_state) or {
        name: np.zeros_like(array) for name, array in common.adapter.items()
    }


def _name(client: str) -> str:
    return f"{COUNTED} {client}"


def _own(visit: Visit, model: LocalModel) -> Adapter:
    return under("adapter", visit.received)


SCAFFOLD = Method(
    "scaffold",
    "fedavg with SGD, and control variates against client drift",
    "Karimireddy et al. 2020, arXiv:1910.06378",
    traffic="A, B and a control variate of the same size, each way",
    local=_local,
    remembers=True,
    own=_own,
    down=_down,
    up=_up,
    measured_from=_before_training,
    combine=_combine,
)
