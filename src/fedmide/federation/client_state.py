"""What a site holds between rounds."""

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace

from fedmide import methods
from fedmide.config import Config
from fedmide.data.records import RecordId
from fedmide.data.tokens import Example
from fedmide.federation.ledger import Ledger, before
from fedmide.model.interface import Adapter


@dataclass(frozen=True)
class Memory:
    """What a method keeps on the site after a round that it trained in; it never leaves."""

    round: int
    arrays: Adapter


@dataclass(frozen=True)
class ClientState:
    """A site: its training and validation records as examples, the configuration, and its ledger so far.

    `memory` is of the last two rounds that kept any, so that the last can be handled again. `adapter` is the
    personalised one, once there is one; it never leaves.
    """

    name: str
    federation: str
    config: Config
    training: Mapping[RecordId, Example]
    validation: Sequence[Example]
    ledger: Ledger = ()
    memory: tuple[Memory, ...] = ()
    adapter: Adapter | None = None

    def before(self, round_number: int) -> "ClientState":
        """The state with what earlier rounds left, and no more."""
        kept = tuple(memory for memory in self.memory if memory.round < round_number)
        return replace(self, ledger=before(self.ledger, round_number), memory=kept)


def keeps_memory(config: Config) -> bool:
    """Whether sites keep anything but their ledgers from round to round."""
    return methods.of(config).remembers or config.keeps_own


def is_lost(kept: Sequence[Memory], trained_in: int) -> bool:
    """Whether what a round that a site trained in left there is missing: that of the round, or of a later one."""
    return all(memory.round < trained_in for memory in kept)


def has_trained(metrics: Container[str]) -> bool:
    """Whether a reply with these metrics comes of a training; where nothing travels no adapter tells."""
    return "steps" in metrics
