"""Sources of records: `load` gives the clients of any configured source, split and limited."""

from collections.abc import Sequence
from pathlib import Path

from fedmide.config.sections import DataConfig, DataSource
from fedmide.data.changes import noisy, pieces
from fedmide.data.files import read_folder, read_table
from fedmide.data.published import is_published, read_published
from fedmide.data.records import ClientData
from fedmide.data.split import SourceParts, limit, split
from fedmide.errors import DataError

MEDICAL_SITES, MEDICAL_TRAINING, MEDICAL_VALIDATION, MEDICAL_TEST = 8, 48, 12, 24
"""Defaults for the medical source: number of sites, and records per site in each part."""


_READERS = {"published": read_published, "files": read_folder, "table": read_table}


def load(config: DataConfig, seed: int, only: str = "") -> tuple[ClientData, ...]:
    """The clients that the configuration names, in order: one or more, each with training records.

    `only`: the one client that is needed. The other clients in a folder of files need not be read, and may be broken.
    """
    clients = _made(config, seed) if config.source == "medical" else _split(_read(config, only), config, seed)
    dealt = [piece for client in clients for piece in pieces(client, config.pieces, seed)]
    return noisy([limit(client, config, seed) for client in dealt], config.noisy_clients, seed)


def detect(path: Path) -> DataSource:
    """The kind of source that a path looks like."""
    if path.is_file():
        return "table"
    return "published" if path.is_dir() and is_published(path) else "files"


def _made(config: DataConfig, seed: int) -> tuple[ClientData, ...]:
    from fedmide.data.medical import sites  # most runs read files and need none of it

    return sites.build(
        seed,
        config.clients or MEDICAL_SITES,
        config.max_records or MEDICAL_TRAINING,
        config.max_validation_records or MEDICAL_VALIDATION,
        config.max_test_records or MEDICAL_TEST,
    )


def _read(config: DataConfig, only: str) -> tuple[SourceParts, ...]:
    """The first `config.clients` clients in the user's files (0: all); of a folder of files just `only`, if given."""
    if not config.path:
        raise DataError(
            f'data.path is empty, expected the path of the records for data.source = "{config.source}"',
            'Set data.path, or data.source = "medical", which needs no files',
        )
    path = Path(config.path).expanduser()
    if only and config.source == "files":
        return read_folder(path, config.fields, only)
    found = _READERS[config.source](path, config.fields)
    if config.clients > len(found):
        raise DataError(
            f"{config.path}: {len(found)} sites, expected at least data.clients = {config.clients}",
            "Set data.clients = 0 to take all of them",
        )
    return found[: config.clients or None]


def _split(found: Sequence[SourceParts], config: DataConfig, seed: int) -> tuple[ClientData, ...]:
    """The split clients. Raises one `DataError` with the problems of all clients."""
    clients: list[ClientData] = []
    errors: list[DataError] = []
    for parts in found:
        try:
            clients.append(split(parts, config, seed))
        except DataError as error:
            errors.append(error)
    if errors:
        raise DataError([problem for error in errors for problem in error.problems], errors[0].remedy)
    return tuple(clients)
