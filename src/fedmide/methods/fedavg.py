"""Methods around the weighted mean of adapters, and training alone.

FedAvg (McMahan et al., 2017, arXiv:1602.05629); with LoRA it is FedIT (Zhang et al., 2023, arXiv:2305.05644).
FedProx (Li et al., 2020, arXiv:1812.06127).
"""

from fedmide.config import Config
from fedmide.methods.method import Common, Method, Trained, Visit, learn, plain
from fedmide.model.adapters import Shapes
from fedmide.model.interface import Adapter, LocalModel, Terms


def _nothing_down(common: Common, client: str, config: Config) -> Adapter:
    return {}


def _nothing_up(common: Common, client: str, config: Config) -> Shapes:
    return {}


def _alone(visit: Visit, model: LocalModel) -> Trained:
    """Training from the client's own adapter of its last round; nothing travels back."""
    work = learn(visit, model, _own(visit, model))
    return Trained({}, work, work.adapter)


def _own(visit: Visit, model: LocalModel) -> Adapter:
    return visit.method_state or model.fresh(visit.config.seed)


def _near(visit: Visit, model: LocalModel) -> Trained:
    """Training with mu / 2 times the squared distance to the received adapter added to the loss."""
    work = learn(visit, model, visit.received, Terms(visit.config.fedprox.mu, visit.received))
    return Trained(work.adapter, work)


LOCAL = Method(
    "local",
    "each site trains alone, for the same number of rounds, then tunes its adapter further",
    "the baseline that a federation must beat",
    traffic="nothing",
    local=_alone,
    remembers=True,
    own=_own,
    tuning=plain,
    down=_nothing_down,
    up=_nothing_up,
    travels=False,
)


CENTRAL = Method(
    "central",
    "one adapter trained on the records of all sites in one place, for research only",
    "a reference that no federation may use",
    traffic="the records themselves, which a federation never sends",
    in_one_place=True,
)


FEDAVG = Method(
    "fedavg",
    "local training from the common adapter; the server averages, weighted by records",
    "McMahan et al. 2017, arXiv:1602.05629; with LoRA FedIT, arXiv:2305.05644",
)


FEDAVG_FT = Method(
    "fedavg-ft",
    "fedavg, then each site tunes the common adapter on its own records",
    "McMahan et al. 2017, arXiv:1602.05629; with LoRA FedIT, arXiv:2305.05644",
    tuning=plain,
)


FEDPROX = Method(
    "fedprox",
    "fedavg with a pull to the received adapter in the local loss",
    "Li et al. 2020, arXiv:1812.06127",
    local=_near,
)
