"""Measures of a client's test records under an adapter: response NLL and the NLL of each choice, per record.

These figures stay on the site. Only the sums that `summary` computes from them leave it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

from fedmide.config import Config
from fedmide.data.records import ClientData, Record
from fedmide.data.tokens import Encoder, Example
from fedmide.evaluation.choice import draw_choices
from fedmide.evaluation.options import Options, listed, right_first
from fedmide.model.interface import Adapter, LocalModel


@dataclass(frozen=True)
class Measured:
    """One value per test record, in the records' order.

    `nll_sums`: in nats, over `num_tokens` response tokens. `choices`: the NLL sums of the reference and of the other
    responses, all after one prompt. `lengths`: their lengths in characters. A record has no sums if one of its choices
    does not fit without a cut. The client has no rows if it has too few different responses.

    `options`, `option_lengths`: the same for the options that a record lists, the right one first. Here only records
    that list options have a row. The row is empty if the right option is not clear.
    """

    record_ids: tuple[str, ...]
    nll_sums: tuple[float, ...]
    num_tokens: tuple[int, ...]
    choices: tuple[tuple[float, ...], ...]
    lengths: tuple[tuple[int, ...], ...]
    num_truncated: int
    options: tuple[tuple[float, ...], ...] = ()
    option_lengths: tuple[tuple[int, ...], ...] = ()

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Measured":
        """Reads back the values of `dataclasses.asdict` from JSON."""
        return cls(
            tuple(values["record_ids"]),
            tuple(math.nan if value is None else value for value in values["nll_sums"]),
            tuple(values["num_tokens"]),
            sums_from_json(values["choices"]),
            tuple(tuple(row) for row in values["lengths"]),
            values["num_truncated"],
            sums_from_json(values["options"]),
            tuple(tuple(row) for row in values["option_lengths"]),
        )


def measure(
    model: LocalModel,
    adapter: Adapter,
    encode: Encoder,
    client: ClientData,
    config: Config,
) -> Measured:
    """Measures the client's test records under the adapter. All choices go through the model together."""
    records = client.test
    references = [encode.encode(record) for record in records]
    answers = _answers(records, config, client.name)
    choices = [_options(encode, record, row) for record, row in zip(records, answers, strict=True)]
    has_choices = config.evaluation.choices > 1
    listing = [(record, _candidates(found)) for record in records if has_choices and (found := listed(record))]
    options = [_continued(_options(encode, record, row)) for record, row in listing]
    # The reference is usually identical to one of the choices. It is measured once.
    distinct = {_key(example): example for example in chain(references, *choices, *options)}
    nlls = dict(zip(distinct, model.nll(adapter, list(distinct.values()), "response"), strict=True))
    has_choice = any(len(row) > 1 for row in answers)
    return Measured(
        tuple(record.id for record in records),
        tuple(nlls[_key(example)].sum for example in references),
        tuple(nlls[_key(example)].num_tokens for example in references),
        tuple(tuple(nlls[_key(example)].sum for example in row) for row in choices) if has_choice else (),
        tuple(tuple(map(len, row)) for row in answers) if has_choice else (),
        sum(example.truncated for example in references),
        tuple(tuple(nlls[_key(example)].sum for example in row) for row in options),
        tuple(tuple(map(len, row)) for _, row in listing),
    )


def _answers(records: Sequence[Record], config: Config, client: str) -> list[list[str]]:
    """For each record its reference and the responses to distinguish it from; empty without choices."""
    if config.evaluation.choices < 2:
        return [[] for _ in records]
    draws = draw_choices([record.response for record in records], config.evaluation.choices, config.data_seed, client)
    return [
        [record.response, *(records[other].response for other in drawn)]
        for record, drawn in zip(records, draws, strict=True)
    ]


def _options(encode: Encoder, record: Record, answers: Sequence[str]) -> tuple[Example, ...]:
    """The record with each answer. Empty if an answer was cut, because a cut answer would seem more likely."""
    examples = encode.encode_options(record, answers) if answers else ()
    end = encode.tokenizer.eos_token_id  # every response ends with this token unless it was cut
    return examples if all(example.ids[-1] == end for example in examples) else ()


def _candidates(options: Options) -> tuple[str, ...]:
    """The texts of a record's options, the right one first. Empty if the right one is not clear."""
    return () if options.answer is None else right_first(options.texts, options.answer)


def _continued(examples: Sequence[Example]) -> tuple[Example, ...]:
    """The examples without the end of sequence, because an answer may continue after the option."""
    return tuple(replace(example, ids=example.ids[:-1]) for example in examples)


def sums_from_json(rows: Sequence[Sequence[float | None]]) -> tuple[tuple[float, ...], ...]:
    """NLL sums read back from JSON. There null means not finite; here it becomes infinity."""
    return tuple(tuple(math.inf if each is None else each for each in row) for row in rows)


def _key(example: Example) -> tuple[bytes, int]:
    return example.ids.tobytes(), example.prompt_length
