"""Clients read from the layout in which the original method's data was published.

A folder holds `local_training_{i}.json` and, for some or all clients, `local_validation_{i}.json` and
`local_test_{i}.json`. Or it holds exactly one folder with these files, whose name is a number: the number of clients.
All other files are ignored, including `local_training_{i}_v2.json` and the like, which the original leaves behind.
"""

import re
from pathlib import Path

from fedmide.config.sections import FieldNames
from fedmide.data.files import ClientFiles, read_clients
from fedmide.data.records import PARTS, Part
from fedmide.data.rows import Reading
from fedmide.data.split import SourceParts
from fedmide.errors import DataError

_FILE = re.compile(r"local_(training|validation|test)_(.*)\.json")


_LEFT_BEHIND = re.compile(r".*_v[0-9]+")


_NUMBER = re.compile(r"0|[1-9][0-9]{0,17}")


_REMEDY = "Set data.path to the folder that holds local_training_0.json and so on, or to the folder above it"


def read_published(path: Path, fields: FieldNames) -> tuple[SourceParts, ...]:
    """The clients in a published folder, named and ordered by number. A held-out part without a file is None."""
    return read_clients(_client_files(_data_folder(path)), fields)


def is_published(path: Path) -> bool:
    """True if a folder, or a numbered folder in it, holds files of this layout."""
    return _holds_records(path) or bool(_inner(path))


def _data_folder(path: Path) -> Path:
    """The folder itself or the one numbered folder in it, whichever holds the records."""
    if not path.is_dir():
        raise DataError(f"{path}: no such folder", _REMEDY)
    if _holds_records(path):
        return path
    inner = _inner(path)
    if not inner:
        raise DataError(f"{path}: no local_training_{{i}}.json, in it or in a numbered folder in it", _REMEDY)
    if len(inner) > 1:
        names = ", ".join(folder.name for folder in inner)
        raise DataError(f"{path}: several numbered folders hold records ({names}), expected one", _REMEDY)
    return inner[0]


def _inner(path: Path) -> list[Path]:
    """The numbered folders in a folder that hold records."""
    return [folder for folder in sorted(path.iterdir()) if _NUMBER.fullmatch(folder.name) and _holds_records(folder)]


def _holds_records(folder: Path) -> bool:
    return folder.is_dir() and any(_FILE.fullmatch(entry.name) for entry in folder.iterdir())


def _client_files(folder: Path) -> Reading[ClientFiles]:
    files = {part: _numbered(folder, part) for part in PARTS}
    unnumbered = [path for paths in files.values() for name, path in paths.items() if not _NUMBER.fullmatch(name)]
    problems = [f"{path}: expected a whole number for the site" for path in sorted(unnumbered)]
    training = files["training"]
    problems += [
        f"{path}: no local_training_{name}.json next to it"
        for part in ("validation", "test")
        for name, path in sorted(files[part].items())
        if name not in training
    ]
    names = sorted(filter(_NUMBER.fullmatch, training), key=int)
    clients = ({part: paths[name] for part, paths in files.items() if name in paths} for name in names)
    return Reading(tuple(map(ClientFiles, names, clients)), tuple(problems))


def _numbered(folder: Path, part: Part) -> dict[str, Path]:
    """The files of one part, by their client's number as it is written."""
    matches = ((_FILE.fullmatch(path.name), path) for path in sorted(folder.iterdir()))
    return {
        match[2]: path for match, path in matches if match and match[1] == part and not _LEFT_BEHIND.fullmatch(match[2])
    }
