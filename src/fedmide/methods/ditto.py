"""Ditto: beside the common adapter each client trains a personal one that is pulled to it.

    client: theta_k from theta^t as fedavg;  v_k from where it stood, with lambda / 2 norm(v_k - theta^t)^2 in the loss
    server: fedavg on theta

Li et al. 2021, arXiv:2012.04221, Algorithm 1. v_k begins at the first received adapter.
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
    return visit.memory or visit.received


DITTO = Method(
    "ditto",
    "fedavg, and beside it a personal adapter that is pulled to the common one: twice the steps",
    "Li et al. 2021, arXiv:2012.04221",
    traffic="A and B of the common adapter, each way",
    local=_local,
    trainings=2,
    remembers=True,
    own=_own,
    sizes=two_adapters,
)
