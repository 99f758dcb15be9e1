"""Batches in parallel, one per CPU core, with results in order.

Two cores with one batch each are faster than two cores that share a batch: most steps of a pass are too small to share.
Every batch is computed by one thread, so its numbers do not depend on the number of threads.
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
    """Limits torch to one thread for the work of this thread."""
    torch.get_num_threads()  # the first call copies the process's number; it must not come after `set_num_threads`
    torch.set_num_threads(1)


class Workers:
    """A number of threads with one core each. With 0 the caller computes the batches itself, on all its threads."""

    def __init__(self, number: int) -> None:
        self.number = number
        self._pool: ThreadPoolExecutor | None = None
        if number > 1 or (number == 1 and torch.get_num_threads() > 1):
            shared = torch.get_num_threads()
            self._pool = ThreadPoolExecutor(number, "fedmide", _stay_alone)
            meeting = Barrier(number)
            wait([self._pool.submit(meeting.wait) for _ in range(number)])  # until all of them have started
            torch.set_num_threads(shared)  # each worker has set the default of all later threads to 1

    def close(self) -> None:
        """Ends the threads after their current batches; drops the batches that have not started."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def each(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """The function's results in the items' order. A few items are computed ahead of the current result."""
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
            wait(waiting)  # running batches hold memory
