"""The processes that run all the time at the server and at each site; they are started again when they end.

At the server: SuperLink and executor. At a site: SuperNode, executor and worker. Executors take tasks only with the
secret that they share with their SuperLink or SuperNode. Everything listens on loopback.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from fedmide.federation.runtimes.link import socket_path
from fedmide.flower.bundle import write_bundle, write_connection
from fedmide.flower.commands import register
from fedmide.flower.processes import end, environment, free_port, start, wait_for_port
from fedmide.flower.server_folder import ServerFolder
from fedmide.flower.site_folder import SiteFolder
from fedmide.flower.variables import LINK, SITE
from fedmide.journal.creation import locked

if TYPE_CHECKING:
    from fedmide.progress import Tell


_RESTART_SECONDS = 3.0


_LOOK_SECONDS = 0.2


_WORKER = "import sys; from pathlib import Path; from fedmide.flower.worker import work; work(Path(sys.argv[1]))"


@dataclass
class Supervisor:
    """Processes by name, each with its command. One that ends is started again after a pause."""

    commands: Mapping[str, Sequence[str]]
    variables: Mapping[str, str]
    logs: Path
    tell: "Tell"
    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    _stopping: bool = False

    def run(self) -> None:
        """Keeps the processes running until this process gets SIGTERM or SIGINT. Then ends them, each by its id."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)
        try:
            while not self._stopping:
                self.look()
                time.sleep(_LOOK_SECONDS)
        finally:
            for process in reversed(self.running.values()):
                end(process)

    def look(self) -> None:
        """Starts the processes that have not been started, and starts again those that have ended."""
        for name, command in self.commands.items():
            process = self.running.get(name)
            if process is not None and process.poll() is not None:
                self.tell(f"{name} ended with code {process.returncode}, starting it again; see {self.logs / name}.log")
                end(process)
                time.sleep(_RESTART_SECONDS)
            if process is None or process.poll() is not None:
                self.running[name] = start(command, self.variables, self.logs / f"{name}.log")

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self._stopping = True


def server(folder: ServerFolder, tell: "Tell") -> None:
    """Registers the sites' keys and runs a consortium's SuperLink and executor, until SIGTERM or SIGINT."""
    with locked(folder.path):
        _server(folder, tell)


def _server(folder: ServerFolder, tell: "Tell") -> None:
    write_bundle(folder.path / "app")
    write_connection(folder.home, folder.port, folder.certificate)
    variables = environment(folder.home, **{LINK: str(socket_path(folder.path, "link"))})
    commands = {"superlink": superlink_command(folder), "superexec": superexec_command(folder)}
    supervisor = Supervisor(commands, variables, folder.path / "logs", tell)
    try:
        supervisor.look()
        wait_for_port(folder.port, supervisor.running["superlink"], folder.log("superlink"))
        register(folder)
        tell(f"the server of {', '.join(folder.sites)} is up on 127.0.0.1:{folder.port}")
    except BaseException:
        for process in supervisor.running.values():
            end(process)
        raise
    supervisor.run()


def site(folder: SiteFolder, tell: "Tell") -> None:
    """Runs a site's SuperNode, executor and worker, until SIGTERM or SIGINT."""
    port = free_port()
    path = folder.path.resolve()
    commands = {
        "worker": [sys.executable, "-c", _WORKER, str(path)],
        "supernode": supernode_command(folder, port),
        "superexec": [
            *("flower-superexec", "--insecure", "--runtime-api-address", f"127.0.0.1:{port}"),
            *("--superexec-auth-secret-file", str(path / "keys" / "superexec.secret")),
        ],
    }
    tell(f"site {folder.name} works for {folder.superlink}; its logs are in {path / 'logs'}")
    with locked(path):
        Supervisor(commands, environment(path / "flwr", **{SITE: str(path)}), path / "logs", tell).run()


def superlink_command(folder: ServerFolder) -> list[str]:
    """The command that starts the SuperLink."""
    keys = folder.path / "keys"
    secure = [
        *("--ssl-ca-certfile", str(keys / "ca.pem"), "--ssl-certfile", str(keys / "server.pem")),
        *("--ssl-keyfile", str(keys / "server.key"), "--enable-supernode-auth"),
    ]
    return [
        *("flower-superlink", "--host", "127.0.0.1", "--port", str(folder.port)),
        *("--database", str(folder.home / "state.db"), "--disable-runtime-dependency-installation"),
        *("--isolation", "process", "--superexec-auth-secret-file", str(keys / "superexec.secret")),
        *(["--insecure"] if folder.plain else secure),
    ]


def superexec_command(folder: ServerFolder) -> list[str]:
    """The command that starts the SuperLink's executor."""
    secure = ["--insecure"] if folder.plain else ["--root-certificates", str(folder.certificate)]
    return [
        *("flower-superexec", "--runtime-api-address", f"127.0.0.1:{folder.port}", *secure),
        *("--superexec-auth-secret-file", str(folder.path / "keys" / "superexec.secret")),
    ]


def supernode_command(folder: SiteFolder, port: int) -> list[str]:
    """The command that starts a site's SuperNode; its own port is on loopback."""
    keys = folder.path.resolve() / "keys"
    secure = [
        *("--root-certificates", str(keys / "ca.pem")),
        *("--auth-supernode-private-key", str(keys / "node-key")),
    ]
    return [
        *("flower-supernode", "--superlink", folder.superlink, "--host", "127.0.0.1", "--port", str(port)),
        *("--isolation", "process", "--superexec-auth-secret-file", str(keys / "superexec.secret")),
        *(["--insecure"] if folder.plain else secure),
    ]


def alive(process_id: int) -> bool:
    """True if there is a process with this id."""
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
