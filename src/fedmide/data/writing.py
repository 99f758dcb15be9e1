"""Records as folders that `data.source = "files"` reads: one folder per client, one file of JSON lines per part."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

from fedmide.atomic import clear_errors, write_file, write_folder
from fedmide.data.records import Part, Record
from fedmide.errors import RunFolderError

FIELDS = ("instruction", "context", "response", "category", "concept")


def check_free(folder: Path) -> None:
    """Raises `RunFolderError` if the folder is neither new nor empty."""
    with clear_errors(folder):
        is_taken = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    if is_taken:
        raise RunFolderError(f"{folder}: expected a new or an empty folder", "Name another one, or empty it")


def write_clients(
    folder: Path, clients: Mapping[str, Mapping[Part, Iterable[Record]]], last: str, content: bytes
) -> tuple[Path, ...]:
    """Writes each client's records by part into a new or empty folder, and then the file `last`.

    All is written to a temporary folder first, then moved client by client: a failed write leaves no client behind.
    A folder that has `last` is complete.
    Returns the clients' folders. Raises `RunFolderError` if the folder is not free or cannot be written.
    """
    check_free(folder)
    with clear_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=".partial-", dir=folder) as aside:
            for name, parts in clients.items():
                files = {f"{part}.jsonl": _lines(records) for part, records in parts.items()}
                write_folder(Path(aside, name), files)
            write_file(Path(aside, last), content)
            for name in (*clients, last):
                Path(aside, name).rename(folder / name)
    return tuple(folder / name for name in clients)


def _lines(records: Iterable[Record]) -> bytes:
    rows = ({name: asdict(record)[name] for name in FIELDS} for record in records)
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
