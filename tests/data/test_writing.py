"""Folders of clients: what is written is read back, and a folder in use is left alone."""

from pathlib import Path

import pytest

from fedmide.config.sections import FieldNames
from fedmide.data.files import read_folder
from fedmide.data.records import Record
from fedmide.data.writing import check_free, write_clients
from fedmide.errors import RunFolderError


def test_written_clients_are_read_back(tmp_path: Path) -> None:
    records = (Record("q1", "é a", "context", "category", "concept"), Record("q2", "b\n\u2028"))
    parts = {"training": records, "test": records[:1]}
    (folder,) = write_clients(tmp_path / "out", {"north": parts}, "SOURCES.md", b"last")
    assert folder == tmp_path / "out" / "north" and (tmp_path / "out" / "SOURCES.md").read_bytes() == b"last"
    (client,) = read_folder(tmp_path / "out", FieldNames())
    assert client.name == "north" and (client.training, client.validation, client.test) == (records, None, records[:1])


def test_a_folder_that_is_taken_is_refused(tmp_path: Path) -> None:
    check_free(tmp_path / "new")
    check_free(tmp_path)
    (tmp_path / "x").write_text("")
    for taken in (tmp_path, tmp_path / "x"):
        with pytest.raises(RunFolderError, match="expected a new or an empty folder"):
            check_free(taken)
