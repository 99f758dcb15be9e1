"""Asking a site's worker. What Flower starts for each message needs this, so it imports no model's libraries."""

from contextlib import closing
from pathlib import Path

from fedmide.federation.runtimes.link import connected, socket_path

_WAIT_SECONDS = 60.0
"""How long a node waits for a worker that is being started."""


def ask(folder: Path, frame: bytes) -> bytes:
    """The answer of the site's worker to a frame; raises where there is none."""
    with closing(connected(socket_path(folder, "worker"), _WAIT_SECONDS)) as connection:
        connection.send_bytes(frame)
        return connection.recv_bytes()
