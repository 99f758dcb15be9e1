"""Token ids of a record, and cuts where it is too long.

Prompt and response are encoded separately and joined. So the boundary is exact, and the same as in generation. Every
response ends with the end-of-sequence token unless it was cut. Padding is on the right. In a causal model no earlier
token can see it, so no attention mask is needed.

The text of a control token in a record is plain text. So a record can neither end its own response nor fake a turn of a
chat. Only the text that a template writes around a record becomes control tokens.
"""

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, Protocol

import numpy as np
from jinja2 import TemplateError
from numpy.typing import NDArray

from fedmide.config.sections import ModelConfig, Positions, PromptConfig
from fedmide.data.prompts import Template, chat_messages, render, resolve
from fedmide.data.records import Record, RecordId
from fedmide.errors import DataError, ModelError

RESPONSE_SHARE = 4
"""If a prompt must be cut, the response keeps its full length or cutoff / RESPONSE_SHARE, whichever is less."""


SAME_DAY = "{% macro strftime_now(format) %}26 Jul 2024{% endmacro +%}"
"""A fixed date for chat templates that ask for it. With the real date a record would have other tokens tomorrow."""


class Tokenizer(Protocol):
    """The part of a tokenizer that is used here. Those of transformers have it."""

    eos_token_id: int | None
    chat_template: str | None
    added_tokens_decoder: Mapping[int, Any]

    def __call__(self, text: str, *, add_special_tokens: bool, split_special_tokens: bool) -> Any:
        """A mapping whose `input_ids` are the text's ids.

        With `split_special_tokens`, control tokens in the text are encoded as plain text.
        """

    def apply_chat_template(
        self, conversation: Any, *, chat_template: str | None, tokenize: bool, add_generation_prompt: bool
    ) -> Any:
        """The conversation as text."""


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """A record as token ids, prompt first, then response.

    ids: int64 (T,), 2 <= T <= cutoff. `truncated`: a part of the record did not fit.
    """

    id: RecordId
    ids: NDArray[np.int64]
    prompt_length: int
    truncated: bool = False

    def first_predicted(self, positions: Positions) -> int:
        """Index of the first token whose likelihood counts. The very first token is never predicted."""
        return max(1, self.prompt_length if positions == "response" else 1)

    def num_predicted(self, positions: Positions) -> int:
        """The number of tokens that count."""
        return len(self.ids) - self.first_predicted(positions)


@dataclass(frozen=True)
class Encoder:
    """Makes examples of records, for one tokenizer, template and cutoff."""

    tokenizer: Tokenizer
    template: Template | Literal["chat"]
    cutoff: int
    overflow: Literal["refuse", "cut"]

    def prompt_ids(self, record: Record) -> list[int]:
        """The prompt's ids, after the tokens that the tokenizer puts before plain text.

        A chat template writes those tokens itself.
        """
        text, mark = self._marked_prompt(record)
        ids = list(self._opening)
        for number, piece in enumerate(text.split(mark)):
            ids += self._ids(piece, plain=number % 2 == 1)
        return ids

    def response_ids(self, text: str) -> list[int]:
        """The response's ids and the end of sequence."""
        return [*self._ids(text, plain=True), _end_of_sequence(self.tokenizer)]

    def encode(self, record: Record) -> Example:
        """The record's example. Raises `DataError` if the prompt leaves no room for a response."""
        return self.encode_options(record, [record.response])[0]

    def encode_options(self, record: Record, responses: Sequence[str]) -> tuple[Example, ...]:
        """The record with each response in place of its own. All share one prompt, cut as the longest one needs."""
        answers = [self.response_ids(response) for response in responses]
        prompt = self.prompt_ids(record)
        room = min(max(map(len, answers)), self.cutoff // RESPONSE_SHARE) if self.overflow == "cut" else 1
        cut = len(prompt) > self.cutoff - room
        if cut:
            prompt = self._shortened(record, len(prompt), room)
        return tuple(self._joined(record.id, prompt, answer, cut) for answer in answers)

    def continued(self, text: str, continuation: str, longest: int) -> Example:
        """A plain text, without a template, and its continuation, which is predicted; no end of sequence.

        Both are encoded together. So a word across the boundary has the tokens that the model knows.
        If there are more than `longest` tokens, the beginning is cut.
        """
        prompt = [*self._plain_opening, *self._ids(text, plain=True)]
        whole = [*self._plain_opening, *self._ids(text + continuation, plain=True)]
        cut = max(0, len(whole) - longest)
        boundary = max(1, min(len(prompt), len(whole) - 1) - cut)
        return Example(RecordId(""), np.asarray(whole[cut:], dtype=np.int64), boundary, cut > 0)

    def _joined(self, record_id: RecordId, prompt: list[int], answer: list[int], cut: bool) -> Example:
        ids = np.asarray((prompt + answer)[: self.cutoff], dtype=np.int64)
        return Example(record_id, ids, len(prompt), cut or len(prompt) + len(answer) > self.cutoff)

    def _shortened(self, record: Record, num_tokens: int, room: int) -> list[int]:
        """The prompt, cut to leave `room` tokens: first the end of the context, then the end of the instruction."""
        if self.overflow == "refuse":
            raise DataError(f"a prompt of {num_tokens} tokens leaves no room below the cutoff of {self.cutoff}")
        for field in ("context", "instruction"):
            record = _longest_beginning(record, field, self._fits(room))
            prompt = self.prompt_ids(record)
            if len(prompt) <= self.cutoff - room:
                return prompt
        raise DataError(f"the prompt's template alone leaves no room below the cutoff of {self.cutoff}")

    def _fits(self, room: int) -> Callable[[Record], bool]:
        return lambda record: len(self.prompt_ids(record)) <= self.cutoff - room

    def _marked_prompt(self, record: Record) -> tuple[str, str]:
        """The prompt's text, and a mark that stands before and after each control token of the record.

        The mark is a hash of the record, so the record cannot contain it.
        """
        mark = hashlib.sha256(f"{record.instruction}\x1f{record.context}".encode()).hexdigest()
        if self._control is not None:
            marked = f"{mark}\\g<0>{mark}"
            instruction, context = (self._control.sub(marked, text) for text in (record.instruction, record.context))
            record = replace(record, instruction=instruction, context=context)
        if self.template == "chat":
            return self._chat(record), mark
        return render(self.template, record), mark

    def _chat(self, record: Record) -> str:
        """The record as text of the tokenizer's chat template."""
        messages, template = chat_messages(record), self.tokenizer.chat_template
        if template and "strftime_now" in template:
            template = SAME_DAY + template
        try:
            text: str = self.tokenizer.apply_chat_template(
                messages, chat_template=template, tokenize=False, add_generation_prompt=True
            )
        except TemplateError as error:
            raise ModelError(f"the tokenizer's chat template fails: {error}", "Use another prompt.template") from None
        return text

    def _ids(self, text: str, plain: bool) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, split_special_tokens=plain)["input_ids"]
        return ids

    @cached_property
    def _control(self) -> re.Pattern[str] | None:
        """A pattern for the texts of control tokens. The longest match comes first if one begins another."""
        texts = {str(token) for token in self.tokenizer.added_tokens_decoder.values() if token.special}
        longest_first = sorted(texts, key=lambda text: (-len(text), text))
        return re.compile("|".join(map(re.escape, longest_first))) if texts else None

    @cached_property
    def _opening(self) -> list[int]:
        """The tokens before a prompt. A chat template writes them itself, so there are none."""
        return [] if self.template == "chat" else self._plain_opening

    @cached_property
    def _plain_opening(self) -> list[int]:
        """The tokens that the tokenizer puts before plain text."""
        whole: list[int] = self.tokenizer("a", add_special_tokens=True, split_special_tokens=False)["input_ids"]
        return whole[: whole.index(self._ids("a", plain=False)[0])]


def encoder(tokenizer: Tokenizer, model: ModelConfig, prompt: PromptConfig) -> Encoder:
    """The encoder that the configuration describes."""
    _end_of_sequence(tokenizer)
    template = resolve(prompt.template)
    if template == "chat" and not tokenizer.chat_template:
        raise ModelError("prompt.template = 'chat': the tokenizer has no chat template", "Use another prompt.template")
    made = Encoder(tokenizer, template, model.cutoff, prompt.overflow)
    made.prompt_ids(Record("probe", "probe", context="probe"))  # a broken template fails here, not at the first record
    return made


def encode_all(encode: Encoder, records: Sequence[Record], where: str) -> tuple[Example, ...]:
    """The records' examples, in order. One `DataError` names all records that do not fit, by position."""
    examples, problems = [], []
    for number, record in enumerate(records, 1):
        try:
            examples.append(encode.encode(record))
        except DataError as error:
            problems.append(f"{where}, record {number}: {error}")
    if problems:
        raise DataError(problems, "Raise model.cutoff, or set prompt.overflow = 'cut' to shorten prompts")
    return tuple(examples)


def _longest_beginning(record: Record, field: str, fits: Callable[[Record], bool]) -> Record:
    """The record with the longest beginning of a field that fits, found by bisection over characters; may be empty."""
    text = getattr(record, field)
    low, high = 0, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(replace(record, **{field: text[:middle]})) else (low, middle - 1)
    return replace(record, **{field: text[:low]})


def _end_of_sequence(tokenizer: Tokenizer) -> int:
    if tokenizer.eos_token_id is None:
        raise ModelError("the tokenizer names no end-of-sequence token", "Set eos_token in its tokenizer_config.json")
    return tokenizer.eos_token_id
