"""Server optimizers: the clients' mean step serves as a gradient for a step of the server.

    D = sum p_k (theta_k - theta^t)
    FedAvgM:    v <- beta v + D                           theta <- theta + v
    the others: m <- beta1 m + (1 - beta1) D              theta <- theta + eta m / (sqrt v + tau)
      FedAdagrad  v <- v + D^2
      FedYogi     v <- v - (1 - beta2) D^2 sign(v - D^2)
      FedAdam     v <- beta2 v + (1 - beta2) D^2

The second moment is of D, not of m, and begins at tau^2. FedAvgM: Hsu et al. 2019, arXiv:1909.06335. The others: Reddi
et al., Adaptive Federated Optimization, 2021, arXiv:2003.00295, Algorithm 2.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from fedmide.config import Config
from fedmide.config.method_sections import AdaptiveConfig
from fedmide.config.sections import MethodName
from fedmide.methods.method import Common, Contribution, Method, mean
from fedmide.model.adapters import prefixed, under
from fedmide.model.interface import Adapter

Array = NDArray[np.float64]


Arrays = dict[str, Array]


SecondMoment = Callable[[Array, Array, Config], Array]
"""Maps v and D^2 to the next v."""


def _combine_momentum(common: Common, answers: Iterable[Contribution], config: Config) -> Common | None:
    step = _mean_step(common, answers, config)
    if step is None:
        return None
    v = _moment(common, "v", 0.0)
    v = {name: config.fedavgm.beta * v[name] + step[name] for name in step}
    return _moved(common, v, {"v": v})


def _combine_adaptive(
    common: Common, answers: Iterable[Contribution], config: Config, own: AdaptiveConfig, second: SecondMoment
) -> Common | None:
    step = _mean_step(common, answers, config)
    if step is None:
        return None
    m, v = _moment(common, "m", 0.0), _moment(common, "v", own.tau**2)
    m = {name: own.beta1 * m[name] + (1 - own.beta1) * step[name] for name in step}
    v = {name: second(v[name], step[name] ** 2, config) for name in step}
    return _moved(common, {name: own.eta * m[name] / (np.sqrt(v[name]) + own.tau) for name in step}, {"m": m, "v": v})


def _mean_step(common: Common, answers: Iterable[Contribution], config: Config) -> Arrays | None:
    averaged = mean(common, answers, config)
    if averaged is None:
        return None
    return {name: averaged.adapter[name].astype(np.float64) - array for name, array in common.adapter.items()}


def _moment(common: Common, name: str, at_first: float) -> Arrays:
    kept = under(name, common.method_state)
    return {
        key: kept[key].astype(np.float64) if kept else np.full(array.shape, at_first)
        for key, array in common.adapter.items()
    }


def _moved(common: Common, step: Arrays, moments: dict[str, Arrays]) -> Common:
    moved = {name: (array + step[name]).astype(np.float32) for name, array in common.adapter.items()}
    kept: dict[str, NDArray[np.float32]] = {}
    for name, moment in moments.items():
        kept |= prefixed(name, _single(moment))
    return replace(common, adapter=moved, method_state=kept)


def _single(arrays: Arrays) -> Adapter:
    return {name: array.astype(np.float32) for name, array in arrays.items()}


def _adagrad(v: Array, squared: Array, config: Config) -> Array:
    return v + squared


def _adam(v: Array, squared: Array, config: Config) -> Array:
    return config.fedadam.beta2 * v + (1 - config.fedadam.beta2) * squared


def _yogi(v: Array, squared: Array, config: Config) -> Array:
    return v - (1 - config.fedyogi.beta2) * squared * np.sign(v - squared)


def _adaptive(name: MethodName, summary: str, own: Callable[[Config], AdaptiveConfig], second: SecondMoment) -> Method:
    def combine(common: Common, answers: Iterable[Contribution], config: Config) -> Common | None:
        return _combine_adaptive(common, answers, config, own(config), second)

    return Method(name, summary, "Reddi et al. 2021, arXiv:2003.00295", combine=combine)


FEDAVGM = Method(
    "fedavgm",
    "fedavg with momentum on the server",
    "Hsu et al. 2019, arXiv:1909.06335",
    combine=_combine_momentum,
)


FEDADAGRAD = _adaptive("fedadagrad", "fedavg with Adagrad on the server", lambda config: config.fedadagrad, _adagrad)


FEDADAM = _adaptive("fedadam", "fedavg with Adam on the server", lambda config: config.fedadam, _adam)


FEDYOGI = _adaptive("fedyogi", "fedavg with Yogi on the server", lambda config: config.fedyogi, _yogi)
