"""A whole run as its configuration says: the sections put together, read from TOML, checked as a whole.

`load` refuses what it does not know, names all problems at once and suggests the nearest right key. The resolved
configuration, written back by `to_toml`, repeats the run. What each knob means: `sections`.
"""

import difflib
import hashlib
import json
import math
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_args

import tomli_w
from pydantic import BaseModel, ValidationError, ValidationInfo, field_validator, model_validator

from fedmide.errors import ConfigError, did_you_mean
from fedmide.sections import (
    NATURAL,
    OWN_METHOD,
    AdaptiveConfig,
    Count,
    DataConfig,
    DittoConfig,
    EnrollmentConfig,
    EvaluationConfig,
    FedAvgMConfig,
    FedDpaConfig,
    FederationConfig,
    FedProxConfig,
    FlexLoraConfig,
    GenerationConfig,
    LoraConfig,
    MethodName,
    ModelConfig,
    MomentsConfig,
    PersonalizationConfig,
    PresetName,
    PromptConfig,
    RepliesConfig,
    RuntimeConfig,
    ScaffoldConfig,
    ScoringConfig,
    Section,
    TrainingConfig,
    WarmupConfig,
)

VARIANTS = "variants"
"""The table of a file that names variants for a comparison, `[variants.NAME]`: no part of a run's configuration."""

PRESETS: Mapping[str, Mapping[str, Mapping[str, Any]]] = MappingProxyType(
    {
        "original": {},
        "recommended": {
            "warmup": {"reset": False},
            "scoring": {"positions": "response"},
            "enrollment": {"rule": "natural", "softness": 0.5},
            "personalization": {
                "start": "own",
                "records": "personal-first",
                "interpolation": [0.0, 0.25, 0.5, 0.75, 1.0],
            },
        },
    }
)
"""FedMIDE's knobs that a preset sets otherwise than the published method has them; docs/results.md says how the
recommended ones were chosen."""

OWN_START = ("fedmide", "fedavg-ft")
"""The methods whose sites may tune their own adapter of the last round instead of the aggregated one."""

METHOD_TABLES: Mapping[str, tuple[MethodName, ...]] = MappingProxyType(
    {
        "fedprox": ("fedprox",),
        "scaffold": ("scaffold",),
        "fedavgm": ("fedavgm",),
        "fedadagrad": ("fedadagrad",),
        "fedadam": ("fedadam",),
        "fedyogi": ("fedyogi",),
        "ditto": ("ditto",),
        "flexlora": ("flexlora",),
        "feddpa": ("feddpa-t", "feddpa-f"),
    }
)
"""The methods' own tables, and which methods use each. Any other method refuses it."""


class Config(Section):
    """A whole run."""

    method: str = "fedmide"
    """The federated algorithm: one that `fedmide methods` lists, or own:NAME, which your program registers. `warmup`,
    `enrollment` and `personalization.records` are fedmide's alone: with any other method there is no warm-up and every
    training record trains. `personalization.start` is fedmide's and fedavg-ft's."""
    preset: PresetName = "original"
    """What fedmide's knobs are where nothing else is said: "original", the published method's, or "recommended": scores
    on the response, no restart after the warm-up, weights that fall softly with the score instead of a split, tuning
    of the site's own last adapter, on personal records first, and a beta for each client by its validation records."""
    seed: Count = 0
    """Every random draw follows from it."""
    data: DataConfig = DataConfig()
    """Records."""
    model: ModelConfig = ModelConfig()
    """Base model."""
    prompt: PromptConfig = PromptConfig()
    """Prompt."""
    lora: LoraConfig = LoraConfig()
    """Adapter."""
    training: TrainingConfig = TrainingConfig()
    """Local training."""
    federation: FederationConfig = FederationConfig()
    """Rounds."""
    replies: RepliesConfig = RepliesConfig()
    """Replies."""
    warmup: WarmupConfig = WarmupConfig()
    """Warm-up."""
    scoring: ScoringConfig = ScoringConfig()
    """Scores."""
    enrollment: EnrollmentConfig = EnrollmentConfig()
    """Sets."""
    personalization: PersonalizationConfig = PersonalizationConfig()
    """Personalisation."""
    fedprox: FedProxConfig = FedProxConfig()
    """FedProx."""
    scaffold: ScaffoldConfig = ScaffoldConfig()
    """SCAFFOLD."""
    fedavgm: FedAvgMConfig = FedAvgMConfig()
    """FedAvgM."""
    fedadagrad: AdaptiveConfig = AdaptiveConfig()
    """FedAdagrad."""
    fedadam: MomentsConfig = MomentsConfig()
    """FedAdam."""
    fedyogi: MomentsConfig = MomentsConfig()
    """FedYogi."""
    ditto: DittoConfig = DittoConfig()
    """Ditto."""
    flexlora: FlexLoraConfig = FlexLoraConfig()
    """FlexLoRA."""
    feddpa: FedDpaConfig = FedDpaConfig()
    """FedDPA."""
    generation: GenerationConfig = GenerationConfig()
    """Decoding."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """Measures."""
    runtime: RuntimeConfig = RuntimeConfig()
    """Machine."""

    @property
    def data_seed(self) -> int:
        """What the records' draws and parts follow from."""
        return self.seed if self.data.seed < 0 else self.data.seed

    @model_validator(mode="before")
    @classmethod
    def _inherit_learning_rate(cls, values: object) -> object:
        """Personalisation tunes at the training's rate unless it is given its own."""
        if not isinstance(values, dict):
            return values
        training, personalization = values.get("training", {}), values.get("personalization", {})
        if not isinstance(training, dict) or not isinstance(personalization, dict):
            return values
        if "learning_rate" in personalization or not _is_rate(training.get("learning_rate")):
            return values
        inherited = {**personalization, "learning_rate": training["learning_rate"]}
        return {**values, "personalization": inherited}

    @model_validator(mode="before")
    @classmethod
    def _natural_threshold(cls, values: object) -> object:
        """Enrollment compares with the score's natural threshold unless it is given one."""
        if not isinstance(values, dict):
            return values
        scoring, enrollment = values.get("scoring", {}), values.get("enrollment", {})
        if not isinstance(scoring, dict) or not isinstance(enrollment, dict):
            return values
        if "threshold" in enrollment or scoring.get("kind") != "relative-gap":
            return values
        return {**values, "enrollment": {**enrollment, "threshold": NATURAL["relative-gap"]}}

    @model_validator(mode="before")
    @classmethod
    def _leave_out_fedmide(cls, values: object) -> object:
        """Another method has no warm-up, and tunes on all records where it tunes at all."""
        if not isinstance(values, dict) or (method := values.get("method", "fedmide")) == "fedmide":
            return values
        tuning = {"records": "all"} if method in OWN_START else {"records": "all", "start": "aggregated"}
        changes: dict[str, dict[str, Any]] = {"warmup": {"rounds": 0}, "personalization": tuning}
        given = {name: values.get(name, {}) for name in changes}
        return {**values, **{name: {**each, **changes[name]} for name, each in given.items() if isinstance(each, dict)}}

    @model_validator(mode="before")  # of these the last runs first
    @classmethod
    def _fill_in_preset(cls, values: object) -> object:
        """A preset says what the user doesn't; it is FedMIDE's, so any other method goes without."""
        if not isinstance(values, dict) or "preset" not in values:
            return values
        if values.get("method", "fedmide") != "fedmide":
            return {name: each for name, each in values.items() if name != "preset"}
        preset = values["preset"]
        return filled_in(values, PRESETS[preset]) if isinstance(preset, str) and preset in PRESETS else values

    @field_validator("method")
    @classmethod
    def _some_method(cls, method: str) -> str:
        known = get_args(MethodName)
        if method in known or OWN_METHOD.fullmatch(method):
            return method
        raise ValueError(f"not a method{did_you_mean(method, known)}; expected {', '.join(known)}, or own:NAME")

    @field_validator(*METHOD_TABLES)
    @classmethod
    def _table_of_the_method(cls, table: Section, info: ValidationInfo) -> Section:
        method = info.data.get("method")
        if method is not None and method not in METHOD_TABLES[info.field_name or ""]:
            raise ValueError(f"method {method!r} has no use for this table")
        return table

    @field_validator("enrollment")
    @classmethod
    def _fit_for_the_score(cls, enrollment: EnrollmentConfig, info: ValidationInfo) -> EnrollmentConfig:
        scoring = info.data.get("scoring")
        for name, value in (("split", enrollment.split), ("choice", enrollment.choice)):
            if enrollment.softness and value != "score":
                raise ValueError(f"softness weighs records by their scores, which {name} {value!r} sets aside")
        kind = "ratio" if scoring is None else scoring.kind
        if kind == "ratio" and enrollment.threshold <= 0:
            raise ValueError(f"threshold {enrollment.threshold} is not positive, as every ratio is")
        if kind != "ratio" and enrollment.rule == "otsu-log":
            raise ValueError("rule 'otsu-log' needs scoring.kind = 'ratio': a gap has no logarithm")
        return enrollment

    @property
    def keeps_own(self) -> bool:
        """Whether a site keeps the adapter that it sent from round to round, because it is needed once more."""
        return self.personalization.start == "own" or (self.scoring.without_own and self.method == "fedmide")

    @field_validator("lora")
    @classmethod
    def _some_target(cls, lora: LoraConfig) -> LoraConfig:
        if not lora.targets:
            raise ValueError("targets is empty: name at least one layer, or say 'all-linear'")
        return lora


def _is_rate(value: object) -> bool:
    """Whether a value will do; one that won't is told of where it stands, and there only."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def parse(values: Mapping[str, Any], where: str = "configuration") -> Config:
    """The configuration that the values describe; all problems at once as one `ConfigError`."""
    try:
        return Config.model_validate(dict(values))
    except ValidationError as error:
        problems = [f"{where}: {_problem(details)}" for details in error.errors()]
        raise ConfigError(problems) from None


def load(path: Path, overrides: Iterable[str] = ()) -> Config:
    """The configuration in a TOML file, changed by `section.key=value` overrides; variants in it are a comparison's."""
    return parse(without_variants(apply_overrides(read_toml(path), overrides)), str(path))


def without_variants(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values without the table that names variants for a comparison."""
    return {key: each for key, each in values.items() if key != VARIANTS}


def read_toml(path: Path) -> dict[str, Any]:
    """What a TOML file holds; a missing or broken one is a `ConfigError` with its place."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file", "Give a TOML file such as examples/tiny.toml") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{path}: not readable as TOML: {error}") from None


def apply_overrides(values: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """The values with each `section.key=value` set; a value is TOML where it parses as such, else a text.

    Where only a text will do, what looks like a number is one too: `data.path=8` names a folder.

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
        raise ConfigError(problems, "For example --set training.learning_rate=1e-3")
    return dict(result)


def to_toml(config: Config) -> str:
    """The resolved configuration, every knob, as TOML that `load` reads back to an equal one."""
    return tomli_w.dumps(_used(config))


def fingerprint(config: Config) -> str:
    """A short hash that tells two configurations apart."""
    canonical = json.dumps(_used(config), sort_keys=True)
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
    return dict(_flat(_used(config)))


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Each knob's dotted name and value."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def filled_in(values: Mapping[str, Any], tables: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The values with those of the tables wherever they say nothing.

    >>> filled_in({"warmup": {"rounds": 2}}, {"warmup": {"rounds": 1, "folds": 2}})
    {'warmup': {'rounds': 2, 'folds': 2}}
    """
    given = {name: values.get(name, {}) for name in tables}
    merged = {name: {**tables[name], **each} if isinstance(each, dict) else each for name, each in given.items()}
    return {**values, **merged}


def for_method(values: Mapping[str, Any], method: str) -> dict[str, Any]:
    """The values with this method, without the tables that only others use: what compares methods begins with it.

    >>> for_method({"seed": 1, "fedprox": {"mu": 1.0}}, "fedavg")
    {'seed': 1, 'method': 'fedavg'}
    """
    kept = {name: each for name, each in values.items() if method in METHOD_TABLES.get(name, (method,))}
    return {**kept, "method": method}


def _used(config: Config) -> dict[str, Any]:
    """Every knob but those in tables of other methods."""
    return for_method(config.model_dump(), config.method)


def knobs(section: type[BaseModel] = Config, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Each knob's dotted name and what it means."""
    for name, field in section.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from knobs(inner, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field.description or ""


def _section(values: dict[str, Any], names: list[str]) -> dict[str, Any] | None:
    """The section that the names lead to, made where it is missing; None where a name is a knob."""
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
    """The type of the knob with this dotted name; None where there is none."""
    kind: Any = Config
    for name in names:
        fields = kind.model_fields if isinstance(kind, type) and issubclass(kind, BaseModel) else {}
        kind = fields[name].annotation if name in fields else None
    return kind


_BRANCHES = ("str", "list[str]")
"""What pydantic puts behind a knob that may be a text or a list, to say which of the two it tried."""


def _problem(details: Any) -> str:
    if details["type"] == "extra_forbidden":
        key = ".".join(str(part) for part in details["loc"])
        return f"unknown key '{key}'{_suggestion(key)}"
    key = ".".join(str(part) for part in details["loc"] if part not in _BRANCHES)
    message = details["msg"].removeprefix("Value error, ")
    return f"{key} = {details['input']!r}: {message[0].lower()}{message[1:]}"


def _suggestion(key: str) -> str:
    names = [name for name, _ in knobs()]
    sections = [name for name, field in Config.model_fields.items() if name not in ("seed", "method", "preset")]
    close = difflib.get_close_matches(key, names + sections, n=1, cutoff=0.6)
    same_leaf = [name for name in names if name.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]]
    nearest = close or same_leaf
    return f" (did you mean '{nearest[0]}'?)" if nearest else ""
