"""Thresholds: the published splits, slow references, changes that do not matter, and scores without a threshold."""

import json
from collections import Counter
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmide.config.sections import ThresholdRule
from fedmide.federation.thresholds import RULES, otsu_256, otsu_exact, otsu_log
from tests.needs import PUBLISHED

GOLDEN = {
    0: (1.081713, 160),
    1: (1.082665, 189),
    2: (1.125860, 195),
    3: (1.095863, 123),
    4: (1.051815, 132),
    5: (1.132255, 167),
    6: (1.074030, 193),
    7: (1.172198, 175),
}

likely_scores = st.lists(st.floats(0.2, 5.0), min_size=2, max_size=40)
coarse_scores = st.lists(st.integers(0, 30).map(lambda number: number / 4), min_size=2, max_size=12)
any_scores = st.lists(st.floats(min_value=0.0, max_value=1.7e308), min_size=0, max_size=12)
rules = pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())


def is_constant(scores: list[float]) -> bool:
    return min(scores) == max(scores)


# --- the published splits


def published(part: str, client: int) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = json.loads(
        (PUBLISHED / "8" / part / "8" / f"local_training_{client}.json").read_text()
    )
    return records


def multiset(records: list[dict[str, Any]]) -> Counter[str]:
    return Counter(json.dumps(record, sort_keys=True) for record in records)


@pytest.mark.needs("published")
@pytest.mark.parametrize("client", GOLDEN)
def test_the_published_scores_split_into_the_published_sets(client: int) -> None:
    scored = published("local1", client)
    threshold = otsu_256([record["personalization_score"] for record in scored])
    assert threshold is not None
    shared = [record for record in scored if record["personalization_score"] < threshold]
    personal = [record for record in scored if record["personalization_score"] >= threshold]
    assert (round(threshold, 6), len(shared), len(scored)) == (*GOLDEN[client], 300)
    assert multiset(shared) == multiset(published("global1", client))
    assert multiset(personal) == multiset(published("remain1", client))


# --- otsu-256


def slow_otsu_256(scores: list[float], kind: type[np.floating[Any]]) -> float:
    """The same rule, one bin after another; `kind` is the type of the probabilities and of their sums."""
    counts, edges = np.histogram(np.array(scores), bins=256)
    below, moment, moments = kind(0), 0.0, []
    for count, edge in zip(counts, edges[:-1], strict=True):
        probability = kind(count) / kind(len(scores))
        below, moment = below + probability, moment + float(probability) * float(edge)
        moments.append((below, moment, float(edge)))
    best, threshold = -np.inf, np.nan
    for below, sum_below, edge in moments:
        if below in (0, 1):
            continue
        difference = sum_below / float(below) - (moment - sum_below) / float(1 - below)
        between = float(below * (1 - below)) * difference**2
        if between > best:
            best, threshold = between, edge
    return threshold


@given(likely_scores)
def test_otsu_256_is_its_slow_twin_in_float32(scores: list[float]) -> None:
    spread = max(scores) - min(scores)
    if spread > 1e-9:
        assert otsu_256(scores) == pytest.approx(slow_otsu_256(scores, np.float32), abs=1e-12)


@pytest.mark.parametrize(
    ("scores", "in_float32", "in_float64"),
    [([1.02, 1.03, 1.12, 1.16, 1.27], 2, 1), ([0.97, 1.08, 1.09, 1.11, 1.14, 1.24], 4, 0)],
)
def test_float64_sums_would_split_elsewhere(scores: list[float], in_float32: int, in_float64: int) -> None:
    """All bins of a gap are equally good but for rounding, and which one wins decides about the record before it."""
    threshold, other = otsu_256(scores), slow_otsu_256(scores, np.float64)
    assert threshold is not None
    assert sum(score < threshold for score in scores) == in_float32
    assert sum(score < other for score in scores) == in_float64


@pytest.mark.parametrize(("scores", "num_shared"), [([0.85, 1.04, 1.06, 1.25], 2), ([0.91, 1.0, 1.03, 1.12], 0)])
def test_means_of_left_edges_decide_where_cuts_are_equally_good(scores: list[float], num_shared: int) -> None:
    """Symmetric sets, whose two best cuts differ by rounding only; means of right edges would choose the other."""
    threshold = otsu_256(scores)
    assert threshold is not None
    assert sum(score < threshold for score in scores) == num_shared


def test_the_winning_bin_is_given_by_its_left_edge() -> None:
    """Nine scores of 0, one each of 0.5 and 1: splitting off the 0s is best, and all bins up to the middle do so."""
    edges = np.linspace(0.0, 1.0, 257)
    assert otsu_256([0.0] * 9 + [0.5, 1.0]) in edges[:128]
    assert otsu_256([1.0, 1.0, 2.0, 2.0]) == 1.0  # nobody is below it: the published rule does that


@given(likely_scores, st.integers(-900, 900))
def test_otsu_256_goes_along_with_a_change_of_unit(scores: list[float], exponent: int) -> None:
    """By a power of two, so that nothing rounds; squares of such scores would overflow."""
    threshold = otsu_256(scores)
    scaled = otsu_256(np.ldexp(scores, exponent))
    assert scaled == (None if threshold is None else float(np.ldexp(threshold, exponent)))


def test_otsu_256_can_not_split_scores_that_differ_less_than_float32_resolves() -> None:
    """A property of the published rule that its users should know; the exact one splits them in the middle."""
    draw = np.random.default_rng(0)
    for width, is_sensible in ((1e-3, True), (1e-5, False)):
        scores = 1 + width * np.concatenate([draw.normal(-1, 0.2, 150), draw.normal(1, 0.2, 150)])
        threshold, exact = otsu_256(scores), otsu_exact(scores)
        assert threshold is not None
        assert exact is not None
        assert (abs(int((scores < threshold).sum()) - 150) <= 2) is is_sensible
        assert (scores < exact).sum() == 150


def test_otsu_256_gives_none_where_its_bins_have_no_width() -> None:
    assert otsu_256([1.0, 1.0 + 2**-52]) is None
    assert otsu_256([1.0, 1.0 + 2**-40]) is not None


# --- otsu-exact


def between_classes(scores: list[float], num_below: int) -> Fraction:
    """The variance between a number of lowest scores and the others, exactly."""
    ordered = sorted(Fraction(score) for score in scores)
    low, high = ordered[:num_below], ordered[num_below:]
    return len(low) * len(high) * (sum(low) / len(low) - sum(high) / len(high)) ** 2


def best_cuts(scores: list[float]) -> set[int]:
    """All cuts between unequal scores that no other cut is better than, by trying each."""
    ordered = sorted(scores)
    cuts = {cut: between_classes(scores, cut) for cut in range(1, len(ordered)) if ordered[cut - 1] < ordered[cut]}
    best = max(cuts.values())
    return {cut for cut, value in cuts.items() if value == best}


@given(coarse_scores)
def test_otsu_exact_is_the_best_of_all_cuts_in_its_middle(scores: list[float]) -> None:
    threshold = otsu_exact(scores)
    if is_constant(scores):
        assert threshold is None
        return
    assert threshold is not None
    ordered, cut = sorted(scores), sum(score < threshold for score in scores)
    assert any(between_classes(scores, cut) >= between_classes(scores, best) for best in best_cuts(scores))
    assert threshold == (ordered[cut - 1] + ordered[cut]) / 2


@given(likely_scores)
def test_otsu_exact_is_as_good_as_the_best_but_for_rounding(scores: list[float]) -> None:
    if is_constant(scores):
        return
    threshold = otsu_exact(scores)
    assert threshold is not None
    cut = sum(score < threshold for score in scores)
    found, best = between_classes(scores, cut), max(between_classes(scores, cut) for cut in best_cuts(scores))
    assert found >= best * (1 - Fraction(1, 10**9))


@given(coarse_scores, st.integers(-8, 8), st.integers(-64, 64))
def test_an_affine_map_carries_otsu_exact_along(scores: list[float], exponent: int, shift: int) -> None:
    """By a power of two and a small shift, so that nothing rounds and ties stay ties."""
    factor = 2.0**exponent
    threshold, mapped = otsu_exact(scores), otsu_exact([factor * score + shift for score in scores])
    assert mapped == (None if threshold is None else factor * threshold + shift)


@given(coarse_scores)
def test_a_mirrored_set_is_cut_as_well(scores: list[float]) -> None:
    threshold = otsu_exact([-score for score in scores])
    if threshold is not None:
        assert sum(score <= -threshold for score in scores) in best_cuts(scores)


@given(st.floats(1e-300, 1e300), st.integers(1, 3), st.integers(1, 3))
def test_otsu_exact_splits_even_adjacent_floats(score: float, num_below: int, num_above: int) -> None:
    above = float(np.nextafter(score, np.inf))
    assert otsu_exact([score] * num_below + [above] * num_above) == above


# --- all rules


@rules
@given(likely_scores, st.randoms(use_true_random=False))
def test_the_order_of_the_scores_changes_nothing(rule: Any, scores: list[float], random: Any) -> None:
    shuffled = list(scores)
    random.shuffle(shuffled)
    assert rule(shuffled) == rule(scores)


@rules
@given(any_scores)
def test_every_finite_score_will_do(rule: Any, scores: list[float]) -> None:
    threshold = rule(scores)
    if threshold is None:
        assert len(scores) < 2 or np.ptp(scores) <= max(scores) * 1e-12 or rule is otsu_256 or 0.0 in scores
    else:
        assert min(scores) <= threshold <= max(scores)
        assert type(threshold) is float


@rules
@pytest.mark.parametrize(
    "scores",
    [[], [1.0], [1.0, 1.0], [0.1] * 300, [1.0, 2.0, float("nan")], [1.0, 2.0, float("inf")], [-float("inf"), 1.0, 2.0]],
)
def test_there_is_no_threshold(rule: Any, scores: list[float]) -> None:
    assert rule(scores) is None


@given(likely_scores)
def test_the_median_has_at_most_half_on_either_side(scores: list[float]) -> None:
    threshold = RULES["median"](scores)
    if threshold is not None:
        assert sum(score < threshold for score in scores) <= len(scores) / 2
        assert sum(score > threshold for score in scores) <= len(scores) / 2


@pytest.mark.parametrize(("rule", "part"), [("lower-quartile", 0.25), ("median", 0.5), ("upper-quartile", 0.75)])
@given(scores=likely_scores)
def test_a_quantile_splits_off_its_fraction_except_for_less_than_a_record(
    rule: ThresholdRule, part: float, scores: list[float]
) -> None:
    threshold = RULES[rule](scores)
    if threshold is not None:
        assert sum(score < threshold for score in scores) < part * len(scores) + 1
        assert sum(score > threshold for score in scores) < (1 - part) * len(scores) + 1


# --- the threshold of the logarithms


@given(likely_scores)
def test_otsu_log_splits_the_scores_as_otsu_splits_their_logarithms(scores: list[float]) -> None:
    logs = np.log(scores)
    threshold, cut = otsu_log(scores), otsu_exact(logs)
    if threshold is None or cut is None:
        assert is_constant(scores) or cut is None
        return
    assert [score < threshold for score in scores] == [bool(log < cut) for log in logs]


def test_a_long_right_tail_does_not_pull_it_up() -> None:
    scores = [0.9, 1.0, 1.1, 1.6, 1.7, 1.8, 1.9, 30.0]
    assert sum(score >= (otsu_exact(scores) or 0.0) for score in scores) == 1
    far = [0.09, 0.1, 0.11, 0.9, 1.0, 1.1, 5.0]
    assert sum(score >= (otsu_log(far) or 0.0) for score in far) == 4
    assert sum(score >= (otsu_exact(far) or 0.0) for score in far) == 1


@pytest.mark.parametrize("scores", [[0.0, 1.0], [-1.0, 2.0], [1.0], [2.0, 2.0]])
def test_scores_without_a_logarithm_are_not_split(scores: list[float]) -> None:
    assert otsu_log(scores) is None
