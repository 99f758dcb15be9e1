"""The apps that Flower runs, one at the server and one at each site: they pass frames on.

No other module imports flwr.

    fedmide run  <- socket ->  server_app  <- Flower ->  client_app  <- socket ->  the site's worker

The loop, the run folder, the records and the model are in fedmide's processes. Flower neither starts nor ends these.
Flower learns nothing of an error at a site, because it would send the exception's text to the server.
In a simulation there is no worker: the client app answers by itself, in the process that Ray gave it.
"""

import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedmide.errors import MessageError
from fedmide.federation.codec import encode_trouble, split_frame
from fedmide.federation.messages import Trouble
from fedmide.federation.runtimes.link import Answered, connected, serve
from fedmide.flower.variables import LINK, RUN, SITE

_PAUSE_SECONDS = 0.25


_CONNECT_SECONDS = 60.0


server_app = ServerApp()


client_app = ClientApp()


@server_app.main()
def main(grid: Grid, context: Context) -> None:
    """Gives the process that runs the rounds access to the grid, until that process ends."""
    serve(connected(Path(os.environ[LINK]), _CONNECT_SECONDS), GridExchange(grid))


@client_app.query()
@client_app.train()
def answer(message: Message, context: Context) -> Message:
    """The site's answer to a message. If an error occurs, the answer reports trouble, without the error's text."""
    try:
        records = records_of(*_split(_worked(frame_of(message.content), context)))
    except Exception:  # noqa: BLE001 - Flower would send the exception's text to the server
        records = records_of(encode_trouble(Trouble("", "worker")), b"")
    return Message(records, reply_to=message)


class GridExchange:
    """Flower's grid as an `Exchange`."""

    def __init__(self, grid: Grid) -> None:
        self.grid = grid

    def nodes(self) -> list[int]:
        """The connected nodes."""
        return sorted(self.grid.get_node_ids())

    def ask(self, frames: Iterable[tuple[int, bytes]], seconds: float) -> Iterator[Answered]:
        """The nodes' answers as they arrive, each with the node that was asked.

        It waits for `seconds` at most.
        """
        waiting: dict[str, int] = {}
        until = time.monotonic() + seconds
        adapter = b""
        for node, frame in frames:
            head, payload = split_frame(frame)
            adapter = adapter if adapter == payload else payload  # one copy, whatever the number of sites
            content = records_of(head, adapter)
            kind = "train" if payload else "query"
            message = Message(content, dst_node_id=node, message_type=kind, ttl=max(1.0, seconds))
            for name in self.grid.push_messages([message]):
                waiting[name] = node
        while waiting and time.monotonic() < until:
            replies = list(self.grid.pull_messages(list(waiting)))
            for reply in replies:
                asked = waiting.pop(reply.metadata.reply_to_message_id, -1)
                if asked >= 0:
                    yield _answered(asked, reply)
            if not replies:
                time.sleep(_PAUSE_SECONDS)


def records_of(head: bytes, adapter: bytes) -> RecordDict:
    """A frame's head and adapter as Flower's records. Sites that get the same adapter share one array."""
    records = RecordDict({"head": ConfigRecord({"frame": head})})
    if adapter:
        records["adapter"] = ArrayRecord({"frame": Array("uint8", (len(adapter),), "bytes", adapter)})
    return records


def frame_of(records: RecordDict) -> bytes:
    """The frame in Flower's records."""
    head = records.config_records["head"]["frame"]
    if not isinstance(head, bytes):
        raise TypeError("the head of a frame must be bytes")
    arrays = records.array_records
    return head + arrays["adapter"]["frame"].data if "adapter" in arrays else head


def _answered(node: int, reply: Message) -> Answered:
    if reply.has_error():
        return Answered(node, b"", f"the site can't be reached (Flower's error {reply.error.code})")
    try:
        return Answered(node, frame_of(reply.content))
    except (KeyError, TypeError, AttributeError):
        return Answered(node, b"", "the site's answer can't be read: it is not a frame")


def _split(frame: bytes) -> tuple[bytes, bytes]:
    """The frame's head and adapter. If the frame can't be read, all of it is the head, and the receiver refuses it."""
    try:
        return split_frame(frame)
    except MessageError:
        return frame, b""


def _worked(frame: bytes, context: Context) -> bytes:
    """The answer of the site's worker. In a simulation, this process answers by itself."""
    if site := os.environ.get(SITE):
        from fedmide.flower.asking import ask

        return ask(Path(site), frame)
    from fedmide.flower.simulated_site import site_of

    return site_of(Path(os.environ[RUN]), int(context.node_config["partition-id"])).answer(frame)
