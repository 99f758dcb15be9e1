"""Sentences: what they say follows from the intervals and from nothing else."""

from dataclasses import replace

import pytest

from fedmide.evaluation.intervals import Interval
from fedmide.journal.folder import RunFolder
from fedmide.report.facts import ClientOutcome, RunFacts, read
from fedmide.report.findings import cautions, headline, numbers

HELPED, UNCLEAR, HURT = Interval(-0.2, -0.3, -0.1), Interval(-0.05, -0.2, 0.1), Interval(0.2, 0.1, 0.3)


@pytest.fixture
def facts(run_folder: RunFolder) -> RunFacts:
    return read(run_folder)


def changed(facts: RunFacts, mean: Interval, **changes: Interval) -> RunFacts:
    first = facts.outcomes[0]
    outcomes = tuple(replace(first, client=name, change=change) for name, change in changes.items())
    return replace(facts, outcomes=outcomes, mean_change=mean)


@pytest.mark.parametrize(
    ("mean", "answer"),
    [
        (HELPED, "Personalization helped."),
        (HURT, "Personalization hurt: the common adapter was better."),
        (UNCLEAR, "These test records are too few to show whether personalization helped."),
    ],
)
def test_the_answer_goes_by_the_interval_of_the_mean(facts: RunFacts, mean: Interval, answer: str) -> None:
    assert headline(changed(facts, mean, a=HELPED)).answer == answer


def test_clients_are_named_by_their_own_intervals(facts: RunFacts) -> None:
    told = headline(changed(facts, HELPED, north=HELPED, south=UNCLEAR, east=HURT)).details
    assert "by −0.200 nats per token on average (95 % interval −0.300 to −0.100; below 0 is better)" in told[0]
    assert "multiplies perplexity by 0.82" in told[0]
    assert "lower for 2 of 3 sites" in told[1]
    assert "clearly lower for 1 (north) and clearly higher for 1 (east)" in told[1]
    worse = headline(changed(facts, HURT, east=HURT)).details
    assert "by +0.200 nats" in worse[0] and "clearly lower for none" in worse[1]


def test_a_run_without_figures_is_marked(facts: RunFacts) -> None:
    bare = replace(facts, outcomes=(), mean_change=None, manifest={**facts.manifest, "status": "trained"})
    assert headline(bare).answer.startswith("This run is not evaluated yet (status: trained)")
    without: tuple[ClientOutcome, ...] = tuple(replace(each, change=None) for each in facts.outcomes)
    assert "without tuned adapters" in headline(replace(facts, outcomes=without, mean_change=None)).answer


def test_numbers_are_the_runs(facts: RunFacts) -> None:
    shown = {each.label: each.value for each in numbers(changed(facts, HELPED, a=HELPED, b=HURT))}
    assert shown["change of NLL by personalization, nats per token"] == "−0.200"
    assert shown["sites better with their tuned adapter"] == "1 of 2"
    assert shown["would be sent, both ways"] == f"{sum(t.bytes_up + t.bytes_down for t in facts.turns) / 1e6:,.1f} MB"
    elsewhere = replace(facts, manifest={**facts.manifest, "federation": f"{facts.manifest['federation']}-0a1b2c3d"})
    assert "sent, both ways" in {each.label for each in numbers(elsewhere)}


def test_kept_prefixes_are_shown_if_there_are_any(facts: RunFacts) -> None:
    for kept, note in ((0, "900 MB of memory"), (65, "900 MB of memory, 65 MB of it kept prefixes")):
        manifest = {**facts.manifest, "seconds": {"trained": 3.0}, "peak_memory_mb": 900, "prefix_cache_mb": kept}
        (work,) = [each for each in numbers(replace(facts, manifest=manifest)) if each.label == "of work"]
        assert work.note == f"at most {note}"


def test_cautions_name_what_went_wrong(facts: RunFacts) -> None:
    turns = (replace(facts.turns[0], refused="it came too late", warnings=1), *facts.turns[1:])
    sets = {**facts.outcomes[0].sets, "not_finite": 2, "spearman_score_tokens": -0.75}
    data = {"a": {**facts.manifest["data"]["a"], "truncated": 3}, "b": facts.manifest["data"]["b"]}
    manifest = {**facts.manifest, "data": data, "commit": "abc", "later_commits": ["de-dirty"]}
    outcomes = (replace(facts.outcomes[0], sets=sets), *facts.outcomes[1:])
    told = " ".join(cautions(replace(facts, turns=turns, outcomes=outcomes, manifest=manifest)))
    for part in (
        "the reply of site a did not count: it came too late.",
        "No threshold could split the records of a",
        "not a number (they stay personal): a 2",
        "cut at 64 tokens: a 3",
        "a −0.75",
        "had uncommitted changes",
        "Started with commit abc, resumed with de-dirty.",
        "All 2 sites have fewer than 50 test records (the smallest has ",
        "one run with seed",
    ):
        assert part in told
