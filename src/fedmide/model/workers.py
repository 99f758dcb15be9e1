"""Batches side by side, one on each processor core, their results in order.

Two cores that take a batch each are faster than two that share one: most of what a pass does is too small to be shared.
And since every batch is the work of one thread, its numbers do not depend on how many there are.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from threading import Barrier
from typing import TypeVar

import torch

Item = TypeVar("Item")


Result = TypeVar("Result")


def _stay_alone() -> None:
    """Keeps this thread's work on it alone."""
    torch.get_num_threads()  # a thread takes over the number of all others when it first asks, and must not later
    torch.set_num_threads(1)


class Workers:
    """So many threads of one core each; with 0 the caller works itself, on as many as it has."""

    def __init__(self, number: int) -> None:
        self.number = number
        self._pool: ThreadPoolExecutor | None = None
        if number > 1 or (number == 1 and torch.get_num_threads() > 1):
            shared = torch.get_num_threads()
            self._pool = ThreadPoolExecutor(number, "fedmide", _stay_alone)
            meeting = Barrier(number)
            wait([self._pool.submit(meeting.wait) for _ in range(number)])  # until all of them have started
            torch.set_num_threads(shared)  # each took 1 for the default of every thread to come

    def close(self) -> None:
        """Ends the threads, once they are done with what they are at."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def each(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """The function's results in the items' order; a few items are taken ahead of the result asked for."""
        if self._pool is None:
            yield from map(function, items)
            return
        waiting: deque[Future[Result]] = deque()
        try:
            for item in items:
                waiting.append(self._pool.submit(function, item))
                if len(waiting) > self.number:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for each in waiting:
                each.cancel()
            wait(waiting)  # what is under way holds memory
