"""Facts of a run: those of its files, at every stage that a run can be at, with or without what stays on the sites."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from fedmide.config import load
from fedmide.errors import RunFolderError
from fedmide.journal.creation import reopen
from fedmide.journal.folder import RunFolder
from fedmide.report.facts import read
from fedmide.runs import opening, stages


def test_turns_are_the_events(run_folder: RunFolder) -> None:
    facts = read(run_folder)
    events = run_folder.events()
    assert len(facts.turns) == len(events) == 8
    for turn, event in zip(facts.turns, events, strict=True):
        assert (turn.client, turn.round, turn.stage) == (event["client"], event["round"], event["stage"])
        assert (turn.bytes_up, turn.bytes_down) == (event["bytes_up"], event["bytes_down"])
        if turn.stage != "personalize":
            loss, metrics = event["metrics"]["loss"], event["metrics"]
            assert turn.loss == loss["sum"] / loss["count"]
            assert (turn.shared, turn.personal) == (metrics["shared"]["sum"], metrics["personal"]["sum"])
    assert facts.titles == ("warmup-000", "round-000", "round-001")
    assert facts.turns[-1].title == "personalization" and len(facts.rounds) == 6


def test_the_mean_loss_is_over_all_tokens(run_folder: RunFolder) -> None:
    losses = [event["metrics"]["loss"] for event in run_folder.events() if event["round"] == 1]
    expected = sum(loss["sum"] for loss in losses) / sum(loss["count"] for loss in losses)
    assert read(run_folder).mean_loss("round-001") == pytest.approx(expected)


def test_a_change_is_the_difference_of_the_clients_figures(run_folder: RunFolder) -> None:
    facts = read(run_folder)
    for outcome in facts.outcomes:
        assert outcome.change is not None and outcome.learned is not None
        values = {stage: each.value for stage, each in outcome.nll.items()}
        assert outcome.change.value == pytest.approx(values["personalized"] - values["aggregated"])
        assert outcome.learned.value == pytest.approx(values["aggregated"] - values["base"])
        assert outcome.change.low <= outcome.change.value <= outcome.change.high
    changes = [outcome.change.value for outcome in facts.outcomes if outcome.change]
    assert facts.mean_change is not None and facts.mean_change.value == pytest.approx(sum(changes) / 2)


def test_steps_are_lengths_of_the_change_but_not_over_a_restart(run_folder: RunFolder) -> None:
    (step,) = read(run_folder).steps
    before, after = (load_file(run_folder.path / f"server/round-00{n}/adapter.safetensors") for n in (0, 1))
    flat = [np.concatenate([each[name].ravel() for name in sorted(each)]) for each in (before, after)]
    expected = np.linalg.norm(flat[1] - flat[0]) / np.linalg.norm(flat[1])
    assert step.title == "round-001" and step.relative_change == pytest.approx(expected, rel=1e-5)


def test_scores_are_those_of_the_ledgers(run_folder: RunFolder) -> None:
    facts = read(run_folder)
    assert set(facts.scores) == {"a", "b"}
    for client, rounds in facts.scores.items():
        judged = [each for each in run_folder.read_ledger(client) if each.reason != "own-nll"]
        assert sum(len(each.logs) + each.num_not_finite for each in rounds) == len(judged)
        assert rounds[0].is_split and len(rounds[0].logs) == 9


def test_a_server_without_the_sites_files_still_has_its_facts(copied: Path) -> None:
    shutil.rmtree(copied / "clients")
    shutil.rmtree(copied / "predictions")
    facts = read(reopen(copied))
    assert facts.scores == {} and facts.mean_change is None
    assert all(outcome.change is None and outcome.nll for outcome in facts.outcomes)
    assert len(facts.turns) == 8


@pytest.mark.parametrize("done", range(5))
def test_facts_at_every_stage(done: int, whole_run: Path, tmp_path: Path, tiny_folder: Path) -> None:
    config = load(whole_run.parent / "input" / "small.toml")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDMIDE_CACHE", str(tiny_folder.parent))
        with opening.start(config, tmp_path / "run") as run:
            for stage in (stages.train, stages.personalize, stages.generate, stages.evaluate)[:done]:
                stage(run)
    facts = read(reopen(tmp_path / "run"))
    assert len(facts.turns) == (0, 6, 8, 8, 8)[done]
    assert bool(facts.outcomes) == (done == 4) and bool(facts.scores) == (done > 0)


def test_a_damaged_file_is_named(copied: Path) -> None:
    (copied / "metrics.json").write_text("{")
    with pytest.raises(RunFolderError, match=r"metrics\.json: broken JSON"):
        read(reopen(copied))


def test_events_of_a_refused_reply_are_reported(copied: Path) -> None:
    lines = (copied / "events.jsonl").read_text().splitlines()
    event = {**json.loads(lines[0]), "metrics": {}, "num_records": 0, "refused": "it came too late"}
    (copied / "events.jsonl").write_text("\n".join([json.dumps(event), *lines[1:]]) + "\n")
    first = read(reopen(copied)).turns[0]
    assert (first.refused, first.loss, first.shared, first.steps) == ("it came too late", None, None, 0)
