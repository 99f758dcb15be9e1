"""Multiple-choice questions read from the user's own copies of public sets: MedQA, MedMCQA, PubMedQA, CareQA.

Each set is read in both forms in which it is published: the authors' files and those of the hub. The prompts are those
of lm-evaluation-harness (tasks medqa_4options, medmcqa, pubmedqa, careqa_en), word for word, so that figures can be
compared.

Sources: D. Jin et al., arXiv 2009.13081; A. Pal et al., CHIL 2022; Q. Jin et al., arXiv 1909.06146;
A. Arias-Duart et al., arXiv 2502.06666.
"""

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from fedmide import hub
from fedmide.data.rows import SUFFIXES, Reading, Row, gathered, kind, rows_of, sound, text_fault
from fedmide.errors import DataError
from fedmide.progress import quiet

SetName = Literal["medqa", "medmcqa", "pubmedqa", "careqa"]


SETS: tuple[SetName, ...] = get_args(SetName)


LETTERS = ("A", "B", "C", "D")


DECISIONS = ("yes", "no", "maybe")


_LISTED = "Question: {question}\nA. {A}\nB. {B}\nC. {C}\nD. {D}\nAnswer:"


_WITH_CHOICES = _LISTED.replace("\nA.", "\nChoices:\nA.")


_SHARD = re.compile(r"(.*)-[0-9]{5}-of-([0-9]{5})")


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt, the possible continuations after a space, and the index of the right one."""

    prompt: str
    choices: tuple[str, ...]
    answer: int


@dataclass(frozen=True, slots=True)
class Form:
    """The prompt and choices of a set, and the names of its test files in a folder.

    `parts`: patterns of file names, without suffix. The first pattern that matches a file is used.
    """

    prompt: str
    choices: tuple[str, ...]
    columns: tuple[str, ...]
    parts: tuple[str, ...]

    @property
    def hash(self) -> str:
        """A short hash that distinguishes this prompt and these choices from others."""
        return hashlib.sha256("\x1f".join((self.prompt, *self.choices)).encode()).hexdigest()[:16]


FORMS: Mapping[SetName, Form] = {
    "medqa": Form(
        _LISTED,
        LETTERS,
        ("question", "options", "answer_idx", "sent1", "ending0", "ending1", "ending2", "ending3", "label"),
        ("*test*",),
    ),
    "medmcqa": Form(_WITH_CHOICES, LETTERS, ("question", "opa", "opb", "opc", "opd", "cop"), ("*validation*", "dev")),
    "pubmedqa": Form(
        "Abstract: {abstract}\nQuestion: {question}\nAnswer:",
        DECISIONS,
        ("QUESTION", "CONTEXTS", "question", "context", "final_decision"),
        ("*test*", "pqa_labeled/*", "ori_pqal"),
    ),
    "careqa": Form(_WITH_CHOICES, LETTERS, ("question", "op1", "op2", "op3", "op4", "cop"), ("CareQA_en", "*test*")),
}


@dataclass(frozen=True, slots=True)
class Asked:
    """A row's question: the values of the prompt's fields, and the number of the right choice as the file counts."""

    values: Mapping[str, str]
    answer: int


def read_questions(name: SetName, path: Path, tell: Callable[[str], None] = quiet) -> tuple[Question, ...]:
    """The questions in a file, or in the test part of a folder or a hub id. Raises one `DataError` with all problems.

    A row whose question is null is left out, and `tell` gets the number of such rows: CareQA has one.
    """
    found = gathered(_rows(file, FORMS[name].columns) for file in _files(name, _here(name, path, tell)))
    rows = Reading(tuple(row for row in found.values if not _is_blank(row)), found.problems)
    if blank := len(found.values) - len(rows.values):
        tell(f"{path}: {blank} of {len(found.values)} rows have no question and are left out")
    asked = gathered((_ASKED[name](row) for row in rows.values), rows.problems)
    good = sound(asked, f"Expected {name} in the form of its authors or of the hub")
    if not good:
        raise DataError(f"{path}: no row has a question", f"Give your own copy of {name}")
    return _counted(name, path, good)


def fingerprint(questions: Sequence[Question]) -> str:
    """A short hash that distinguishes lists of questions."""
    text = json.dumps([(each.prompt, each.choices, each.answer) for each in questions])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _counted(name: SetName, path: Path, asked: Sequence[Asked]) -> tuple[Question, ...]:
    """The questions, with answers counted from 0. The authors' MedMCQA begins at 1, the hub's at 0."""
    form = FORMS[name]
    first = _first_number(path, [each.answer for each in asked]) if name == "medmcqa" else 0
    return tuple(Question(form.prompt.format(**each.values), form.choices, each.answer - first) for each in asked)


def _first_number(path: Path, answers: Sequence[int]) -> int:
    """The number of a file's first choice, 0 or 1. Answers with the lowest or highest possible number show it."""
    lowest, highest = min(answers), max(answers)
    if lowest < 0:
        raise DataError(f"{path}: questions without an answer", "MedMCQA's answers are in its validation part")
    if (lowest == 0) == (highest == len(LETTERS)):
        raise DataError(
            f"{path}: 'cop' runs from {lowest} to {highest}, expected 0 to 3 or 1 to 4: it is not clear where it begins"
        )
    return 0 if lowest == 0 else 1


def _here(name: SetName, path: Path, tell: Callable[[str], None]) -> Path:
    """The path itself. If it does not exist and looks like a hub id, the hub's snapshot of the set's test part."""
    is_file = path.suffix.lower() in SUFFIXES  # a mistyped file name is not a reason to ask the hub
    if path.exists() or is_file or not hub.HUB_ID.fullmatch(str(path)):
        return path
    tell(f"looking up {path} on the hub")
    files = [f"{folder}{part}{suffix}" for folder in ("", "*/") for part in FORMS[name].parts for suffix in SUFFIXES]

    def refused(reason: str) -> DataError:
        return DataError(
            f"{path}: no such file or folder here, and the hub didn't give it: {reason}",
            f"Give your own copy of {name}",
        )

    return hub.snapshot(str(path), "dataset", files, refused)


def _files(name: SetName, path: Path) -> tuple[Path, ...]:
    """The file itself. For a folder, such as a hub snapshot: the one file of its test part, or all its shards."""
    if not path.is_dir():
        if not path.is_file():
            raise DataError(f"{path}: no such file or folder", f"Give your own copy of {name}")
        return (path,)
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
    fitting = ([file for file in files if _fits(file.relative_to(path), part)] for part in FORMS[name].parts)
    found = next(filter(None, fitting), [])
    sets = {match.groups() if (match := _SHARD.fullmatch(file.stem)) else (file.stem, "1") for file in found}
    if [int(total) for _, total in sets] != [len(found)]:
        seen = ", ".join(str(file.relative_to(path)) for file in found or files) or "none"
        raise DataError(f"{path}: expected one file of the test part of {name}, found {seen}", "Give the file itself")
    return tuple(found)


def _fits(file: Path, pattern: str) -> bool:
    return file.with_suffix("").match(pattern)


def _rows(path: Path, columns: Sequence[str]) -> Reading[Row]:
    """The rows of a file. PubMedQA's authors keep theirs in one object, by the number of the article."""
    if path.suffix.lower() == ".json":
        try:
            values = json.loads(path.read_text("utf-8-sig"))
        except (OSError, ValueError, RecursionError):
            return rows_of(path, columns)  # it reports the problem and its place
        if isinstance(values, dict):
            return Reading(tuple(Row(f"{path}: record {i}", value) for i, value in enumerate(values.values(), 1)))
    return rows_of(path, columns)


def _is_blank(row: Row) -> bool:
    return isinstance(row.value, dict) and "question" in row.value and row.value["question"] is None


def _medqa(row: Row) -> Reading[Asked]:
    if isinstance(row.value, dict) and "sent1" in row.value:
        return _letters(row, "sent1", ("ending0", "ending1", "ending2", "ending3"), _number("label", 0))
    value = row.value if isinstance(row.value, dict) else {}
    options = value.get("options")
    given = options if isinstance(options, dict) else {}
    extra = sorted(given.keys() - set(LETTERS))
    if extra and any(given[letter] is not None for letter in extra):
        return Reading(problems=(f"{row.place}: {len(given)} options, expected 4: give the set with 4 options",))
    flat = Row(row.place, {**value, **{letter: given.get(letter) for letter in LETTERS}})
    return _letters(flat if value else row, "question", LETTERS, _one_of("answer_idx", LETTERS))


def _medmcqa(row: Row) -> Reading[Asked]:
    return _letters(row, "question", ("opa", "opb", "opc", "opd"), _number("cop", None))


def _careqa(row: Row) -> Reading[Asked]:
    return _letters(row, "question", ("op1", "op2", "op3", "op4"), _number("cop", 1))


def _pubmedqa(row: Row) -> Reading[Asked]:
    value = row.value
    if not isinstance(value, dict):
        return _no_object(row)
    authors = "QUESTION" in value
    contexts = value.get("CONTEXTS") if authors else value.get("context")
    if isinstance(contexts, dict):
        contexts = contexts.get("contexts")
    if not isinstance(contexts, list) or not contexts or any(text_fault(text, required=True) for text in contexts):
        return Reading(problems=(f"{row.place}: no contexts, expected a list of texts",))
    flat = Row(row.place, {**value, "abstract": "\n".join(contexts)})
    fields = {"question": "QUESTION" if authors else "question", "abstract": "abstract"}
    return _asked(flat, fields, _one_of("final_decision", DECISIONS))


_ASKED: Mapping[SetName, Callable[[Row], Reading[Asked]]] = {
    "medqa": _medqa,
    "medmcqa": _medmcqa,
    "pubmedqa": _pubmedqa,
    "careqa": _careqa,
}


FindAnswer = Callable[[Mapping[str, Any]], tuple[int, str]]
"""Finds the right choice in a row. Returns its number and its fault; the fault is empty if there is none."""


def _letters(row: Row, question: str, options: Sequence[str], answer: FindAnswer) -> Reading[Asked]:
    return _asked(row, {"question": question, **dict(zip(LETTERS, options, strict=True))}, answer)


def _asked(row: Row, fields: Mapping[str, str], answer: FindAnswer) -> Reading[Asked]:
    """A row's question. `fields`: for each field of the prompt, the name of the row's field."""
    value = row.value
    if not isinstance(value, dict):
        return _no_object(row)
    faults = {name: text_fault(value.get(name), required=True) for name in fields.values()}
    problems = [f"{row.place}: field '{name}' {fault}" for name, fault in faults.items() if fault]
    number, fault = answer(value)
    problems += [f"{row.place}: {fault}"] if fault else []
    if problems:
        return Reading(problems=tuple(problems))
    return Reading((Asked({key: value[name] for key, name in fields.items()}, number),))


def _no_object(row: Row) -> Reading[Asked]:
    return Reading(problems=(f"{row.place}: {kind(row.value)}, expected an object",))


def _number(field: str, first: int | None) -> FindAnswer:
    """Finds a number that counts from `first`. None: from 0 or 1, and -1 stands for a missing answer."""
    low, high = (-1, len(LETTERS)) if first is None else (first, first + len(LETTERS) - 1)

    def found(value: Mapping[str, Any]) -> tuple[int, str]:
        number = value.get(field)
        if type(number) is not int or not low <= number <= high:
            return 0, f"field '{field}' names no option, expected a number from {max(low, 0)} to {high}"
        return number - (first or 0), ""

    return found


def _one_of(field: str, names: Sequence[str]) -> FindAnswer:
    def found(value: Mapping[str, Any]) -> tuple[int, str]:
        name = value.get(field)
        if not isinstance(name, str) or name not in names:
            return 0, f"field '{field}' names no option, expected one of {', '.join(names)}"
        return names.index(name), ""

    return found
