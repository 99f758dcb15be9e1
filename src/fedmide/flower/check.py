"""The check of a site before a run: records, model, version, key, connection."""

import json
import socket
import ssl
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass

from fedmide.errors import UserError
from fedmide.federation.messages import Facts
from fedmide.federation.runtimes.link import socket_path
from fedmide.federation.runtimes.remote import differences
from fedmide.flower.processes import environment, free_port, last_words, started
from fedmide.flower.site_folder import SiteFolder
from fedmide.flower.supervision import supernode_command
from fedmide.progress import Tell

_CONNECT_SECONDS = 30.0


@dataclass(frozen=True)
class Finding:
    """The result of one check: its subject, what was found, and the problem. `problem` is empty if there is none."""

    what: str
    found: str
    problem: str = ""


def check(folder: SiteFolder, tell: Tell) -> list[Finding]:
    """All findings, in the best order for fixing them."""
    return list(_findings(folder, tell))


def _findings(folder: SiteFolder, tell: Tell) -> Iterator[Finding]:
    try:
        inputs = folder.inputs(tell)
    except UserError as error:
        yield Finding("records and model", "", str(error))
    else:
        data = inputs.clients[folder.name]
        parts = (data.training, data.validation, data.test)
        counts = ", ".join(
            f"{len(part)} {name}" for part, name in zip(parts, ("training", "validation", "test"), strict=True)
        )
        yield Finding("records", counts)
        problems = "; ".join(differences(_expected(folder), inputs.facts(folder.name), None))
        yield Finding("version, model, prompt and settings", f"as agreed ({inputs.federation})", problems)
    yield _attempt("keys", lambda: _keys(folder))
    reached = _attempt("server", lambda: _server(folder))
    yield reached
    if not reached.problem:
        yield _attempt("node", lambda: _node(folder))


def _attempt(what: str, look: Callable[[], str]) -> Finding:
    try:
        return Finding(what, look())
    except (UserError, OSError, ValueError) as error:
        return Finding(what, "", str(error))


def _expected(folder: SiteFolder) -> Facts:
    return Facts(**json.loads((folder.path / "federation.json").read_text("utf-8")))


def _keys(folder: SiteFolder) -> str:
    """Checks that the secrets are there and that only their owner can read them."""
    names = ["superexec.secret", *([] if folder.plain else ["node-key"])]
    for name in names:
        path = folder.path / "keys" / name
        mode = stat.S_IMODE(path.stat().st_mode)
        if mode & 0o077:
            raise UserError(f"{path} can be read by others (mode {mode:o})", f"Run chmod 600 {path}")
    return "present, and readable by their owner only"


def _server(folder: SiteFolder) -> str:
    """Connects to the server and checks its certificate."""
    host, _, port = folder.superlink.rpartition(":")
    try:
        connection = socket.create_connection((host.strip("[]"), int(port)), timeout=10)
    except ConnectionRefusedError:
        raise UserError(
            f"the connection to {folder.superlink} is refused: no server listens there",
            "Ask the coordinator to start the server with `fedmide flower server start`, and to confirm the address",
        ) from None
    with closing(connection) as plain:
        if not folder.plain:
            context = ssl.create_default_context(cafile=str(folder.path / "keys" / "ca.pem"))
            context.wrap_socket(plain, server_hostname=host.strip("[]")).close()
    return f"reached at {folder.superlink}" + ("" if folder.plain else ", with the right certificate")


def _node(folder: SiteFolder) -> str:
    """Checks that the server accepts this site's key.

    It starts the node for a moment, unless the site is running.
    """
    if socket_path(folder.path, "worker").exists():
        return "the site is running; logs/supernode.log shows its connection"
    log = folder.path / "logs" / "check.log"
    log.unlink(missing_ok=True)
    command = supernode_command(folder, free_port())
    with started(command, environment(folder.path / "flwr"), log) as process:
        until = time.monotonic() + _CONNECT_SECONDS
        while process.poll() is None and time.monotonic() < until:
            if log.exists() and "SuperNode ID:" in log.read_text(errors="replace"):
                return "the server accepts this site's key"
            time.sleep(0.2)
        raise UserError(
            f"the server does not accept this site's key: {last_words(log, 5)}",
            "Ask the coordinator to start the server with `fedmide flower server start`, "
            "which registers this site's key",
        )
