"""What a federated algorithm is: data plus a few pure functions.

On a site: how a round trains (`local`), what model the client ends with (`own`) and whether that is then tuned on its
own records. On the server: what it keeps (`begin`), what travels to a client (`down`), which arrays a reply has (`up`),
and what becomes of the replies (`combine`). A method is one value of these; each stands in a short module.
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
    """A round as a site sees it: what came with the task, what it kept of its earlier rounds, its training records.

    `memory` is empty before the site's first round.
    """

    config: Config
    client: str
    round: int
    received: Adapter
    memory: Adapter
    examples: Sequence[Example]


@dataclass(frozen=True)
class Trained:
    """What comes of a round on a site: what travels, what stays, and the work that it took."""

    travels: Adapter
    work: Epoch
    memory: Adapter = field(default_factory=dict)
    beside: Epoch | None = None
    """A second training in the same round, of what does not travel."""


@dataclass(frozen=True)
class Common:
    """What the server holds between two rounds: the common model's adapter, and what else the method keeps.

    `round` is the one to come.
    """

    clients: tuple[str, ...]
    round: int
    adapter: Adapter
    memory: Adapter = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """What a client's reply brings that has been checked; `num_records` trained it."""

    client: str
    arrays: Adapter
    num_records: int


@dataclass(frozen=True)
class Sizes:
    """How many values a client trains in a round, and how many it needs at inference that can't be merged into the
    base weights."""

    trained_parameters: int
    extra_parameters: int = 0


def num_values(adapter: Adapter) -> int:
    """How many values the arrays hold together."""
    return sum(array.size for array in adapter.values())


def one_adapter(adapter: Adapter, clients: Sequence[str], config: Config) -> Sizes:
    """One adapter is trained; at inference it can be merged."""
    return Sizes(num_values(adapter))


def two_adapters(adapter: Adapter, clients: Sequence[str], config: Config) -> Sizes:
    """Two are trained, one is used."""
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
    """Local training from the received adapter, which then travels back: FedAvg's."""
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
    """That of two adapters as one."""
    return 2 * config.lora.r


def plain(visit: Visit) -> Terms:
    """Tuning as it is without a method."""
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


def mean(common: Common, answers: Iterable[Answer], config: Config) -> Common | None:
    """The common adapter is the clients' mean, weighted by records; A and B apart."""
    averaged = weighted_mean((answer.arrays, answer.num_records) for answer in answers)
    return None if averaged is None else replace(common, adapter=averaged)


@dataclass(frozen=True)
class Method:
    """A federated algorithm. The defaults are FedAvg's."""

    name: str
    """How a configuration chooses it: its `MethodName`, or own:NAME."""
    summary: str
    """One line: what it does."""
    source: str
    """Where it was published."""
    local: Callable[[Visit, LocalModel], Trained] = train_received
    """A site's round; never called without records."""
    remembers: bool = False
    """Whether `Trained.memory` stays on the site from round to round."""
    own: Callable[[Visit, LocalModel], Adapter] = received
    """The client's model after the last round, in which `visit.received` is what came with the last task."""
    tuning: Callable[[Visit], Terms] | None = None
    """How that is then tuned for `personalization.epochs`; None: it isn't."""
    finish: Callable[[Visit, LocalModel, Adapter], Adapter] = as_it_is
    """What is kept of that, tuned or not, for inference."""
    begin: Callable[[Adapter, Sequence[str], Config], Common] = only_the_adapter
    """What the server holds before the first round, out of a fresh adapter."""
    down: Callable[[Common, str, Config], Adapter] = whole_adapter
    """The arrays that travel to a client."""
    up: Callable[[Common, str, Config], Shapes] = like_the_adapter
    """Names and shapes of the arrays that travel back; anything else is refused."""
    measured_from: Callable[[Common, str, Config], Adapter] | None = None
    """What a client's training begins with, by the names of `up`: the length of its update is counted from there. None:
    with what travels down."""
    combine: Callable[[Common, Iterable[Answer], Config], Common | None] = mean
    """The server's state after the replies; None where they have no weight at all, then it stays as it was."""
    trainings: int = 1
    """How many local trainings a client does in a round, of one adapter each."""
    travels: bool = True
    """Whether anything does."""
    sizes: Callable[[Adapter, Sequence[str], Config], Sizes] = one_adapter
    """How many values a client works with, out of an adapter of rank `lora.r`."""
    rank: Callable[[Config], int] = rank_of_lora
    """The rank that the network's layers need to have."""
    in_one_place: bool = False
    """Whether it trains on all clients' records together, which no federation could: for research only."""
    traffic: str = "A and B, each way"
    """What travels in a round, in words: for people."""
