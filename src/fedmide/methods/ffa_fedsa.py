"""Methods in which one of the two factors travels.

FFA-LoRA: A is frozen at a random start that the seed gives. B is trained and averaged. So the mean of the products is
the product of the means. Sun et al. 2024, arXiv:2403.12313.

FedSA-LoRA: both are trained. A is averaged (unweighted), B stays on the site. Guo et al. 2025, arXiv:2410.01463.
"""

from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from fedmide.config import Config
from fedmide.methods.aggregation import weighted_mean
from fedmide.methods.method import Common, Contribution, Method, Sizes, Trained, Visit, learn, num_values
from fedmide.model.adapters import A, B, Shapes, named, shapes
from fedmide.model.interface import Adapter, LocalModel, Terms


# --- FFA-LoRA
def _train_b(visit: Visit, model: LocalModel) -> Trained:
    start = _with_received(visit, model)
    trains_b = {name: np.full_like(array, B in name) for name, array in start.items()}
    work = learn(visit, model, start, Terms(share=trains_b))
    return Trained(named(work.adapter, B), work)


def _with_received(visit: Visit, model: LocalModel) -> Adapter:
    """The received factor, and the other one as it is at the start."""
    return {**model.fresh(visit.config.seed), **visit.received}


def _b_down(common: Common, client: str, config: Config) -> Adapter:
    return named(common.adapter, B)


def _b_up(common: Common, client: str, config: Config) -> Shapes:
    return shapes(named(common.adapter, B))


def _mean_b(common: Common, answers: Iterable[Contribution], config: Config) -> Common | None:
    mean = weighted_mean((answer.arrays, answer.num_records) for answer in answers)
    return None if mean is None else replace(common, adapter={**common.adapter, **mean})


# --- FedSA-LoRA
def _train_both(visit: Visit, model: LocalModel) -> Trained:
    work = learn(visit, model, _with_own_b(visit, model))
    return Trained(named(work.adapter, A), work, named(work.adapter, B))


def _with_own_b(visit: Visit, model: LocalModel) -> Adapter:
    return {**_with_received(visit, model), **visit.method_state}


def _a_down(common: Common, client: str, config: Config) -> Adapter:
    return named(common.adapter, A)


def _a_up(common: Common, client: str, config: Config) -> Shapes:
    return shapes(named(common.adapter, A))


def _mean_a(common: Common, answers: Iterable[Contribution], config: Config) -> Common | None:
    mean = weighted_mean((answer.arrays, 1) for answer in answers if answer.num_records)
    return None if mean is None else replace(common, adapter={**common.adapter, **mean})


FFA_LORA = Method(
    "ffa-lora",
    "A is frozen, B is trained and averaged: the mean is exact",
    "Sun et al. 2024, arXiv:2403.12313",
    traffic="B, each way",
    local=_train_b,
    sizes=lambda adapter, clients, config: Sizes(num_values(named(adapter, B))),
    own=_with_received,
    down=_b_down,
    up=_b_up,
    combine=_mean_b,
)


FEDSA_LORA = Method(
    "fedsa-lora",
    "A is averaged, each site keeps its own B",
    "Guo et al. 2025, arXiv:2410.01463",
    traffic="A, each way",
    local=_train_both,
    remembers=True,
    own=_with_own_b,
    down=_a_down,
    up=_a_up,
    combine=_mean_a,
)
