"""Named random streams: every draw in fedmide comes from one, so no draw shifts another.

A stream is named by its purpose, the round and the client. Adding a client, a worker or a draw elsewhere leaves every
other stream unchanged.
"""

import hashlib

import numpy as np


def entropy(seed: int, purpose: str, round_number: int = 0, client: str = "") -> int:
    """A 128-bit number that depends on every part of the name and on nothing else.

    >>> entropy(0, "batches", 1, "a") == entropy(0, "batches", 1, "a")
    True
    >>> entropy(0, "batches", 1, "a") == entropy(0, "batches", 1, "b")
    False
    """
    name = "\x1f".join((str(seed), purpose, str(round_number), client))
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:16], "big")


def stream(seed: int, purpose: str, round_number: int = 0, client: str = "") -> np.random.Generator:
    """A fresh generator for one purpose, round and client."""
    return np.random.default_rng(entropy(seed, purpose, round_number, client))
