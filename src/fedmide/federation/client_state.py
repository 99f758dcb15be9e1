"""The state of a site between rounds."""

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace

from fedmide import methods
from fedmide.config import Config
from fedmide.data.records import RecordId
from fedmide.data.tokens import Example
from fedmide.federation.ledger import Ledger, before
from fedmide.model.interface import Adapter


@dataclass(frozen=True)
class MethodState:
    """Arrays that a method keeps at the site after a round of training. They never leave it."""

    round: int
    arrays: Adapter


@dataclass(frozen=True)
class ClientState:
    """A site: its training and validation records as examples, the configuration, and its ledger so far.

    `method_state`: of the last two rounds that kept any, so that the last one can be handled again.
    `adapter`: the tuned adapter, after personalization; it never leaves.
    """

    name: str
    federation: str
    config: Config
    training: Mapping[RecordId, Example]
    validation: Sequence[Example]
    ledger: Ledger = ()
    method_state: tuple[MethodState, ...] = ()
    adapter: Adapter | None = None

    def before(self, round_number: int) -> "ClientState":
        """The state as earlier rounds left it."""
        kept = tuple(each for each in self.method_state if each.round < round_number)
        return replace(self, ledger=before(self.ledger, round_number), method_state=kept)


def keeps_method_state(config: Config) -> bool:
    """True if sites keep more than their ledgers from round to round."""
    return methods.of(config).remembers or config.keeps_own


def is_lost(kept: Sequence[MethodState], trained_in: int) -> bool:
    """True if the method state of a round of training is missing, and that of every later round too."""
    return all(each.round < trained_in for each in kept)


def has_trained(metrics: Container[str]) -> bool:
    """True if the site trained. Replies of methods that send no adapter are recognized by their `steps` metric."""
    return "steps" in metrics
