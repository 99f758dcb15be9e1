"""The interfaces by which long work reports messages and progress."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

Tell = Callable[[str], None]
"""A function that is called with each message to the user."""


def quiet(message: str) -> None:
    """Shows no message."""


Advance = Callable[[int, str], None]
"""A function that is called with the number of units just done, and a short note on the last one."""


class Progress(Protocol):
    """A display of long work."""

    def __call__(self, stage: str, total: int, unit: str) -> AbstractContextManager[Advance]:
        """A context for a stage of `total` units. In it, the work calls the given function as units are done."""


def silent(stage: str, total: int, unit: str) -> AbstractContextManager[Advance]:
    """Shows no progress."""
    return nullcontext(lambda units, note: None)
