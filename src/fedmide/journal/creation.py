"""Creating, opening and locking of run folders."""

import fcntl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from fedmide.atomic import clear_errors, to_json, write_file
from fedmide.config import Config, load, to_toml
from fedmide.config.knobs import differing, flat
from fedmide.errors import RunFolderError
from fedmide.journal.folder import RunFolder

_BEGUN = {".lock", "manifest.json", ".manifest.json.partial", ".config.toml.partial"}
"""Files that a folder may hold before it is a run folder. config.toml is written last."""


RUNS = Path("runs")
"""Default parent of new runs, in the working directory."""


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Locks a run folder, and creates it if missing. Raises `RunFolderError` while another process holds the lock."""
    with clear_errors(path):
        path.mkdir(parents=True, exist_ok=True)
        handle = (path / ".lock").open("w")
    with handle:
        with clear_errors(path):
            _lock(handle, path)
        yield


def free_folder(parent: Path, name: str = "") -> Path:
    """Default folder of a new run: PARENT/NAME-NNN, or PARENT/NNN, with the first free number."""
    number, start = 1, f"{name}-" if name else ""
    while (folder := parent / f"{start}{number:03d}").exists():
        number += 1
    return folder


def check_new(path: Path, config: Config) -> None:
    """Raises `RunFolderError` if the path is not free for a new run."""
    if not path.exists() or (path.is_dir() and {entry.name for entry in path.iterdir()} <= _BEGUN):
        return
    if (path / "config.toml").is_file():
        reopen(path, config)  # reports the settings that differ, if any
        raise RunFolderError(
            f"{path} exists already",
            f"To resume it: fedmide run --resume {path}. A run over Flower: fedmide flower resume SERVER {path}",
        )
    raise RunFolderError(f"{path} exists already and holds something else", "Give another --out")


def create(path: Path, config: Config, manifest: Mapping[str, Any]) -> RunFolder:
    """Creates a run folder. Refuses a path that is not free."""
    check_new(path, config)
    write_file(path / "manifest.json", to_json(manifest))
    write_file(path / "config.toml", to_toml(config).encode())
    return RunFolder(path, config)


def reopen(path: Path, config: Config | None = None) -> RunFolder:
    """The run folder at a path. Refuses one that belongs to another configuration."""
    if not (path / "config.toml").is_file():
        reason = "it has no config.toml" if path.is_dir() else "it is not a folder"
        raise RunFolderError(f"{path} is not a run folder: {reason}", "Start a run with fedmide run CONFIG")
    own = load(path / "config.toml")
    differences = () if config is None else differing(flat(own.model_dump()), flat(config.model_dump()))
    problems = [f"{name} is {theirs!r} in {path} and {ours!r} here" for name, theirs, ours in differences]
    if problems:
        raise RunFolderError(
            problems, f"{path} belongs to another configuration: give another --out, or resume it without CONFIG"
        )
    return RunFolder(path, own)


def _lock(handle: TextIO, path: Path) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise RunFolderError(f"{path}: another process works on this run", "Wait until it ends, or stop it") from None
