"""The link between two processes: what is sent arrives, a closed end is reported, nobody else gets in."""

import socket
import stat
import threading
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from fedmide.errors import RunFolderError
from fedmide.federation.runtimes import link
from fedmide.federation.runtimes.link import (
    Answered,
    Linked,
    LinkLostError,
    accepted,
    connected,
    listening,
    serve,
    socket_path,
)


class Echo:
    """An exchange of three nodes that answer with what they got, the last one first; node 2 has a problem."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def nodes(self) -> list[int]:
        return [1, 2, 2**63]

    def ask(self, frames: Iterable[tuple[int, bytes]], seconds: float) -> Iterator[Answered]:
        self.seconds = seconds
        for node, frame in reversed(list(frames)):
            yield Answered(node, b"", "gone") if node == 2 else Answered(node, frame)


@contextmanager
def linked(exchange: Echo) -> Iterator[Linked]:
    one, other = socket.socketpair()
    near, far = Connection(one.detach()), Connection(other.detach())
    thread = threading.Thread(target=serve, args=(far, exchange))
    thread.start()
    try:
        yield Linked(near)
    finally:
        near.close()
        thread.join(10)
        far.close()
    assert not thread.is_alive(), "the serving end stops when the other end disconnects"


def test_an_exchange_is_the_same_in_another_process() -> None:
    frames = [(1, b"x" * 3_000_000), (2, b""), (2**63, b"\x00\xff")]
    with linked(Echo()) as far:
        assert far.nodes() == Echo().nodes()
        for seconds in (0.5, 7.0):
            assert list(far.ask(frames, seconds)) == list(Echo().ask(frames, seconds))
        assert list(far.ask([], 1.0)) == []
        assert far.nodes() == Echo().nodes()


def test_the_time_to_wait_arrives() -> None:
    echo = Echo()
    with linked(echo) as far:
        list(far.ask([(1, b"")], 12.5))
    assert echo.seconds == 12.5


def test_an_end_that_is_gone_is_reported() -> None:
    one, other = socket.socketpair()
    other.close()
    with closing(Connection(one.detach())) as connection:
        with pytest.raises(LinkLostError):
            Linked(connection).nodes()
        with pytest.raises(LinkLostError):
            list(Linked(connection).ask([(1, b"")], 1.0))


def test_a_listener_is_found_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with pytest.raises(LinkLostError, match="nobody listens"):
        connected(path)
    with listening(path) as listener:
        with closing(connected(path)) as near:
            far = accepted(listener, lambda: True)
            assert far is not None
            near.send_bytes(b"hello")
            assert far.recv_bytes() == b"hello"
            far.close()
        assert accepted(listener, lambda: False) is None
    assert not path.exists()


def test_only_the_user_enters_the_folder_of_sockets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link.tempfile, "gettempdir", lambda: str(tmp_path))
    deep = tmp_path / ("long" * 20) / ("names" * 20)
    deep.mkdir(parents=True)
    path = socket_path(deep, "worker")
    assert len(str(path).removeprefix(str(tmp_path))) < 50
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert path == socket_path(deep, "worker") != socket_path(deep.parent, "worker")
    path.parent.chmod(0o755)
    with pytest.raises(RunFolderError, match="only this user"):
        socket_path(deep, "worker")
    path.parent.rmdir()
    path.parent.symlink_to(deep)
    with pytest.raises(RunFolderError, match="only this user"):
        socket_path(deep, "worker")
