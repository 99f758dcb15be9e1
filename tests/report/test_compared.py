"""Runs side by side: paired on the same records, and refused or with a warning if they can't be compared."""

import json
import re
import shutil
from pathlib import Path

import pytest

from fedmide import report
from fedmide.errors import UsageError
from fedmide.journal.creation import reopen
from fedmide.journal.folder import RunFolder
from fedmide.report import compared
from fedmide.report.facts import RunFacts, read


@pytest.fixture
def shifted(copied: Path) -> RunFacts:
    """The same run, with the tuned NLL of client a 0.25 nats per token better, and that of client b 0.5 worse."""
    for client, change in (("a", -0.25), ("b", 0.5)):
        path = copied / "clients" / client / "evaluation-personalized.json"
        values = json.loads(path.read_text())
        pairs = zip(values["nll_sums"], values["num_tokens"], strict=True)
        values["nll_sums"] = [nll + change * tokens for nll, tokens in pairs]
        path.write_text(json.dumps(values))
    return read(reopen(copied))


def test_a_difference_is_paired_by_record(run_folder: RunFolder, shifted: RunFacts) -> None:
    (found,) = compared.differences((read(run_folder), shifted))
    assert found.clients["a"].value == pytest.approx(-0.25) and found.clients["b"].value == pytest.approx(0.5)
    assert found.clients["a"].low == pytest.approx(-0.25) == found.clients["a"].high
    assert found.mean is not None and found.mean.value == pytest.approx(0.125)
    assert found.worse == ("b",)
    told = compared.headline((read(run_folder), shifted))
    assert told.answer == "run is better than the other."
    assert "NLL differs from that of run by +0.125 nats per token on average (below 0 is better)" in re.sub(
        r" \[.*?\]", "", told.details[0]
    )
    assert "1 of 2 sites are worse off: b." in told.details[0]
    back = compared.headline((shifted, read(run_folder)))
    assert back.answer == "Better than copy: run."


def test_a_run_against_itself_differs_by_nothing(run_folder: RunFolder) -> None:
    runs = compared.labeled((read(run_folder), read(run_folder)))
    (found,) = compared.differences(runs)
    assert {change.value for change in found.clients.values()} == {0.0} and found.worse == ()
    assert [run.name for run in runs] == ["run (1)", "run (2)"]
    assert compared.headline(runs).answer == "No run is clearly better than run (1)."
    assert compared.cautions(runs) == ("Intervals are over test records only. Another seed may give other figures.",)
    assert [row.cells[0] for row in compared.knobs_table(runs).rows] == ["none"]


def test_runs_that_can_not_be_compared_are_reported(run_folder: RunFolder, copied: Path) -> None:
    shutil.rmtree(copied / "clients")
    manifest = json.loads((copied / "manifest.json").read_text())
    manifest["prompt"] = "another"
    (copied / "manifest.json").write_text(json.dumps(manifest))
    (copied / "metrics.json").unlink()
    runs = (read(run_folder), read(reopen(copied)))
    assert compared.headline(runs).answer == "These runs have no test records in common, so they can't be compared."
    told = " ".join(compared.cautions(runs))
    assert "copy and run do not have the same prompt" in told and "copy is not evaluated yet" in told


def test_knobs_that_differ_are_shown(run_folder: RunFolder, copied: Path) -> None:
    config = copied / "config.toml"
    config.write_text(config.read_text().replace("seed = 3", "seed = 5", 1))
    rows = compared.knobs_table((read(run_folder), read(reopen(copied)))).rows
    assert [row.cells for row in rows] == [("seed", "3", "5")]


def test_a_run_is_named_once(run_folder: RunFolder, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="can't be compared with itself"):
        report.compare([run_folder, run_folder], tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()
