"""Processes that are started here, and ended by id with all that they started."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import psutil

from fedmide.errors import UserError
from fedmide.flower.variables import NO_TELEMETRY

_GRACE_SECONDS = 10.0


_FAST_POLLING = {"FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2"}
"""An executor looks for work every 0.2 seconds; Flower's default is 1 second."""


def environment(home: Path, **more: str) -> dict[str, str]:
    """The environment of Flower's processes: no telemetry, a folder of their own, and this Python's commands."""
    commands = str(Path(sys.executable).parent)
    path = os.pathsep.join([commands, *filter(None, [os.environ.get("PATH")])])
    return {
        **os.environ,
        **NO_TELEMETRY,
        "FLWR_HOME": str(home),
        "PATH": path,
        "PYTHONUNBUFFERED": "1",
        **_FAST_POLLING,
        **more,
    }


@contextmanager
def started(command: Sequence[str], variables: Mapping[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that runs during a `with` block. At its end, the process is ended with all that it started."""
    process = start(command, variables, log)
    try:
        yield process
    finally:
        end(process)


def start(command: Sequence[str], variables: Mapping[str, str], log: Path) -> subprocess.Popen[bytes]:
    """A process whose output goes to a log that only its user can read."""
    log.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    with os.fdopen(descriptor, "ab") as output:
        return subprocess.Popen(
            command, env=dict(variables), stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
        )


def end(process: subprocess.Popen[bytes]) -> None:
    """Ends a process and all that it started: terminates them, then kills those that remain.

    If the process has ended already, this does nothing.
    """
    if process.poll() is not None:
        return  # its id may belong to another process by now
    family = _descendants(process.pid)
    for each in family:
        with suppress(psutil.NoSuchProcess):
            each.terminate()
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(_GRACE_SECONDS)
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(family, _GRACE_SECONDS)
    for each in alive:
        with suppress(psutil.NoSuchProcess):
            each.kill()
    psutil.wait_procs(alive, _GRACE_SECONDS)


def _descendants(pid: int) -> list[psutil.Process]:
    """All descendants of a process."""
    with suppress(psutil.NoSuchProcess):
        return list(psutil.Process(pid).children(recursive=True))
    return []


def wait_for_port(port: int, process: subprocess.Popen[bytes], log: Path, seconds: float = 180.0) -> None:
    """Waits until a process listens on a port of this machine.

    Raises `UserError` with the end of the log if the process ends or the time is up.
    """
    until = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < until:
        with closing(socket.socket()) as probe:
            probe.settimeout(1.0)
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise UserError(f"no process listens on port {port}: {last_words(log)}", f"See {log}")


def last_words(log: Path, lines: int = 3) -> str:
    """The last lines of a log, joined to one line."""
    with suppress(OSError):
        return " | ".join(log.read_text(errors="replace").strip().splitlines()[-lines:]) or "its log is empty"
    return "it has no log"


def free_port() -> int:
    """A port of this machine that no process uses now."""
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
