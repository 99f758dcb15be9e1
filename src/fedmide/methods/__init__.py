"""FedMIDE and the methods it is compared with; each is a `Method` in a short module."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import get_args

from fedmide.config import Config, MethodName
from fedmide.methods.adaptive import FEDADAGRAD, FEDADAM, FEDAVGM, FEDYOGI
from fedmide.methods.averaging import CENTRAL, FEDAVG, FEDAVG_FT, FEDPROX, LOCAL
from fedmide.methods.ditto import DITTO
from fedmide.methods.fedalt import FEDALT
from fedmide.methods.feddpa import FEDDPA_F, FEDDPA_T
from fedmide.methods.fedmide import FEDMIDE
from fedmide.methods.flexlora import FLEXLORA
from fedmide.methods.halves import FEDSA_LORA, FFA_LORA
from fedmide.methods.method import Method
from fedmide.methods.scaffold import SCAFFOLD
from fedmide.methods.stacking import FEDEX_LORA, FLORA

_ALL = (
    *(FEDMIDE, LOCAL, CENTRAL, FEDAVG, FEDAVG_FT, FEDPROX),
    SCAFFOLD,
    *(FEDAVGM, FEDADAGRAD, FEDADAM, FEDYOGI),
    *(FFA_LORA, FEDSA_LORA),
    DITTO,
    *(FLORA, FEDEX_LORA, FLEXLORA),
    *(FEDDPA_T, FEDDPA_F),
    FEDALT,
)

METHODS: Mapping[MethodName, Method] = MappingProxyType({method.name: method for method in _ALL})
"""The methods by their names in the configuration."""

assert tuple(METHODS) == get_args(MethodName), "a method is named in the configuration and not here, or the reverse"


def of(config: Config) -> Method:
    """The method that the configuration chooses."""
    return METHODS[config.method]
