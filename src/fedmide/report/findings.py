"""Findings of a run in sentences: the headline, the numbers next to it, and cautions."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from fedmide.evaluation.intervals import Interval
from fedmide.report.facts import RunFacts
from fedmide.report.figure import counted, counted_rounds, megabytes, number, seconds

FEW_RECORDS = 50
"""Intervals are wide for a site with fewer test records than this."""


FOLLOWS_LENGTH = 0.5
"""The report warns if the rank correlation between score and length has at least this absolute value."""


@dataclass(frozen=True)
class Number:
    """A figure for the top of the page."""

    value: str
    label: str
    note: str = ""


@dataclass(frozen=True)
class Headline:
    """The answer to "did it help?": a sentence, and further ones that qualify it."""

    answer: str
    details: tuple[str, ...]


def headline(facts: RunFacts) -> Headline:
    """The change of NLL by personalization: its mean, and the sites where it is clear."""
    changes = {each.client: each.change for each in facts.outcomes if each.change}
    if not facts.outcomes:
        status = facts.manifest["status"]
        return Headline(f"This run is not evaluated yet (status: {status}), so its benefit is unknown.", ())
    if not changes or facts.mean_change is None:
        return Headline(
            "This run was evaluated without tuned adapters, so there is nothing to compare.", tuple(_learned(facts))
        )
    helped, hurt = (_clear(changes, sign) for sign in (-1, 1))
    lower = sum(each.value < 0 for each in changes.values())
    mean = facts.mean_change
    return Headline(
        _answer(mean),
        (
            f"Personalization changes the NLL of a site's test responses by {number(mean.value, signed=True)} nats per "
            f"token on average ({_ends(mean)}; below 0 is better). That multiplies perplexity by "
            f"{math.exp(mean.value):.2f}.",
            f"NLL is lower for {lower} of {counted(len(changes), 'site')}. By the intervals it is clearly lower for "
            f"{_named(helped)} and clearly higher for {_named(hurt)}. The others have too few test records to decide.",
            *_learned(facts),
        ),
    )


def numbers(facts: RunFacts) -> tuple[Number, ...]:
    """The figures at the top of the page."""
    return tuple(_numbers(facts))


def cautions(facts: RunFacts) -> tuple[str, ...]:
    """Failures in the run, and limits of its figures."""
    return (*_troubles(facts), *_limits(facts))


def _numbers(facts: RunFacts) -> Iterator[Number]:
    changes = [each.change for each in facts.outcomes if each.change]
    if facts.mean_change is not None:
        yield Number(
            number(facts.mean_change.value, signed=True),
            "change of NLL by personalization, nats per token",
            f"{_ends(facts.mean_change)}; below 0 is better",
        )
        lower = sum(each.value < 0 for each in changes)
        yield Number(f"{lower} of {len(changes)}", "sites better with their tuned adapter", "by their test records")
    judged = [each.sets for each in facts.outcomes if each.sets.get("shared_at_split") is not None]
    if judged:
        split, end = (sum(sets[name] for sets in judged) for name in ("shared_at_split", "shared"))
        total = sum(sets["shared"] + sets["personal"] for sets in judged)
        yield Number(f"{split} → {end}", f"of {total} training records shared", "at the split → at the end")
    if facts.turns:
        traffic = sum(turn.bytes_up + turn.bytes_down for turn in facts.turns)
        done = {turn.round for turn in facts.rounds}
        warmup = sum(index < 0 for index in done)
        rounds = counted_rounds(warmup, len(done) - warmup)
        yield Number(
            megabytes(traffic),
            "sent, both ways" if facts.is_sent else "would be sent, both ways",
            f"{counted(len(facts.clients), 'site')}, {rounds}",
        )
    if facts.manifest["seconds"]:
        spent = sum(facts.manifest["seconds"].values())
        kept = facts.manifest.get("prefix_cache_mb", 0)
        memory = f"at most {facts.manifest['peak_memory_mb']:,} MB of memory"
        memory += f", {kept:,} MB of it kept prefixes" if kept else ""
        yield Number(seconds(spent), "of work", memory)


def _answer(mean: Interval) -> str:
    if mean.high < 0:
        return "Personalization helped."
    if mean.low > 0:
        return "Personalization hurt: the common adapter was better."
    return "These test records are too few to show whether personalization helped."


def _learned(facts: RunFacts) -> Iterator[str]:
    """The change of NLL by the common training, from the base model to the common adapter."""
    learned = [each.learned for each in facts.outcomes if each.learned]
    if learned:
        lower = sum(each.value < 0 for each in learned)
        mean = sum(each.value for each in learned) / len(learned)
        yield (
            f"The common training had changed the NLL by {number(mean, signed=True)} nats per token on average from "
            f"that of the base model. NLL was lower for {lower} of {counted(len(learned), 'site')}."
        )


def _troubles(facts: RunFacts) -> Iterator[str]:
    """Failures in this run."""
    for turn in facts.turns:
        if turn.refused:
            yield f"{turn.title}: the reply of site {turn.client} did not count: {turn.refused}."
    empty = facts.metrics.get("federation", {}).get("rounds_without_aggregate", 0)
    if empty:
        yield f"In {counted(empty, 'round')} no site's adapter counted, so the common adapter did not change."
    unsplit = sorted({turn.client for turn in facts.rounds if turn.warnings})
    if unsplit:
        yield f"No threshold could split the records of {', '.join(unsplit)}, so all of them are shared."
    odd = {each.client: each.sets["not_finite"] for each in facts.outcomes if each.sets.get("not_finite")}
    if odd:
        yield f"Records whose score is not a number (they stay personal): {_counts(odd)}."
    cut = {name: each["truncated"] for name, each in facts.manifest["data"].items() if each.get("truncated")}
    if cut:
        yield f"Records cut at {facts.config.model.cutoff} tokens: {_counts(cut)}."
    later = facts.manifest.get("later_commits", [])
    if any(str(each).endswith("-dirty") for each in (facts.manifest.get("commit"), *later)):
        yield "The code had uncommitted changes, so the commit does not identify it."
    if later:
        first, *others = (each or "unknown" for each in (facts.manifest["commit"], *later))
        yield f"Started with commit {first}, resumed with {', '.join(others)}."


def _limits(facts: RunFacts) -> Iterator[str]:
    """Reasons to read the figures with care."""
    follows = {
        each.client: each.sets["spearman_score_tokens"]
        for each in facts.outcomes
        if abs(each.sets.get("spearman_score_tokens") or 0) >= FOLLOWS_LENGTH
    }
    if follows:
        listed = ", ".join(f"{client} {number(value, 2, signed=True)}" for client, value in follows.items())
        yield (
            f"The score follows the length of records (rank correlation {listed}). "
            "So the split may be by length, not by content."
        )
    few = [each.num_records for each in facts.outcomes if each.num_records < FEW_RECORDS]
    if few:
        yield _few_records(len(few), len(facts.outcomes), min(few))
    if facts.outcomes:
        yield (
            f"Intervals are over the test records of this one run with seed {facts.config.seed}. "
            "Another seed may give other figures."
        )


def _clear(changes: dict[str, Interval], sign: int) -> list[str]:
    """The sites whose interval lies on one side of 0: below it for -1, above it for 1."""
    return [name for name, each in changes.items() if min(sign * each.low, sign * each.high) > 0]


def _named(names: list[str]) -> str:
    return "none" if not names else f"{len(names)} ({', '.join(names[:12])}{', …' if len(names) > 12 else ''})"


def _few_records(few: int, total: int, least: int) -> str:
    if few == total == 1:
        return f"The site has only {least} test records (fewer than {FEW_RECORDS}), so its interval is wide."
    sites = f"All {total} sites" if few == total else f"{few} of {counted(total, 'site')}"
    return f"{sites} have fewer than {FEW_RECORDS} test records (the smallest has {least}), so intervals are wide."


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{client} {count}" for client, count in counts.items())


def _ends(interval: Interval) -> str:
    return f"95 % interval {number(interval.low, signed=True)} to {number(interval.high, signed=True)}"
