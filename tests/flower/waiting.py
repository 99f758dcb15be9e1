"""A wait for the work of other processes."""

import time
from collections.abc import Callable
from typing import Any


def until(true: Callable[[], Any], seconds: float = 240.0) -> None:
    """Waits until `true` returns true; fails after `seconds`."""
    limit = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < limit, "waited too long"
        time.sleep(0.1)
