"""Named random streams: a draw depends on the name of its stream, and on nothing else."""

import hashlib

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fedmide.seeds import entropy, stream

names = st.tuples(
    st.integers(0, 2**40), st.sampled_from(["a", "b", "adapter:x"]), st.integers(-3, 30), st.text("ab-", max_size=3)
)


def test_the_number_is_a_hash_of_the_name() -> None:
    """Frozen: other numbers would change every run that was ever made."""
    digest = hashlib.sha256(b"7\x1ftraining\x1f-1\x1fsite-1").digest()
    assert entropy(7, "training", -1, "site-1") == int.from_bytes(digest[:16], "big")
    assert stream(0, "x").integers(0, 1000, 4).tolist() == [
        *np.random.default_rng(entropy(0, "x")).integers(0, 1000, 4)
    ]


@given(st.lists(names, min_size=2, max_size=20, unique=True))
def test_every_part_of_the_name_distinguishes_streams(given_names: list[tuple[int, str, int, str]]) -> None:
    assert len({entropy(*name) for name in given_names}) == len(given_names)
    assert len({stream(*name).random() for name in given_names}) == len(given_names)


@given(names)
def test_a_stream_is_fresh_each_time_and_untouched_by_others(name: tuple[int, str, int, str]) -> None:
    first = stream(*name)
    draws = first.random(3).tolist()
    stream(0, "another").random(100)
    np.random.default_rng().random(10)
    assert stream(*name).random(3).tolist() == draws
    assert first.random(3).tolist() != draws


@given(names)
def test_a_number_has_128_bits(name: tuple[int, str, int, str]) -> None:
    assert 0 <= entropy(*name) < 2**128
