"""A conversation with a client's model, in the terminal."""

import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from rich.console import Console

from fedmide.errors import DataError
from fedmide.terminal import tell

if TYPE_CHECKING:
    from fedmide.runs.chat import Chat


QUIT = "/quit"
"""What ends a conversation."""


def talk(chat: "Chat", question: str, context: str, clean: Callable[[str], str]) -> None:
    """Writes every voice's answer to stdout as it comes, each after its name where there are several.

    `clean` makes of a piece of an answer what a terminal may be shown.
    """
    for voice in chat.voices:
        if len(chat.voices) > 1:
            sys.stdout.write(f"[{voice}] ")
        chat.answer(voice, question, context, lambda piece: _say(clean(piece)))
        _say("\n")


def converse(chat: "Chat", context: str, clean: Callable[[str], str]) -> None:
    """Answers what is typed, a question a line, until /quit or the end of the input."""
    for question in _questions():
        try:
            talk(chat, question, context, clean)
        except DataError as error:  # too long; the next one may not be
            tell(str(error))


def _questions() -> Iterator[str]:
    """What is typed. The prompt goes to stderr, so that answers alone can be kept."""
    console, asks = Console(stderr=True), sys.stdin.isatty()
    while True:
        try:
            line = console.input("> " if asks else "").strip()
        except EOFError:
            return
        if line == QUIT:
            return
        if line:
            yield line


def _say(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
