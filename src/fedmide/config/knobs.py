"""Every knob by its dotted name: fingerprints, what parties must agree on, how two configurations differ."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel

from fedmide.config.config import METHOD_TABLES, Config


def fingerprint(config: Config) -> str:
    """A short hash that tells two configurations apart."""
    canonical = json.dumps(used(config), sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


_LOCAL = ("data.", "runtime.", "replies.", "model.name", "model.device", "prompt.template")
"""What every party sets for itself: paths, machines, patience. What a path leads to is compared by its hash."""


def agreed(config: Config) -> dict[str, str]:
    """The knobs that all parties of a federation must set alike, as JSON by their dotted names.

    >>> agreed(Config())["lora.r"], "data.path" in agreed(Config())
    ('8', False)
    """
    return {name: json.dumps(value) for name, value in flat(config).items() if not name.startswith(_LOCAL)}


def differing(first: Mapping[str, str], second: Mapping[str, str]) -> list[tuple[str, str | None, str | None]]:
    """The knobs that two parties set differently, with both values; None where a party has no such knob.

    >>> differing({"seed": "0", "lora.r": "8"}, {"seed": "1", "lora.r": "8"})
    [('seed', '0', '1')]
    """
    named = ((name, first.get(name), second.get(name)) for name in sorted({*first, *second}))
    return [(name, one, other) for name, one, other in named if one != other]


def flat(config: Config) -> dict[str, Any]:
    """Every knob that the method uses, by its dotted name.

    >>> flat(Config())["lora.r"], "fedprox.mu" in flat(Config())
    (8, False)
    """
    return dict(_flat(used(config)))


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Each knob's dotted name and value."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def for_method(values: Mapping[str, Any], method: str) -> dict[str, Any]:
    """The values with this method, without the tables that only others use: what compares methods begins with it.

    >>> for_method({"seed": 1, "fedprox": {"mu": 1.0}}, "fedavg")
    {'seed': 1, 'method': 'fedavg'}
    """
    kept = {name: each for name, each in values.items() if method in METHOD_TABLES.get(name, (method,))}
    return {**kept, "method": method}


def used(config: Config) -> dict[str, Any]:
    """Every setting, without the tables of other methods."""
    return for_method(config.model_dump(), config.method)


def knobs(section: type[BaseModel] = Config, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Each knob's dotted name and what it means."""
    for name, field in section.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from knobs(inner, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field.description or ""
