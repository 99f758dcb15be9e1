"""Processes: ended with all that they started, with logs for their owner only, restarted by their supervisor."""

import os
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from fedmide.errors import UserError
from fedmide.flower import processes, supervision
from fedmide.flower.processes import end, environment, free_port, start, started, wait_for_port
from fedmide.flower.supervision import Supervisor

FAMILY = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', sys.argv[1]]); time.sleep(60)"
STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"


def until(text: str, log: Path) -> None:
    limit = time.monotonic() + 30
    while text not in (log.read_text() if log.exists() else ""):
        assert time.monotonic() < limit
        time.sleep(0.02)


def test_a_process_is_ended_with_what_it_started_even_if_that_will_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "_GRACE_SECONDS", 0.5)
    log = tmp_path / "logs" / "log"
    process = start([sys.executable, "-c", FAMILY, STUBBORN], environment(tmp_path), log)
    until("up", log)
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) == 1
    end(process)
    assert process.returncode in (-signal.SIGTERM, -signal.SIGKILL)
    assert not children[0].is_running() or children[0].status() == psutil.STATUS_ZOMBIE
    assert stat.S_IMODE(log.stat().st_mode) == 0o600
    end(process)  # does nothing: the process has ended


def test_it_is_ended_also_where_something_failed(tmp_path: Path) -> None:
    with pytest.raises(KeyError), started(["sleep", "60"], environment(tmp_path), tmp_path / "log") as process:
        raise KeyError
    assert process.returncode is not None


def test_a_port_that_does_not_open_is_reported_with_the_last_lines_of_the_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with started(["sh", "-c", "echo no such thing; exit 3"], environment(tmp_path), log) as process:  # noqa: SIM117
        with pytest.raises(UserError, match="no such thing"):
            wait_for_port(free_port(), process, log)


def test_the_telemetry_of_flower_is_off(tmp_path: Path) -> None:
    variables = environment(tmp_path, MORE="1")
    off = ("FLWR_TELEMETRY_ENABLED", "RAY_USAGE_STATS_ENABLED")
    assert [variables[name] for name in off] == ["0", "0"]
    assert (variables["FLWR_DISABLE_UPDATE_CHECK"], variables["FLWR_HOME"], variables["MORE"]) == (
        "1",
        str(tmp_path),
        "1",
    )
    assert variables["PATH"].startswith(str(Path(sys.executable).parent))


def test_a_supervisor_starts_again_what_ends_and_ends_all_at_its_own_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervision, "_RESTART_SECONDS", 0.0)
    told: list[str] = []
    commands = {"lives": ["sleep", "60"], "dies": ["sh", "-c", "echo again; exit 7"]}
    supervisor = Supervisor(commands, environment(tmp_path), tmp_path, told.append)
    former = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    seen: list[subprocess.Popen[bytes]] = []

    def stop() -> None:
        until("again\nagain\nagain", tmp_path / "dies.log")
        seen.append(supervisor.running["lives"])
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop)
    thread.start()
    try:
        supervisor.run()
    finally:
        thread.join()
        for number, handler in former.items():
            signal.signal(number, handler)
    assert [process.returncode for process in seen] == [-signal.SIGTERM]
    assert all(process.poll() is not None for process in supervisor.running.values())
    assert "dies ended with code 7, starting it again" in told[0]
