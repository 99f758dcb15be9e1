"""Folders of clients: what is written is read back, and a folder in use is left alone."""

from collections.abc import Mapping
from pathlib import Path

import pytest

from fedmide.atomic import write_folder
from fedmide.config.sections import FieldNames
from fedmide.data import writing
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


def test_a_failed_write_leaves_no_client_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[Path] = []

    def full(path: Path, files: Mapping[str, bytes]) -> None:
        if written:
            raise RunFolderError(f"{path}: no room on disk", is_disk=True)
        written.append(path)
        write_folder(path, files)

    parts = {"training": (Record("q", "a"),)}
    with monkeypatch.context() as patched:
        patched.setattr(writing, "write_folder", full)
        with pytest.raises(RunFolderError, match="no room on disk"):
            write_clients(tmp_path, {"north": parts, "south": parts}, "SOURCES.md", b"")
    assert list(tmp_path.iterdir()) == [] and len(written) == 1
    assert len(write_clients(tmp_path, {"north": parts, "south": parts}, "SOURCES.md", b"")) == 2


def test_a_folder_that_is_taken_is_refused(tmp_path: Path) -> None:
    check_free(tmp_path / "new")
    check_free(tmp_path)
    (tmp_path / "x").write_text("")
    for taken in (tmp_path, tmp_path / "x"):
        with pytest.raises(RunFolderError, match="expected a new or an empty folder"):
            check_free(taken)
