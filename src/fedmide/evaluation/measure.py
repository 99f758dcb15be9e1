"""What a client's test records measure under an adapter: response NLL and the NLL of each choice, per record.

These figures stay on the site; what leaves it are the sums that `summary` makes of them.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedmide.config import Config
from fedmide.evaluation.choice import draw_choices
from fedmide.localmodel import Adapter, LocalModel
from fedmide.records import ClientData
from fedmide.tokens import Encoder


@dataclass(frozen=True)
class Measured:
    """One value for each test record, in the records' order.

    `nll_sums` in nats over `num_tokens` response tokens. `choices`: the NLL sums of the reference and of the other
    responses, with their lengths in characters; empty where the client has too few different responses.
    """

    record_ids: tuple[str, ...]
    nll_sums: tuple[float, ...]
    num_tokens: tuple[int, ...]
    choices: tuple[tuple[float, ...], ...]
    lengths: tuple[tuple[int, ...], ...]
    num_truncated: int

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Measured":
        """What `dataclasses.asdict` made, after a way through JSON."""
        return cls(
            tuple(values["record_ids"]),
            tuple(math.nan if value is None else value for value in values["nll_sums"]),
            tuple(values["num_tokens"]),
            tuple(tuple(math.inf if each is None else each for each in row) for row in values["choices"]),
            tuple(tuple(row) for row in values["lengths"]),
            values["num_truncated"],
        )


def measure(
    model: LocalModel,
    adapter: Adapter,
    encode: Encoder,
    client: ClientData,
    config: Config,
) -> Measured:
    """What the client's test records measure under the adapter; all choices go through the model together."""
    records = client.test
    responses = [record.response for record in records]
    draws = draw_choices(responses, config.evaluation.choices, config.seed, client.name)
    answers = [
        [record.response, *(records[other].response for other in drawn)]
        for record, drawn in zip(records, draws, strict=True)
    ]
    examples = [
        encode.encode(record, response) for record, row in zip(records, answers, strict=True) for response in row
    ]
    values = iter(model.nll(adapter, examples, "response"))
    rows = [[next(values) for _ in row] for row in answers]
    has_choice = bool(draws) and len(draws[0]) > 0
    return Measured(
        tuple(record.id for record in records),
        tuple(row[0].sum for row in rows),
        tuple(row[0].num_tokens for row in rows),
        tuple(tuple(nll.sum for nll in row) for row in rows) if has_choice else (),
        tuple(tuple(len(response) for response in row) for row in answers) if has_choice else (),
        sum(encode.encode(record).truncated for record in records),
    )
