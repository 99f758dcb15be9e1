"""Rows of JSON, JSON lines and Parquet files, each with its place. Problems are collected, not raised."""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from fedmide.errors import DataError

T = TypeVar("T")


SUFFIXES = (".json", ".jsonl", ".parquet")


_SURROGATE = re.compile("[\ud800-\udfff]")


_MARK = re.compile(r"[ \t\n\r]*([\[,\]]?)[ \t\n\r]*")


_KINDS = {dict: "an object", list: "a list", str: "text", type(None): "null"}


_NO_RECORDS = "no records, expected at least one"


@dataclass(frozen=True, slots=True)
class Reading(Generic[T]):
    """Values that were read, and problems that were found."""

    values: tuple[T, ...] = ()
    problems: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Row:
    """One element of a file, and its place there."""

    place: str
    value: object


def sound(reading: Reading[T], remedy: str) -> tuple[T, ...]:
    """The values of a reading. Raises `DataError` if it has problems."""
    if reading.problems:
        raise DataError(reading.problems, remedy)
    return reading.values


def gathered(readings: Iterable[Reading[T]], problems: Iterable[str] = ()) -> Reading[T]:
    """All readings as one. Its problems begin with those given here, which were found earlier."""
    readings = tuple(readings)
    values = tuple(value for reading in readings for value in reading.values)
    return Reading(values, (*problems, *(problem for reading in readings for problem in reading.problems)))


def natural_order(name: str) -> tuple[tuple[str | int, ...], str]:
    """A key that sorts names as people do: numbers by value.

    >>> sorted(["site10", "Site9", "site1"], key=natural_order)
    ['site1', 'Site9', 'site10']
    """
    pieces = re.split(r"([0-9]+)", name.casefold())
    return tuple(int(piece) if index % 2 else piece for index, piece in enumerate(pieces)), name


def json_rows(path: Path) -> Reading[Row]:
    """The elements of a .json list or a .jsonl file, each with its line."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        return Reading(problems=(f"{path}: not readable: {error.strerror}",))
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        return Reading(problems=(f"{path}:{line}: not UTF-8, expected text in UTF-8",))
    found = _line_rows(path, text) if path.suffix.lower() == ".jsonl" else _list_rows(path, text)
    return found if found.values or found.problems else Reading(problems=(f"{path}: {_NO_RECORDS}",))


def rows_of(path: Path, columns: Iterable[str]) -> Reading[Row]:
    """The elements of a .json list, a .jsonl or a .parquet file. Rows of a .parquet file have only these columns."""
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        return Reading(problems=(f"{path}: expected a file that ends in {', '.join(SUFFIXES)}",))
    return _parquet_rows(path, columns) if suffix == ".parquet" else json_rows(path)


def holds_half_a_pair(text: str) -> bool:
    """True if a text has half of a surrogate pair. JSON can spell it, but no encoding of Unicode can hold it."""
    return _SURROGATE.search(text) is not None


def kind(value: object) -> str:
    """The kind of a value in words, without the value itself."""
    return _KINDS.get(type(value), type(value).__name__)


def _line_rows(path: Path, text: str) -> Reading[Row]:
    rows, problems = [], []
    # Not splitlines(): it also cuts at U+2028 and the like, which may stand unescaped in a JSON string.
    for number, line in enumerate(text.split("\n"), start=1):
        try:
            rows += [Row(f"{path}:{number}", json.loads(line))] if line.strip() else []
        except (ValueError, RecursionError) as error:
            problems.append(_broken(path, number, error))
    return Reading(tuple(rows), tuple(problems))


def _list_rows(path: Path, text: str) -> Reading[Row]:
    rows: list[Row] = []
    line, counted_to = 1, 0
    try:
        for position, value in _elements(text) if text.strip() else ():
            line += text.count("\n", counted_to, position)
            counted_to = position
            rows.append(Row(f"{path}:{line}", value))
    except (ValueError, RecursionError) as error:
        place = error.lineno if isinstance(error, json.JSONDecodeError) else line
        return Reading(tuple(rows), (_broken(path, place, error),))
    return Reading(tuple(rows))


def _elements(text: str) -> Iterator[tuple[int, object]]:
    """Each element of a JSON list and the position where it begins, which `json.loads` does not report."""
    decoder = json.JSONDecoder()
    mark, position = _mark(text, 0)
    if mark != "[":
        raise json.JSONDecodeError("expected a list (JSON lines end in .jsonl)", text, position)
    if text.startswith("]", position):
        mark, position = _mark(text, position)
    while mark != "]":
        value, end = decoder.raw_decode(text, position)
        yield position, value
        mark, position = _mark(text, end)
        if mark not in {",", "]"}:
            raise json.JSONDecodeError("expected ',' or ']' after an element", text, position)
    if position != len(text):
        raise json.JSONDecodeError("expected nothing after the list", text, position)


def _mark(text: str, position: int) -> tuple[str, int]:
    """The next mark ("[", "]" or ",", else empty), and the position where the text after it begins."""
    match = _MARK.match(text, position)
    return (match[1], match.end()) if match else ("", position)


def _broken(path: Path, line: int, error: ValueError | RecursionError) -> str:
    reason = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deep or a number too long"
    return f"{path}:{line}: broken JSON: {reason}"


def _parquet_rows(path: Path, wanted: Iterable[str]) -> Reading[Row]:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            table = file.read()
        columns = {name: table.column(name).to_pylist() for name in wanted if name in table.column_names}
    except (pyarrow.ArrowException, OSError, ValueError, KeyError):
        return Reading(problems=(f"{path}: not readable as Parquet",))
    values = ({name: column[i] for name, column in columns.items()} for i in range(table.num_rows))
    rows = tuple(Row(f"{path}: record {i}", value) for i, value in enumerate(values, start=1))
    return Reading(rows) if rows else Reading(problems=(f"{path}: {_NO_RECORDS}",))


def text_fault(text: object, required: bool) -> str:
    """The fault of a value that should be a text; empty without a fault."""
    if text is None:
        return "is missing, expected text" if required else ""
    if not isinstance(text, str):
        return f"is {kind(text)}, expected text"
    if holds_half_a_pair(text):
        return "holds half of a surrogate pair, expected Unicode text"
    return "is empty, expected text" if required and not text.strip() else ""
