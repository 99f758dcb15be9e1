"""The number of threads that pay off on the cores that are really free.

Every matrix product waits for its slowest thread. If one thread shares its core with another process, two threads can
be slower than one. The system's load figures do not predict this, and in a container they often describe the cores of
another machine. So the numbers of threads are tried out.
`workers` need no such trial, because they do not share products.
"""

import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

from fedmide.progress import quiet

CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")
"""The file with a container's share of the CPU: the granted microseconds, or "max", and the period in microseconds."""


SECONDS = 0.06
"""The seconds for which two numbers of threads are compared: several time slices of the system's scheduler."""


TURNS = 3
"""The trials of each of the two numbers. They alternate, so that a short disturbance does not affect only one."""


GAIN = 1.1
"""The factor by which the larger number of threads must be faster to be chosen."""


ROWS, COLUMNS = 128, 576
"""The size of a product that takes one thread about a millisecond. Each further thread adds as many rows."""


def free_threads(tell: Callable[[str], None] = quiet) -> int:
    """The number of threads that pays off now, out of those that this process may use.

    `tell` is called with a message if this is fewer than all of them.
    """
    cores = available_cores()
    chosen = worth_it(cores, speeds)
    if chosen < cores:
        tell(
            f"using {chosen} of {cores} threads per product, because more are not faster now; "
            f"set runtime.threads = {cores} to use all"
        )
    return chosen


def worth_it(most: int, compare: Callable[[int, int], tuple[float, float]]) -> int:
    """The number of threads to use: `most`, halved as long as half of them are about as fast.

    `compare` returns the products per second of two numbers of threads.

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
    """Products per second with each of two numbers of threads, in turns. Afterwards torch's own number is restored."""
    earlier = torch.get_num_threads()
    left, right = torch.ones(ROWS * more, COLUMNS), torch.ones(COLUMNS, COLUMNS)
    done, spent = {more: 0, fewer: 0}, {more: 0.0, fewer: 0.0}
    try:
        for number in (more, fewer) * TURNS:
            torch.set_num_threads(number)
            torch.mm(left, right)  # starts the threads
            begun = time.perf_counter()
            while (passed := time.perf_counter() - begun) < SECONDS / (2 * TURNS):
                torch.mm(left, right)
                done[number] += 1
            spent[number] += passed
    finally:
        torch.set_num_threads(earlier)
    return done[more] / spent[more], done[fewer] / spent[fewer]


def available_cores() -> int:
    """The number of cores that this process may use: those it is bound to, limited by its control group.

    `OMP_NUM_THREADS` is a limit too, if it is set.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with suppress(OSError, ValueError):  # no Linux, no control group, or "max": no limit
        quota, period = (int(each) for each in CPU_QUOTA.read_text().split())
        cores = min(cores, max(1, quota // period))
    with suppress(KeyError, ValueError):
        cores = min(cores, max(1, int(os.environ["OMP_NUM_THREADS"])))
    return cores
