"""Choice by likelihood: is a record's reference more likely than other records' responses?

It draws the other responses and turns summed NLLs into accuracies; scoring the responses is done elsewhere.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedmide.seeds import stream

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class ChoiceScores:
    """What each record's choice was worth, one value for each record.

    `correct` goes by the summed log-probability (acc), `correct_norm` by that divided by the choice's
    characters (acc_norm): 1 where the reference is best alone, 0 where another is better, 1/k where k choices
    share the first place and the reference is among them. `num_options` counts the choices, the reference
    included.
    """

    correct: FloatArray
    correct_norm: FloatArray
    num_options: npt.NDArray[np.int64]

    def chance(self) -> float:
        """The accuracy expected from guessing."""
        return float(np.mean(1.0 / self.num_options))


def draw_choices(responses: Sequence[str], choices: int, seed: int, client: str) -> tuple[tuple[int, ...], ...]:
    """For each test record of a client the indices of `choices - 1` other records, in random order.

    The responses they point at differ from the record's own and from each other (leading and trailing
    whitespace apart). They are drawn from the client's distinct responses, so a frequent one is as likely as
    a rare one, and the first record that has it stands for it. Where there are fewer distinct responses all
    are taken: every record of a client has the same number of options, and with fewer than two distinct
    responses the draws are empty, so the client has no choice accuracy.

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
    # A child generator for each record: what it draws does not hang on what was drawn for the others.
    generators = stream(seed, "choices", client=client).spawn(len(texts))
    draws = []
    for text, generator in zip(texts, generators, strict=True):
        drawn = generator.choice(len(firsts) - 1, size=size, replace=False).tolist() if size else []
        # The numbers run over the distinct responses without the record's own, which is stepped over.
        draws.append(tuple(firsts[number + (number >= positions[text])] for number in drawn))
    return tuple(draws)


def choice_accuracy(nll_sums: Sequence[Sequence[float]], lengths: Sequence[Sequence[int]]) -> ChoiceScores:
    """The credit of each record, from the NLLs of its choices, the reference first.

    `nll_sums`: for each record the NLL summed over the tokens of [reference, *others]; `lengths`: the
    characters of the same choices. Best is the lowest sum. Where choices tie, lm-evaluation-harness takes the
    first, which would favour the reference here; a tie of k is worth 1/k instead, what breaking it at random
    is worth on average.

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
    """sqrt(p(1 - p)/n) for the mean p of n credits; ties make it a little wider than the credits' own spread.

    >>> standard_error(np.array([1.0, 0.0, 1.0, 0.0]))
    0.25
    """
    accuracy = float(np.mean(credit))
    return math.sqrt(accuracy * (1.0 - accuracy) / len(credit))
