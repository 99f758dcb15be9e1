"""A new consortium: it is complete, and all problems are reported before anything is written."""

import json
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedmide.cli import flower
from fedmide.config import load, to_toml
from fedmide.errors import UsageError
from fedmide.flower import deployment, texts
from fedmide.flower.consortium import Consortium, create, named
from fedmide.flower.server_folder import ServerFolder
from fedmide.flower.site_folder import SiteFolder
from fedmide.flower.supervision import superlink_command, supernode_command


def quiet(message: str) -> None:
    """Ignores the message."""


@pytest.fixture(scope="module")
def made(
    tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory, small_input_at: Callable[[Path], Any], one_thread: None
) -> Path:
    folder = tmp_path_factory.mktemp("init")
    given = small_input_at(folder / "input")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDMIDE_CACHE", str(tiny_folder.parent))
        create(Consortium(folder / "new", ("a", "b"), "hub.example.org:8443", 9092), load(given.config), quiet)
    return folder / "new"


def test_every_party_has_what_it_needs(made: Path) -> None:
    files = {str(path.relative_to(made)) for path in made.rglob("*") if path.is_file()}
    site = {"site.toml", "site.json", "federation.json", "start.sh"}
    site |= {f"keys/{name}" for name in ("node-key", "node-key.pub", "ca.pem", "superexec.secret")}
    server = {"server.json", "federation.toml", "start.sh", "nginx.conf"}
    server |= {"app/pyproject.toml", "app/LICENSE", "keys/sites/a.pub", "keys/sites/b.pub"}
    server |= {f"keys/{name}" for name in ("ca.key", "ca.pem", "server.key", "server.pem", "superexec.secret")}
    expected = {"CHECKLIST.md", *(f"server/{name}" for name in server)}
    assert files == expected | {f"site-{each}/{name}" for each in "ab" for name in site}
    assert sum((made / "server" / "app" / name).stat().st_size for name in ("pyproject.toml", "LICENSE")) < 1024


def test_folders_are_their_owner_s_only(made: Path) -> None:
    for name in ("server", "site-a", "site-b"):
        assert stat.S_IMODE((made / name).stat().st_mode) == 0o700


def test_a_site_holds_nobody_else_s_secret(made: Path) -> None:
    secrets = {
        name: (made / name / "keys" / "superexec.secret").read_bytes() for name in ("server", "site-a", "site-b")
    }
    assert len(set(secrets.values())) == 3
    others = [secrets["server"], secrets["site-b"], (made / "server" / "keys" / "ca.key").read_bytes()]
    held = b"".join(path.read_bytes() for path in (made / "site-a").rglob("*") if path.is_file())
    assert not any(other in held for other in others)


def test_the_sites_have_the_federation_s_configuration(made: Path) -> None:
    assert load(made / "site-a" / "site.toml") == load(made / "server" / "federation.toml")
    facts = json.loads((made / "site-a" / "federation.json").read_text())
    assert facts["version"] == "0.1.0"
    assert len(facts["federation"]) == 16


def test_encryption_keys_and_the_secret_are_the_default(made: Path) -> None:
    superlink = superlink_command(ServerFolder.read(made / "server"))
    assert {"--enable-supernode-auth", "--ssl-keyfile", "--superexec-auth-secret-file"} <= set(superlink)
    assert superlink[superlink.index("--isolation") + 1] == "process"
    assert superlink[superlink.index("--host") + 1] == "127.0.0.1"
    assert "--insecure" not in superlink
    node = supernode_command(SiteFolder.read(made / "site-a"), 1234)
    assert {"--root-certificates", "--auth-supernode-private-key", "--superexec-auth-secret-file"} <= set(node)
    assert node[node.index("--superlink") + 1] == "hub.example.org:8443"
    assert "--insecure" not in node


def test_the_proxy_lets_through_one_path(made: Path) -> None:
    text = (made / "server" / "nginx.conf").read_text()
    assert text.count("location") == 2
    assert "location /v1/fleet/ {" in text
    assert "return 404" in text


def test_a_folder_starts_from_where_it_is_handed_to(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved, other = tmp_path / "at a hospital", tmp_path / "bin" / "python3"
    shutil.copytree(made / "site-a", moved)
    other.parent.mkdir()
    other.write_text('#!/bin/sh\nprintf "%s|" "$0" "$@"\n')
    other.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    for variables in (
        {"PATH": f"{other.parent}:/usr/bin:/bin"},
        {"PATH": "/usr/bin:/bin", "FEDMIDE_PYTHON": str(other)},
    ):
        started = subprocess.run([moved / "start.sh"], env=variables, capture_output=True, text=True, check=True)
        assert started.stdout == f"{other}|-m|fedmide|flower|site|start|{moved}|"
    kept = b"".join(path.read_bytes() for path in moved.rglob("*") if path.is_file())
    assert str(made).encode() not in kept and sys.executable.encode() not in kept


def test_a_unit_runs_a_folder_where_it_is_as_its_owner(made: Path, tmp_path: Path) -> None:
    moved = tmp_path / "at 100%"
    shutil.copytree(made / "site-a", moved)
    lines = texts.unit("site a", moved).splitlines()
    place = str(moved).replace("%", "%%")
    assert {f'ExecStart="{place}/start.sh"', f"WorkingDirectory={place}", f"User={moved.owner()}"} <= set(lines)
    assert {f'Environment="FEDMIDE_PYTHON={sys.executable}"', "Restart=always", "KillMode=control-group"} <= set(lines)


def test_paths_of_a_site_count_from_its_folder_and_only_what_is_named_like_it_is_opened(
    made: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDMIDE_CACHE", str(tiny_folder.parent))
    moved = tmp_path / "moved"
    shutil.copytree(made / "site-a", moved)
    config = load(moved / "site.toml")
    shutil.copytree(Path(config.data.path) / "a", moved / "records" / "a")
    (moved / "records" / "b.json").write_text("broken")
    (moved / "site.toml").write_text(
        to_toml(config.model_copy(update={"data": config.data.model_copy(update={"path": "records"})}))
    )
    monkeypatch.chdir(tmp_path)
    assert len(SiteFolder.read(Path("moved")).inputs(quiet).clients["a"].test) == 3


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"sites": ()}, "no site is named"),
        ({"sites": ("a", "B c")}, "'B c' is not a name for a site"),
        ({"sites": ("../a",)}, "'../a' is not a name for a site"),
        ({"sites": ("a", "a")}, "'a' is named twice"),
        ({"address": "nowhere"}, "is not an address"),
        ({"plain": True, "address": "hub.example.org:443"}, "without encryption all sites must be on it"),
    ],
)
def test_a_consortium_that_can_t_be_is_refused(
    changes: dict[str, Any], problem: str, tmp_path: Path, fakes: Any
) -> None:
    given: dict[str, Any] = {"sites": ("a",), "address": "127.0.0.1:9092", "port": 9092, **changes}
    with pytest.raises(UsageError, match=problem):
        create(Consortium(tmp_path / "new", **given), fakes.config(), quiet)
    assert not (tmp_path / "new").exists()


def test_a_folder_that_holds_something_is_left_alone(made: Path, fakes: Any) -> None:
    with pytest.raises(UsageError, match="exists already"):
        create(Consortium(made, ("a",), "127.0.0.1:9092", 9092), fakes.config(), quiet)


def test_other_folders_are_distinguished_from_those_of_a_consortium(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not the folder of a site"):
        SiteFolder.read(tmp_path)
    with pytest.raises(UsageError, match="not the folder of a server"):
        ServerFolder.read(tmp_path)


def test_before_the_first_run_none_of_its_rounds_is_done(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deployment, "nodes", lambda folder: [{"node-id": "7", "status": "online"}])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "anything").mkdir()
    told = deployment.status(ServerFolder.read(made / "server"))
    assert told == {"sites": {"7": "online"}, "run": None, "going_on": False, "rounds_done": 0}
    with pytest.raises(UsageError, match="no run is in progress"):
        deployment.stop(ServerFolder.read(made / "server"))


def test_a_run_that_every_site_would_refuse_is_refused_at_once(made: Path, tmp_path: Path) -> None:
    server, own = ServerFolder.read(made / "server"), load(made / "server" / "federation.toml")
    expected = r"2 problems: federation.rounds is 10 here and 2 at the sites; lora.r is 4 .* fedmide flower init"
    with pytest.raises(UsageError, match=expected):
        server.configuration(None, ["federation.rounds=10", "lora.r=4", "replies.quorum=0.8"])
    other = tmp_path / "other.toml"
    other.write_text(to_toml(own.model_copy(update={"seed": 4})))
    with pytest.raises(UsageError, match="seed is 4 here and 3 at the sites"):
        server.configuration(other, [])
    assert server.configuration(None, []) == own


def test_the_example_of_a_run_sets_what_the_server_may_set(made: Path) -> None:
    (command,) = [each for each in flower.app.registered_commands if each.name == "run"]
    overrides = (command.epilog or "").partition("--set ")[2].split()
    assert overrides
    assert ServerFolder.read(made / "server").configuration(None, overrides).replies.quorum == 0.8


def test_names_are_read_from_a_list() -> None:
    assert named(" a,b ,,c") == ("a", "b", "c")
