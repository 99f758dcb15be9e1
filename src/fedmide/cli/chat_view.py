"""A conversation with a site's model, in the terminal."""

import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from rich.console import Console

from fedmide.errors import DataError
from fedmide.terminal import tell

if TYPE_CHECKING:
    from fedmide.runs.chat import Chat


QUIT = "/quit"
"""The line that ends a conversation."""


def talk(chat: "Chat", question: str, context: str, clean: Callable[[str], str]) -> None:
    """Writes each model's answer to stdout as it is generated; with several models, each after its name.

    `clean` turns a piece of an answer into text that a terminal may show.
    """
    for voice in chat.voices:
        if len(chat.voices) > 1:
            sys.stdout.write(f"[{voice}] ")
        chat.answer(voice, question, context, lambda piece: _say(clean(piece)))
        _say("\n")


def converse(chat: "Chat", context: str, clean: Callable[[str], str]) -> None:
    """Answers questions, one per line of input, until /quit or the end of the input."""
    for question in _questions():
        try:
            talk(chat, question, context, clean)
        except DataError as error:  # too long, but the next question may fit
            tell(str(error))


def _questions() -> Iterator[str]:
    """The typed questions. The prompt goes to stderr, so that stdout has the answers alone."""
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
