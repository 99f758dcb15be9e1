"""Files and folders are written completely or not at all."""

import errno
import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmide import atomic
from fedmide.errors import RunFolderError


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def fail_at(monkeypatch: pytest.MonkeyPatch, name: str, error: OSError) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr(os, name, refuse)


def test_a_file_is_written_with_the_folders_above_it_and_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "c.json"
    atomic.write_file(path, b"one")
    atomic.write_file(path, b"two")
    assert tree(tmp_path) == {"a/b/c.json": b"two"}


def test_a_folder_is_written_and_replaced_with_all_its_files(tmp_path: Path) -> None:
    path = tmp_path / "a" / "round"
    atomic.write_folder(path, {"x": b"1", "y": b"2"})
    atomic.write_folder(path, {"y": b"3"})
    assert tree(tmp_path) == {"a/round/y": b"3"}


def test_added_data_is_synced_and_follows_the_old_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.readlink(f"/proc/self/fd/{descriptor}")))  # noqa: PTH115
    for line in (b"one\n", b"two\n"):
        atomic.append_file(tmp_path / "it", line)
    assert tree(tmp_path) == {"it": b"one\ntwo\n"}
    assert synced == [str(tmp_path / "it"), str(tmp_path), str(tmp_path / "it")]
    with pytest.raises(RunFolderError, match="can't be written: "):
        atomic.append_file(tmp_path, b"")


def test_leftovers_of_an_earlier_crash_do_no_harm(tmp_path: Path) -> None:
    (tmp_path / ".file.partial").write_bytes(b"half")
    for name in (".folder.partial", ".folder.former"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "old").write_bytes(b"half")
    (tmp_path / "folder").mkdir()
    atomic.write_file(tmp_path / "file", b"whole")
    atomic.write_folder(tmp_path / "folder", {"new": b"whole"})
    assert tree(tmp_path) == {"file": b"whole", "folder/new": b"whole"}


WRITES: dict[str, Callable[[Path], None]] = {
    "file": lambda path: atomic.write_file(path, b"new"),
    "folder": lambda path: atomic.write_folder(path, {"one": b"new", "two": b"new"}),
}
OLD = {"file": {"it": b"old"}, "folder": {"it/one": b"old", "it/three": b"old"}}
NEW = {"file": {"it": b"new"}, "folder": {"it/one": b"new", "it/two": b"new"}}


class Stopped(BaseException):
    """Ends the process, in its effect on files."""


def write_old(folder: Path, kind: str) -> None:
    for name, data in OLD[kind].items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)


@pytest.mark.parametrize("kind", WRITES)
@pytest.mark.parametrize("call", ["fsync", "replace", "rename", "rmdir", "unlink", "close"])
@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_a_process_stopped_at_any_call_leaves_the_old_the_new_or_nothing(
    kind: str, call: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_old(tmp_path, kind)
    left, original = [number], getattr(os, call)

    def stop(*args: object, **kwargs: object) -> object:
        left[0] -= 1
        if not left[0]:
            raise Stopped
        return original(*args, **kwargs)

    monkeypatch.setattr(os, call, stop)
    try:
        WRITES[kind](tmp_path / "it")
    except Stopped:
        pass
    finally:
        monkeypatch.undo()
    visible = {name: data for name, data in tree(tmp_path).items() if not name.startswith(".")}
    assert visible in (OLD[kind], NEW[kind], {})
    WRITES[kind](tmp_path / "it")
    assert tree(tmp_path) == NEW[kind]


@pytest.mark.parametrize(
    ("kind", "call"),
    [("file", "fsync"), ("file", "replace"), ("folder", "fsync"), ("folder", "replace"), ("folder", "mkdir")],
)
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_reported_and_leaves_the_old_files(
    kind: str, number: int, call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_old(tmp_path, kind)
    fail_at(monkeypatch, call, OSError(number, "full"))
    with pytest.raises(
        RunFolderError, match=r"it: no room on disk. Free some .* --resume RUN, .* fedmide flower resume SERVER RUN"
    ):
        WRITES[kind](tmp_path / "it")
    monkeypatch.undo()
    assert tree(tmp_path) == OLD[kind]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the device that is always full")
def test_a_full_device_is_reported(tmp_path: Path) -> None:
    (tmp_path / ".it.partial").symlink_to("/dev/full")
    with pytest.raises(RunFolderError, match="no room on disk"):
        atomic.write_file(tmp_path / "it", b"new")
    assert tree(tmp_path) == {}


def test_other_errors_of_the_system_are_reported_with_their_reason(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for kind, write in WRITES.items():
        with pytest.raises(RunFolderError, match="can't be written: "):
            write(tmp_path / "file" / kind)


def test_a_file_system_that_cannot_sync_folders_is_fine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = os.fsync

    def files_only(descriptor: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):  # noqa: PTH112
            raise OSError(errno.EINVAL, "not for folders")
        original(descriptor)

    monkeypatch.setattr(os, "fsync", files_only)
    for kind, write in WRITES.items():
        write(tmp_path / kind)
    assert (tmp_path / "file").read_bytes() == b"new"


def test_room_on_disk_is_checked_where_the_folder_will_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def usage(path: Path) -> tuple[int, int, int]:
        asked.append(path)
        return shutil._ntuple_diskusage(10**9, 0, 80_000_000)  # type: ignore[attr-defined,no-any-return]

    monkeypatch.setattr(shutil, "disk_usage", usage)
    atomic.check_room(tmp_path / "not" / "yet", 30_000_000)
    assert asked == [tmp_path]
    with pytest.raises(RunFolderError, match="81 MB needed, 80 MB free"):
        atomic.check_room(tmp_path / "not" / "yet", 30_500_001)
    assert tree(tmp_path) == {}


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(), values, max_size=3))
def test_json_keeps_everything_but_numbers_that_are_not_finite(given_values: dict[str, object]) -> None:
    def strict(constant: str) -> None:
        raise AssertionError(constant)

    found = json.loads(atomic.to_json(given_values), parse_constant=strict)
    assert found == atomic.without_nan(given_values)


def test_json_has_null_for_numbers_that_are_not_finite() -> None:
    assert json.loads(atomic.to_json({"a": [math.nan, (math.inf, 1.5)], "b": {"c": -math.inf}})) == {
        "a": [None, [None, 1.5]],
        "b": {"c": None},
    }
