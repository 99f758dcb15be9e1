"""The run folder: complete rounds, refused folders, resuming."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fedmide import atomic
from fedmide.config import Config, apply_overrides, parse
from fedmide.data.records import RecordId
from fedmide.errors import ModelError, RunFolderError
from fedmide.federation.client_state import ClientState
from fedmide.federation.ledger import Entry
from fedmide.federation.messages import Metric
from fedmide.federation.server import ClientRow, RoundSummary, ServerState, Stage
from fedmide.journal import creation
from fedmide.journal import folder as journal_folder
from fedmide.journal.folder import RunFolder
from fedmide.model.interface import Adapter


def config(*overrides: str) -> Config:
    return parse(apply_overrides({"warmup": {"rounds": 2}, "federation": {"rounds": 2}}, overrides))


def adapter(value: float) -> Adapter:
    return {"a.lora_A.weight": np.full((2, 3), value, np.float32)}


BEGIN = ServerState("f", ("a", "b"), -2, adapter(0))


def state(next_round: int) -> ServerState:
    return replace(BEGIN, round=next_round, adapter=adapter(next_round))


def summary(number: int, stage: Stage = "train", clients: str = "ab") -> RoundSummary:
    rows = (ClientRow(name, 3, {"loss": Metric(1.5, 2)}, 10, 20, 0.25) for name in clients)
    return RoundSummary(number, stage, True, tuple(rows))


def ledger_entry(number: int, record: str) -> Entry:
    return Entry(number, RecordId(record), 4, 1.0, None, None, "shared", "own-nll", None, number)


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return creation.create(tmp_path / "run", config(), {"status": "started", "seconds": {}})


def commit(folder: RunFolder, *rounds: int) -> None:
    for number in rounds:
        folder.commit_round(state(number + 1), summary(number, "warmup" if number < 0 else "train"))


def told(folder: RunFolder) -> list[tuple[int, str]]:
    return [(event["round"], event["client"]) for event in folder.events()]


# --- rounds


def test_a_run_without_rounds_begins_at_the_beginning(folder: RunFolder) -> None:
    assert folder.last_round(BEGIN) is BEGIN


@pytest.mark.parametrize("rounds", [[-2], [-2, -1], [-2, -1, 0], [-2, -1, 0, 1]])
def test_a_run_resumes_after_its_last_round(folder: RunFolder, rounds: list[int]) -> None:
    commit(folder, *rounds)
    found = folder.last_round(BEGIN)
    assert (found.round, found.federation, found.clients) == (rounds[-1] + 1, "f", ("a", "b"))
    np.testing.assert_array_equal(found.adapter["a.lora_A.weight"], adapter(rounds[-1] + 1)["a.lora_A.weight"])


def test_rounds_have_folders_of_their_own(folder: RunFolder) -> None:
    commit(folder, -2, -1, 0, 1)
    names = {"warmup-000", "warmup-001", "round-000", "round-001"}
    assert {path.name for path in (folder.path / "server").iterdir()} == names
    for name in names:
        files = {path.name for path in (folder.path / "server" / name).iterdir()}
        assert files == {"adapter.safetensors", "state.json"}


def test_a_gap_ends_what_counts(folder: RunFolder) -> None:
    commit(folder, -2, -1, 0, 1)
    shutil.rmtree(folder.path / "server" / "round-000")
    assert folder.last_round(BEGIN).round == 0


@pytest.mark.parametrize("kept", range(4))
def test_rounds_taken_over_count_once_all_are_there(
    folder: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: int
) -> None:
    """If copying the rounds stops early, it starts again from the beginning."""
    commit(folder, -2, -1, 0, 1)
    other = creation.create(tmp_path / "other", config(), {"status": "started", "seconds": {}})
    written = []

    def write_folder(path: Path, files: Mapping[str, bytes]) -> None:
        if len(written) == kept:
            raise KeyboardInterrupt
        written.append(path)
        atomic.write_folder(path, files)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(journal_folder, "write_folder", write_folder)
        other.take_rounds(folder, "ab")
    assert len(written) == kept
    assert not other.has_rounds
    (other.path / "server" / ".warmup-000.partial").mkdir(parents=True)  # as a killed round leaves it
    other.take_rounds(folder, "ab")
    assert other.last_round(BEGIN).round == 2
    assert told(other) == told(folder)


def test_a_round_left_aside_does_not_count(folder: RunFolder) -> None:
    commit(folder, -2, -1)
    (folder.path / "server" / "warmup-001").rename(folder.path / "server" / ".warmup-001.partial")
    assert folder.last_round(BEGIN).round == -1
    folder.rebuild_events(("a", "b"))
    assert told(folder) == [(-2, "a"), (-2, "b")]
    commit(folder, -1)
    assert folder.last_round(BEGIN).round == 0


def test_a_round_of_another_model_is_refused(folder: RunFolder) -> None:
    commit(folder, -2)
    other = replace(BEGIN, adapter={"b.lora_A.weight": np.zeros((2, 3), np.float32)})
    with pytest.raises(ModelError, match="1 arrays missing"):
        folder.last_round(other)


# --- events


def test_an_event_is_a_client_in_a_round(folder: RunFolder) -> None:
    commit(folder, -2)
    assert folder.events()[0] == {
        "stage": "warmup",
        "round": -2,
        "client": "a",
        "num_records": 3,
        "metrics": {"loss": {"sum": 1.5, "count": 2}},
        "bytes_down": 10,
        "bytes_up": 20,
        "seconds": 0.25,
        "refused": "",
        "clipped_from": 0.0,
    }


def test_events_are_rebuilt_from_what_is_whole(folder: RunFolder) -> None:
    commit(folder, -2, -1, 0, 1)
    for client in "ab":
        folder.commit_personalization(summary(2, "personalize", client))
    whole = (folder.path / "events.jsonl").read_bytes()
    assert len(whole.splitlines()) == 10
    for damaged in (b"", whole[: len(whole) // 2], whole + b'{"stage"'):
        (folder.path / "events.jsonl").write_bytes(damaged)
        folder.rebuild_events(("a", "b"))
        assert (folder.path / "events.jsonl").read_bytes() == whole
    (folder.site("a") / "personalization.json").unlink()
    folder.rebuild_events(("a", "b"))
    assert told(folder)[-1] == (2, "b") and len(told(folder)) == 9


def test_a_round_adds_its_events_to_those_before(folder: RunFolder) -> None:
    commit(folder, -2)
    path = folder.path / "events.jsonl"
    number, before = path.stat().st_ino, path.read_bytes()
    commit(folder, -1)
    folder.commit_personalization(summary(2, "personalize", "a"))
    assert path.stat().st_ino == number, "the same file: it is only appended to"
    assert path.read_bytes().startswith(before) and told(folder)[2:] == [(-1, "a"), (-1, "b"), (2, "a")]


def test_an_event_that_is_only_being_written_is_left_out(folder: RunFolder) -> None:
    commit(folder, -2)
    path = folder.path / "events.jsonl"
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        assert told(folder) == [(-2, "a"), (-2, "b")][: (size >= first) + (size == len(whole))]
    path.write_bytes(whole[:4] + b"\n" + whole)
    with pytest.raises(RunFolderError, match=r"events\.jsonl: broken JSON"):
        folder.events()


def test_figures_that_are_no_numbers_make_no_broken_events(folder: RunFolder) -> None:
    assert folder.events() == []
    commit(folder, -2)
    for line in (folder.path / "events.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)


# --- sites


def test_a_ledger_comes_back(folder: RunFolder) -> None:
    entries = (ledger_entry(-1, "r-0"), ledger_entry(0, "r-1"))
    assert folder.read_ledger("a") == ()
    folder.save_ledger(ClientState("a", "f", config(), {}, (), entries))
    assert folder.read_ledger("a") == entries
    assert folder.read_ledger("b") == ()


def test_evaluations_come_back(folder: RunFolder) -> None:
    assert folder.read_evaluation("a", "base") is None
    folder.save_evaluation("a", "base", {"nll_sums": [1.0, float("nan")]})
    assert folder.read_evaluation("a", "base") == {"nll_sums": [1.0, None]}
    assert folder.read_evaluation("a", "aggregated") is None


# --- creating and reopening


def test_a_new_folder_holds_configuration_and_manifest(folder: RunFolder) -> None:
    assert {path.name for path in folder.path.iterdir()} == {"config.toml", "manifest.json"}
    assert creation.reopen(folder.path).config == config()
    assert folder.read_manifest() == {"status": "started", "seconds": {}}
    folder.update_manifest(status="trained")
    assert folder.read_manifest() == {"status": "trained", "seconds": {}}


@pytest.mark.parametrize("left", [[], [".lock"], [".lock", ".manifest.json.partial", "manifest.json"]])
def test_a_folder_in_which_nothing_has_begun_is_taken(tmp_path: Path, left: list[str]) -> None:
    for name in left:
        (tmp_path / name).touch()
    folder = creation.create(tmp_path, config(), {})
    assert creation.reopen(tmp_path) == folder


def hold_something(path: Path) -> None:
    path.mkdir()
    (path / "notes.txt").touch()


@pytest.mark.parametrize("occupy", [Path.touch, hold_something])
def test_a_path_that_holds_something_else_is_refused(tmp_path: Path, occupy: Callable[[Path], None]) -> None:
    occupy(tmp_path / "x")
    with pytest.raises(RunFolderError, match=r"x exists already and holds something else\. Give another --out"):
        creation.create(tmp_path / "x", config(), {})


def test_a_run_that_exists_is_refused_with_the_command_that_resumes_it(folder: RunFolder) -> None:
    with pytest.raises(RunFolderError, match=f"exists already.*fedmide run --resume {folder.path}"):
        creation.create(folder.path, config(), {})


def test_another_configuration_is_refused_with_all_that_differs(folder: RunFolder) -> None:
    other = config("seed=7", "federation.rounds=9", 'lora.targets=["k_proj"]')
    for refused in (
        lambda: creation.reopen(folder.path, other),
        lambda: creation.create(folder.path, other, {}),
    ):
        with pytest.raises(RunFolderError) as error:
            refused()
        assert [problem.split(" is ")[0] for problem in error.value.problems] == [
            "seed",
            "lora.targets",
            "federation.rounds",
        ]
        assert f"seed is 0 in {folder.path} and 7 here" in str(error.value)
    assert creation.reopen(folder.path, config()) == folder


def test_a_folder_that_is_not_a_run_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for name, reason in (
        ("file", "it is not a folder"),
        ("nothing", "it is not a folder"),
        (".", "it has no config.toml"),
    ):
        with pytest.raises(RunFolderError, match=f"is not a run folder: {reason}. Start a run"):
            creation.reopen(tmp_path / name)


@pytest.mark.parametrize("name", ["manifest.json", "server/warmup-000/state.json", "clients/a/evaluation-base.json"])
def test_damaged_files_are_named(folder: RunFolder, name: str) -> None:
    commit(folder, -2)
    folder.save_evaluation("a", "base", {})
    readers: list[Callable[[], object]] = [
        folder.read_manifest,
        lambda: folder.last_round(BEGIN),
        lambda: folder.read_evaluation("a", "base"),
    ]
    path = folder.path / name
    for damage in (b"{", b"\xff"):
        path.write_bytes(damage)
        with pytest.raises(RunFolderError, match=f"{name}: (broken JSON|can't be read).*start a new run"):
            for read in readers:
                read()
    path.unlink()
    if name != "clients/a/evaluation-base.json":  # that one may be missing
        with pytest.raises(RunFolderError, match=f"{name}: can't be read.*start a new run"):
            for read in readers:
                read()


# --- the lock


def is_locked(path: Path) -> bool:
    try:
        with creation.locked(path):
            return False
    except RunFolderError as error:
        assert "another process works on this run" in str(error)
        return True


def test_a_lock_keeps_others_out_until_it_ends(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "run"
    with creation.locked(path):
        assert is_locked(path)
        assert not is_locked(tmp_path / "other")
    assert not is_locked(path)


def test_a_lock_ends_with_an_error(tmp_path: Path) -> None:
    with pytest.raises(BlockingIOError), creation.locked(tmp_path):
        raise BlockingIOError("of something else")
    assert not is_locked(tmp_path)


def test_a_lock_keeps_other_processes_out_and_ends_when_its_process_is_killed(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD_LOCK, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "locked\n"
        assert is_locked(tmp_path)
        holder.kill()
    assert not is_locked(tmp_path)


HOLD_LOCK = """
import sys
from pathlib import Path
from fedmide.journal.creation import locked
with locked(Path(sys.argv[1])):
    print("locked", flush=True)
    sys.stdin.read()
"""


def test_a_folder_that_cannot_be_locked_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunFolderError, match="can't be written: "), creation.locked(tmp_path / "file" / "run"):
        pass
    assert os.listdir(tmp_path) == ["file"]  # noqa: PTH208
