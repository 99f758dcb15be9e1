"""All clients in this process, one after the other, on one resident base model.

Every message is encoded and decoded with the codec of the wire. So its bytes are counted, and nothing passes that could
not cross a network.
"""

import time
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass

from fedmide.federation.client import handle
from fedmide.federation.client_state import ClientState
from fedmide.federation.codec import decode_reply, decode_task, encode_reply, encode_tasks
from fedmide.federation.messages import ClientTask
from fedmide.federation.server import Delivery
from fedmide.model.interface import LocalModel


@dataclass(frozen=True)
class InProcess:
    """A runtime: call it with tasks. `sites` is updated in place; `save` gets each state before its reply returns."""

    sites: MutableMapping[str, ClientState]
    model: LocalModel
    save: Callable[[ClientState], None]

    def __call__(self, tasks: Sequence[ClientTask]) -> Iterator[Delivery]:
        """The replies, in the tasks' order."""
        for task, down in zip(tasks, encode_tasks(tasks), strict=True):
            yield self._deliver(task, down)

    def _deliver(self, task: ClientTask, down: bytes) -> Delivery:
        begun = time.perf_counter()
        reply, state = handle(decode_task(down), self.sites[task.client], self.model)
        self.sites[task.client] = state
        self.save(state)
        seconds = time.perf_counter() - begun
        up = encode_reply(reply)
        return Delivery(task.client, decode_reply(up), "", len(down), len(up), seconds)
