"""How many threads are worth it on the cores that are really free.

Every product waits for the slowest of its threads: one that shares its core with another process can make two threads
slower than one. What the system says of its load does not tell whether that will be so, and in a container it is often
of another machine's cores; so it is tried out. `workers`, who share no product, need no such trial.
"""

import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")
"""What a container may use of the processor: microseconds in so many microseconds, or "max"."""


SECONDS = 0.06
"""How long two numbers of threads are compared: some turns of the system's scheduler."""


TURNS = 3
"""How often each of the two has its turn, so that a short disturbance does not hit one alone."""


GAIN = 1.1
"""What the larger number must bring."""


ROWS, COLUMNS = 128, 576
"""A product of about a millisecond on one thread; there are as many rows for each."""


def free_threads(tell: Callable[[str], None] = lambda message: None) -> int:
    """The number of threads that is worth it now, of those that this process may use; `tell` hears of fewer."""
    cores = available_cores()
    chosen = worth_it(cores, speeds)
    if chosen < cores:
        tell(
            f"threads that share a product: {chosen} of {cores}, more bring nothing now; "
            f"runtime.threads = {cores} takes them all the same"
        )
    return chosen


def worth_it(most: int, compare: Callable[[int, int], tuple[float, float]]) -> int:
    """So many threads, or half of them as long as that gets about as much done.

    `compare` gives what two numbers of threads get done in a second.

    >>> worth_it(8, lambda more, fewer: (min(more, 2), min(fewer, 2)))
    2
    """
    while most > 1:
        fewer = most - most // 2
        speed, half = compare(most, fewer)
        if speed >= GAIN * half:
            return most
        most = fewer
    return most


def speeds(more: int, fewer: int) -> tuple[float, float]:
    """Products a second on two numbers of threads, in turns; torch's own number is afterwards as before."""
    earlier = torch.get_num_threads()
    left, right = torch.ones(ROWS * more, COLUMNS), torch.ones(COLUMNS, COLUMNS)
    done, spent = {more: 0, fewer: 0}, {more: 0.0, fewer: 0.0}
    try:
        for number in (more, fewer) * TURNS:
            torch.set_num_threads(number)
            torch.mm(left, right)  # its threads are made
            begun = time.perf_counter()
            while (passed := time.perf_counter() - begun) < SECONDS / (2 * TURNS):
                torch.mm(left, right)
                done[number] += 1
            spent[number] += passed
    finally:
        torch.set_num_threads(earlier)
    return done[more] / spent[more], done[fewer] / spent[fewer]


def available_cores() -> int:
    """How many cores this process may use: those it is bound to, and no more than its control group is granted.

    `OMP_NUM_THREADS`, where it is set, is a limit too.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with suppress(OSError, ValueError):  # no Linux, no control group, or "max": no limit
        quota, period = (int(each) for each in CPU_QUOTA.read_text().split())
        cores = min(cores, max(1, quota // period))
    with suppress(KeyError, ValueError):
        cores = min(cores, max(1, int(os.environ["OMP_NUM_THREADS"])))
    return cores
