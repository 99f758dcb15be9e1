"""Records with scores or likelihoods that were measured elsewhere, to be split by a threshold.

A record's object in the file stays as it is, so that a split writes exactly what was read.
"""

import json
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedmide.atomic import write_file
from fedmide.config.sections import ThresholdRule
from fedmide.data.records import RecordId
from fedmide.data.rows import Reading, Row, gathered, holds_half_a_pair, json_rows, kind, sound
from fedmide.errors import DataError
from fedmide.federation.enrollment import SetName, score, split_by_score

SETS: tuple[SetName, ...] = ("shared", "personal")


@dataclass(frozen=True, slots=True)
class ScoredRecord:
    """An object of the file and its score; a measurement that failed makes the score NaN or infinite."""

    original: Mapping[str, object]
    score: float


def read_scores(path: Path) -> tuple[ScoredRecord, ...]:
    """The objects of a .json list or a .jsonl file with their scores; all problems as one `DataError`.

    A score is taken from the first of these that an object has: `personalization_score`; `score`;
    `local_perplexity` and `aggregated_perplexity`; `nll_local` and `nll_aggregated`.
    """
    if path.suffix.lower() not in {".json", ".jsonl"}:
        raise DataError(f"{path}: expected a file that ends in .json or .jsonl")
    rows = json_rows(path)
    found = gathered(map(_scored, rows.values), rows.problems)
    return sound(found, "Every object needs " + " or ".join(" and ".join(names) for names in RULES))


def split_file(path: Path, rule: ThresholdRule, out: Path | None = None) -> dict[str, Any]:
    """The figures of the split of a file's records: threshold, sizes of the sets, rule, and number of failed scores.

    With `out`, the records are written to `out/shared.json` and `out/personal.json`, in the file's order.
    """
    existing = [] if out is None else [file for name in SETS if (file := out / f"{name}.json").exists()]
    if existing:
        raise DataError([f"{file} exists already" for file in existing], "Give another --out")
    records = read_scores(path)
    verdicts = split_by_score({RecordId(str(number)): record.score for number, record in enumerate(records)}, rule)
    sets: dict[SetName, list[Mapping[str, object]]] = {name: [] for name in SETS}
    for record, verdict in zip(records, verdicts.values(), strict=True):
        sets[verdict.set].append(record.original)
    if out is not None:
        texts = {name: json.dumps(members, indent=2, ensure_ascii=False).encode() for name, members in sets.items()}
        for name, text in texts.items():
            write_file(out / f"{name}.json", text)
    return {
        "threshold": next((verdict.threshold for verdict in verdicts.values()), None),
        "shared": len(sets["shared"]),
        "personal": len(sets["personal"]),
        "rule": rule,
        "not_finite": sum(not math.isfinite(record.score) for record in records),
    }


def perplexity_ratio(local: float, aggregated: float) -> float:
    """The aggregated perplexity over the local one; NaN if either is not finite.

    A plain quotient would give a record with a failed local likelihood (infinite perplexity) the score 0, and share it.

    >>> perplexity_ratio(10.0, 11.0), perplexity_ratio(math.inf, 11.0)
    (1.1, nan)
    """
    return aggregated / local if math.isfinite(local) and math.isfinite(aggregated) else math.nan


RULES: Mapping[tuple[str, ...], Callable[..., float]] = {
    ("personalization_score",): float,
    ("score",): float,
    ("local_perplexity", "aggregated_perplexity"): perplexity_ratio,
    ("nll_local", "nll_aggregated"): lambda local, aggregated: score(aggregated, local),
}


def _scored(row: Row) -> Reading[ScoredRecord]:
    value = row.value
    if not isinstance(value, dict):
        return Reading(problems=(f"{row.place}: {kind(value)}, expected an object",))
    names = next((names for names in RULES if all(name in value for name in names)), None)
    if names is None:
        return Reading(problems=(f"{row.place}: no score and no pair of likelihoods",))
    faults = {name: _fault(name, value[name]) for name in names}
    problems = tuple(f"{row.place}: field '{name}' {fault}" for name, fault in faults.items() if fault)
    if holds_half_a_pair(json.dumps(value, ensure_ascii=False)):
        problems += (f"{row.place}: half of a surrogate pair, expected Unicode text",)
    if problems:
        return Reading(problems=problems)
    return Reading((ScoredRecord(value, RULES[names](*(float(value[name]) for name in names))),))


def _fault(name: str, value: object) -> str:
    """The fault of a measured number; empty if there is none. NaN and infinity are not faults."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return f"is {kind(value)}, expected a number (NaN where the measurement failed)"
    if isinstance(value, int) and abs(value) > sys.float_info.max:
        return "is too large, expected a number that a float can hold"
    if name.endswith("_perplexity") and value <= 0:
        return "is not positive, expected a perplexity"
    return ""
