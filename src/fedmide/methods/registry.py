"""The table of methods by name, and the registration of your own."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import get_args

from fedmide.config import Config
from fedmide.config.config import ENROLLING
from fedmide.config.sections import OWN_METHOD, MethodName
from fedmide.errors import ConfigError
from fedmide.methods.ditto import DITTO
from fedmide.methods.fedalt import FEDALT
from fedmide.methods.fedavg import CENTRAL, FEDAVG, FEDAVG_FT, FEDPROX, LOCAL
from fedmide.methods.feddpa import FEDDPA_F, FEDDPA_T
from fedmide.methods.fedmide import FEDMIDE
from fedmide.methods.ffa_fedsa import FEDSA_LORA, FFA_LORA
from fedmide.methods.flexlora import FLEXLORA
from fedmide.methods.flora_fedex import FEDEX_LORA, FLORA
from fedmide.methods.method import Method
from fedmide.methods.scaffold import SCAFFOLD
from fedmide.methods.server_optimizers import FEDADAGRAD, FEDADAM, FEDAVGM, FEDYOGI

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


METHODS: Mapping[str, Method] = MappingProxyType({method.name: method for method in _ALL})
"""The methods by their names in the configuration."""


assert tuple(METHODS) == get_args(MethodName), "a method is named in the configuration and not here, or the reverse"
assert {name for name, method in METHODS.items() if method.enrolls} == set(ENROLLING), (
    "ENROLLING in the configuration differs from the methods that enroll"
)


_OWN: dict[str, Method] = {}
"""Methods that this process registered. A configuration holds only names, and no code is loaded from a name."""


def register(method: Method) -> None:
    """Makes a method of your own known to this process, so that a configuration can choose it by its name, own:NAME.

    One that is registered again takes the earlier one's place. Raises `ConfigError`.
    """
    if not OWN_METHOD.fullmatch(method.name):
        raise ConfigError(
            f"{method.name!r} is not a name for a method of your own", "Call it own:NAME, of a-z, 0-9 and -"
        )
    if method.enrolls:
        raise ConfigError(
            f"{method.name}: a method of your own can't enroll: the settings for it are those of fedmide",
            'Leave `enrolls` false, or change the settings of method = "fedmide"',
        )
    _OWN[method.name] = method


def of(config: Config) -> Method:
    """The method that the configuration chooses; raises `ConfigError` if nobody has registered it."""
    method = METHODS.get(config.method) or _OWN.get(config.method)
    if method is None:
        raise ConfigError(
            f"method = {config.method!r} is not known to this process",
            "Call fedmide.register(METHOD) before the run, as examples/own_method.py does",
        )
    return method
