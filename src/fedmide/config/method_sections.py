"""The settings that belong to one method: each method that has any has a section of its name."""

from typing import Annotated

from pydantic import Field

from fedmide.config.sections import Count, Fraction, Positive, Rate, Section


class FedProxConfig(Section):
    """Settings of FedProx."""

    mu: Annotated[float, Field(ge=0.0, le=1e6)] = 0.01
    """Weight of the pull towards the received adapter: mu / 2 times the squared distance is added to the loss."""


class ScaffoldConfig(Section):
    """Settings of SCAFFOLD."""

    learning_rate: Rate = 0.1
    """Learning rate of the local SGD, scheduled by `training.schedule`; `training.learning_rate` is for AdamW only. The
    paper tunes this rate. At the default, a clipped step is about as long as a step of AdamW at 2e-4 over 10^6
    values."""
    server_rate: Rate = 1.0
    """Step of the server towards the mean; 1: the mean itself."""


class FedAvgMConfig(Section):
    """Settings of FedAvgM."""

    beta: Fraction = 0.9
    """Server momentum: the fraction of the earlier steps that is kept in each round."""


class AdaptiveConfig(Section):
    """Settings that FedAdagrad, FedAdam and FedYogi share; each has a table of its own."""

    eta: Rate = 1e-3
    """Server learning rate."""
    tau: Rate = 1e-3
    """Adaptivity: added to the root of the second moment. The second moment starts at tau squared."""
    beta1: Fraction = 0.9
    """Decay of the first moment of the mean step."""


class MomentsConfig(AdaptiveConfig):
    """Settings of FedAdam and FedYogi: the same, with a second moment that decays."""

    beta2: Fraction = 0.99
    """Decay of the second moment."""


class DittoConfig(Section):
    """Settings of Ditto."""

    lam: Annotated[float, Field(ge=0.0, le=1e6)] = 0.1
    """Lambda: weight of the pull of the site's personal adapter towards the received one."""
    epochs: Positive = 1
    """Passes of the personal training in each round, in addition to the `training.epochs` passes of the common
    training."""
    max_steps: Count = 0
    """Maximum number of optimizer steps of the personal training per round. 0: as `training.max_steps`."""


class FlexLoraConfig(Section):
    """Settings of FlexLoRA."""

    ranks: list[Positive] = []  # noqa: RUF012  # pydantic copies a default
    """Ranks of the sites, in their order; a list that is too short is repeated. Empty: all sites have `lora.r`. The
    scale is `lora.alpha / lora.r` for every rank."""


class FedDpaConfig(Section):
    """Settings of FedDPA, for both variants."""

    weight: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.5
    """Weight of the local adapter's output during its training. The common adapter gets 1 - weight."""
    most: Annotated[float, Field(ge=0.0, le=1.0)] = 0.5
    """Maximum weight of the local adapter at inference. For each record it is multiplied by the record's similarity to
    the site's training records."""
    references: Positive = 5
    """Number of training records with which a record is compared."""
    max_steps: Count = 0
    """Maximum number of optimizer steps of feddpa-t's local adapter per round. A site's first round trains no local
    adapter and gives these steps to the common adapter. 0: as `training.max_steps`, without extra steps in the first
    round."""
