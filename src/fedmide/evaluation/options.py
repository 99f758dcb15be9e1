"""Options that a record's instruction or context lists, and the one that its reference names.

The reference is free text, such as "The likely cause is C. Thrombosis." or one that only repeats an option's words.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedmide.data.records import Record

_OPTION = re.compile(r"^[ \t]*\(?([A-H])[.):][ \t]*(\S.*?)[ \t]*$", re.MULTILINE)


_WORD = re.compile(r"[^\W_]+")


_LETTER = re.compile(r"[\W_]*([A-H])[\W_]*")


_NAMED = re.compile(r"\b(?:[Oo]ption|[Aa]nswer(?:[ ]is)?:?|[Cc]hoice)[ ]*[*(]*([A-H])\b|(?:^|[\s(*\"])([A-H])[.):]")


@dataclass(frozen=True, slots=True)
class Options:
    """The options' texts without letters, in order, and the index of the right one; None if that is not clear."""

    texts: tuple[str, ...]
    answer: int | None


def right_first(texts: Sequence[str], answer: int) -> tuple[str, ...]:
    """The right text, at index `answer`, and then the others in their order.

    >>> right_first(("Heart", "Liver", "Lung"), 1)
    ('Liver', 'Heart', 'Lung')
    """
    return (texts[answer], *texts[:answer], *texts[answer + 1 :])


def listed(record: Record) -> Options | None:
    r"""The options that a record lists from A on, one per line.

    None if there are fewer than two, if a letter is skipped or out of order, or if two texts are equal.

    >>> listed(Record("Which organ makes bile?\nA. Heart\nB. Liver", "It is **B. Liver**."))
    Options(texts=('Heart', 'Liver'), answer=1)
    """
    found: dict[str, str] = dict(_OPTION.findall(f"{record.instruction}\n{record.context}"))
    letters = "ABCDEFGH"[: len(found)]
    if len(found) < 2 or "".join(found) != letters or len(set(found.values())) < len(found):
        return None
    return Options(tuple(found.values()), _answer(found, record.response))


def _answer(options: Mapping[str, str], reference: str) -> int | None:
    """Index of the option that the reference names by its letter or, without a letter, by its words.

    None unless it names exactly one. None also if the words are those of exactly one other option than the letter's.
    """
    alone = _LETTER.fullmatch(reference)
    named = {alone[1]} if alone else {first or second for first, second in _NAMED.findall(reference)}
    words = _words(reference)
    repeated = {letter for letter, text in options.items() if _words(text).strip() and _words(text) in words}
    clear = named or repeated
    if len(clear) != 1 or not clear <= options.keys() or (len(repeated) == 1 and clear != repeated):
        return None
    return list(options).index(clear.pop())


def _words(text: str) -> str:
    """The words of a text between single spaces, so that a search in another text matches whole words."""
    return f" {' '.join(_WORD.findall(text.casefold()))} "
