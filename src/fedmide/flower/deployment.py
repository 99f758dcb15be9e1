"""A run over a running consortium: submitted to its SuperLink, watched, and ended."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from socket import socket

from fedmide.errors import UsageError
from fedmide.federation.runtimes.link import Linked, LinkLostError, accepted, listening, socket_path
from fedmide.flower.commands import FlowerCommandError, flwr, nodes
from fedmide.flower.remote_runs import remote
from fedmide.flower.server_folder import ServerFolder
from fedmide.flower.supervision import alive
from fedmide.progress import Tell
from fedmide.runs.opening import Run

_COME_UP_SECONDS = 60.0
"""The longest wait for the server app of a submitted run to connect."""


_RETRY_SECONDS = 3.0


@dataclass
class Submitted:
    """Flower's runs for one run of fedmide, one after the other: if one is lost, the next one is submitted."""

    folder: ServerFolder
    listener: socket
    run: Path
    tell: Tell
    patience_seconds: float
    _connection: Connection | None = field(default=None)

    def connect(self) -> Linked:
        """The connection to the sites, through a new run of Flower.

        If the SuperLink is down, this tries again for `patience_seconds`.
        """
        self.end()
        until = time.monotonic() + self.patience_seconds
        while True:
            try:
                return self._submit()
            except (FlowerCommandError, LinkLostError) as error:
                if time.monotonic() >= until:
                    raise
                self.tell(f"{error}; trying again")
                time.sleep(_RETRY_SECONDS)

    def end(self) -> None:
        """Closes the connection, if there is one. The server app then ends by itself."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _submit(self) -> Linked:
        number = str(flwr(self.folder, "run", str(self.folder.path / "app"), "fedmide")["run-id"])
        self.folder.write_run(run=str(self.run), flower_run=number, process=os.getpid())
        until = time.monotonic() + _COME_UP_SECONDS
        connection = accepted(self.listener, lambda: time.monotonic() < until)
        if connection is None:
            with suppress(FlowerCommandError):
                flwr(self.folder, "stop", number, "fedmide")
            raise LinkLostError(f"Flower's run {number} did not start; see {self.folder.log('superexec')}")
        self._connection = connection
        return Linked(connection)


@contextmanager
def deployed(run: Run, folder: ServerFolder) -> Iterator[Run]:
    """The same run over the consortium; raises `UsageError` while another run is in progress."""
    _check_free(folder)
    bound = None if folder.plain else {node: name for name, node in folder.read_nodes().items()}
    with listening(socket_path(folder.path, "link")) as listener:
        path = run.folder.path.resolve()
        submitted = Submitted(folder, listener, path, run.tell, run.config.replies.deadline_seconds)
        try:
            yield remote(run, submitted.connect, bound)
        finally:
            submitted.end()


def stop(folder: ServerFolder) -> str:
    """Stops the current run, as if it were interrupted, and describes what was done."""
    last = folder.read_run()
    if not last or not _is_going_on(folder):
        raise UsageError("no run is in progress", f"Start one: fedmide flower run {folder.path}")
    os.kill(last["process"], signal.SIGINT)
    return f"stopped {last['run']}; resume it: fedmide flower resume {folder.path} {last['run']}"


def status(folder: ServerFolder) -> dict[str, object]:
    """The sites' connections, and the progress of the last run."""
    known = {int(node["node-id"]): str(node["status"]) for node in nodes(folder)}
    sites = {name: known.get(node, "unknown") for name, node in folder.read_nodes().items()}
    last = folder.read_run()
    rounds = Path(last["run"], "server").glob("[!.]*") if last else ()
    facts = {"run": last.get("run"), "going_on": _is_going_on(folder), "rounds_done": len(list(rounds))}
    return {"sites": sites or {str(node): each for node, each in known.items()}, **facts}


def _is_going_on(folder: ServerFolder) -> bool:
    """True if the process of the last run is alive and this server's socket exists."""
    last = folder.read_run()
    return bool(last) and socket_path(folder.path, "link").exists() and alive(int(last["process"]))


def _check_free(folder: ServerFolder) -> None:
    if _is_going_on(folder):
        raise UsageError(
            f"{folder.path}: a run is in progress", f"Wait for it, or stop it: fedmide flower stop {folder.path}"
        )
