"""A question to a site's worker.

Flower starts a process per message, and that process needs this module. So it imports none of the model's libraries.
"""

from contextlib import closing
from pathlib import Path

from fedmide.federation.runtimes.link import connected, socket_path

_WAIT_SECONDS = 60.0
"""The longest wait of a node for a worker that is being started."""


def ask(folder: Path, frame: bytes) -> bytes:
    """The answer of the site's worker to a frame; raises if there is none."""
    with closing(connected(socket_path(folder, "worker"), _WAIT_SECONDS)) as connection:
        connection.send_bytes(frame)
        return connection.recv_bytes()
