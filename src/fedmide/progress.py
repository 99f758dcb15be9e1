"""Long work as whoever waits for it sees it, and what it leaves in the manifest: how long it took, how much it held."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

Tell = Callable[[str], None]
"""Says something to whoever waits."""


Advance = Callable[[int, str], None]
"""Tells how many units of work were done, and a word on the latest."""


class Progress(Protocol):
    """Shows long work to whoever waits for it."""

    def __call__(self, stage: str, total: int, unit: str) -> AbstractContextManager[Advance]:
        """A stage of `total` units; within it the returned function is called as units are done."""


def silent(stage: str, total: int, unit: str) -> AbstractContextManager[Advance]:
    """Shows nothing."""
    return nullcontext(lambda units, note: None)
