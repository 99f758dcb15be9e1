"""The NLL of records under an adapter, as (sum, count) per record.

Apart from rounding, a record's NLL does not depend on its batch, its neighbors, their order or the padding.
Rounding changes it by a millionth over a float32 base, and by up to a hundredth over a bfloat16 base.
The cause: matrix products of another shape add up in another order.
"""

from collections.abc import Callable, Sequence

import numpy as np

from fedmide.config.sections import Positions
from fedmide.data.batches import batches
from fedmide.data.tokens import Example
from fedmide.model.interface import Nll
from fedmide.model.lora import LoraModel


def nll(
    model: LoraModel,
    examples: Sequence[Example],
    positions: Positions,
    tokens_per_batch: int,
    progress: Callable[[int], None] = lambda num_tokens: None,
) -> tuple[Nll, ...]:
    """NLL of each example under the adapter that the model holds, without dropout, in the examples' order."""
    results: dict[int, Nll] = {}
    model.prepare(training=False)

    def score(most: int) -> None:
        """Scores the records that have no result yet, in batches of at most `most` tokens."""
        left = [row for row in range(len(examples)) if row not in results]
        made = tuple(batches([examples[row] for row in left], positions, most, unpadded=model.unpadded))
        for batch, losses in zip(made, model.workers.each(model.nll, made), strict=True):
            rows = [left[row] for row in batch.rows]
            results.update(zip(rows, _row_sums(losses.cpu().double().numpy(), batch.predicts), strict=True))
            progress(sum(len(examples[row].ids) for row in rows))

    longest = max((len(example.ids) for example in examples), default=0)
    model.scoring_budget.within(tokens_per_batch, longest, score)
    return tuple(results[row] for row in range(len(examples)))


def _row_sums(losses: np.ndarray, predicts: np.ndarray) -> list[Nll]:
    """One (sum, count) per row, out of the losses in row-major order. Sums are in float64."""
    counts = predicts.sum(axis=1)
    pieces = np.split(losses, np.cumsum(counts)[:-1])
    return [Nll(float(piece.sum()), int(count)) for piece, count in zip(pieces, counts, strict=True)]
