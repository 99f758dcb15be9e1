"""Records read from the user's files: JSON, JSON lines or Parquet; a folder of clients, or one table of all clients.

Files are only read, never written. All problems of all files make one `DataError`, which holds no word of a record.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from fedmide.config.sections import FieldNames
from fedmide.data.records import PARTS, Part, Record
from fedmide.data.rows import SUFFIXES, Reading, Row, gathered, kind, natural_order, rows_of, sound, text_fault
from fedmide.data.split import SourceParts
from fedmide.errors import DataError

_PART_NAMES: Mapping[str, Part] = {
    **{part: part for part in PARTS},
    "train": "training",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
}


LAYOUT = (
    "Expected one file per site (NAME.json, NAME.jsonl or NAME.parquet), or one folder per site. "
    "Such a folder holds training.json and, if you have them, validation.json and test.json (or .jsonl, .parquet)"
)


NEEDED = "Every record needs an instruction and a response, both text; data.fields sets the names of these fields"


_NAME = re.compile(r"(?!\.{1,2}$)[A-Za-z0-9._-]{1,64}")


_NAME_RULE = "expected a name of 1 to 64 characters out of A-Z a-z 0-9 . _ -"


@dataclass(frozen=True, slots=True)
class ClientFiles:
    """A client's name and the file of each part that it has."""

    name: str
    paths: Mapping[Part, Path]


def read_records(path: Path, fields: FieldNames) -> tuple[Record, ...]:
    """The records in one .json, .jsonl or .parquet file, in order. Raises one `DataError` with all its problems."""
    return sound(_records(path, fields), NEEDED)


def read_folder(path: Path, fields: FieldNames, only: str = "") -> tuple[SourceParts, ...]:
    """The clients in a folder, in natural order of their names: one file or one subfolder each.

    `only`: reads just the client of that name and opens nothing else in the folder.
    """
    if not path.is_dir():
        raise DataError(f"{path}: no such folder", "Give the folder of your records (data.path)")
    return read_clients(_clients_in(path, only), fields)


def read_table(path: Path, fields: FieldNames) -> tuple[SourceParts, ...]:
    """The clients in one file in which each record names its client, in natural order of their names."""
    if not path.is_file():
        raise DataError(f"{path}: no such file", "Give the file of your records (data.path)")
    found = _rows(path, fields)
    problems = list(found.problems)
    owned: defaultdict[str, list[Row]] = defaultdict(list)
    for row in found.values:
        owner = _owner(row, fields)
        problems += owner.problems
        owned[next(iter(owner.values), "")].append(row)  # a row without a client is still read, for its other problems
    clients = gathered(_parted(name, owned[name], fields) for name in sorted(owned, key=natural_order))
    problems += [*clients.problems, *_repeated(path, owned)]
    return sound(Reading(clients.values, tuple(problems)), NEEDED)


def read_clients(found: Reading[ClientFiles], fields: FieldNames) -> tuple[SourceParts, ...]:
    """The clients whose files were found. One `DataError` has the problems of the search and of all files."""
    read = gathered((_client(client, fields) for client in found.values), found.problems)
    return sound(read, LAYOUT if found.problems else NEEDED)


def checked_record(row: Row, fields: FieldNames) -> Reading[Record]:
    """The record that a row describes, or what is wrong with it.

    >>> checked_record(Row("a.json:3", {"instruction": "Why?", "response": 7}), FieldNames()).problems
    ("a.json:3: field 'response' is int, expected text",)
    """
    value = row.value
    if not isinstance(value, dict):
        return Reading(problems=(f"{row.place}: {kind(value)}, expected an object",))
    required = (fields.instruction, fields.response)
    names = (*required, fields.context, fields.category, fields.concept)
    faults = {name: text_fault(value.get(name), name in required) for name in names}
    problems = tuple(f"{row.place}: field '{name}' {fault}" for name, fault in faults.items() if fault)
    if problems:
        return Reading(problems=problems)
    instruction, response, context, category, concept = (value.get(name) or "" for name in names)
    return Reading((Record(instruction, response, context, category, concept),))


def _client(files: ClientFiles, fields: FieldNames) -> Reading[SourceParts]:
    if tuple(files.paths) == ("training",):
        found = _rows(files.paths["training"], fields)
        parted = _parted(files.name, found.values, fields)
        return Reading(parted.values, found.problems + parted.problems)
    parts = {part: _records(path, fields) for part, path in files.paths.items()}
    given = {part: reading.values for part, reading in parts.items()}
    client = SourceParts(files.name, given.get("training", ()), given.get("validation"), given.get("test"))
    return Reading((client,), gathered(parts.values()).problems)


def _parted(name: str, rows: Iterable[Row], fields: FieldNames) -> Reading[SourceParts]:
    """One client from the rows of one file. A validation or test part without a row is None."""
    records: dict[Part, list[Record]] = {"training": []}
    problems: list[str] = []
    for row in rows:
        part, reading = _part(row, fields), checked_record(row, fields)
        problems += (*part.problems, *reading.problems)
        for which in part.values:
            records.setdefault(which, []).extend(reading.values)
    given = {part: tuple(members) for part, members in records.items()}
    return Reading((SourceParts(name, given["training"], given.get("validation"), given.get("test")),), tuple(problems))


def _part(row: Row, fields: FieldNames) -> Reading[Part]:
    """The part that a row belongs to: training if no field is set for the part."""
    if not fields.part or not isinstance(row.value, dict):
        return Reading(("training",))
    value = row.value.get(fields.part)
    part = _PART_NAMES.get(value) if isinstance(value, str) else None
    if part is None:
        return Reading(problems=(f"{row.place}: field '{fields.part}' names no part, expected {', '.join(PARTS)}",))
    return Reading((part,))


def _records(path: Path, fields: FieldNames) -> Reading[Record]:
    found = _rows(path, fields)
    return gathered((checked_record(row, fields) for row in found.values), found.problems)


def _rows(path: Path, fields: FieldNames) -> Reading[Row]:
    return rows_of(path, fields.model_dump().values())


def _owner(row: Row, fields: FieldNames) -> Reading[str]:
    """The name of the client that a row belongs to. A whole number is a name too."""
    value = row.value.get(fields.client) if isinstance(row.value, dict) else None
    name = str(value) if type(value) in {str, int} else ""
    if _NAME.fullmatch(name):
        return Reading((name,))
    return Reading(problems=(f"{row.place}: field '{fields.client}' does not name a site, {_NAME_RULE}",))


def _clients_in(path: Path, only: str = "") -> Reading[ClientFiles]:
    files, folders = _entries(path)
    if only:
        files, folders = [each for each in files if each.stem == only], [each for each in folders if each.name == only]
    single = [ClientFiles(file.stem, {"training": file}) for file in files]
    found = gathered(_parts_in(folder) for folder in folders)
    clients = sorted((*single, *found.values), key=lambda client: natural_order(client.name))
    names = [client.name for client in clients]
    problems = [*found.problems, *_repeated(path, names)]
    problems += [f"{path / name}: {_NAME_RULE}" for name in names if not _NAME.fullmatch(name)]
    # Without this check, the folder of a single client would be read as clients called training and test.
    problems += [f"{file}: a part, expected a site" for file in files if file.stem in PARTS]
    return Reading(
        tuple(clients),
        tuple(problems if clients else [f"{path}: no {f'site {only!r}' if only else 'sites'} found"]),
    )


def _parts_in(folder: Path) -> Reading[ClientFiles]:
    """The client whose files a subfolder holds."""
    files, _ = _entries(folder)
    paths: dict[Part, Path] = {part: file for part in PARTS for file in files if file.stem == part}
    rest = [file for file in files if file not in paths.values()]
    problems = [f"{file}: expected one file for each of {', '.join(PARTS)} and no other" for file in rest]
    problems += [] if "training" in paths else [f"{folder}: no training file"]
    return Reading((ClientFiles(folder.name, paths),), tuple(problems))


def _entries(folder: Path) -> tuple[list[Path], list[Path]]:
    """The record files and the folders in a folder, without hidden ones."""
    seen = [path for path in sorted(folder.iterdir()) if not path.name.startswith(".")]
    folders = [path for path in seen if path.is_dir()]
    return [path for path in seen if path.suffix.lower() in SUFFIXES and path not in folders], folders


def _repeated(path: Path, names: Iterable[str]) -> list[str]:
    """A problem for each repeated client name. It ignores case, like many file systems."""
    same: defaultdict[str, list[str]] = defaultdict(list)
    for name in names:
        same[name.casefold()].append(name)
    repeated = [", ".join(alike) for alike in same.values() if len(alike) > 1]
    return [f"{path}: duplicate site name, whatever its case: {alike}" for alike in repeated]
