"""A federated algorithm as data plus a few pure functions.

On a site: the training of a round (`local`), the site's model after the last round (`own`) and its tuning (`tuning`).
On the server: its state (`begin`), the arrays that travel to a site (`down`) and back (`up`), and the server's step
(`combine`). A method is one value of `Method`; each has a short module.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

from fedmide.config import Config
from fedmide.data.tokens import Example
from fedmide.methods.aggregation import weighted_mean
from fedmide.model import adapters
from fedmide.model.adapters import Shapes
from fedmide.model.interface import PLAIN, Adapter, Epoch, LocalModel, Terms, TrainingPlan, after_training


@dataclass(frozen=True)
class Visit:
    """A round at a site: the arrays of the task, the method's state after earlier rounds, the training records.

    `method_state` is empty before the site's first round.
    """

    config: Config
    client: str
    round: int
    received: Adapter
    method_state: Adapter
    examples: Sequence[Example]


@dataclass(frozen=True)
class Trained:
    """The result of a round at a site: the arrays that travel, those that stay, and the training."""

    travels: Adapter
    work: Epoch
    method_state: Adapter = field(default_factory=dict)
    beside: Epoch | None = None
    """A second training in the same round, of arrays that do not travel."""


@dataclass(frozen=True)
class Common:
    """The server's state between two rounds: the common adapter, and other arrays of the method.

    `round` is the next one.
    """

    clients: tuple[str, ...]
    round: int
    adapter: Adapter
    method_state: Adapter = field(default_factory=dict)


@dataclass(frozen=True)
class Contribution:
    """The checked arrays of a client's reply, and the number of records that trained them."""

    client: str
    arrays: Adapter
    num_records: int


@dataclass(frozen=True)
class Sizes:
    """Values that a client trains in a round, and those at inference that can't be merged into the base weights."""

    trained_parameters: int
    extra_parameters: int = 0


def num_values(adapter: Adapter) -> int:
    """The number of values in all arrays."""
    return sum(array.size for array in adapter.values())


def one_adapter(adapter: Adapter, clients: Sequence[str], config: Config) -> Sizes:
    """One adapter is trained; at inference it can be merged."""
    return Sizes(num_values(adapter))


def two_adapters(adapter: Adapter, clients: Sequence[str], config: Config) -> Sizes:
    """Two adapters are trained, one is used."""
    return Sizes(2 * num_values(adapter))


def learn(
    visit: Visit,
    model: LocalModel,
    start: Adapter,
    terms: Terms = PLAIN,
    purpose: str = "training",
    **settings: float,
) -> Epoch:
    """The state after a local training from `start` on all of the site's records; its loss is over all passes.

    `settings` are changes to `[training]`; `purpose` names the random streams.
    """
    changed = visit.config.training.model_copy(update=settings)
    plan = TrainingPlan(changed, visit.config.seed, visit.round, visit.client, terms, purpose)
    return after_training(model, start, visit.examples, plan)


def train_received(visit: Visit, model: LocalModel) -> Trained:
    """FedAvg's local training: from the received adapter, which then travels back."""
    work = learn(visit, model, visit.received)
    return Trained(work.adapter, work)


def received(visit: Visit, model: LocalModel) -> Adapter:
    """The client's model is the common one."""
    return visit.received


def as_it_is(visit: Visit, model: LocalModel, adapter: Adapter) -> Adapter:
    """The same adapter."""
    return adapter


def rank_of_lora(config: Config) -> int:
    """The configured rank."""
    return config.lora.r


def twice_the_rank(config: Config) -> int:
    """The rank of two adapters as one."""
    return 2 * config.lora.r


def plain(visit: Visit) -> Terms:
    """Tuning without a term of the method."""
    return PLAIN


def only_the_adapter(fresh: Adapter, clients: Sequence[str], config: Config) -> Common:
    """The server begins with the fresh adapter and keeps nothing else."""
    return Common(tuple(clients), 0, fresh)


def whole_adapter(common: Common, client: str, config: Config) -> Adapter:
    """The whole common adapter travels to a client."""
    return common.adapter


def like_the_adapter(common: Common, client: str, config: Config) -> Shapes:
    """A reply has the common adapter's arrays."""
    return adapters.shapes(common.adapter)


def mean(common: Common, answers: Iterable[Contribution], config: Config) -> Common | None:
    """The common adapter is the clients' mean, weighted by records; A and B apart."""
    averaged = weighted_mean((answer.arrays, answer.num_records) for answer in answers)
    return None if averaged is None else replace(common, adapter=averaged)


@dataclass(frozen=True)
class Method:
    """A federated algorithm. The defaults are FedAvg's."""

    name: str
    """Its name in a configuration: a `MethodName`, or own:NAME."""
    summary: str
    """Its idea in one line."""
    source: str
    """Its publication."""
    local: Callable[[Visit, LocalModel], Trained] = train_received
    """A site's round; never called without records."""
    enrolls: bool = False
    """True: a site splits its records by score and trains the common model on the shared ones. False: on all."""
    remembers: bool = False
    """True if `Trained.method_state` stays at the site from round to round."""
    own: Callable[[Visit, LocalModel], Adapter] = received
    """The client's model after the last round, in which `visit.received` is what came with the last task."""
    tuning: Callable[[Visit], Terms] | None = None
    """The terms under which `own` is tuned for `personalization.epochs`; None: it is not tuned."""
    finish: Callable[[Visit, LocalModel, Adapter], Adapter] = as_it_is
    """The adapter for inference, out of the one that was tuned or not."""
    begin: Callable[[Adapter, Sequence[str], Config], Common] = only_the_adapter
    """The server's state before the first round, out of a fresh adapter."""
    down: Callable[[Common, str, Config], Adapter] = whole_adapter
    """The arrays that travel to a client."""
    up: Callable[[Common, str, Config], Shapes] = like_the_adapter
    """Names and shapes of the arrays that travel back; anything else is refused."""
    measured_from: Callable[[Common, str, Config], Adapter] | None = None
    """The start of a client's training, by the names of `up`: the length of an update is its distance from there.
    None: the arrays that travel down."""
    combine: Callable[[Common, Iterable[Contribution], Config], Common | None] = mean
    """The server's state after the replies; None if they have no weight at all: the state then stays as it was."""
    trainings: int = 1
    """Number of local trainings per client and round, of one adapter each."""
    travels: bool = True
    """False if nothing travels."""
    sizes: Callable[[Adapter, Sequence[str], Config], Sizes] = one_adapter
    """Counts of the values that a client works with, for an adapter of rank `lora.r`."""
    rank: Callable[[Config], int] = rank_of_lora
    """The rank that the network's layers need to have."""
    in_one_place: bool = False
    """True if it trains on the records of all clients together. No federation can: for research only."""
    traffic: str = "A and B, each way"
    """The traffic of a round, in words."""
