"""FedMIDE and the methods it is compared with; each is a `Method` in a short module."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import get_args

from fedmide.config import Config, MethodName
from fedmide.methods.averaging import CENTRAL, FEDAVG, FEDAVG_FT, FEDMIDE, FEDPROX, LOCAL
from fedmide.methods.method import Method

METHODS: Mapping[MethodName, Method] = MappingProxyType(
    {method.name: method for method in (FEDMIDE, LOCAL, CENTRAL, FEDAVG, FEDAVG_FT, FEDPROX)}
)
"""The methods by their names in the configuration."""

assert tuple(METHODS) == get_args(MethodName), "a method is named in the configuration and not here, or the reverse"


def of(config: Config) -> Method:
    """The method that the configuration chooses."""
    return METHODS[config.method]
