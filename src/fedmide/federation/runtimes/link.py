"""Bytes between two processes on one machine, over a socket in a folder that only its user can enter.

`Exchange` is what any transport does for the server: it knows who is there, brings each a frame and brings back what
they answer. `Linked` is an exchange in another process, which `serve` there gives access to. Nothing is unpickled.
"""

import hashlib
import json
import os
import socket
import stat
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

from fedmide.errors import FedMIDEError, RunFolderError

_GLANCE_SECONDS = 0.2


class LinkLostError(FedMIDEError):
    """The process at the other end is gone."""


@dataclass(frozen=True)
class Answered:
    """What came back from a node: a frame, or the reason why there is none."""

    node: int
    frame: bytes
    problem: str = ""


class Exchange(Protocol):
    """A transport, as the server sees it."""

    def nodes(self) -> list[int]:
        """Who is there."""

    def ask(self, frames: Iterable[tuple[int, bytes]], seconds: float) -> Iterator[Answered]:
        """The answers of the nodes to their frames, as they come, for at most so many seconds."""


def socket_path(folder: Path, name: str) -> Path:
    """Where a folder's sockets are: their paths must be short, and only this user may enter.

    Raises `RunFolderError` where somebody else has made that place.
    """
    digest = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    private = Path(tempfile.gettempdir()) / f"fedmide-{os.getuid()}-{digest}"
    private.mkdir(mode=0o700, exist_ok=True)
    found = private.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) != 0o700:
        raise RunFolderError(f"{private}: not a folder that only this user can enter", "Remove it")
    return private / name


@contextmanager
def listening(path: Path) -> Iterator[socket.socket]:
    """A socket at a path, until the end."""
    path.unlink(missing_ok=True)
    with closing(socket.socket(socket.AF_UNIX)) as listener:
        listener.bind(str(path))
        listener.listen(8)
        listener.settimeout(_GLANCE_SECONDS)
        try:
            yield listener
        finally:
            path.unlink(missing_ok=True)


def accepted(listener: socket.socket, still: Callable[[], bool]) -> Connection | None:
    """The next that connects; None once it is no longer worth waiting."""
    while still():
        with suppress(TimeoutError):
            other, _ = listener.accept()
            other.setblocking(True)
            return Connection(other.detach())
    return None


def connected(path: Path, seconds: float = 0.0) -> Connection:
    """A connection to who listens at a path, for whom it waits so long; raises `LinkLostError`."""
    until = time.monotonic() + seconds
    while True:
        with closing(socket.socket(socket.AF_UNIX)) as own, suppress(FileNotFoundError, ConnectionRefusedError):
            own.connect(str(path))
            return Connection(own.detach())
        if time.monotonic() >= until:
            raise LinkLostError(f"nobody listens at {path}")
        time.sleep(_GLANCE_SECONDS)


@dataclass(frozen=True)
class Linked:
    """The exchange in the process at the other end."""

    connection: Connection

    def nodes(self) -> list[int]:
        """Who is there."""
        with _lost():
            _send(self.connection, {"do": "nodes"})
            return list(_receive(self.connection)["nodes"])

    def ask(self, frames: Iterable[tuple[int, bytes]], seconds: float) -> Iterator[Answered]:
        """The answers of the nodes to their frames, as they come, for at most so many seconds."""
        with _lost():
            _send(self.connection, {"do": "ask", "seconds": seconds})
            for node, frame in frames:
                _send(self.connection, {"node": node}, frame)
            _send(self.connection, {"node": None})
            while (head := _receive(self.connection))["node"] is not None:
                yield Answered(head["node"], self.connection.recv_bytes(), head["problem"])


def serve(connection: Connection, exchange: Exchange) -> None:
    """Gives the other end this exchange, until it goes."""
    with suppress(EOFError, OSError):
        while True:
            request = _receive(connection)
            if request["do"] == "nodes":
                _send(connection, {"nodes": exchange.nodes()})
                continue
            for answer in exchange.ask(_frames(connection), request["seconds"]):
                _send(connection, {"node": answer.node, "problem": answer.problem}, answer.frame)
            _send(connection, {"node": None})


def _frames(connection: Connection) -> Iterator[tuple[int, bytes]]:
    while (node := _receive(connection)["node"]) is not None:
        yield node, connection.recv_bytes()


def _send(connection: Connection, head: dict[str, Any], frame: bytes | None = None) -> None:
    connection.send_bytes(json.dumps(head).encode())
    if frame is not None:
        connection.send_bytes(frame)


def _receive(connection: Connection) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(connection.recv_bytes())
    return values


@contextmanager
def _lost() -> Iterator[None]:
    """Says that the link is lost where the other end is gone."""
    try:
        yield
    except (EOFError, OSError):
        raise LinkLostError("the process at the other end is gone") from None
