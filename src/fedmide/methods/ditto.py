"""Ditto: each client trains a personal adapter in addition to the common one, and the loss pulls it to the common one.

    client: theta_k from theta^t as fedavg;  v_k from its last state, with lambda / 2 norm(v_k - theta^t)^2 in the loss
    server: fedavg on theta

Li et al. 2021, arXiv:2012.04221, Algorithm 1. v_k begins as the first received adapter.
"""

from fedmide.methods.method import Method, Trained, Visit, learn, two_adapters
from fedmide.model.interface import Adapter, LocalModel, Terms


def _local(visit: Visit, model: LocalModel) -> Trained:
    common = learn(visit, model, visit.received)
    own = visit.config.ditto
    terms = Terms(own.lam, visit.received)
    limits = {"epochs": own.epochs, "max_steps": own.max_steps or visit.config.training.max_steps}
    personal = learn(visit, model, _own(visit, model), terms, "personal training", **limits)
    return Trained(common.adapter, common, personal.adapter, personal)


def _own(visit: Visit, model: LocalModel) -> Adapter:
    return visit.method_state or visit.received


DITTO = Method(
    "ditto",
    "fedavg, plus a personal adapter that is pulled to the common one: twice the steps",
    "Li et al. 2021, arXiv:2012.04221",
    traffic="A and B of the common adapter, each way",
    local=_local,
    trainings=2,
    remembers=True,
    own=_own,
    sizes=two_adapters,
)
