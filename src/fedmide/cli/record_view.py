"""Records as the model sees them: the tokens it reads, the tokens with loss, and the text that is cut.

They show texts of records, so they are for the owner of the records only, and go to the terminal only.
"""

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

from rich.console import Group, RenderableType
from rich.text import Text

from fedmide.config import Config
from fedmide.config.sections import Positions
from fedmide.data.records import Record
from fedmide.data.tokens import Encoder, Example, encoder
from fedmide.errors import DataError

Kind = Literal["prompt", "response", "cut"]


STYLES = {
    ("prompt", False): "dim",
    ("prompt", True): "cyan",
    ("response", True): "bold green",
    ("cut", False): "red strike",
}


@dataclass(frozen=True)
class Piece:
    """Successive tokens as text. `loss`: true if training predicts them."""

    kind: Kind
    loss: bool
    num_tokens: int
    text: str


@dataclass(frozen=True)
class Seen:
    """One record as the model sees it. `cut_prompt_tokens`: the number of tokens cut from its prompt."""

    title: str
    pieces: tuple[Piece, ...]
    cut_prompt_tokens: int = 0
    problem: str = ""


def see(tokenizer: Any, config: Config, records: Sequence[tuple[str, Record]]) -> Iterator[Seen]:
    """The titled records through the tokenizer, template and cutoff of the configuration."""
    encode = encoder(tokenizer, config.model, config.prompt)
    for title, record in records:
        try:
            example = encode.encode(record)
        except DataError as error:
            yield Seen(title, (), problem=str(error))
            continue
        full_prompt, response = encode.prompt_ids(record), encode.response_ids(record.response)
        kept = len(example.ids) - example.prompt_length
        pieces = (*_pieces(encode, example, config.training.positions), *_cut(encode, response[kept:]))
        yield Seen(title, pieces, len(full_prompt) - example.prompt_length)


def render(seen: Seen) -> RenderableType:
    """The record with a line of figures above each of its pieces."""
    lines: list[Text] = [Text(seen.title, style="bold underline")]
    if seen.problem:
        lines.append(Text(f"refused: {seen.problem}", style="red"))
    if seen.cut_prompt_tokens:
        lines.append(Text(f"the prompt is shortened by {seen.cut_prompt_tokens} tokens", style="red"))
    for piece in seen.pieces:
        carries = "" if piece.kind == "cut" else ", loss" if piece.loss else ", no loss"
        lines.append(Text(f"[{piece.kind}, {piece.num_tokens} tokens{carries}]", style="italic"))
        lines.append(Text(harmless(piece.text), style=STYLES.get((piece.kind, piece.loss), "")))
    return Group(*lines, Text(""))


def harmless(text: str) -> str:
    r"""The text with control characters written out, so that no record can control a terminal.

    >>> harmless("a\x1b[31mb\n")
    'a\\x1b[31mb\n'
    """
    return "".join(
        char if char in "\n\t" or unicodedata.category(char) not in ("Cc", "Cf") else ascii(char)[1:-1] for char in text
    )


def _pieces(encode: Encoder, example: Example, positions: Positions) -> Iterator[Piece]:
    """The example's tokens, split at the start of the response and at the start of the loss."""
    first, ids = example.first_predicted(positions), example.ids.tolist()
    for start, end in pairwise(sorted({0, first, example.prompt_length, len(ids)})):
        kind: Kind = "prompt" if start < example.prompt_length else "response"
        yield Piece(kind, start >= first, end - start, _text(encode, ids[start:end]))


def _cut(encode: Encoder, ids: list[int]) -> Iterator[Piece]:
    """The end of the response that does not fit."""
    if ids:
        yield Piece("cut", False, len(ids), _text(encode, ids))


def _text(encode: Encoder, ids: list[int]) -> str:
    tokenizer: Any = encode.tokenizer
    text: str = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text
