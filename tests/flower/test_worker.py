"""A site's worker without the processes around it: every message gets an answer, and the site's log the reason."""

from collections.abc import Callable
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fedmide.errors import DataError
from fedmide.federation.codec import decode_answer
from fedmide.federation.messages import Trouble
from fedmide.flower import worker
from fedmide.flower.site_folder import SiteFolder

SECRET = "records of Maria M."


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Connection]]:
    """A function that lets a worker answer `number` messages, and returns the senders' connections.

    The first `leaves` senders are gone before the worker accepts them.
    """

    def ask(opener: Callable[[], Any], number: int, leaves: int = 0) -> list[Connection]:
        SiteFolder(tmp_path, "a", "127.0.0.1:1").write()
        ends = [Pipe() for _ in range(number)]
        for own, _ in ends[:leaves]:
            own.close()
        for own, _ in ends[leaves:]:
            own.send_bytes(b"a frame")
        waiting = iter([*(other for _, other in ends), None])
        monkeypatch.setattr(worker, "accepted", lambda listener, still: next(waiting))
        monkeypatch.setattr(SiteFolder, "site", lambda folder, tell: opener())
        worker.work(tmp_path)
        return [own for own, _ in ends[leaves:]]

    return ask


@pytest.mark.parametrize("error", [PermissionError(13, SECRET), DataError(SECRET)])
def test_a_site_that_can_t_be_opened_is_reported_and_tried_again(
    error: Exception, asked: Callable[..., list[Connection]], capsys: pytest.CaptureFixture[str]
) -> None:
    found = iter([error, SimpleNamespace(answer=lambda frame: b"done " + frame)])

    def opened() -> Any:
        site = next(found)
        if isinstance(site, Exception):
            raise site
        return site

    first, second = (each.recv_bytes() for each in asked(opened, 2))
    assert decode_answer(first) == Trouble("a", "site")
    assert second == b"done a frame"
    assert SECRET in capsys.readouterr().err, "the site's own log has it"


def test_a_server_that_has_gone_is_not_waited_for(asked: Callable[..., list[Connection]]) -> None:
    site = SimpleNamespace(answer=lambda frame: b"done")
    assert [each.recv_bytes() for each in asked(lambda: site, 3, leaves=2)] == [b"done"]
