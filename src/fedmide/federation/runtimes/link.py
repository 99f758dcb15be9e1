"""Bytes between two processes on one machine, over a socket in a folder that only its user can enter.

`Exchange` is the interface of every transport for the server: it lists the connected nodes, sends each a frame and
returns their answers. `Linked` is an exchange in another process; there, `serve` gives access to it. Nothing is
unpickled.
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
    """The answer of a node: a frame, or the reason why there is none."""

    node: int
    frame: bytes
    problem: str = ""


class Exchange(Protocol):
    """A transport, as the server sees it."""

    def nodes(self) -> list[int]:
        """The connected nodes."""

    def ask(self, frames: Iterable[tuple[int, bytes]], seconds: float) -> Iterator[Answered]:
        """The answers of the nodes to their frames, as they arrive, for at most `seconds`."""


def socket_path(folder: Path, name: str) -> Path:
    """The path of a folder's socket, in a place that only this user can enter; the paths of sockets must be short.

    Raises `RunFolderError` if others can enter that place, or own it.
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
    """A listening socket at a path, removed at the end."""
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
    """The next connection; None once `still` returns false."""
    while still():
        with suppress(TimeoutError):
            other, _ = listener.accept()
            other.setblocking(True)
            return Connection(other.detach())
    return None


def connected(path: Path, seconds: float = 0.0) -> Connection:
    """A connection to the listener at a path; raises `LinkLostError` if none appears within `seconds`."""
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
        """The connected nodes."""
        with _lost():
            _send(self.connection, {"do": "nodes"})
            return list(_receive(self.connection)["nodes"])

    def ask(self, frames: Iterable[tuple[int, bytes]], seconds: float) -> Iterator[Answered]:
        """The answers of the nodes to their frames, as they arrive, for at most `seconds`."""
        with _lost():
            _send(self.connection, {"do": "ask", "seconds": seconds})
            for node, frame in frames:
                _send(self.connection, {"node": node}, frame)
            _send(self.connection, {"node": None})
            while (head := _receive(self.connection))["node"] is not None:
                yield Answered(head["node"], self.connection.recv_bytes(), head["problem"])


def serve(connection: Connection, exchange: Exchange) -> None:
    """Gives the other end access to this exchange, until the other end disconnects."""
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
    """Raises `LinkLostError` if the other end is gone."""
    try:
        yield
    except (EOFError, OSError):
        raise LinkLostError("the process at the other end is gone") from None
