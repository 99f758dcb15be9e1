"""Every knob of a run, with its meaning, unit and source; read from TOML, checked as a whole.

The defaults are those of the published method. `load` refuses what it does not know, names all problems at once and
suggests the nearest right key. The resolved configuration, written back by `to_toml`, repeats the run.
"""

import difflib
import hashlib
import json
import math
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, get_args

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from fedmide.errors import ConfigError, did_you_mean

Positions = Literal["all", "response"]
DataSource = Literal["published", "files", "table", "medical"]
ThresholdRule = Literal["otsu-256", "otsu-exact", "otsu-log", "median", "natural"]
SplitRule = Literal["score", "random", "reversed", "length-matched"]
ScoreKind = Literal["ratio", "relative-gap"]
PresetName = Literal["original", "recommended"]
MethodName = Literal[
    "fedmide",
    "local",
    "central",
    "fedavg",
    "fedavg-ft",
    "fedprox",
    "scaffold",
    "fedavgm",
    "fedadagrad",
    "fedadam",
    "fedyogi",
    "ffa-lora",
    "fedsa-lora",
    "ditto",
    "flora",
    "fedex-lora",
    "flexlora",
    "feddpa-t",
    "feddpa-f",
    "fedalt",
]
"""The federated algorithms; what each does: `methods`, docs/methods.md."""
OWN_METHOD = re.compile(r"own:[a-z0-9][a-z0-9-]{0,40}")
"""What a method is called that the package does not have, but the program that runs it: `methods.register`."""
Quantization = Literal["none", "int8", "nf4"]
Device = Literal["auto", "cpu", "cuda", "mps"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]

NATURAL: Mapping[ScoreKind, float] = MappingProxyType({"ratio": 1.0, "relative-gap": 0.0})
"""Where a score says that both adapters explain a record equally well."""

Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(gt=0.0, le=1e6)]


class Section(BaseModel):
    """A group of knobs: frozen, and closed to unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)


class FieldNames(Section):
    """What the fields of a record are called in the user's files."""

    instruction: str = "instruction"
    """The question or task."""
    context: str = "context"
    """Text that the question is about; the field may be absent."""
    response: str = "response"
    """The answer to learn."""
    category: str = "category"
    """A label of the record's kind; the field may be absent."""
    concept: str = "concept"
    """What the record is about; the field may be absent. Records of one concept stay in one part."""
    client: str = "client"
    """The owner of the record, where one file holds all clients."""
    part: str = ""
    """The field that says training, validation or test, where one file holds all parts of a client; "": none."""


class DataConfig(Section):
    """Where the records come from and how they are parted."""

    source: DataSource = "published"
    """The published layout; one file a client; one file with a client column; or the sites made from packages."""
    path: str = ""
    """Folder or file to read; relative to the working directory. Not used by "medical"."""
    fields: FieldNames = FieldNames()
    """Names of the fields in the files."""
    clients: Annotated[int, Field(ge=0)] = 0
    """How many clients to take, in order; 0: all (of "medical": 8)."""
    max_records: Count = 0
    """At most so many training records a client, drawn with the run's seed; 0: all (of "medical": 48)."""
    max_validation_records: Count = 0
    """At most so many validation records a client; 0: all (of "medical": 12)."""
    max_test_records: Count = 0
    """At most so many test records a client; 0: all (of "medical": 24)."""
    validation_fraction: Fraction = 0.1
    """Part of the training records held out to choose the personalisation epoch, where no validation is given."""
    test_fraction: Fraction = 0.2
    """Part of the records held out for testing, where no test is given."""
    pieces: Positive = 1
    """Clients that each one is dealt out into, before the limits: 8 become 40 with 5."""
    noisy_clients: Count = 0
    """Clients whose training responses are swapped among their records, to see what wrong labels do."""
    seed: Annotated[int, Field(ge=-1)] = -1
    """What the draws and parts of the records, and the choices of the evaluation, follow from; -1: the run's seed."""


class ModelConfig(Section):
    """The frozen base model."""

    name: str = "smollm2-135m"
    """A folder, a hub id, `smollm2-135m` (out of a package) or `tiny-random` (tests)."""
    dtype: Dtype = "auto"
    """Type of the base weights; "auto": bfloat16 where processor or GPU computes with it, else float32. float16 is for
    GPUs without bfloat16."""
    quantization: Quantization = "none"
    """"int8" or "nf4" (4 bits): the base's linear layers through bitsandbytes, for less memory, not for speed."""
    device: Device = "auto"
    """"auto": a CUDA GPU where there is one, else the processor."""
    cutoff: Annotated[int, Field(ge=8)] = 512
    """Longest record, in tokens, prompt and response together."""


class PromptConfig(Section):
    """How a record becomes a prompt and a response."""

    template: str = "alpaca"
    """`alpaca`, `plain`, `chat` (the tokenizer's own), or a TOML file with `with_context` and `without_context`."""
    overflow: Literal["refuse", "cut"] = "refuse"
    """A prompt that leaves no room for a response: stop with an error, or cut its context, then its instruction."""


class LoraConfig(Section):
    """The adapter that every site trains."""

    r: Positive = 8
    """Rank."""
    alpha: Rate = 16.0
    """Scale: the update is alpha / r * B A."""
    dropout: Fraction = 0.05
    """Dropout on the adapter's input while training."""
    targets: str | list[str] = ["q_proj", "v_proj"]
    """Names of the linear layers that get an adapter, or "all-linear"."""
    blocks: Annotated[str, Field(pattern=r"^(all|top:[1-9][0-9]*)$")] = "all"
    """Which transformer blocks get one: "all", or "top:N" for the last N."""


class TrainingConfig(Section):
    """Local training within one round."""

    epochs: Positive = 1
    """Passes over the shared set in each round."""
    max_steps: Count = 0
    """At most so many optimiser steps a round; 0: as the epochs give."""
    batch_size: Positive = 32
    """Records in one optimiser step."""
    learning_rate: Rate = 2e-4
    """AdamW's rate at the start of the local training."""
    schedule: Literal["linear", "constant"] = "linear"
    """"linear": to 0 within the round's local training."""
    weight_decay: Annotated[float, Field(ge=0.0, le=1e6)] = 0.0
    """AdamW's decoupled weight decay."""
    max_grad_norm: Rate = 1.0
    """Gradients are clipped to this norm."""
    positions: Positions = "all"
    """Tokens that the loss counts: "all" (prompt and response) or "response"."""
    tokens_per_batch: Annotated[int, Field(ge=16)] = 1024
    """Tokens in one pass through the model; several passes make one optimiser step. Changes no result beyond
    rounding, but for the draws of dropout."""
    checkpointing: bool = False
    """Keep only each block's input and run the block again on the way back: less memory, a third more work."""


class FederationConfig(Section):
    """The rounds."""

    rounds: Count = 20
    """T, federated rounds after the warm-up."""
    participation: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Part of the clients that trains in a round; at least one does."""


class RepliesConfig(Section):
    """What the server asks of replies. Each server sets its own."""

    quorum: Annotated[float, Field(ge=0.0, le=1.0)] = 0.5
    """Part of the asked clients whose replies must count, where they are in other processes; with fewer the run stops,
    to go on from the round before."""
    deadline_seconds: Annotated[float, Field(gt=0.0, le=1e6)] = 3600.0
    """How long a round waits for clients that are in other processes: to be there, then to answer."""
    max_update_norm: Annotated[float, Field(ge=0.0, le=1e30)] = 0.0
    """Largest Euclidean length of what a client's training added to the adapter; 0: any."""
    oversized: Literal["refuse", "clip"] = "refuse"
    """A longer one: its reply does not count, or it is scaled down to that length."""


class WarmupConfig(Section):
    """FedAvg on all records, to tell shared from personal."""

    rounds: Count = 1
    """W; 0: no split, everything is shared."""
    reset: bool = True
    """Start the federated rounds from a fresh adapter; false: go on from the warm-up's."""
    max_steps: Count = 0
    """At most so many optimiser steps in each warm-up round; 0: as `training.max_steps` says."""
    folds: Annotated[int, Field(ge=1, le=2)] = 1
    """1: a record's local score comes from an adapter that trained on it (published). 2: in the last warm-up round two
    adapters train, each on half of the records for half of the steps; the one that did not see a record scores it,
    and their mean is what travels."""


class ScoringConfig(Section):
    """What a score counts."""

    positions: Positions = "all"
    """Tokens whose likelihood counts: "all" (published) or "response"."""
    kind: ScoreKind = "ratio"
    """"ratio": exp(NLL_aggregated - NLL_local), naturally parted at 1 (published); "relative-gap":
    (NLL_aggregated - NLL_local) / NLL_aggregated, naturally parted at 0."""
    without_own: bool = False
    """true: the aggregated adapter that a site scores with leaves the site's own out; the server then tells a site how
    many records stand behind it, in all and of its own."""
    tokens_per_batch: Annotated[int, Field(ge=16)] = 2048
    """Tokens in one pass through the model. Changes no result beyond rounding."""


class EnrollmentConfig(Section):
    """Who is shared, who is personal, and who moves."""

    rule: ThresholdRule = "otsu-256"
    """Threshold of the split after the warm-up; "otsu-log": Otsu's exact one of the scores' logarithms, for ratios;
    "natural": 1 for ratios, 0 for gaps."""
    split: SplitRule = "score"
    """Which records the split makes shared, as many as score below the threshold: "score", those; the others are there
    to show what the score is good for: "random"; "reversed", those with the highest scores; "length-matched", drawn
    among records of like length, so that both sets are as long as the score's."""
    enabled: bool = True
    """false: the split after the warm-up stands."""
    threshold: Annotated[float, Field(ge=-1e6, le=1e6)] = 1.0
    """A personal record with a lower score is enrolled; where it isn't given, the score's natural threshold."""
    timing: Literal["same_round", "next_round"] = "same_round"
    """When enrolled records begin to train: at once, or in the next round as the original's do."""
    softness: Annotated[float, Field(ge=0.0, le=1e6)] = 0.0
    """s: a record's loss in the common training weighs 1 / (1 + exp(d / s)), d being how far its last score lies above
    the threshold: in nats per token for ratios, in parts of the NLL for gaps. 0: shared records train and personal ones
    don't (published). The larger, the more alike all are, up to FedAvg."""


class PersonalizationConfig(Section):
    """Tuning of the aggregated adapter on each client's own records."""

    epochs: Count = 10
    """At most so many passes; the one with the lowest validation loss is kept. 0: no personalisation."""
    learning_rate: Rate = 2e-4
    """AdamW's rate at the start; where it isn't given, `training.learning_rate`."""
    records: Literal["all", "personal", "shared"] = "all"
    """Which of the client's training records to tune on."""
    max_steps: Count = 0
    """At most so many optimiser steps; 0: as the epochs give."""
    personal_weight: Rate = 1.0
    """Where all are tuned on: how much the loss of a personal record weighs beside that of a shared one."""
    interpolation: Annotated[list[Annotated[float, Field(ge=0.0, le=10.0)]], Field(min_length=1)] = [1.0]
    """Values of beta to choose from: the personalised adapter is aggregated + beta (tuned - aggregated), with the beta
    whose validation loss is lowest, the smaller of equals; without validation records the largest. [1]: as tuned."""


class FedProxConfig(Section):
    """FedProx's own knobs."""

    mu: Annotated[float, Field(ge=0.0, le=1e6)] = 0.01
    """Weight of the pull to the received adapter: mu / 2 times the squared distance is added to the loss."""


class ScaffoldConfig(Section):
    """SCAFFOLD's own knobs."""

    learning_rate: Rate = 0.1
    """Rate of the local SGD, scheduled as `training.schedule` says; `training.learning_rate` is AdamW's. The paper
    tunes it; at this one a clipped step is about as long as one of AdamW at 2e-4 over 10^6 values."""
    server_rate: Rate = 1.0
    """How far the server goes towards the mean."""


class FedAvgMConfig(Section):
    """FedAvgM's own knobs."""

    beta: Fraction = 0.9
    """Server momentum: what stays of the earlier rounds' steps."""


class AdaptiveConfig(Section):
    """What FedAdagrad, FedAdam and FedYogi each have a table of."""

    eta: Rate = 1e-3
    """Server learning rate."""
    tau: Rate = 1e-3
    """Adaptivity: added to the root of the second moment, which begins at its square."""
    beta1: Fraction = 0.9
    """Decay of the first moment of the mean step."""


class MomentsConfig(AdaptiveConfig):
    """The same with a second moment that decays."""

    beta2: Fraction = 0.99
    """Decay of the second moment."""


class DittoConfig(Section):
    """Ditto's own knobs."""

    lam: Annotated[float, Field(ge=0.0, le=1e6)] = 0.1
    """Lambda: weight of the pull of the personal adapter to the received one."""
    epochs: Positive = 1
    """Passes of the personal training in each round, beside `training.epochs` of the common one."""


class FlexLoraConfig(Section):
    """FlexLoRA's own knobs."""

    ranks: list[Positive] = []
    """Ranks of the clients, dealt out in their order, again and again; none: all have `lora.r`. Whatever the rank, the
    scale is `lora.alpha / lora.r`."""


class FedDpaConfig(Section):
    """FedDPA's own knobs, of both variants."""

    weight: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.5
    """Of the local adapter's output while it is trained; the common one has the rest."""
    most: Annotated[float, Field(ge=0.0, le=1.0)] = 0.5
    """Highest weight of the local adapter at inference; a record's own is so much times its likeness."""
    references: Positive = 5
    """Training records that a record is compared with."""


class GenerationConfig(Section):
    """Decoding of the test records' responses: greedy, batched, masked."""

    enabled: bool = True
    """false: no responses are generated."""
    max_new_tokens: Count = 0
    """Longest response, in tokens; 0: the 99th percentile of the training responses, at most 256."""
    max_records: Count = 0
    """At most so many test records a client; 0: all."""
    batch_size: Positive = 16
    """Prompts decoded together."""


class EvaluationConfig(Section):
    """What is measured on the test records."""

    choices: Count = 4
    """Responses in the choice by likelihood: the reference and choices - 1 others of the same client. 0: no choice is
    scored, nor the options that instructions list."""
    bootstrap: Annotated[int, Field(ge=100)] = 1000
    """Resamples for the 95 % intervals."""

    @field_validator("choices")
    @classmethod
    def _none_or_two(cls, choices: int) -> int:
        if choices == 1:
            raise ValueError("a choice needs 2 or more, or 0 for none")
        return choices


class RuntimeConfig(Section):
    """The machine."""

    threads: Count = 0
    """Processor threads; 0: as many as are worth it on the cores that are free, measured at the start. Bytes repeat for
    the same number only; a run goes on with as many as it began with."""
    prefix_cache_mb: Count = 2048
    """Memory for what the blocks below the lowest adapter make of a record, which never changes; in 10^6 bytes."""


VARIANTS = "variants"
"""The table of a file that names variants for a comparison, `[variants.NAME]`: no part of a run's configuration."""

PRESETS: Mapping[str, Mapping[str, Mapping[str, Any]]] = MappingProxyType(
    {
        "original": {},
        "recommended": {
            "warmup": {"reset": False},
            "scoring": {"positions": "response"},
            "personalization": {"interpolation": [0.0, 0.25, 0.5, 0.75, 1.0]},
        },
    }
)
"""FedMIDE's knobs that a preset sets otherwise than the published method has them; docs/results.md says how the
recommended ones were chosen."""

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
    training record trains."""
    preset: PresetName = "original"
    """What fedmide's knobs are where nothing else is said: "original", the published method's, or "recommended": scores
    on the response, no restart after the warm-up, and a beta for each client by its validation records."""
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
        if not isinstance(values, dict) or values.get("method", "fedmide") == "fedmide":
            return values
        changes: dict[str, dict[str, Any]] = {"warmup": {"rounds": 0}, "personalization": {"records": "all"}}
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
        if enrollment.softness and enrollment.split != "score":
            raise ValueError(f"softness weighs records by their scores, which split {enrollment.split!r} sets aside")
        kind = "ratio" if scoring is None else scoring.kind
        if kind == "ratio" and enrollment.threshold <= 0:
            raise ValueError(f"threshold {enrollment.threshold} is not positive, as every ratio is")
        if kind != "ratio" and enrollment.rule == "otsu-log":
            raise ValueError("rule 'otsu-log' needs scoring.kind = 'ratio': a gap has no logarithm")
        return enrollment

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
