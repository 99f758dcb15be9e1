"""Files and folders that are written completely or not at all, even if the process or the machine stops.

A file that only grows is the exception: its last line may be incomplete.
"""

import errno
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from fedmide.errors import RunFolderError

DISK_RESERVE_BYTES = 50_000_000
"""Free bytes that must be left on the disk."""


def check_room(folder: Path, needed_bytes: int) -> None:
    """Raises `RunFolderError` if the disk does not have room for this many bytes."""
    with clear_errors(folder):
        existing = next(parent for parent in [folder, *folder.resolve().parents] if parent.exists())
        free = shutil.disk_usage(existing).free
    if free < needed_bytes + DISK_RESERVE_BYTES:
        raise RunFolderError(
            f"{folder}: no room on disk: {(needed_bytes + DISK_RESERVE_BYTES) / 1e6:.0f} MB needed, "
            f"{free / 1e6:.0f} MB free",
            "Free some space, or give --out on another disk",
        )


@contextmanager
def clear_errors(path: Path) -> Iterator[None]:
    """Turns an error of the operating system into a `RunFolderError`."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise RunFolderError(
                f"{path}: no room on disk",
                "Free some space and give the command again. To resume a run: fedmide run --resume RUN, one "
                "between sites: fedmide flower resume SERVER RUN",
                is_disk=True,
            ) from None
        raise RunFolderError(f"{path}: can't be written: {error.strerror}", is_disk=True) from None


def write_file(path: Path, data: bytes) -> None:
    """Writes a file completely or not at all; an existing one is replaced."""
    aside = path.with_name(f".{path.name}.partial")
    with clear_errors(path), _removed_on_error(aside):
        _make_folder(path.parent)
        _write_synced(aside, data)
        aside.replace(path)
        _sync_folder(path.parent)


def append_file(path: Path, data: bytes) -> None:
    """Adds to a file, which is created if there is none. If this is stopped, only part of the data may be there."""
    with clear_errors(path):
        is_new = not path.exists()
        _write_synced(path, data, "ab")
        if is_new:
            _sync_folder(path.parent)


def write_folder(path: Path, files: Mapping[str, bytes]) -> None:
    """Writes a folder of files completely or not at all; an existing one is replaced."""
    aside, former = path.with_name(f".{path.name}.partial"), path.with_name(f".{path.name}.former")
    with clear_errors(path), _removed_on_error(aside):
        _remove(aside)
        _make_folder(aside)
        for name, data in files.items():
            _write_synced(aside / name, data)
        _sync_folder(aside)
        if path.exists():  # moved first: a removal in place would leave part of it for a moment
            _remove(former)
            path.replace(former)
        aside.replace(path)
        _sync_folder(path.parent)
    _remove(former)


def to_json(values: Mapping[str, Any]) -> bytes:
    """The values as indented JSON, with null for numbers that are not finite.

    >>> to_json({"mean": math.nan, "names": ("a", "é")}).decode().split()
    ['{', '"mean":', 'null,', '"names":', '[', '"a",', '"é"', ']', '}']
    """
    return (json.dumps(without_nan(values), indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def without_nan(value: Any) -> Any:
    """The same values, with null for numbers that are not finite, because JSON has no word for those."""
    if isinstance(value, Mapping):
        return {key: without_nan(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def lines_of(text: str) -> list[str]:
    r"""The lines of a JSON Lines text. `splitlines()` would also cut at U+2028 and others, which JSON texts may hold.

    >>> lines_of('"a\u2028b"\n"c"\n')
    ['"a\u2028b"', '"c"']
    """
    return text.removesuffix("\n").split("\n") if text else []


@contextmanager
def _removed_on_error(aside: Path) -> Iterator[None]:
    """Removes a half-written file after an error, because on a full disk it would take needed room."""
    try:
        yield
    except OSError:
        _remove(aside)
        raise


def _remove(path: Path) -> None:
    """Removes a file or folder, if it exists and can be removed."""
    shutil.rmtree(path, ignore_errors=True)
    with suppress(OSError):
        path.unlink()


def _write_synced(path: Path, data: bytes, mode: Literal["wb", "ab"] = "wb") -> None:
    with path.open(mode) as handle:
        handle.write(data)
        handle.flush()
        os.fsync(handle.fileno())


def _make_folder(path: Path) -> None:
    """Creates a folder and its missing parents, each synced to disk."""
    if path.is_dir():
        return
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        _sync_folder(folder.parent)


def _sync_folder(path: Path) -> None:
    """Syncs the names in a folder to disk: a power failure could otherwise lose a renamed file."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    with suppress(OSError):  # some network file systems can't
        os.fsync(descriptor)
    os.close(descriptor)
