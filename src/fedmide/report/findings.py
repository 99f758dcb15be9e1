"""What the figures come to, in sentences: the headline, the numbers beside it, and what to mind before trust."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from fedmide.evaluation.intervals import Interval
from fedmide.report.facts import RunFacts
from fedmide.report.figure import counted_rounds, megabytes, number, seconds

FEW_RECORDS = 50
"""Fewer test records a client than this give wide intervals."""


FOLLOWS_LENGTH = 0.5


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
    """Whether personalisation helped, whom and by how much, as far as the run says."""
    changes = {each.client: each.change for each in facts.outcomes if each.change}
    if not facts.outcomes:
        status = facts.manifest["status"]
        return Headline(f"This run is not evaluated yet (it is {status}), so nobody knows whether it helped.", ())
    if not changes or facts.mean_change is None:
        return Headline("The run was evaluated without personalised adapters to compare.", tuple(_learned(facts)))
    helped, hurt = (_clear(changes, sign) for sign in (-1, 1))
    lower = sum(each.value < 0 for each in changes.values())
    mean = facts.mean_change
    return Headline(
        _answer(mean),
        (
            f"It changes the NLL of a client's test responses by {number(mean.value, signed=True)} nats per token on "
            f"average ({_ends(mean)}; below 0 is better). That multiplies perplexity by {math.exp(mean.value):.2f}.",
            f"NLL is lower for {lower} of {_clients(len(changes))}. By the intervals it is clearly lower for "
            f"{_named(helped)} and clearly higher for {_named(hurt)}. The others have too few test records to decide.",
            *_learned(facts),
        ),
    )


def numbers(facts: RunFacts) -> tuple[Number, ...]:
    """The figures that a visitor should see first."""
    return tuple(_numbers(facts))


def cautions(facts: RunFacts) -> tuple[str, ...]:
    """What went wrong, and what a reader should know before trusting the figures."""
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
        yield Number(f"{lower} of {len(changes)}", "clients better with their own adapter", "by their test records")
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
        yield Number(megabytes(traffic), "sent, both ways", f"{_clients(len(facts.clients))}, {rounds}")
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
        return "Personalization hurt: the aggregated adapter was better."
    return "These test records can't tell whether personalization helped."


def _learned(facts: RunFacts) -> Iterator[str]:
    """What the common training brought against the base model."""
    learned = [each.learned for each in facts.outcomes if each.learned]
    if learned:
        lower = sum(each.value < 0 for each in learned)
        mean = sum(each.value for each in learned) / len(learned)
        yield (
            f"Before that, the common training had changed it by {number(mean, signed=True)} on average from that of "
            f"the base model. NLL was lower for {lower} of {_clients(len(learned))}."
        )


def _troubles(facts: RunFacts) -> Iterator[str]:
    """What went wrong in this run."""
    for turn in facts.turns:
        if turn.refused:
            yield f"{turn.title}: the reply of client {turn.client} did not count: {turn.refused}."
    empty = facts.metrics.get("federation", {}).get("rounds_without_aggregate", 0)
    if empty:
        yield f"In {empty} rounds nobody's adapter counted; the aggregated one stayed as it was."
    unparted = sorted({turn.client for turn in facts.rounds if turn.warnings})
    if unparted:
        yield f"No threshold could part the records of {', '.join(unparted)}: all of them are shared."
    odd = {each.client: each.sets["not_finite"] for each in facts.outcomes if each.sets.get("not_finite")}
    if odd:
        yield f"Records whose score was no number (they stay personal): {_counts(odd)}."
    cut = {name: each["truncated"] for name, each in facts.manifest["data"].items() if each.get("truncated")}
    if cut:
        yield f"Records that were cut at {facts.config.model.cutoff} tokens: {_counts(cut)}."
    later = facts.manifest.get("later_commits", [])
    if any(str(each).endswith("-dirty") for each in (facts.manifest.get("commit"), *later)):
        yield "The code was changed after its commit, so the commit does not say what ran."
    if later:
        first, *others = (each or "unknown" for each in (facts.manifest["commit"], *later))
        yield f"It began with commit {first} and was gone on with {', '.join(others)}."


def _limits(facts: RunFacts) -> Iterator[str]:
    """What the figures can't say."""
    follows = {
        each.client: each.sets["spearman_score_tokens"]
        for each in facts.outcomes
        if abs(each.sets.get("spearman_score_tokens") or 0) >= FOLLOWS_LENGTH
    }
    if follows:
        told = ", ".join(f"{client} {number(value, 2, signed=True)}" for client, value in follows.items())
        yield f"The score follows the records' length (rank correlation {told}): the split may go by that, not content."
    few = [each.num_records for each in facts.outcomes if each.num_records < FEW_RECORDS]
    if few:
        yield f"{_clients(len(few))} have under {FEW_RECORDS} test records (at least {min(few)}): intervals are wide."
    if facts.outcomes:
        yield (
            f"Intervals are over the test records of this one run with seed {facts.config.seed}; "
            "another seed may give other figures."
        )


def _clear(changes: dict[str, Interval], sign: int) -> list[str]:
    """The clients whose interval lies on one side of 0."""
    return [name for name, each in changes.items() if min(sign * each.low, sign * each.high) > 0]


def _named(names: list[str]) -> str:
    return "none" if not names else f"{len(names)} ({', '.join(names[:12])}{', …' if len(names) > 12 else ''})"


def _clients(count: int) -> str:
    return f"{count} client{'' if count == 1 else 's'}"


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{client} {count}" for client, count in counts.items())


def _ends(interval: Interval) -> str:
    return f"95 % interval {number(interval.low, signed=True)} to {number(interval.high, signed=True)}"
