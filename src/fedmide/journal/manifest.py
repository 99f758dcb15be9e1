"""Differences between two manifests of a run: configuration, model, prompt, records, versions."""

from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any


def changed(earlier: Mapping[str, Any], present: Mapping[str, Any]) -> Iterator[str]:
    """Problems that forbid a resume: one per difference between the manifest of the start and the present one."""
    if earlier.get("config") != present["config"]:
        yield f"config.toml is not what the run began with{_version_hint(earlier, present)}"
    if earlier["device"] != present["device"]:
        yield f"the device was {earlier['device']} when the run began and is {present['device']} now"
    if earlier.get("prompt") != present["prompt"]:
        yield "the prompt's template is not what the run began with"
    for name, value in present["model"].items():
        if earlier["model"][name] != value:
            yield f"the model's {name} was {earlier['model'][name]} when the run began and is {value} now"
    yield from changed_records(earlier, present)


def changed_records(earlier: Mapping[str, Any], present: Mapping[str, Any]) -> Iterator[str]:
    """Problems, one per client whose records or splits have changed since the run began."""
    for client in {**earlier["data"], **present["data"]}:
        records = [each["data"].get(client, {}).get("fingerprint") for each in (earlier, present)]
        if records[0] != records[1]:
            yield f"the records of site {client!r} are not those that the run began with"


def _version_hint(earlier: Mapping[str, Any], present: Mapping[str, Any]) -> str:
    """A hint that fedmide itself has changed, and with it perhaps its settings; empty if it has not."""
    first, second = _code(earlier), _code(present)
    return "" if first == second else f", or fedmide {first}, which began it, had other settings than {second}"


def _code(manifest: Mapping[str, Any]) -> str:
    return f"{manifest['fedmide']}, commit {manifest['commit'] or 'unknown'}"


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def other_versions(earlier: Mapping[str, Any], present: Mapping[str, Any]) -> Iterator[str]:
    """Sentences on libraries, and on fedmide itself, whose versions have changed since the run began."""
    was, now_is = _code(earlier), _code(present)
    if was != now_is:
        yield f"fedmide was {was} when the run began and is {now_is} now"
    for name, first in earlier["versions"].items():
        if present["versions"].get(name) != first:
            yield f"{name} was {first} when the run began and is {present['versions'].get(name)} now"


STATUSES = ("started", "trained", "personalized", "generated", "evaluated")
"""Stages of a run, in order, as its manifest names them."""
