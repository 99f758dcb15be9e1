"""Batches of examples that waste little on padding."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedmide.config.sections import Positions
from fedmide.data.tokens import Example

MAX_PADDING = 64
"""The most padding tokens in a batch. With more of them, two passes cost less than one."""


MAX_SPREAD = 4
"""An unpadded batch may hold this many times the token budget, each text counted as the longest: attention does so."""


WORTH_PARTING = 256
"""From this many tokens on, two halves on two cores take less time than all tokens on one core."""


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Several examples side by side.

    ids: int64 (B, T), padded on the right. predicts: bool (B, T), true at t where the loss of token t + 1 counts.
    lengths: tokens in each row, without padding. rows: indices of these examples in the caller's sequence.
    """

    ids: NDArray[np.int64]
    predicts: NDArray[np.bool_]
    lengths: tuple[int, ...]
    rows: tuple[int, ...]


def batches(
    examples: Sequence[Example],
    positions: Positions,
    tokens_per_batch: int,
    max_padding: int = MAX_PADDING,
    unpadded: int = 0,
) -> Iterator[Batch]:
    """Batches of at most `tokens_per_batch` tokens (or a single example), longest first, every example in exactly one.

    The longest come first, so a batch that is too large for the memory fails at once. Padding counts as tokens. A batch
    ends early if it would hold more than `max_padding` tokens of padding.
    Examples of at most `unpadded` tokens get batches of their own, without padding. These batches have nearly the same
    size, and their number is even unless there are few tokens. So two processor cores finish at the same time.
    """
    lengths = [len(example.ids) for example in examples]
    order = sorted(range(len(examples)), key=lambda row: -lengths[row])
    padded, others = ([row for row in order if (lengths[row] > unpadded) is is_long] for is_long in (True, False))
    groups = _groups(padded, lengths, tokens_per_batch, max_padding)
    for rows in (*groups, *_even_groups(others, lengths, tokens_per_batch)):
        yield pad([examples[row] for row in rows], positions, tuple(rows))


def pad(examples: Sequence[Example], positions: Positions, rows: tuple[int, ...]) -> Batch:
    """One batch of the examples, in their order."""
    longest = max(len(example.ids) for example in examples)
    ids = np.zeros((len(examples), longest), dtype=np.int64)  # any id is fine: no token sees the padding
    predicts = np.zeros((len(examples), longest), dtype=np.bool_)
    for row, example in enumerate(examples):
        ids[row, : len(example.ids)] = example.ids
        predicts[row, example.first_predicted(positions) - 1 : len(example.ids) - 1] = True
    return Batch(ids, predicts, tuple(len(example.ids) for example in examples), rows)


def _groups(order: Iterable[int], lengths: Sequence[int], budget: int, max_padding: int) -> Iterator[list[int]]:
    group: list[int] = []
    padding = 0
    for row in order:
        added = lengths[group[0]] - lengths[row] if group else 0
        if group and ((len(group) + 1) * lengths[group[0]] > budget or padding + added > max_padding):
            yield group
            group, padding, added = [], 0, 0
        group.append(row)
        padding += added
    if group:
        yield group


def _even_groups(order: Sequence[int], lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    total = sum(lengths)
    number = -(-total // budget)
    number += number % 2 if total >= WORTH_PARTING else 0
    group: list[int] = []
    size = before = num_groups = 0
    for row in order:
        is_next = (before + lengths[row] / 2) * number > total * (num_groups + 1)
        is_wide = group and (len(group) + 1) * lengths[group[0]] > MAX_SPREAD * budget
        if group and (is_next or is_wide or size + lengths[row] > budget):
            yield group
            group, size, num_groups = [], 0, num_groups + 1
        group.append(row)
        size += lengths[row]
        before += lengths[row]
    if group:
        yield group
