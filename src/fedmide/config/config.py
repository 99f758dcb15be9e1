"""The configuration of a whole run: the sections together, presets, and the checks across sections.

`sections` has the settings with their meanings, `loading` reads and writes TOML.
"""

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, get_args

from pydantic import ValidationInfo, field_validator, model_validator

from fedmide.config.method_sections import (
    AdaptiveConfig,
    DittoConfig,
    FedAvgMConfig,
    FedDpaConfig,
    FedProxConfig,
    FlexLoraConfig,
    MomentsConfig,
    ScaffoldConfig,
)
from fedmide.config.sections import (
    NATURAL,
    OWN_METHOD,
    Count,
    DataConfig,
    EnrollmentConfig,
    EvaluationConfig,
    FederationConfig,
    GenerationConfig,
    LoraConfig,
    MethodName,
    ModelConfig,
    PersonalizationConfig,
    PresetName,
    PromptConfig,
    RepliesConfig,
    RuntimeConfig,
    ScoringConfig,
    Section,
    TrainingConfig,
    WarmupConfig,
)
from fedmide.errors import did_you_mean

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
"""Per preset: FedMIDE's settings that differ from the published method. docs/results.md has the reasons."""


ENROLLING = ("fedmide",)
"""The methods whose sites split and enroll records: `warmup`, `enrollment` and the presets are theirs alone."""


OWN_START = ("fedmide", "fedavg-ft")
"""The methods whose sites may tune their own adapter of the last round instead of the common one."""


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
    `enrollment` and `personalization.records` work with fedmide only: any other method has no warm-up, and every
    training record trains. `personalization.start` works with fedmide and fedavg-ft."""
    preset: PresetName = "original"
    """Defaults of fedmide's settings. "original": those of the published method. "recommended": scores on the response,
    no restart after the warm-up, weights that fall softly with the score instead of a split. The site then tunes its
    own last adapter, on personal records first, and chooses a beta by its validation records."""
    seed: Count = 0
    """Seed of every random draw."""
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
    """Personalization."""
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
        """The seed of the draws and the split of the records."""
        return self.seed if self.data.seed < 0 else self.data.seed

    @model_validator(mode="before")
    @classmethod
    def _resolve(cls, values: object) -> object:
        """Fill in what follows from other settings, in this order: preset, method, threshold, learning rate."""
        if not isinstance(values, dict):
            return values
        for step in (_with_preset, _with_method, _with_threshold, _with_learning_rate):
            values = step(values)
        return values

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
        """True if sites store the adapter they sent last: to tune it, or to subtract it from the common adapter.

        `personalization.start = "own"` and `scoring.without_own` need it.
        """
        return self.personalization.start == "own" or (self.scoring.without_own and self.method in ENROLLING)

    @field_validator("lora")
    @classmethod
    def _some_target(cls, lora: LoraConfig) -> LoraConfig:
        if not lora.targets:
            raise ValueError("targets is empty: name at least one layer, or say 'all-linear'")
        return lora


def _with_preset(values: dict[str, Any]) -> dict[str, Any]:
    """The values of the preset where the user gives none. It is FedMIDE's: with any other method it is left out."""
    if "preset" not in values:
        return values
    if values.get("method", "fedmide") not in ENROLLING:
        return {name: each for name, each in values.items() if name != "preset"}
    preset = values["preset"]
    return filled_in(values, PRESETS[preset]) if isinstance(preset, str) and preset in PRESETS else values


def _with_method(values: dict[str, Any]) -> dict[str, Any]:
    """No warm-up, and tuning on all records, with a method that enrolls none."""
    if (method := values.get("method", "fedmide")) in ENROLLING:
        return values
    tuning = {"records": "all"} if method in OWN_START else {"records": "all", "start": "aggregated"}
    changes: dict[str, dict[str, Any]] = {"warmup": {"rounds": 0}, "personalization": tuning}
    given = {name: values.get(name, {}) for name in changes}
    return {**values, **{name: {**each, **changes[name]} for name, each in given.items() if isinstance(each, dict)}}


def _with_threshold(values: dict[str, Any]) -> dict[str, Any]:
    """Enrollment's threshold, where it is not given: the natural one of the score."""
    scoring, enrollment = values.get("scoring", {}), values.get("enrollment", {})
    if not isinstance(scoring, dict) or not isinstance(enrollment, dict):
        return values
    if "threshold" in enrollment or scoring.get("kind") != "relative-gap":
        return values
    return {**values, "enrollment": {**enrollment, "threshold": NATURAL["relative-gap"]}}


def _with_learning_rate(values: dict[str, Any]) -> dict[str, Any]:
    """The learning rate of personalization, where it is not given: that of training."""
    training, personalization = values.get("training", {}), values.get("personalization", {})
    if not isinstance(training, dict) or not isinstance(personalization, dict):
        return values
    if "learning_rate" in personalization or not _is_rate(training.get("learning_rate")):
        return values
    return {**values, "personalization": {**personalization, "learning_rate": training["learning_rate"]}}


def _is_rate(value: object) -> bool:
    """True for a positive finite number. The field's own check reports anything else, once."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def filled_in(values: Mapping[str, Any], tables: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The values, completed by those of the tables.

    >>> filled_in({"warmup": {"rounds": 2}}, {"warmup": {"rounds": 1, "folds": 2}})
    {'warmup': {'rounds': 2, 'folds': 2}}
    """
    given = {name: values.get(name, {}) for name in tables}
    merged = {name: {**tables[name], **each} if isinstance(each, dict) else each for name, each in given.items()}
    return {**values, **merged}
