"""A run seen from its folder: what is shown is what the folder says, at every stage, and looking changes nothing."""

import io
import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fedmide.cli import run_view
from fedmide.cli.run_view import Snapshot, follow, look, render
from fedmide.config import load
from fedmide.journal import manifest
from fedmide.journal.creation import reopen
from fedmide.journal.folder import RunFolder
from fedmide.runs import opening, stages
from fedmide.runs.tracking import tracked


def shown(seen: Snapshot) -> list[str]:
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(render(seen))
    return [line.rstrip() for line in console.export_text().splitlines()]


@pytest.fixture
def looks(small_input: Any, tmp_path: Path) -> list[list[str]]:
    """The view of a run after each of its stages."""
    seen = []
    with opening.start(load(small_input.config), tmp_path / "run") as run:
        for stage in (None, stages.train, stages.personalize, stages.generate, stages.evaluate):
            if stage is not None:
                stage(run)
            seen.append(shown(look(reopen(tmp_path / "run"), datetime.now(UTC))))
    return seen


def test_every_stage_is_shown(looks: list[list[str]], tmp_path: Path) -> None:
    heads = [lines[0].split(",")[0] for lines in looks]
    assert heads == [f"run: {status}" for status in manifest.STATUSES]
    assert [lines[1] for lines in looks] == [
        f"rounds {rounds}/3   personalized {tuned}/2   generated {told}/2"
        for rounds, tuned, told in [(0, 0, 0), (3, 0, 0), (3, 2, 0), (3, 2, 2), (3, 2, 2)]
    ]
    assert "last change" in looks[0][0] and "last change" not in looks[-1][0]
    assert looks[0][4].split() == ["a", "0", "–", "–", "–", "0", "0:00:00"]
    events = [event for event in reopen(tmp_path / "run").events() if event["client"] == "a"]
    last = [event for event in events if event["stage"] == "train"][-1]["metrics"]
    name, rounds, loss, line, shared, personal, *_ = looks[-1][4].split()
    assert (name, rounds, len(line)) == ("a", "3", 3)
    assert loss == f"{last['loss']['sum'] / last['loss']['count']:.3f}"
    assert (shared, personal) == (f"{last['shared']['sum']:.0f}", f"{last['personal']['sum']:.0f}")


@pytest.fixture
def trained(small_input: Any, tmp_path: Path) -> RunFolder:
    with opening.start(load(small_input.config), tmp_path / "run") as run:
        stages.train(run)
    return reopen(tmp_path / "run")


def test_silence_and_refusals_are_shown(trained: RunFolder) -> None:
    path = trained.path / "events.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([json.dumps({**json.loads(lines[0]), "refused": "it came too late"}), *lines[1:]]) + "\n")
    told = shown(look(trained, datetime.now(UTC) + timedelta(hours=2)))
    assert ", 2:00:0" in told[0] and "last change 2:00:0" in told[0]
    assert told[-1] == "warmup-000, a: it came too late"


def test_an_event_that_is_only_being_written_is_not_shown_yet(trained: RunFolder) -> None:
    path = trained.path / "events.jsonl"
    seen, points, whole = look(trained, datetime.now(UTC)), tracked(trained).rounds, path.read_bytes()
    path.write_bytes(whole + whole[: len(whole.splitlines()[0]) // 2])
    assert look(trained, datetime.now(UTC)).turns == seen.turns
    assert tracked(trained).rounds == points


def test_following_ends_with_the_run(
    trained: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    waited: list[float] = []

    def wait(seconds: float) -> None:
        waited.append(seconds)
        if len(waited) == 3:
            trained.update_manifest(status="evaluated", updated=datetime.now(UTC).isoformat())

    monkeypatch.setattr(run_view.time, "sleep", wait)
    monkeypatch.setattr(run_view, "Console", lambda: Console(force_terminal=True, width=100))
    follow(trained, 0.5)
    assert waited == [0.5] * 3
    out = capsys.readouterr().out
    assert "trained" in out and "evaluated" in out


def test_on_no_terminal_it_looks_once(
    trained: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], lasting: Callable[..., Any]
) -> None:
    monkeypatch.setattr(run_view.time, "sleep", lambda seconds: pytest.fail("it waits"))
    before = lasting(trained.path)
    follow(trained, 0.5)
    assert capsys.readouterr().out.startswith("run: trained, 0:00:0")
    assert lasting(trained.path) == before
