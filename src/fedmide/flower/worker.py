"""A site's worker: one process that keeps the records and the base model, and answers the node's messages.

Flower starts a new process for every message; each would load the model again. The worker listens on a socket that
only the site's user can reach. It loads the model when the first message comes, and works on one message at a time.
"""

import time
from contextlib import closing, suppress
from multiprocessing.connection import Connection
from pathlib import Path

from fedmide import terminal
from fedmide.errors import UserError
from fedmide.federation.codec import encode_trouble
from fedmide.federation.messages import Trouble
from fedmide.federation.runtimes.link import accepted, listening, socket_path
from fedmide.flower.site_folder import SiteFolder
from fedmide.runs.site import Site


def work(folder: Path) -> None:
    """Answers frames until the process is ended."""
    opened = SiteFolder.read(folder)
    site: Site | None = None
    with listening(socket_path(folder, "worker")) as listener:
        tell("waiting for messages")
        while (connection := accepted(listener, lambda: True)) is not None:
            with closing(connection):
                frame = _received(connection)
                if frame is not None:
                    site = site or _open(opened)
                    answer = site.answer(frame) if site else encode_trouble(Trouble(opened.name, "site"))
                    with suppress(OSError):  # the process that asked may have ended; the site keeps its answer
                        connection.send_bytes(answer)


def _received(connection: Connection) -> bytes | None:
    """The frame that was sent; None if the sender has ended."""
    try:
        return connection.recv_bytes()
    except (EOFError, OSError):
        return None


def _open(opened: SiteFolder) -> Site | None:
    """The site with its model; None if it can't be opened.

    The reason is then in the log, and the next message tries again.
    """
    try:
        return opened.site(tell)
    except (UserError, OSError) as error:
        tell(f"{type(error).__name__}: {error}")
        return None


def tell(message: str) -> None:
    """Writes a message to the site's own log."""
    terminal.tell(f"{time.strftime('%Y-%m-%dT%H:%M:%S')} worker: {message}")
