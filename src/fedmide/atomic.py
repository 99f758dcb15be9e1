"""Files and folders that are there whole or not at all."""

import errno
import json
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedmide.errors import RunFolderError

DISK_RESERVE_BYTES = 50_000_000


def check_room(folder: Path, needed_bytes: int) -> None:
    """Raises `RunFolderError` where the disk has no room for so much."""
    existing = next(parent for parent in [folder, *folder.resolve().parents] if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed_bytes + DISK_RESERVE_BYTES:
        raise RunFolderError(
            f"{folder}: no room on disk: {needed_bytes / 1e6:.0f} MB needed, {free / 1e6:.0f} MB free",
            "Free some, or give --out on another disk",
        )


def write_file(path: Path, data: bytes) -> None:
    """Writes a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.partial")
    _write_synced(aside, data)
    aside.replace(path)


def write_folder(path: Path, files: Mapping[str, bytes]) -> None:
    """Writes a folder of files whole or not at all; one that stood there is replaced."""
    aside = path.with_name(f".{path.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    for name, data in files.items():
        _write_synced(aside / name, data)
    if path.exists():
        shutil.rmtree(path)
    aside.replace(path)


def _write_synced(path: Path, data: bytes) -> None:
    try:
        with path.open("wb") as handle:
            handle.write(data)
            handle.flush()
            os.fsync(handle.fileno())
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise RunFolderError(
                f"{path}: no room on disk",
                "Free some and go on with fedmide run --resume RUN: nothing is lost",
            ) from None
        raise


def to_json(values: Mapping[str, Any]) -> bytes:
    """The values as JSON that a person can read."""
    return (json.dumps(_without_nan(values), indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _without_nan(value: Any) -> Any:
    """The same values with null where a number is not finite: JSON has no word for those."""
    if isinstance(value, Mapping):
        return {key: _without_nan(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
