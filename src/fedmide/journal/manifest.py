"""How two manifests of a run differ: configuration, model, prompt, records, versions."""

from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any


def changed(earlier: Mapping[str, Any], present: Mapping[str, Any]) -> Iterator[str]:
    """How what a run would go on with differs from what it began with, by their manifests; a problem each."""
    if earlier.get("config") != present["config"]:
        yield f"config.toml is not what the run began with{_unless(earlier, present)}"
    if earlier["device"] != present["device"]:
        yield f"the device was {earlier['device']} when the run began and is {present['device']} now"
    if earlier.get("prompt") != present["prompt"]:
        yield "the prompt's template is not what the run began with"
    for name, value in present["model"].items():
        if earlier["model"][name] != value:
            yield f"the model's {name} was {earlier['model'][name]} when the run began and is {value} now"
    yield from changed_records(earlier, present)


def changed_records(earlier: Mapping[str, Any], present: Mapping[str, Any]) -> Iterator[str]:
    """Whose records, or their parts, are no longer those that a run began with, by its manifests; a problem each."""
    for client in {**earlier["data"], **present["data"]}:
        records = [each["data"].get(client, {}).get("fingerprint") for each in (earlier, present)]
        if records[0] != records[1]:
            yield f"the records of client {client!r} are not those that the run began with"


def _unless(earlier: Mapping[str, Any], present: Mapping[str, Any]) -> str:
    """Another fedmide may read other knobs out of the same file."""
    first, second = _code(earlier), _code(present)
    return "" if first == second else f", or fedmide {first}, which began it, had other knobs than {second}"


def _code(manifest: Mapping[str, Any]) -> str:
    return f"{manifest['fedmide']}, commit {manifest['commit'] or 'unknown'}"


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def other_versions(earlier: Mapping[str, Any], present: Mapping[str, Any]) -> Iterator[str]:
    """Which libraries, and whether fedmide itself, are not of the versions that the run began with."""
    was, now_is = _code(earlier), _code(present)
    if was != now_is:
        yield f"fedmide was {was} when the run began and is {now_is} now"
    for name, first in earlier["versions"].items():
        if present["versions"].get(name) != first:
            yield f"{name} was {first} when the run began and is {present['versions'].get(name)} now"


STATUSES = ("started", "trained", "personalized", "generated", "evaluated")
"""How far a run is, as its manifest says."""
