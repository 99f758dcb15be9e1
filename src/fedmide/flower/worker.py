"""A site's worker: one process that keeps the records and the base model and answers what the node passes on.

Flower starts a new process for every message; each would load the model again. The worker listens on a socket that
only the site's user can reach, loads the model when the first message comes, and works on one message at a time.
"""

import time
from contextlib import closing, suppress
from multiprocessing.connection import Connection
from pathlib import Path

from fedmide import console
from fedmide.errors import UserError
from fedmide.flower.sitefolder import SiteFolder
from fedmide.messages import Trouble, encode_trouble
from fedmide.runtimes.link import accepted, connected, listening, socket_path
from fedmide.site import Site

_WAIT_SECONDS = 60.0
"""How long a node waits for a worker that is being started."""


def ask(folder: Path, frame: bytes) -> bytes:
    """The answer of the site's worker to a frame; raises where there is none."""
    with closing(connected(socket_path(folder, "worker"), _WAIT_SECONDS)) as connection:
        connection.send_bytes(frame)
        return connection.recv_bytes()


def work(folder: Path) -> None:
    """Answers frames until the process is ended."""
    opened = SiteFolder.read(folder)
    site: Site | None = None
    with listening(socket_path(folder, "worker")) as listener:
        tell("waiting for messages")
        while (connection := accepted(listener, lambda: True)) is not None:
            with closing(connection), suppress(EOFError, OSError):  # the asker may be gone: the answer is kept
                frame = connection.recv_bytes()
                site = site or _open(opened)
                _answer(connection, site, opened.name, frame)


def _answer(connection: Connection, site: Site | None, name: str, frame: bytes) -> None:
    connection.send_bytes(site.answer(frame) if site else encode_trouble(Trouble(name, "site")))


def _open(opened: SiteFolder) -> Site | None:
    """The site with its model; None, and the reason in the log, where it can't be opened, to be tried again."""
    try:
        return opened.site(tell)
    except UserError as error:
        tell(str(error))
        return None


def tell(message: str) -> None:
    """Says something in the site's own log."""
    console.tell(f"{time.strftime('%Y-%m-%dT%H:%M:%S')} worker: {message}")
