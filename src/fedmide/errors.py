"""The exceptions that fedmide raises on purpose.

    FedMIDEError
    ├── UserError            something that the user can fix: one paragraph on stderr, exit code 2
    │   ├── ConfigError      the configuration: unknown key, value out of range
    │   ├── DataError        records: broken file, missing field, empty response, leak
    │   ├── ModelError       base model or adapter: no weights, targets that match nothing
    │   ├── RunFolderError   a run folder: wrong config, in use, incomplete, no room on disk
    │   ├── TrackerError     a tracker: not installed, or it refuses the run
    │   └── UsageError       a command line or call that asks for something that does not exist
    └── MessageError         a message that can't be decoded or must not be trusted

A user error holds *all* problems that were found, so that a file can be fixed in one pass. Messages name the place
(file, line, client), what was expected and what to do. They never hold the text of a record.
"""

import difflib
from collections.abc import Iterable, Sequence

MAX_SHOWN = 20
"""The most problems that the text of one error names."""


class FedMIDEError(Exception):
    """The root of the tree."""


class UserError(FedMIDEError):
    """One or more problems that the user can fix."""

    def __init__(self, problems: str | Sequence[str], remedy: str = "") -> None:
        self.problems: tuple[str, ...] = (problems,) if isinstance(problems, str) else tuple(problems)
        self.remedy = remedy
        super().__init__(self._paragraph())

    def _paragraph(self) -> str:
        shown = list(self.problems[:MAX_SHOWN])
        hidden = len(self.problems) - len(shown)
        if hidden:
            shown.append(f"and {hidden} more, which --json lists")
        text = shown[0] if len(shown) == 1 else f"{len(self.problems)} problems: " + "; ".join(shown)
        return f"{text}. {self.remedy}" if self.remedy else text


class ConfigError(UserError):
    """The configuration can't be used."""


class DataError(UserError):
    """The records can't be used."""


class ModelError(UserError):
    """The base model or an adapter can't be used."""


class RunFolderError(UserError):
    """The run folder can't be used. `is_disk`: True if the reason is that it can't be written to."""

    def __init__(self, problems: str | Sequence[str], remedy: str = "", is_disk: bool = False) -> None:
        super().__init__(problems, remedy)
        self.is_disk = is_disk


class TrackerError(UserError):
    """A tracker is not installed, or it refuses the run."""


class UsageError(UserError):
    """The command line, or a call, asks for something that does not exist."""


class MessageError(FedMIDEError):
    """A message is malformed or not to be trusted."""


def first_line(error: Exception) -> str:
    """The first line of another library's error, or its type if it has no text.

    >>> first_line(ValueError("one\\ntwo")), first_line(KeyError())
    ('one', 'KeyError')
    """
    return next(iter(str(error).splitlines()), type(error).__name__)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A hint for a message about an unknown name: the closest known one, or "" if none is close.

    >>> did_you_mean("fedprx", ["fedavg", "fedprox"]), did_you_mean("x", ["fedavg"])
    (" (did you mean 'fedprox'?)", '')
    """
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean '{close[0]}'?)" if close else ""
