"""The number of threads that pay off, out of those that this process may use."""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedmide.model import threads


@pytest.mark.parametrize(
    ("cores", "free", "chosen"), [(1, 1, 1), (2, 2, 2), (2, 1, 1), (3, 2, 2), (8, 8, 8), (8, 4, 4), (64, 16, 16)]
)
def test_threads_on_busy_cores_are_not_used(cores: int, free: int, chosen: int) -> None:
    """A product waits for its slowest thread. With one thread too many, all wait for a shared core."""

    def speed(number: int) -> float:
        return float(number) if number <= free else 0.5

    assert threads.worth_it(cores, lambda more, fewer: (speed(more), speed(fewer))) == chosen


@given(st.integers(1, 200), st.floats(0.0, 1.0))
def test_a_number_between_one_and_all(cores: int, gain: float) -> None:
    def speed(number: int) -> float:
        return number**gain

    chosen = threads.worth_it(cores, lambda more, fewer: (speed(more), speed(fewer)))
    assert 1 <= chosen <= cores
    if gain == 1.0:
        assert chosen == cores
    if gain < 0.1:
        assert chosen == 1


def test_measuring_gives_speeds_and_restores_torch() -> None:
    earlier = torch.get_num_threads()
    more, fewer = threads.speeds(2, 1)
    assert more > 0 and fewer > 0
    assert torch.get_num_threads() == earlier


def test_one_core_needs_no_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "available_cores", lambda: 1)
    monkeypatch.setattr(threads, "speeds", None)
    assert threads.free_threads() == 1


def test_fewer_threads_are_reported_with_the_setting_that_uses_all(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(threads, "available_cores", lambda: 4)
    monkeypatch.setattr(threads, "speeds", lambda more, fewer: (1.0, 1.0) if more > 2 else (2.0, 1.0))
    assert threads.free_threads(told.append) == 2
    assert told == [
        "using 2 of 4 threads per product, because more are not faster now; set runtime.threads = 4 to use all"
    ]
    monkeypatch.setattr(threads, "speeds", lambda more, fewer: (2.0, 1.0))
    assert threads.free_threads(told.append) == 4 and len(told) == 1


@pytest.mark.parametrize(("quota", "cores"), [("200000 100000", 2), ("50000 100000", 1), ("max 100000", 8), ("", 8)])
def test_no_more_cores_than_the_container_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quota: str, cores: int
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
    monkeypatch.setattr(threads, "CPU_QUOTA", tmp_path / "cpu.max")
    assert threads.available_cores() == 8
    (tmp_path / "cpu.max").write_text(quota)
    assert threads.available_cores() == cores


@pytest.mark.parametrize(("said", "cores"), [("3", 3), ("64", 8), ("0", 1), ("4,2", 8), ("", 8)])
def test_no_more_than_the_environment_allows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str, cores: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
    monkeypatch.setattr(threads, "CPU_QUOTA", tmp_path / "cpu.max")
    monkeypatch.setenv("OMP_NUM_THREADS", said)
    assert threads.available_cores() == cores
