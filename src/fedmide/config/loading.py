"""The reading of configurations from TOML, with overrides; one message has all problems of a file."""

import difflib
import json
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import BaseModel, ValidationError

from fedmide.config.config import VARIANTS, Config
from fedmide.config.knobs import knobs, used
from fedmide.errors import ConfigError


def parse(values: Mapping[str, Any], where: str = "configuration") -> Config:
    """The configuration that the values describe; one `ConfigError` has all their problems."""
    try:
        return Config.model_validate(dict(values))
    except ValidationError as error:
        problems = [f"{where}: {_problem(details)}" for details in error.errors()]
        raise ConfigError(problems) from None


def load(path: Path, overrides: Iterable[str] = ()) -> Config:
    """The configuration in a TOML file, with `section.key=value` overrides, without its table of variants."""
    return parse(without_variants(apply_overrides(read_toml(path), overrides)), str(path))


def without_variants(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values without the table of variants, which only comparisons use."""
    return {key: each for key, each in values.items() if key != VARIANTS}


def read_toml(path: Path) -> dict[str, Any]:
    """The content of a TOML file; a missing or broken file is a `ConfigError` with its path."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"{path}: no such file", "Give a configuration (TOML); fedmide demo runs without one"
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{path}: not readable as TOML: {error}") from None


def apply_overrides(values: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """The values with each `section.key=value` set. A value is TOML if it parses as TOML, else a text.

    A setting that takes only texts reads a number as a text too: `data.path=8` names a folder.

    >>> apply_overrides({"seed": 1}, ["seed=2", "data.path=here/it/is"])
    {'seed': 2, 'data': {'path': 'here/it/is'}}
    """
    result = json.loads(json.dumps(dict(values), default=str))
    problems = []
    for override in overrides:
        key, separator, text = override.partition("=")
        *sections, name = key.strip().split(".")
        target = _section(result, sections)
        if not separator or not name or target is None:
            problems.append(f"--set {override!r}: expected section.key=value")
        else:
            target[name] = _value(text.strip(), is_text=_type_of([*sections, name]) is str)
    if problems:
        raise ConfigError(problems, "Write for example --set training.learning_rate=1e-3")
    return dict(result)


def to_toml(config: Config) -> str:
    """The configuration with every setting, as TOML that `load` reads back to an equal one."""
    return tomli_w.dumps(used(config))


def _section(values: dict[str, Any], names: list[str]) -> dict[str, Any] | None:
    """The section that the names lead to, created if it is missing; None if one of the names is a setting."""
    section: Any = values
    for name in names:
        section = section.setdefault(name, {}) if isinstance(section, dict) else None
    return section if isinstance(section, dict) else None


def _value(text: str, is_text: bool) -> Any:
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
    return text if is_text and not isinstance(value, str) else value


def _type_of(names: Sequence[str]) -> Any:
    """The type of the setting with this dotted name; None if there is no such setting."""
    kind: Any = Config
    for name in names:
        fields = kind.model_fields if isinstance(kind, type) and issubclass(kind, BaseModel) else {}
        kind = fields[name].annotation if name in fields else None
    return kind


_BRANCHES = ("str", "list[str]")
"""Words that pydantic appends to the name of a setting that takes a text or a list: the type that it tried."""


def _problem(details: Any) -> str:
    if details["type"] == "extra_forbidden":
        key = ".".join(str(part) for part in details["loc"])
        return f"unknown key '{key}'{_suggestion(key)}"
    key = ".".join(str(part) for part in details["loc"] if part not in _BRANCHES)
    message = details["msg"].removeprefix("Value error, ")
    return f"{key} = {details['input']!r}: {message[0].lower()}{message[1:]}"


def _suggestion(key: str) -> str:
    names = [name for name, _ in knobs()]
    sections = [name for name in Config.model_fields if name not in ("seed", "method", "preset")]
    close = difflib.get_close_matches(key, names + sections, n=1, cutoff=0.6)
    same_leaf = [name for name in names if name.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]]
    nearest = close or same_leaf
    return f" (did you mean '{nearest[0]}'?)" if nearest else ""
