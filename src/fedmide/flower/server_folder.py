"""The folder of a consortium's server.

It contains:

    server.json        the sites' names and the addresses
    federation.toml    the configuration that all sites got
    keys/              keys of the CA and the server (0600), certificates, superexec secret (0600),
                       sites/NAME.pub: the sites' public keys
    app/               the app bundle that Flower's runs carry
    flwr/              Flower's own settings and, in state.db, the SuperLink's state
    nodes.json         the node id of each site, by its registered key
    run.json           the run that was started last, with its process
    runs/NNN/          the run folders, unless --out names another place
    start.sh           the script that starts the server
    nginx.conf         the proxy's configuration, if sites are on other machines
    logs/              the output of the server's processes
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fedmide.atomic import to_json, write_file
from fedmide.config import Config, load
from fedmide.config.knobs import agreed, differing
from fedmide.errors import UsageError


@dataclass(frozen=True)
class ServerFolder:
    """A server's folder. `port` is the SuperLink's own, on loopback. `plain` means no encryption and no keys."""

    path: Path
    sites: tuple[str, ...]
    address: str
    port: int
    plain: bool = False

    @classmethod
    def read(cls, path: Path) -> "ServerFolder":
        """The folder as its `server.json` describes it; raises `UsageError`."""
        try:
            values = json.loads((path / "server.json").read_text("utf-8"))
            sites, plain = tuple(map(str, values["sites"])), bool(values["plain"])
            return cls(path.resolve(), sites, str(values["address"]), int(values["port"]), plain)
        except (OSError, ValueError, KeyError, TypeError):
            raise UsageError(
                f"{path} is not the folder of a server", "Give the folder server/ that fedmide flower init wrote"
            ) from None

    def write(self) -> None:
        """Writes `server.json`."""
        values = {key: value for key, value in asdict(self).items() if key != "path"}
        write_file(self.path / "server.json", to_json(values))

    @property
    def home(self) -> Path:
        """Flower's own folder."""
        return self.path / "flwr"

    @property
    def certificate(self) -> Path | None:
        """The certificate with which Flower's commands check the server's one; None without encryption."""
        return None if self.plain else self.path / "keys" / "ca.pem"

    def log(self, name: str) -> Path:
        """The log of one of its processes."""
        return self.path / "logs" / f"{name}.log"

    def configuration(self, other: Path | None, overrides: Sequence[str]) -> Config:
        """The configuration of a run: the federation's own or another, changed by `section.key=value`.

        Raises `UsageError` if a setting that the sites agreed to would differ: they would all refuse the run.
        """
        own = self.path / "federation.toml"
        wanted = load(other or own, overrides)
        problems = [
            f"{name} is {ours} here and {theirs} at the sites"
            for name, ours, theirs in sorted(differing(agreed(wanted), agreed(load(own))))
        ]
        if problems:
            raise UsageError(
                problems,
                "The sites agreed to their values. To change them, make a new consortium with fedmide flower init",
            )
        return wanted

    def read_nodes(self) -> dict[str, int]:
        """The node id of each site, by its registered key."""
        path = self.path / "nodes.json"
        return {name: int(node) for name, node in json.loads(path.read_text()).items()} if path.exists() else {}

    def write_nodes(self, nodes: Mapping[str, int]) -> None:
        """Stores the node id of each site."""
        write_file(self.path / "nodes.json", to_json(nodes))

    def read_run(self) -> dict[str, Any]:
        """The run that was started last; empty if there is none."""
        path = self.path / "run.json"
        return dict(json.loads(path.read_text())) if path.exists() else {}

    def write_run(self, **values: Any) -> None:
        """Stores which run was started last."""
        write_file(self.path / "run.json", to_json(values))
