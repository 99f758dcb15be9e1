"""The sections of a configuration: every knob with its meaning, unit and default.

The defaults are those of the published method. `config` puts the sections together and reads them.
"""

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

Positions = Literal["all", "response"]


DataSource = Literal["published", "files", "table", "medical"]


ThresholdRule = Literal["otsu-256", "otsu-exact", "otsu-log", "lower-quartile", "median", "upper-quartile", "natural"]


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
    """Largest Euclidean length of what a client's training added to the arrays that it sends; 0: any."""
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
    median and quartiles make a fixed part of the records shared; "natural": 1 for ratios, 0 for gaps."""
    split: SplitRule = "score"
    """Which records the split makes shared, as many as score below the threshold: "score", those; the others are there
    to show what the score is good for: "random"; "reversed", those with the highest scores; "length-matched", drawn
    among records of like length, so that both sets are as long as the score's."""
    enabled: bool = True
    """false: the split after the warm-up stands."""
    threshold: Annotated[float, Field(ge=-1e6, le=1e6)] = 1.0
    """A personal record with a lower score is enrolled; where it isn't given, the score's natural threshold."""
    choice: Literal["score", "random"] = "score"
    """Which personal records a round enrolls, as many as score below the threshold: "score", those; "random", drawn, to
    show what the score is good for."""
    timing: Literal["same_round", "next_round"] = "same_round"
    """When enrolled records begin to train: at once, or in the next round as the original's do."""
    softness: Annotated[float, Field(ge=0.0, le=1e6)] = 0.0
    """s: a record's loss in the common training weighs 1 / (1 + exp(d / s)), d being how far its last score lies above
    the threshold: in nats per token for ratios, in parts of the NLL for gaps. 0: shared records train and personal ones
    don't (published). The larger, the more alike all are, up to FedAvg."""


class PersonalizationConfig(Section):
    """Tuning of the aggregated adapter, or of each site's own, on its own records."""

    epochs: Count = 10
    """At most so many passes; the one with the lowest validation loss is kept. 0: no personalisation."""
    learning_rate: Rate = 2e-4
    """AdamW's rate at the start; where it isn't given, `training.learning_rate`."""
    start: Literal["aggregated", "own"] = "aggregated"
    """Which adapter is tuned; "own": the site's own one of the last round, as it was before the others' went into the
    mean, and the aggregated one where the site did not train in that round. It stays on the site. fedmide's and
    fedavg-ft's."""
    records: Literal["all", "personal-first", "personal", "shared"] = "all"
    """Which of the client's training records to tune on; "personal-first": all, in every pass those of the personal
    set first, so that fewer steps than records leave out shared ones."""
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
    max_steps: Count = 0
    """At most so many optimiser steps of it in a round; 0: as `training.max_steps` says."""


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
    max_steps: Count = 0
    """At most so many optimiser steps of feddpa-t's local adapter in a round; a client's first round, which trains none
    yet, gives them to the common one. 0: as `training.max_steps` says, and none in the first."""


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
