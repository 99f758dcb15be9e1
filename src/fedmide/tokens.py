"""Token ids of a record, what is cut where it is too long, and batches that waste little on padding.

Prompt and response are encoded apart and joined, so the boundary is exact and equal to what generation sees. Every
response ends with the end-of-sequence token unless it was cut. Padding is on the right: with a causal model nothing
before it can see it, so no attention mask is needed.

A control token's text within a record is plain text: a record can neither end its own response nor fake a turn of a
chat. Only what a template writes around a record becomes control tokens.
"""

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, Protocol

import numpy as np
from jinja2 import TemplateError
from numpy.typing import NDArray

from fedmide.errors import DataError, ModelError
from fedmide.prompts import Template, chat_messages, render, resolve
from fedmide.records import Record, RecordId
from fedmide.sections import ModelConfig, Positions, PromptConfig

ROOM = 4
"""A prompt is cut so that the response gets its length or this part of the cutoff, whichever is less: 1 / ROOM."""

MAX_PADDING = 64
"""Padding tokens in one batch from which on two passes cost less than one."""

MAX_SPREAD = 4
"""How many times the budget texts without padding may have, each counted as if it were the longest: attention does."""

WORTH_PARTING = 256
"""Tokens of which two halves, each on a core of its own, take less time than all of them on one."""

SAME_DAY = "{% macro strftime_now(format) %}26 Jul 2024{% endmacro +%}"
"""What a chat template that asks for the date is told: with the real one a record would have other tokens tomorrow."""


class Tokenizer(Protocol):
    """What is needed of a tokenizer; transformers' own have it."""

    eos_token_id: int | None
    chat_template: str | None
    added_tokens_decoder: Mapping[int, Any]

    def __call__(self, text: str, *, add_special_tokens: bool, split_special_tokens: bool) -> Any:
        """A mapping whose `input_ids` are the text's ids; control tokens in it are plain text where they are split."""

    def apply_chat_template(
        self, conversation: Any, *, chat_template: str | None, tokenize: bool, add_generation_prompt: bool
    ) -> Any:
        """The conversation as text."""


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """A record as token ids, prompt first, then response.

    ids: int64 (T,), 2 <= T <= cutoff. `truncated`: some of the record did not fit.
    """

    id: RecordId
    ids: NDArray[np.int64]
    prompt_length: int
    truncated: bool = False

    def first_predicted(self, positions: Positions) -> int:
        """Index of the first token whose likelihood counts; the very first token is never predicted."""
        return max(1, self.prompt_length if positions == "response" else 1)

    def num_predicted(self, positions: Positions) -> int:
        """How many tokens count."""
        return len(self.ids) - self.first_predicted(positions)


@dataclass(frozen=True)
class Encoder:
    """Records to examples, for one tokenizer, template and cutoff."""

    tokenizer: Tokenizer
    template: Template | Literal["chat"]
    cutoff: int
    overflow: Literal["refuse", "cut"]

    def prompt_ids(self, record: Record) -> list[int]:
        """The prompt's ids, with whatever the tokenizer puts before plain text."""
        text, mark = self._marked_prompt(record)
        ids = list(self._opening)
        for number, piece in enumerate(text.split(mark)):
            ids += self._ids(piece, plain=number % 2 == 1)
        return ids

    def response_ids(self, text: str) -> list[int]:
        """The response's ids and the end of sequence."""
        return [*self._ids(text, plain=True), _end_of_sequence(self.tokenizer)]

    def encode(self, record: Record) -> Example:
        """The record's example; raises `DataError` where the prompt leaves no room for a response."""
        return self.encode_options(record, [record.response])[0]

    def encode_options(self, record: Record, responses: Sequence[str]) -> tuple[Example, ...]:
        """The record with each of the responses in the place of its own, after one prompt: as the longest needs it."""
        answers = [self.response_ids(response) for response in responses]
        prompt = self.prompt_ids(record)
        room = min(max(map(len, answers)), self.cutoff // ROOM) if self.overflow == "cut" else 1
        cut = len(prompt) > self.cutoff - room
        if cut:
            prompt = self._shortened(record, len(prompt), room)
        return tuple(self._joined(record.id, prompt, answer, cut) for answer in answers)

    def continued(self, text: str, continuation: str, longest: int) -> Example:
        """A text as it is, without a template, and how it goes on, which is what is predicted; no end of sequence.

        Both are encoded together, so that a word that the boundary parts is tokenised as the model knows it. More than
        `longest` tokens are cut at the beginning.
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
        """The prompt with as much of the context's beginning as leaves `room` tokens, then of the instruction's."""
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
        """The prompt's text and a mark that stands before and after each control token out of the record.

        The mark is a hash of the record, which therefore can't hold it.
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
        """The record through the tokenizer's chat template."""
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
        """What finds the texts of control tokens, the longest first where one begins another."""
        texts = {str(token) for token in self.tokenizer.added_tokens_decoder.values() if token.special}
        longest_first = sorted(texts, key=lambda text: (-len(text), text))
        return re.compile("|".join(map(re.escape, longest_first))) if texts else None

    @cached_property
    def _opening(self) -> list[int]:
        """What stands before a prompt; a chat template writes that itself."""
        return [] if self.template == "chat" else self._plain_opening

    @cached_property
    def _plain_opening(self) -> list[int]:
        """What the tokenizer puts before plain text."""
        whole: list[int] = self.tokenizer("a", add_special_tokens=True, split_special_tokens=False)["input_ids"]
        return whole[: whole.index(self._ids("a", plain=False)[0])]


def encoder(tokenizer: Tokenizer, model: ModelConfig, prompt: PromptConfig) -> Encoder:
    """The encoder that the configuration describes."""
    _end_of_sequence(tokenizer)
    template = resolve(prompt.template)
    if template == "chat" and not tokenizer.chat_template:
        raise ModelError("prompt.template = 'chat': the tokenizer has no chat template", "Use another prompt.template")
    made = Encoder(tokenizer, template, model.cutoff, prompt.overflow)
    made.prompt_ids(Record("probe", "probe", context="probe"))  # a template that fails does so here
    return made


def encode_all(encode: Encoder, records: Sequence[Record], where: str) -> tuple[Example, ...]:
    """The records' examples, in order; all that do not fit are named at once, by position."""
    examples, problems = [], []
    for number, record in enumerate(records, 1):
        try:
            examples.append(encode.encode(record))
        except DataError as error:
            problems.append(f"{where}, record {number}: {error}")
    if problems:
        raise DataError(problems, "Raise model.cutoff, or say prompt.overflow = 'cut' to shorten prompts")
    return tuple(examples)


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Several examples side by side.

    ids: int64 (B, T), padded on the right. predicts: bool (B, T), true at t where the loss of token t + 1 counts.
    lengths: tokens in each row, padding left out. rows: which examples of the caller's sequence these are.
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
    """Batches of at most so many tokens (or a single example), longest first, every example in exactly one.

    Longest first, so that a batch too large for the memory fails at once. Padding counts, and a batch ends early where
    it would hold more than `max_padding` tokens of it. Examples of at most `unpadded` tokens stand without padding, in
    batches of their own: these are of nearly one size and, but for few tokens, even in number, so that two processor
    cores have work and are done at the same time.
    """
    lengths = [len(example.ids) for example in examples]
    order = sorted(range(len(examples)), key=lambda row: -lengths[row])
    padded, others = ([row for row in order if (lengths[row] > unpadded) is is_long] for is_long in (True, False))
    groups = _groups(padded, lengths, tokens_per_batch, max_padding)
    for rows in (*groups, *_even_groups(others, lengths, tokens_per_batch)):
        yield pad([examples[row] for row in rows], positions, tuple(rows))


def pad(examples: Sequence[Example], positions: Positions, rows: tuple[int, ...]) -> Batch:
    """One batch out of the examples, in their order."""
    longest = max(len(example.ids) for example in examples)
    ids = np.zeros((len(examples), longest), dtype=np.int64)  # any id will do: nothing sees the padding
    predicts = np.zeros((len(examples), longest), dtype=np.bool_)
    for row, example in enumerate(examples):
        ids[row, : len(example.ids)] = example.ids
        predicts[row, example.first_predicted(positions) - 1 : len(example.ids) - 1] = True
    return Batch(ids, predicts, tuple(len(example.ids) for example in examples), rows)


def _longest_beginning(record: Record, field: str, fits: Callable[[Record], bool]) -> Record:
    """The record with the longest beginning of a field that fits, found by bisection over characters; else without."""
    text = getattr(record, field)
    low, high = 0, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(replace(record, **{field: text[:middle]})) else (low, middle - 1)
    return replace(record, **{field: text[:low]})


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


def _end_of_sequence(tokenizer: Tokenizer) -> int:
    if tokenizer.eos_token_id is None:
        raise ModelError("the tokenizer names no end-of-sequence token", "Set eos_token in its tokenizer_config.json")
    return tokenizer.eos_token_id
