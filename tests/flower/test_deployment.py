"""A deployment of real processes: the same bytes as in process; failures of sites, server and SuperLink; access.

All tests are in one file, so that one worker of pytest-xdist runs them, on one consortium.
"""

import http.client
import json
import os
import shutil
import signal
import ssl
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from cryptography.hazmat.primitives.serialization import Encoding

from fedmide.flower import keys, texts
from fedmide.flower.check import check
from fedmide.flower.commands import flwr
from fedmide.flower.deployment import status
from fedmide.flower.processes import environment, free_port, started
from fedmide.flower.server_folder import ServerFolder
from fedmide.flower.site_folder import SiteFolder
from fedmide.flower.supervision import superexec_command, supernode_command
from fedmide.journal.creation import reopen
from tests.flower.waiting import until
from tests.needs import find_nginx

pytestmark = pytest.mark.flower


@pytest.fixture(autouse=True)
def no_faults(consortium: Any) -> Iterator[None]:
    yield
    consortium.end_runs()
    for name in "abc":
        (consortium.site(name) / "fault.json").unlink(missing_ok=True)


def ended(process: subprocess.Popen[str], seconds: float = 300.0) -> str:
    """The output of a command, after its end."""
    said: str = process.communicate(timeout=seconds)[0]
    sys.stdout.write(said)
    return said


def rows(out: Path) -> dict[tuple[int, str], str]:
    """The reason why each client's reply did not count in a round; empty if it did."""
    return {(event["round"], event["client"]): event["refused"] for event in reopen(out).events()}


def in_process(consortium: Any, out: Path) -> Path:
    """The same federation in one process, on the records that are at the sites now."""
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
    told = status(ServerFolder.read(consortium.server))
    assert told == {"sites": dict.fromkeys("abc", "online"), "run": str(out), "going_on": False, "rounds_done": 3}
    expected = in_process(consortium, tmp_path / "expected")
    for name in ("adapter/adapter_model.safetensors", "server/round-001/adapter.safetensors"):
        assert (out / name).read_bytes() == (expected / name).read_bytes()
    for site in "abc":
        assert consortium.ledger(site, out) == (expected / "clients" / site / "ledger.jsonl").read_bytes()
        done = [line for line in consortium.works(site) if line.endswith(": done")]
        assert len(done) == 4, "each round once, whichever process was killed"
    assert set(rows(out).values()) == {""}
    assert not list(out.rglob("ledger.jsonl")), "what stays on the sites is not at the server"


def test_replies_that_can_t_be_used_are_refused_and_nothing_of_a_patient_leaves(
    consortium: Any, tmp_path: Path
) -> None:
    consortium.fault("b", round_m1="truncated", round_0="nan", round_1="raise", round_2="raise")
    consortium.fault("c", round_m1="shape", round_0="huge", round_1="slow:48", round_2="disk")
    out = consortium.server / "runs" / "faults"
    settings = ("replies.quorum=0.3", "replies.deadline_seconds=45", "replies.max_update_norm=100")
    said = ended(consortium.run(out, *settings))
    refused = rows(out)
    assert "can't be read" in refused[-1, "b"]
    assert "not finite" in refused[0, "b"]
    assert "its work failed" in refused[1, "b"]
    assert "shape" in refused[-1, "c"]
    assert "length" in refused[0, "c"]
    assert "no answer within 45 s" in refused[1, "c"]
    assert {refused[number, "a"] for number in (-1, 0, 1, 2)} == {""}
    assert "site b is not personalized: its work failed" in said
    assert "site c is not personalized: its disk is full or can't be written to" in said
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
    consortium.fault("b", round_0="slow:100")
    nodes = (consortium.server / "nodes.json").read_text()
    process = consortium.run(out, "replies.quorum=0.6", "replies.deadline_seconds=40")
    until((out / "server" / "warmup-000").is_dir)
    time.sleep(8)
    consortium.kill("site-b")
    consortium.fault("b")
    consortium.start_site("b")
    said = ended(process)
    assert rows(out)[0, "b"] != ""
    assert {rows(out)[number, name] for number in (0, 1) for name in "ac"} == {""}
    for _ in range(3):
        if "not personalized" not in said and "are needed" not in said:
            break
        time.sleep(15)  # until the server has given up on the node that was killed
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
    process = consortium.run(out, "replies.quorum=0.5", "replies.deadline_seconds=30")
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


# --- access, open ports, and what others can read


@pytest.fixture
def server(consortium: Any) -> ServerFolder:
    return ServerFolder.read(consortium.server)


@pytest.fixture
def stranger(consortium: Any, tmp_path: Path) -> SiteFolder:
    """A site's folder whose key is not registered."""
    folder = replace(SiteFolder.read(consortium.site("a")), path=tmp_path / "stranger")
    private, public = keys.node_key()
    keys.write_secret(folder.path / "keys" / "node-key", private)
    (folder.path / "keys" / "node-key.pub").write_bytes(public)
    keys.write_secret(folder.path / "keys" / "superexec.secret", keys.new_secret())
    shutil.copy(consortium.server / "keys" / "ca.pem", folder.path / "keys" / "ca.pem")
    return folder


def said(commands: dict[str, Sequence[str]], folder: Path, enough: Callable[[dict[str, str]], bool]) -> dict[str, str]:
    """The output of processes that are started at once, as soon as it is enough."""
    logs = {name: folder / f"{name}.log" for name in commands}
    with ExitStack() as stack:
        for name, command in commands.items():
            stack.enter_context(started(command, environment(folder / name), logs[name]))
        limit = time.monotonic() + 60
        while True:
            words = {name: log.read_text(errors="replace") for name, log in logs.items()}
            if enough(words) or time.monotonic() > limit:
                return words
            time.sleep(0.2)


def test_nobody_gets_in_without_a_registered_key_the_right_certificate_and_the_secret(
    server: ServerFolder, stranger: SiteFolder, tmp_path: Path
) -> None:
    other = keys.new_authority("another")
    wrong = stranger.path.with_name("wrong-ca")
    shutil.copytree(stranger.path, wrong)
    (wrong / "keys" / "ca.pem").write_bytes(other.certificate.public_bytes(Encoding.PEM))
    no_secret = superexec_command(server)[:-2]
    assert not any("secret" in part for part in no_secret)
    rogue = replace(server, path=tmp_path / "rogue")
    keys.write_secret(rogue.path / "keys" / "superexec.secret", keys.new_secret())
    shutil.copy(server.path / "keys" / "ca.pem", rogue.path / "keys" / "ca.pem")
    commands = {
        "unregistered": supernode_command(stranger, free_port()),
        "wrong-ca": supernode_command(replace(stranger, path=wrong), free_port()),
        "plain": supernode_command(replace(stranger, plain=True), free_port()),
        "no-secret": no_secret,
        "wrong-secret": superexec_command(rogue),
    }
    expected = {
        "unregistered": "Failed to activate SuperNode",
        "wrong-ca": "CERTIFICATE_VERIFY_FAILED",
        "plain": "Connection attempt failed",
    }
    before = refused_executors(server)

    def refused(words: dict[str, str]) -> bool:
        return refused_executors(server) >= before + 2 and all(word in words[name] for name, word in expected.items())

    words = said(commands, tmp_path, refused)
    assert refused(words), {name: text[-600:] for name, text in words.items()}
    assert not any("SuperNode ID" in text or "Start `flwr" in text for text in words.values())
    known = set(server.read_nodes().values())
    assert {int(node["node-id"]) for node in flwr(server, "supernode", "list", "fedmide")["nodes"]} == known


def refused_executors(server: ServerFolder) -> int:
    """The number of times that the SuperLink has refused an executor its work so far."""
    return server.log("superlink").read_text(errors="replace").count('acquire-task HTTP/1.1" 401')


def family(consortium: Any) -> Iterator[psutil.Process]:
    for running in consortium.running.values():
        parent = psutil.Process(running.pid)
        for process in [parent, *parent.children(recursive=True)]:
            if process.status() != psutil.STATUS_ZOMBIE:  # an app that has ended, before its executor has noticed
                yield process


def test_everything_listens_on_loopback_only(consortium: Any) -> None:
    processes = list(family(consortium))
    assert len(processes) >= 3 + 3 * 4
    listening = [
        each.laddr.ip
        for process in processes
        for each in process.net_connections("inet")
        if each.status == psutil.CONN_LISTEN
    ]
    assert len(listening) >= 4
    assert set(listening) == {"127.0.0.1"}


def test_no_use_is_reported_and_no_secret_is_an_argument(consortium: Any) -> None:
    secrets = [path.read_text() for path in consortium.path.rglob("superexec.secret")]
    secrets += [path.read_text().splitlines()[2] for path in consortium.path.rglob("node-key")]
    assert len(secrets) == 7
    for process in family(consortium):
        command = " ".join(process.cmdline())
        assert not any(secret in command for secret in secrets)
        if "flower-" in command:
            variables = process.environ()
            assert variables["FLWR_TELEMETRY_ENABLED"] == "0"
            assert variables["FLWR_DISABLE_UPDATE_CHECK"] == "1"


def test_secrets_are_files_of_their_owner_only_and_in_no_log(consortium: Any) -> None:
    names = ("superexec.secret", "node-key", "ca.key", "server.key")
    files = [path for name in names for path in consortium.path.rglob(name)]
    assert len(files) == 4 + 3 + 1 + 1
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o600}
    logs = b"".join(path.read_bytes() for path in [*consortium.path.rglob("*.log"), *consortium.path.glob("*.out")])
    for path in files:
        assert path.read_bytes().strip() not in logs


def test_the_check_of_a_site_reports_each_fault(consortium: Any, stranger: SiteFolder) -> None:
    good = SiteFolder.read(consortium.site("a"))
    assert [finding for finding in check(good, lambda message: None) if finding.problem] == []
    for name in ("site.toml", "federation.json"):
        shutil.copy(good.path / name, stranger.path / name)
    facts = json.loads((stranger.path / "federation.json").read_text())
    facts["knobs"]["lora.r"], facts["version"] = "64", "0.0.1"
    (stranger.path / "federation.json").write_text(json.dumps(facts))
    (stranger.path / "keys" / "node-key").chmod(0o644)
    problems = {finding.what: finding.problem for finding in check(stranger, lambda message: None) if finding.problem}
    assert set(problems) == {"version, model, prompt and settings", "keys", "node"}
    assert "lora.r is 2 there and 64 here" in problems["version, model, prompt and settings"]
    assert "fedmide is '0.1.0' there and '0.0.1' here" in problems["version, model, prompt and settings"]
    assert "can be read by others" in problems["keys"]
    assert "does not accept this site's key" in problems["node"]


@pytest.mark.needs("nginx")
def test_through_the_proxy_sites_reach_the_fleet_and_nothing_else(
    server: ServerFolder, stranger: SiteFolder, tmp_path: Path
) -> None:
    port = free_port()
    made = texts.proxy("127.0.0.1", port, server.port, server.path).replace(
        f"listen {port}", f"listen 127.0.0.1:{port}"
    )
    temporary = "".join(
        f"{kind}_temp_path {tmp_path}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    (tmp_path / "nginx.conf").write_text(
        f"daemon off; master_process off; pid {tmp_path}/pid; error_log {tmp_path}/error;"
        f"events {{}} http {{ access_log off; {temporary} {made} }}"
    )
    flwr(server, "supernode", "register", str(stranger.path / "keys" / "node-key.pub"), "fedmide", "--name", "late")
    command = [
        str(find_nginx()),
        "-p",
        str(tmp_path),
        "-c",
        str(tmp_path / "nginx.conf"),
        "-e",
        str(tmp_path / "error"),
    ]
    with started(command, environment(tmp_path), tmp_path / "nginx.log"):
        assert answer_of(server, server.port, "/v1/control/list-nodes") != 404, "the SuperLink itself has it"
        time.sleep(1)
        hidden = ["control/list-nodes", "runtime/pull-messages", "fleet/../control/list-nodes"]
        hidden += ["fleet/%2e%2e/control/list-nodes", "fleet/..%2fcontrol/list-nodes", "control", ""]
        codes = {path: answer_of(server, port, f"/v1/{path}") for path in hidden}
        assert set(codes.values()) <= {400, 404}, codes
        words = said(
            {"node": supernode_command(replace(stranger, superlink=f"127.0.0.1:{port}"), free_port())},
            tmp_path,
            lambda words: "SuperNode ID" in words["node"],
        )
    assert "SuperNode ID" in words["node"]


def answer_of(server: ServerFolder, port: int, path: str) -> int:
    context = ssl.create_default_context(cafile=str(server.certificate))
    connection = http.client.HTTPSConnection("127.0.0.1", port, context=context, timeout=10)
    try:
        connection.request("POST", path, body=b"", headers={"Content-Type": "application/x-protobuf"})
        return connection.getresponse().status
    finally:
        connection.close()
