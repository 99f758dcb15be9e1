"""A new consortium: one folder for the server and one per site. They lack only the sites' records."""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from cryptography.hazmat.primitives.serialization import Encoding

from fedmide.atomic import to_json, write_file
from fedmide.config import Config, to_toml
from fedmide.errors import UsageError
from fedmide.federation.messages import Facts
from fedmide.flower import keys, texts
from fedmide.flower.bundle import write_bundle
from fedmide.flower.server_folder import ServerFolder
from fedmide.flower.site_folder import SiteFolder
from fedmide.progress import Tell
from fedmide.runs.inputs import read, without_records
from fedmide.version import __version__

_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,31}")


LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class Consortium:
    """The description of a new consortium.

    `address`, as HOST:PORT, is where sites reach the server. `port` is the SuperLink's own, on loopback.
    `plain` means no encryption and no keys; it needs an address on loopback.
    """

    path: Path
    sites: tuple[str, ...]
    address: str
    port: int
    plain: bool = False

    @property
    def host(self) -> str:
        """The server's name or address."""
        return self.address.rpartition(":")[0].strip("[]")

    @property
    def behind_proxy(self) -> bool:
        """True if sites are on other machines: they reach the SuperLink through a proxy."""
        return self.host not in LOOPBACK

    def problems(self) -> list[str]:
        """All problems of the description."""
        found = [
            f"{name!r} is not a name for a site: expected 1 to 32 characters from a-z 0-9 _ -, starting with a-z or 0-9"
            for name in self.sites
            if not _NAME.fullmatch(name)
        ]
        found += [
            f"site {name!r} is named twice"
            for name in sorted({each for each in self.sites if self.sites.count(each) > 1})
        ]
        if not self.sites:
            found.append("no site is named")
        if not re.fullmatch(r".+:[0-9]{1,5}", self.address):
            found.append(f"{self.address!r} is not an address: expected HOST:PORT")
        if self.plain and self.behind_proxy:
            found.append(f"{self.host} is not this machine, but without encryption all sites must be on it")
        if self.path.exists() and any(self.path.iterdir()):
            found.append(f"{self.path} exists already and is not empty")
        return found


def create(consortium: Consortium, config: Config, tell: Tell) -> None:
    """Writes all folders; raises `UsageError` with all problems before anything is written."""
    if problems := consortium.problems():
        raise UsageError(problems)
    inputs = read(config, tell, load=without_records(consortium.sites))
    facts = inputs.facts()
    authority = None if consortium.plain else keys.new_authority("fedmide consortium")
    server = _server(consortium, config, authority)
    for name in consortium.sites:
        _site(consortium, name, config, facts, authority, server)
    behind = consortium.behind_proxy
    write_file(consortium.path / "CHECKLIST.md", texts.checklist(consortium.address, __version__, behind).encode())


def _server(consortium: Consortium, config: Config, authority: keys.Authority | None) -> ServerFolder:
    path = (consortium.path / "server").resolve()
    folder = ServerFolder(path, consortium.sites, consortium.address, consortium.port, consortium.plain)
    folder.write()
    write_file(path / "federation.toml", to_toml(config).encode())
    write_bundle(path / "app")
    keys.write_secret(path / "keys" / "superexec.secret", keys.new_secret())
    if authority is not None:
        key, certificate = keys.server_certificate(authority, [consortium.host, "127.0.0.1", "localhost"])
        keys.write_secret(path / "keys" / "ca.key", keys.private_pem(authority.key))
        keys.write_secret(path / "keys" / "server.key", key)
        write_file(path / "keys" / "server.pem", certificate)
        write_file(path / "keys" / "ca.pem", authority.certificate.public_bytes(Encoding.PEM))
    if consortium.behind_proxy:
        port = int(consortium.address.rpartition(":")[2])
        write_file(path / "nginx.conf", texts.proxy(consortium.host, port, consortium.port, path).encode())
    _write_script("server", "server", path)
    return folder


def _site(
    consortium: Consortium,
    name: str,
    config: Config,
    facts: Facts,
    authority: keys.Authority | None,
    server: ServerFolder,
) -> None:
    path = (consortium.path / f"site-{name}").resolve()
    superlink = consortium.address if consortium.behind_proxy else f"127.0.0.1:{consortium.port}"
    SiteFolder(path, name, superlink, consortium.plain).write()
    write_file(path / "site.toml", to_toml(config).encode())
    write_file(path / "federation.json", to_json(asdict(facts)))
    keys.write_secret(path / "keys" / "superexec.secret", keys.new_secret())
    if authority is not None:
        private, public = keys.node_key()
        keys.write_secret(path / "keys" / "node-key", private)
        write_file(path / "keys" / "node-key.pub", public)
        write_file(path / "keys" / "ca.pem", authority.certificate.public_bytes(Encoding.PEM))
        write_file(server.path / "keys" / "sites" / f"{name}.pub", public)
    _write_script(f"site {name}", "site", path)


def _write_script(what: str, verb: str, path: Path) -> None:
    write_file(path / "start.sh", texts.start_script(what, verb).encode())
    (path / "start.sh").chmod(0o755)
    path.chmod(0o700)


def named(sites: Sequence[str] | str) -> tuple[str, ...]:
    """The sites' names, from a text with commas between them or from a sequence.

    >>> named("a, b,c")
    ('a', 'b', 'c')
    """
    parts = sites.split(",") if isinstance(sites, str) else sites
    return tuple(part.strip() for part in parts if part.strip())
