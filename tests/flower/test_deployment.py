"""A deployment of real processes: the same bytes as in process, and what befalls sites, server and SuperLink."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedmide.config import load
from fedmide.journal import reopen

pytestmark = [pytest.mark.flower, pytest.mark.xdist_group("deployment")]


@pytest.fixture(autouse=True)
def no_faults(consortium: Any) -> Iterator[None]:
    yield
    consortium.end_runs()
    for name in "abc":
        (consortium.site(name) / "fault.json").unlink(missing_ok=True)


def ended(process: subprocess.Popen[str], seconds: float = 300.0) -> str:
    """What a command said until its end."""
    said: str = process.communicate(timeout=seconds)[0]
    sys.stdout.write(said)
    return said


def until(true: Any, seconds: float = 240.0) -> None:
    limit = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < limit, "waited too long"
        time.sleep(0.1)


def rows(out: Path) -> dict[tuple[int, str], str]:
    """Why each client's reply did not count in a round, empty where it did."""
    return {(event["round"], event["client"]): event["refused"] for event in reopen(out).events()}


def in_process(consortium: Any, out: Path) -> Path:
    """The same federation in one process, on the records that now lie at the sites."""
    data = out.with_name(f"{out.name}-data")
    data.mkdir()
    for name in "abc":
        (data / name).symlink_to(consortium.site(name) / "data" / name)
    command = [sys.executable, "-m", "fedmide", "run", str(consortium.config), "--set", f"data.path={data}"]
    subprocess.run(
        [*command, "--out", str(out)], check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    return out


def test_a_run_whose_server_is_killed_ends_with_the_bytes_of_one_process(consortium: Any, tmp_path: Path) -> None:
    out = tmp_path / "run"
    consortium.run(out)
    until((out / "server" / "warmup-000").is_dir)
    consortium.end_runs()
    said = ended(consortium.resume(out))
    assert "personalized" in said
    expected = in_process(consortium, tmp_path / "expected")
    for name in ("adapter/adapter_model.safetensors", "server/round-001/adapter.safetensors"):
        assert (out / name).read_bytes() == (expected / name).read_bytes()
    for site in "abc":
        assert consortium.ledger(site, out) == (expected / "clients" / site / "ledger.jsonl").read_bytes()
        done = [line for line in consortium.works(site) if line.endswith(": done")]
        assert len(done) == 4, "each round once, whoever was killed"
    assert set(rows(out).values()) == {""}
    assert not list(out.rglob("ledger.jsonl")), "what stays on the sites is not at the server"


def test_replies_that_can_t_be_used_are_refused_and_nothing_of_a_patient_leaves(
    consortium: Any, tmp_path: Path
) -> None:
    consortium.fault("b", round_m1="truncated", round_0="nan", round_1="raise", round_2="raise")
    consortium.fault("c", round_m1="shape", round_0="huge", round_1="slow:100")
    out = consortium.server / "runs" / "faults"
    settings = ("replies.quorum=0.3", "replies.deadline_seconds=60", "replies.max_update_norm=100")
    said = ended(consortium.run(out, *settings))
    refused = rows(out)
    assert "can't be read" in refused[-1, "b"]
    assert "not finite" in refused[0, "b"]
    assert "its work failed" in refused[1, "b"]
    assert "shape" in refused[-1, "c"]
    assert "length" in refused[0, "c"]
    assert "no answer within 60 s" in refused[1, "c"]
    assert {refused[number, "a"] for number in (-1, 0, 1, 2)} == {""}
    assert "client b is not personalised: its work failed" in said
    told = said.encode() + consortium.wrote()
    words = ["Musterfrau", *texts_of(consortium)]
    assert [word for word in words if word.encode() in told] == []
    assert "Musterfrau" in "".join(consortium.works("b")), "the site's own log has it"


def texts_of(consortium: Any) -> list[str]:
    """Every instruction and response of every site."""
    found = []
    for name in "abc":
        for path in (consortium.site(name) / "data" / name).iterdir():
            records = [json.loads(line) for line in path.read_text().splitlines()]
            found += [record[field] for record in records for field in ("instruction", "response")]
    assert len(found) > 50
    return found


def test_a_site_that_goes_dark_comes_back_with_its_ledger(consortium: Any, tmp_path: Path) -> None:
    out = tmp_path / "run"
    consortium.fault("b", round_0="slow:200")
    nodes = (consortium.server / "nodes.json").read_text()
    process = consortium.run(out, "replies.quorum=0.6", "replies.deadline_seconds=60")
    until((out / "server" / "warmup-000").is_dir)
    time.sleep(8)
    consortium.kill("site-b")
    consortium.fault("b")
    consortium.start_site("b")
    said = ended(process)
    assert rows(out)[0, "b"] != ""
    assert {rows(out)[number, name] for number in (0, 1) for name in "ac"} == {""}
    for _ in range(3):
        if "not personalised" not in said and "are needed" not in said:
            break
        time.sleep(15)  # until the server has given up on the node that went dark
        said = ended(consortium.resume(out))
    assert "personalized: " in said
    assert (consortium.server / "nodes.json").read_text() == nodes
    rounds_of_b = {json.loads(line)["round"] for line in consortium.ledger("b", out).splitlines()}
    assert -1 in rounds_of_b
    assert rows(out)[2, "b"] == ""


def test_a_superlink_that_is_killed_costs_no_round(consortium: Any, tmp_path: Path) -> None:
    out = tmp_path / "run"
    for name in "abc":
        consortium.fault(name, round_0="slow:6")
    process = consortium.run(out, "replies.deadline_seconds=240")
    until((out / "server" / "warmup-000").is_dir)
    before = {name: len(consortium.works(name)) for name in "abc"}
    time.sleep(4)
    superlink = consortium.child("server", "flower-superlink")
    os.kill(superlink.pid, signal.SIGKILL)
    said = ended(process)
    assert "personalized: " in said
    assert set(rows(out).values()) == {""}
    for name in "abc":
        done = [line for line in consortium.works(name)[before[name] :] if line.endswith("round 0: done")]
        assert len(done) <= 1, "trained once"


def test_sites_that_differ_are_refused_with_the_reason_before_they_train(consortium: Any, tmp_path: Path) -> None:
    out = tmp_path / "run"
    for name, kind in zip("abc", ("model", "version", "schema"), strict=True):
        consortium.fault(name, hello=kind)
    process = consortium.run(out, "replies.quorum=0.5", "replies.deadline_seconds=60")
    said = ended(process)
    assert process.returncode == 2
    assert "site b is refused: fedmide is '0.0.9' there and '0.1.0' here" in said
    assert "site a is refused: the base model is '0123456789abcdef' there" in said
    assert "site c is refused: its answer can't be read: not a fedmide message" in said
    assert "Traceback" not in said
    assert not (out / "server").exists()
    for name in "abc":
        runs = consortium.site(name) / "runs"
        assert not (runs / consortium.federation(out) / "clients").exists()


def test_the_quorum_is_that_of_the_configuration(consortium: Any) -> None:
    assert load(consortium.server / "federation.toml").replies.quorum == 0.5
