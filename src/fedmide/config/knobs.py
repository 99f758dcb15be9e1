"""Every setting by its dotted name: fingerprints, the settings that parties must share, and differences."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from pydantic import BaseModel

from fedmide.config.config import METHOD_TABLES, Config

T = TypeVar("T")


def fingerprint(config: Config) -> str:
    """A short hash; two configurations with different settings have different ones."""
    canonical = json.dumps(used(config), sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


_LOCAL = ("data.", "runtime.", "replies.", "model.name", "model.device", "prompt.template")
"""Settings of each party for itself: paths, machines, patience. The content of a path is compared by its hash."""


def agreed(config: Config) -> dict[str, str]:
    """The settings that all parties of a federation must share, as JSON by their dotted names.

    >>> agreed(Config())["lora.r"], "data.path" in agreed(Config())
    ('8', False)
    """
    return {name: json.dumps(value) for name, value in flat(used(config)).items() if not name.startswith(_LOCAL)}


def differing(first: Mapping[str, T], second: Mapping[str, T]) -> list[tuple[str, T | None, T | None]]:
    """The settings in which two parties differ, in the order of the first, with both values; None if a party has none.

    >>> differing({"seed": "0", "lora.r": "8"}, {"seed": "1", "lora.r": "8"})
    [('seed', '0', '1')]
    """
    named = ((name, first.get(name), second.get(name)) for name in {**first, **second})
    return [(name, one, other) for name, one, other in named if one != other]


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of nested sections by their dotted names.

    >>> flat({"seed": 1, "lora": {"r": 8, "alpha": 16}})
    {'seed': 1, 'lora.r': 8, 'lora.alpha': 16}
    """
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return found


def for_method(values: Mapping[str, Any], method: str) -> dict[str, Any]:
    """The values with this method, without the tables that only other methods use; comparisons of methods start here.

    >>> for_method({"seed": 1, "fedprox": {"mu": 1.0}}, "fedavg")
    {'seed': 1, 'method': 'fedavg'}
    """
    kept = {name: each for name, each in values.items() if method in METHOD_TABLES.get(name, (method,))}
    return {**kept, "method": method}


def used(config: Config) -> dict[str, Any]:
    """The values of every setting, without the tables of other methods."""
    return for_method(config.model_dump(), config.method)


def knobs(section: type[BaseModel] = Config, prefix: str = "") -> Iterator[tuple[str, str]]:
    """The dotted name and the meaning of each setting."""
    for name, field in section.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from knobs(inner, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field.description or ""
