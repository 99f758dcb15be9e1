"""Choice by likelihood: is a record's reference more likely than other records' responses?

This module draws the other responses and turns NLL sums into accuracies. Other modules score the responses.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedmide.evaluation.intervals import FloatArray
from fedmide.seeds import stream


@dataclass(frozen=True, slots=True, eq=False)
class ChoiceScores:
    """The credit of each record's choice, one value per record.

    `correct` compares the summed log-probabilities (acc). `correct_norm` compares those sums, each divided by the
    choice's number of characters (acc_norm). The credit is 1 if the reference alone is best, and 0 if another choice
    is better. It is 1/k if the reference shares the first place with k - 1 others. `num_options` counts the choices,
    including the reference.
    """

    correct: FloatArray
    correct_norm: FloatArray
    num_options: npt.NDArray[np.int64]

    def chance(self) -> float:
        """The accuracy expected from guessing."""
        return float(np.mean(1.0 / self.num_options))


def draw_choices(responses: Sequence[str], choices: int, seed: int, client: str) -> tuple[tuple[int, ...], ...]:
    """Indices of `choices - 1` other records for each test record of a client, in random order.

    Their responses differ from the record's own and from each other (leading and trailing whitespace is ignored).
    They are drawn from the client's distinct responses, so frequent and rare ones are equally likely. The first
    record with a response represents it. If there are fewer distinct responses, all are taken, so every record of a
    client has the same number of options. With fewer than two distinct responses the draws are empty, and the client
    has no choice accuracy.

    >>> draw_choices(["yes", "no", " no "], choices=4, seed=0, client="a")
    ((1,), (0,), (0,))
    """
    if choices < 2:
        raise ValueError(f"a choice needs at least 2 options, not {choices}")
    texts = [response.strip() for response in responses]
    first_of: dict[str, int] = {}
    for index, text in enumerate(texts):
        first_of.setdefault(text, index)
    firsts = list(first_of.values())
    positions = {text: position for position, text in enumerate(first_of)}
    size = min(choices, len(firsts)) - 1
    # One child generator per record: its draws do not depend on those for other records.
    generators = stream(seed, "choices", client=client).spawn(len(texts))
    draws = []
    for text, generator in zip(texts, generators, strict=True):
        drawn = generator.choice(len(firsts) - 1, size=size, replace=False).tolist() if size else []
        # A number counts the distinct responses without the record's own. From the own position on, it is one too low.
        draws.append(tuple(firsts[number + (number >= positions[text])] for number in drawn))
    return tuple(draws)


def choice_accuracy(nll_sums: Sequence[Sequence[float]], lengths: Sequence[Sequence[int]]) -> ChoiceScores:
    """The credit of each record, from the NLLs of its choices, the reference first.

    `nll_sums`: per record, the NLL summed over the tokens of [reference, *others]. `lengths`: the characters of the
    same choices. The lowest sum is best. If choices tie, lm-evaluation-harness takes the first, which would favor the
    reference here. Instead, a tie of k choices gives 1/k: the mean credit if ties were broken at random.

    >>> scores = choice_accuracy([[2.0, 3.0], [4.0, 4.0]], [[1, 3], [2, 1]])
    >>> scores.correct.tolist(), scores.correct_norm.tolist()
    ([1.0, 0.5], [0.0, 1.0])
    """
    _check(nll_sums, lengths)
    by_length = [
        [nll_sum / length for nll_sum, length in zip(sums, characters, strict=True)]
        for sums, characters in zip(nll_sums, lengths, strict=True)
    ]
    return ChoiceScores(
        correct=np.array([_credit(sums) for sums in nll_sums], dtype=np.float64),
        correct_norm=np.array([_credit(values) for values in by_length], dtype=np.float64),
        num_options=np.array([len(sums) for sums in nll_sums], dtype=np.int64),
    )


def _check(nll_sums: Sequence[Sequence[float]], lengths: Sequence[Sequence[int]]) -> None:
    if [len(sums) for sums in nll_sums] != [len(characters) for characters in lengths]:
        raise ValueError("sums and lengths differ in shape")
    if not nll_sums:
        raise ValueError("there are no records to score")
    if any(len(sums) < 2 for sums in nll_sums):
        raise ValueError("a record has fewer than 2 options")
    if any(math.isnan(nll_sum) for sums in nll_sums for nll_sum in sums):
        raise ValueError("the NLL of a choice is not a number")
    if any(length < 1 for characters in lengths for length in characters):
        raise ValueError("a choice has no characters")


def _credit(values: Sequence[float]) -> float:
    best = min(values)
    return 1.0 / values.count(best) if values[0] == best else 0.0


def standard_error(credit: FloatArray) -> float:
    """The standard error sqrt(p(1 - p)/n) of the mean p of n credits.

    With ties it is slightly larger than the one from the credits' own variance.

    >>> standard_error(np.array([1.0, 0.0, 1.0, 0.0]))
    0.25
    """
    accuracy = float(np.mean(credit))
    return math.sqrt(accuracy * (1.0 - accuracy) / len(credit))
