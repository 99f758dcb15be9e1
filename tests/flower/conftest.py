"""A consortium of real processes on loopback, with TLS and keys: three sites in folders of their own."""

import ctypes
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from fedmide.config import apply_overrides, load, read_toml
from fedmide.flower.processes import end, free_port
from tests.flower.waiting import until

FAULTY = Path(__file__).with_name("faulty.py")
SITES = ("a", "b", "c")
SETTINGS = ["federation.rounds=2", "personalization.epochs=1", "evaluation.bootstrap=100"]
STARTER = """import sys
from pathlib import Path
from fedmide.terminal import tell
from fedmide.flower import supervision
from fedmide.flower.site_folder import SiteFolder
supervision._WORKER = (
    f"import runpy, sys; sys.argv = ['faulty', sys.argv[1]]; runpy.run_path({sys.argv[2]!r}, run_name='__main__')"
)
supervision.site(SiteFolder.read(Path(sys.argv[1])), tell)
"""


@dataclass
class Consortium:
    """The consortium's folders and processes by name. Every process that is started is ended by its id."""

    path: Path
    data: Path
    config: Path
    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    runs: list[subprocess.Popen[str]] = field(default_factory=list)

    @property
    def server(self) -> Path:
        return self.path / "server"

    def site(self, name: str) -> Path:
        return self.path / f"site-{name}"

    def start(self, name: str, *command: str) -> subprocess.Popen[bytes]:
        log = self.path / f"{name}.out"
        with log.open("ab") as output:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=environment(),
                preexec_fn=die_with_parent,  # noqa: PLW1509
            )
        self.running[name] = process
        return process

    def start_server(self) -> None:
        self.start("server", *FEDMIDE, "flower", "server", "start", str(self.server))

    def start_site(self, name: str) -> None:
        self.start(f"site-{name}", sys.executable, "-c", STARTER, str(self.site(name)), str(FAULTY))

    def kill(self, name: str) -> None:
        """Kills a process and all its children at once, as if its machine lost power."""
        parent = self.running.pop(name)
        children = psutil.Process(parent.pid).children(recursive=True)
        parent.kill()  # first, so that it starts none of them again
        for child in children:
            child.kill()
        parent.wait()

    def child(self, name: str, word: str) -> psutil.Process:
        """The descendant of a process of the consortium that has this word in its command."""
        children = psutil.Process(self.running[name].pid).children(recursive=True)
        return next(child for child in children if word in " ".join(child.cmdline()))

    def fault(self, name: str, **kinds: str) -> None:
        """Makes a site fail from now on: in `hello` or in `round_N`, `round_m1` for -1."""
        keys = {key.removeprefix("round_").replace("m", "-"): kind for key, kind in kinds.items() if key != "hello"}
        if "hello" in kinds:
            keys["hello"] = kinds["hello"]
        (self.site(name) / "fault.json").write_text(json.dumps(keys))

    def run(self, out: Path, *settings: str) -> subprocess.Popen[str]:
        """A run that has been started."""
        options = [part for setting in settings for part in ("--set", setting)]
        return self._begun("flower", "run", str(self.server), "--out", str(out), *options)

    def resume(self, out: Path) -> subprocess.Popen[str]:
        """A run that is resumed."""
        return self._begun("flower", "resume", str(self.server), str(out))

    def _begun(self, *arguments: str) -> subprocess.Popen[str]:
        self.runs.append(popen(*arguments))
        return self.runs[-1]

    def end_runs(self) -> None:
        """Ends the runs of a test, also if it failed."""
        while self.runs:
            process = self.runs.pop()
            if process.poll() is None:
                process.kill()
            process.communicate()

    def works(self, name: str) -> list[str]:
        """The lines of a site's worker log."""
        return (self.site(name) / "logs" / "worker.log").read_text().splitlines()

    def federation(self, out: Path) -> str:
        return str(json.loads((out / "manifest.json").read_text())["federation"])

    def ledger(self, name: str, out: Path) -> bytes:
        return (self.site(name) / "runs" / self.federation(out) / "clients" / name / "ledger.jsonl").read_bytes()

    def wrote(self) -> bytes:
        """All bytes that the server's side has written: its folder, its state, its logs."""
        files = [path for path in self.server.rglob("*") if path.is_file()]
        return b"".join(path.read_bytes() for path in files) + (self.path / "server.out").read_bytes()


def die_with_parent() -> None:
    """Asks the system to end this process if the tests are killed."""
    libc.prctl(1, signal.SIGTERM)


libc = ctypes.CDLL(None)
FEDMIDE = (sys.executable, "-m", "fedmide")


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def popen(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*FEDMIDE, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(),
        preexec_fn=die_with_parent,  # noqa: PLW1509
    )


@pytest.fixture(scope="session")
def consortium(
    tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory, small_input_at: Callable[[Path], Any]
) -> Iterator[Consortium]:
    folder = tmp_path_factory.mktemp("consortium")
    given = small_input_at(folder / "input")
    third = given.data / "c"
    third.mkdir()
    for part in ("training", "test"):
        (third / f"{part}.jsonl").write_text((given.data / "b" / f"{part}.jsonl").read_text().replace("Find", "Show"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDMIDE_CACHE", str(tiny_folder.parent))
        import tomli_w

        config = folder / "federation.toml"
        config.write_text(tomli_w.dumps(apply_overrides(read_toml(given.config), SETTINGS)))
        load(config)
        made = Consortium(folder / "made", given.data, config)
        port = str(free_port())
        command = ["flower", "init", str(made.path), "--config", str(config), "--sites", ",".join(SITES)]
        process = popen(*command, "--address", f"127.0.0.1:{port}", "--port", port)
        said = process.communicate(timeout=240)[0]
        assert process.returncode == 0, said
        try:
            for name in SITES:
                to_own_records(made, name)
            made.start_server()
            until(lambda: b"is up" in (made.path / "server.out").read_bytes())
            for name in SITES:
                made.start_site(name)
            until(lambda: all(is_up(made, name) for name in SITES))
            yield made
        finally:
            for running in made.running.values():
                end(running)


def is_up(made: Consortium, name: str) -> bool:
    logs = made.site(name) / "logs"
    words = {"worker.log": "waiting for messages", "supernode.log": "SuperNode ID", "superexec.log": "SuperExec"}
    return all((logs / log).exists() and word in (logs / log).read_text() for log, word in words.items())


def to_own_records(made: Consortium, name: str) -> None:
    """Puts a site's records into its own folder, and its configuration with them."""
    own = made.site(name) / "data"
    (made.data / name).rename(made.site(name) / "moved")
    own.mkdir()
    (made.site(name) / "moved").rename(own / name)
    config = made.site(name) / "site.toml"
    import tomli_w

    config.write_text(tomli_w.dumps(apply_overrides(read_toml(config), [f"data.path={own}"])))
