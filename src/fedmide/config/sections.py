"""The sections of a configuration: every setting with its meaning, unit and default.

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
"""The federated algorithms. `methods` and docs/methods.md describe each."""


OWN_METHOD = re.compile(r"own:[a-z0-9][a-z0-9-]{0,40}")
"""Names of methods that the calling program adds to those of the package: `methods.register`."""


Quantization = Literal["none", "int8", "nf4"]
Device = Literal["auto", "cpu", "cuda", "mps"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]


NATURAL: Mapping[ScoreKind, float] = MappingProxyType({"ratio": 1.0, "relative-gap": 0.0})
"""The score of a record that has the same NLL under both adapters, by kind of score."""


Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(gt=0.0, le=1e6)]


class Section(BaseModel):
    """A group of settings: frozen, and closed to unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)


class FieldNames(Section):
    """Names of the fields of a record in the user's files."""

    instruction: str = "instruction"
    """Field with the question or task."""
    context: str = "context"
    """Field with the text that the question is about. The field may be absent."""
    response: str = "response"
    """Field with the answer to learn."""
    category: str = "category"
    """Field with a label of the record's kind. The field may be absent."""
    concept: str = "concept"
    """Field with the subject of the record. The field may be absent. Records with the same concept stay in the same
    split."""
    client: str = "client"
    """Field with the name of the site that owns the record, if one file holds all sites."""
    part: str = ""
    """Field that says training, validation or test, if one file holds all splits of a site. "": none."""


class DataConfig(Section):
    """The source of the records and their split into training, validation and test."""

    source: DataSource = "published"
    """"published": the layout of the published data. "files": one file per site. "table": one file with a client
    column. "medical": demo sites made from Python packages."""
    path: str = ""
    """Folder or file to read, relative to the working directory. "medical" does not use it."""
    fields: FieldNames = FieldNames()
    """Names of the fields in the files."""
    clients: Annotated[int, Field(ge=0)] = 0
    """Number of sites to take, in order. 0: all ("medical": 8)."""
    max_records: Count = 0
    """Maximum number of training records per site, drawn with the run's seed. 0: all ("medical": 48)."""
    max_validation_records: Count = 0
    """Maximum number of validation records per site. 0: all ("medical": 12)."""
    max_test_records: Count = 0
    """Maximum number of test records per site. 0: all ("medical": 24)."""
    validation_fraction: Fraction = 0.1
    """Fraction of the training records held out for validation, if a site has no validation records. They choose the
    epoch of the tuning."""
    test_fraction: Fraction = 0.2
    """Fraction of the records held out for testing, if a site has no test records."""
    pieces: Positive = 1
    """Split every site into this many sites, before the size limits are applied: with 5, 8 sites become 40."""
    noisy_clients: Count = 0
    """Number of sites whose training responses are swapped among their own records, to measure the effect of wrong
    labels."""
    seed: Annotated[int, Field(ge=-1)] = -1
    """Seed of the draws and splits of the records, and of the choices in the evaluation. -1: the run's seed."""


class ModelConfig(Section):
    """The frozen base model."""

    name: str = "smollm2-135m"
    """A folder, a hub id, `smollm2-135m` (from a Python package) or `tiny-random` (for tests)."""
    dtype: Dtype = "auto"
    """Type of the base weights. "auto": bfloat16 if the processor or GPU computes with it, else float32. float16 is for
    GPUs without bfloat16."""
    quantization: Quantization = "none"
    """"int8" or "nf4" (4 bits): store the base's linear layers with bitsandbytes. This saves memory, not time."""
    device: Device = "auto"
    """"auto": a CUDA GPU if there is one, else the processor."""
    cutoff: Annotated[int, Field(ge=8)] = 512
    """Maximum length of a record in tokens, prompt and response together."""


class PromptConfig(Section):
    """The form in which the model sees a record: a prompt and a response."""

    template: str = "alpaca"
    """`alpaca`, `plain`, `chat` (the tokenizer's own), or a TOML file with `with_context` and `without_context`."""
    overflow: Literal["refuse", "cut"] = "refuse"
    """Treatment of a prompt that leaves no room for a response. "refuse": stop with an error. "cut": cut its context,
    then its instruction."""


class LoraConfig(Section):
    """The adapter that every site trains."""

    r: Positive = 8
    """Rank of the adapter's matrices."""
    alpha: Rate = 16.0
    """Scale of the adapter: the update of a weight matrix is alpha / r * B A."""
    dropout: Fraction = 0.05
    """Dropout rate on the adapter's input during training."""
    targets: str | list[str] = ["q_proj", "v_proj"]
    """Names of the linear layers that get an adapter, or "all-linear"."""
    blocks: Annotated[str, Field(pattern=r"^(all|top:[1-9][0-9]*)$")] = "all"
    """Transformer blocks that get an adapter: "all", or "top:N" for the last N."""


class TrainingConfig(Section):
    """Local training within one round."""

    epochs: Positive = 1
    """Passes over the shared records in each round."""
    max_steps: Count = 0
    """Maximum number of optimizer steps per round. 0: no limit, so the epochs decide."""
    batch_size: Positive = 32
    """Number of records per optimizer step."""
    learning_rate: Rate = 2e-4
    """AdamW's learning rate at the start of the local training."""
    schedule: Literal["linear", "constant"] = "linear"
    """"linear": the rate falls to 0 within the local training of each round. "constant": it stays."""
    weight_decay: Annotated[float, Field(ge=0.0, le=1e6)] = 0.0
    """AdamW's decoupled weight decay."""
    max_grad_norm: Rate = 1.0
    """Norm to which gradients are clipped."""
    positions: Positions = "all"
    """Tokens that count in the loss: "all" (prompt and response) or "response"."""
    tokens_per_batch: Annotated[int, Field(ge=16)] = 1024
    """Number of tokens per pass through the model. Several passes make one optimizer step. It changes results only by
    rounding and by the draws of dropout."""
    checkpointing: bool = False
    """true: keep only the input of each block and compute the block again in the backward pass. This takes less memory
    and a third more work."""


class FederationConfig(Section):
    """The federated rounds."""

    rounds: Count = 20
    """T, the number of federated rounds after the warm-up."""
    participation: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Fraction of the sites that train in a round; at least one does."""


class RepliesConfig(Section):
    """Conditions that the server sets for replies. Each server has its own."""

    quorum: Annotated[float, Field(ge=0.0, le=1.0)] = 0.5
    """Fraction of the asked sites whose replies must count, if sites are other processes. With fewer the run stops and
    can be resumed from the round before."""
    deadline_seconds: Annotated[float, Field(gt=0.0, le=1e6)] = 3600.0
    """Seconds that a round waits for sites that are other processes: first until they are connected, then until they
    answer."""
    max_update_norm: Annotated[float, Field(ge=0.0, le=1e30)] = 0.0
    """Maximum Euclidean norm of an update, that is, of the change by a site's training in the arrays that it sends. 0:
    no limit."""
    oversized: Literal["refuse", "clip"] = "refuse"
    """Treatment of an update with a larger norm. "refuse": its reply does not count. "clip": it is scaled down to the
    limit."""


class WarmupConfig(Section):
    """FedAvg on all records, before they are split into shared and personal ones."""

    rounds: Count = 1
    """W, the number of warm-up rounds. 0: no split, so all records are shared."""
    reset: bool = True
    """true: start the federated rounds from a fresh adapter. false: continue from the adapter of the warm-up."""
    max_steps: Count = 0
    """Maximum number of optimizer steps per warm-up round. 0: as `training.max_steps`."""
    folds: Annotated[int, Field(ge=1, le=2)] = 1
    """1: the local adapter that scores a record has trained on it (published). 2: two adapters train in the last
    warm-up round, each on half of the records for half of the steps. The one that did not see a record scores it, and
    the site sends their mean."""


class ScoringConfig(Section):
    """The definition of a record's score."""

    positions: Positions = "all"
    """Tokens that count in the NLL: "all" (published) or "response"."""
    kind: ScoreKind = "ratio"
    """"ratio": exp(NLL_aggregated - NLL_local), with the natural threshold 1 (published). "relative-gap":
    (NLL_aggregated - NLL_local) / NLL_aggregated, with the natural threshold 0. NLL_aggregated is measured under the
    common adapter."""
    without_own: bool = False
    """true: a site subtracts its own adapter from the common adapter before it scores. For this the server sends each
    site the number of records that trained the common adapter, in total and from this site."""
    tokens_per_batch: Annotated[int, Field(ge=16)] = 2048
    """Number of tokens per pass through the model. It changes results only by rounding."""


class EnrollmentConfig(Section):
    """The split into shared and personal records, and the later enrollment of personal ones."""

    rule: ThresholdRule = "otsu-256"
    """Rule for the threshold of the split after the warm-up. "otsu-256", "otsu-exact": Otsu's threshold, with 256 bins
    or exact. "otsu-log": the exact one of the scores' logarithms, for ratios. The median and the quartiles share a
    fixed fraction of the records. "natural": 1 for ratios, 0 for gaps."""
    split: SplitRule = "score"
    """Records that become shared; their number is that of the scores below the threshold. "score": the records with
    these scores. The others are controls that show the value of the score. "random": drawn. "reversed": those with the
    highest scores. "length-matched": drawn among records of similar length, so that both sets are as long as the
    score's."""
    enabled: bool = True
    """false: the split after the warm-up is final."""
    threshold: Annotated[float, Field(ge=-1e6, le=1e6)] = 1.0
    """Score below which a personal record is enrolled. If it is not set, the natural threshold of the score."""
    choice: Literal["score", "random"] = "score"
    """Personal records that a round enrolls; their number is that of the scores below the threshold. "score": the
    records with these scores. "random": drawn, as a control that shows the value of the score."""
    timing: Literal["same_round", "next_round"] = "same_round"
    """Round in which enrolled records begin to train: at once, or in the next round, as in the original."""
    softness: Annotated[float, Field(ge=0.0, le=1e6)] = 0.0
    """Softness s: the weight of a record's loss in the common training is 1 / (1 + exp(d / s)). Here d is the distance
    of its last score above the threshold: in nats per token for ratios, as a fraction of the NLL for gaps. 0: only
    shared records train (published). A larger s makes all weights more equal, up to FedAvg."""


class PersonalizationConfig(Section):
    """Tuning at each site: the common adapter, or the site's local adapter, trains on the site's own records."""

    epochs: Count = 10
    """Maximum number of passes. The pass with the lowest validation loss is kept. 0: no tuning."""
    learning_rate: Rate = 2e-4
    """AdamW's learning rate at the start. If it is not set, `training.learning_rate`."""
    start: Literal["aggregated", "own"] = "aggregated"
    """Adapter to tune. "aggregated": the common adapter. "own": the site's local adapter of the last round, as it was
    before it was averaged with the others; the common adapter if the site did not train in that round. The tuned
    adapter stays on the site. For fedmide and fedavg-ft."""
    records: Literal["all", "personal-first", "personal", "shared"] = "all"
    """Training records to tune on. "personal-first": all, with the personal records first in every pass. If there are
    fewer steps than records, shared records are left out."""
    max_steps: Count = 0
    """Maximum number of optimizer steps. 0: no limit, so the epochs decide."""
    personal_weight: Rate = 1.0
    """Weight of a personal record's loss, if all records are tuned on. A shared record has weight 1."""
    interpolation: Annotated[list[Annotated[float, Field(ge=0.0, le=10.0)]], Field(min_length=1)] = [1.0]
    """Values of beta to choose from. The final adapter is aggregated + beta (tuned - aggregated). The beta with the
    lowest validation loss is chosen, of equal ones the smaller; without validation records, the largest. [1]: as
    tuned."""


class GenerationConfig(Section):
    """Generation of responses to the test records: greedy, in masked batches."""

    enabled: bool = True
    """false: no responses are generated."""
    max_new_tokens: Count = 0
    """Maximum length of a response in tokens. 0: the 99th percentile of the training responses, at most 256."""
    max_records: Count = 0
    """Maximum number of test records per site. 0: all."""
    batch_size: Positive = 16
    """Number of prompts that are decoded together."""


class EvaluationConfig(Section):
    """Measurements on the test records."""

    choices: Count = 4
    """Number of responses in the multiple choice by NLL: the reference and choices - 1 others of the same site. 0: no
    choice is scored, nor the options that instructions list."""
    bootstrap: Annotated[int, Field(ge=100)] = 1000
    """Number of resamples for the 95 % intervals."""

    @field_validator("choices")
    @classmethod
    def _none_or_two(cls, choices: int) -> int:
        if choices == 1:
            raise ValueError("a choice needs 2 or more, or 0 for none")
        return choices


class RuntimeConfig(Section):
    """Use of the machine: processor threads and memory."""

    threads: Count = 0
    """Number of processor threads. 0: measured at the start on the free cores. Results repeat byte for byte only with
    the same number; a resumed run uses the number that it began with."""
    prefix_cache_mb: Count = 2048
    """Memory in MB (10^6 bytes) for the cached outputs of the blocks below the lowest adapter. They never change."""
