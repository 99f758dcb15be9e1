"""Files and folders that are there whole or not at all, whatever stops the process or the machine.

A file that only grows is the exception: its last line may be there in part.
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


def check_room(folder: Path, needed_bytes: int) -> None:
    """Raises `RunFolderError` where the disk has no room for so much."""
    with clear_errors(folder):
        existing = next(parent for parent in [folder, *folder.resolve().parents] if parent.exists())
        free = shutil.disk_usage(existing).free
    if free < needed_bytes + DISK_RESERVE_BYTES:
        raise RunFolderError(
            f"{folder}: no room on disk: {(needed_bytes + DISK_RESERVE_BYTES) / 1e6:.0f} MB needed, "
            f"{free / 1e6:.0f} MB free",
            "Free some, or give --out on another disk",
        )


@contextmanager
def clear_errors(path: Path) -> Iterator[None]:
    """Makes one `RunFolderError` of what the system refuses."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise RunFolderError(
                f"{path}: no room on disk",
                "Free some and give the command again; a run that has begun goes on with fedmide run --resume RUN, one "
                "over Flower with fedmide flower resume SERVER RUN",
                is_disk=True,
            ) from None
        raise RunFolderError(f"{path}: can't be written: {error.strerror}", is_disk=True) from None


def write_file(path: Path, data: bytes) -> None:
    """Writes a file whole or not at all; one that stood there is replaced."""
    aside = path.with_name(f".{path.name}.partial")
    with clear_errors(path), _removed_on_error(aside):
        _make_folder(path.parent)
        _write_synced(aside, data)
        aside.replace(path)
        _sync_folder(path.parent)


def append_file(path: Path, data: bytes) -> None:
    """Adds to a file, which is made where there is none; stopped meanwhile, a part of the data may be there."""
    with clear_errors(path):
        is_new = not path.exists()
        _write_synced(path, data, "ab")
        if is_new:
            _sync_folder(path.parent)


def write_folder(path: Path, files: Mapping[str, bytes]) -> None:
    """Writes a folder of files whole or not at all; one that stood there is replaced."""
    aside, former = path.with_name(f".{path.name}.partial"), path.with_name(f".{path.name}.former")
    with clear_errors(path), _removed_on_error(aside):
        _remove(aside)
        _make_folder(aside)
        for name, data in files.items():
            _write_synced(aside / name, data)
        _sync_folder(aside)
        if path.exists():  # moved away first: removed in place it would for a moment be there in part
            _remove(former)
            path.replace(former)
        aside.replace(path)
        _sync_folder(path.parent)
    _remove(former)


def to_json(values: Mapping[str, Any]) -> bytes:
    """The values as JSON that a person can read.

    >>> to_json({"mean": math.nan, "names": ("a", "é")}).decode().split()
    ['{', '"mean":', 'null,', '"names":', '[', '"a",', '"é"', ']', '}']
    """
    return (json.dumps(without_nan(values), indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def without_nan(value: Any) -> Any:
    """The same values with null where a number is not finite: JSON has no word for those."""
    if isinstance(value, Mapping):
        return {key: without_nan(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def lines_of(text: str) -> list[str]:
    r"""The lines of JSON lines. Not splitlines(): that also cuts at U+2028 and others, which JSON texts may hold.

    >>> lines_of('"a\u2028b"\n"c"\n')
    ['"a\u2028b"', '"c"']
    """
    return text.removesuffix("\n").split("\n") if text else []


@contextmanager
def _removed_on_error(aside: Path) -> Iterator[None]:
    """Leaves nothing half-written behind; on a full disk that would take the room it lacks."""
    try:
        yield
    except OSError:
        _remove(aside)
        raise


def _remove(path: Path) -> None:
    """Removes a file or a folder, if it is there and can be."""
    shutil.rmtree(path, ignore_errors=True)
    with suppress(OSError):
        path.unlink()


def _write_synced(path: Path, data: bytes, mode: Literal["wb", "ab"] = "wb") -> None:
    with path.open(mode) as handle:
        handle.write(data)
        handle.flush()
        os.fsync(handle.fileno())


def _make_folder(path: Path) -> None:
    """Makes a folder and those above it that are not there, each so that it lasts."""
    if path.is_dir():
        return
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        _sync_folder(folder.parent)


def _sync_folder(path: Path) -> None:
    """Makes the names in a folder last: a renamed file may otherwise be lost when power fails."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    with suppress(OSError):  # not every network file system can
        os.fsync(descriptor)
    os.close(descriptor)
