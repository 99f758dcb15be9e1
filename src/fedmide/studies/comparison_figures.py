"""The figures of a comparison: several methods' runs over the same test records.

A record's NLL is averaged over seeds first. Records are then resampled within each client, the same ones for all
methods, so that two methods are compared record by record. Clients and seeds are not resampled.
The exceptions are the interval ends `low_of_all` and `high_of_all`, for which clients and seeds are resampled too. They
estimate the result of another such federation, trained again. A difference is also given seed by seed, because a few
seeds are too few to be resampled well.
A method is listed in `diverged` if, in one of its runs, a client has no NLL that is a number: its training diverged.
Only its cost is reported.
A record whose NLL is not a number under some other method or seed is left out for all of them, and counted.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedmide.evaluation.choice import choice_accuracy
from fedmide.evaluation.intervals import Draws, FloatArray, draws, ends, paired_bootstrap, resampled
from fedmide.evaluation.measure import Measured
from fedmide.evaluation.over_clients import worse_than_local
from fedmide.evaluation.summary import Figures
from fedmide.seeds import stream

LOWER_IS_BETTER = {"response_nll": True, "choice_accuracy": False}


@dataclass(frozen=True)
class RunOutcome:
    """One run: the measurements of each client's test records under its model, and the run's cost."""

    clients: Mapping[str, Measured]
    costs: Mapping[str, float]


Outcomes = Mapping[str, Mapping[int, RunOutcome]]
"""The runs by method and seed."""


@dataclass(frozen=True)
class Values:
    """One metric: the records' values [seeds, records] per method and client, and per client the records' counts.

    A client's figure is the sum of its values divided by the sum of its counts.
    """

    values: Mapping[str, Mapping[str, FloatArray]]
    counts: Mapping[str, FloatArray]
    num_left_out: int


def compare(outcomes: Outcomes, against: Sequence[str], resamples: int, seed: int) -> Figures:
    """The figures of comparison.json: of each method, and its differences to the methods in `against`.

    ValueError if two runs do not measure the same records.
    """
    _check_same_records(outcomes)
    figures: Figures = {name: {} for name in ("methods", "by_seed", "clients", "differences", "num_left_out")}
    figures["methods"] = {name: {} for name in outcomes}
    figures["diverged"] = [name for name, runs in outcomes.items() if any(map(_has_diverged, runs.values()))]
    finite = {name: runs for name, runs in outcomes.items() if name not in figures["diverged"]}
    metrics = {"response_nll": _likelihoods(finite), "choice_accuracy": _choices(finite)} if finite else {}
    for metric, values in metrics.items():
        if values.counts:
            figures["num_left_out"][metric] = values.num_left_out
            _add_metric(figures, metric, values, against, resamples, seed)
    _add_worse_than_local(figures, outcomes)
    for method, runs in outcomes.items():
        for cost in next(iter(runs.values())).costs:
            if all(cost in run.costs for run in runs.values()):
                _add_by_seed(figures, method, cost, {seed: run.costs[cost] for seed, run in runs.items()})
    return figures


def _add_metric(
    figures: Figures, metric: str, values: Values, against: Sequence[str], resamples: int, seed: int
) -> None:
    """A metric's mean over clients, worst client and deviation over clients, and the differences of the first two."""
    drawn = {name: tuple(draws(len(counts), resamples, seed, name)) for name, counts in values.counts.items()}
    others = stream(seed, "bootstrap of clients").integers(len(drawn), size=(resamples, len(drawn)))
    sampled: dict[str, dict[str, FloatArray]] = {}
    points: dict[str, dict[str, float]] = {}
    by_seed: dict[str, dict[str, FloatArray]] = {}
    for method, clients in values.values.items():
        ratios = np.stack([_resampled(clients[name], values.counts[name], drawn[name]) for name in drawn], axis=-1)
        seeds = np.stack([clients[name].sum(axis=1) / values.counts[name].sum() for name in drawn], axis=-1)
        point = dict(zip(drawn, map(float, seeds.mean(axis=0)), strict=True))
        worst = list(drawn).index(_worst(point, LOWER_IS_BETTER[metric]))
        over_seeds = ratios.mean(axis=0)
        sampled[method] = {
            metric: over_seeds.mean(axis=1),
            f"{metric}_worst": over_seeds[:, worst],
            "all": np.take_along_axis(_drawn_seeds(ratios, seed), others, axis=1).mean(axis=1),
        }
        points[method] = {metric: _mean(point.values()), f"{metric}_worst": point[list(drawn)[worst]]}
        by_seed[method] = {metric: seeds.mean(axis=1), f"{metric}_worst": seeds[:, worst]}
        _add_method(figures, method, metric, seeds, point, points[method], sampled[method])
    for reference in against:
        for method in values.values:
            if reference in points and method != reference:
                rows = figures["differences"].setdefault(reference, {}).setdefault(method, {})
                for name, value in points[method].items():
                    change = sampled[method][name] - sampled[reference][name]
                    rows[name] = {"difference": value - points[reference][name], **_ends(change)}
                    if len(by_seed[method][name]) == len(by_seed[reference][name]):  # the base model has no seed
                        rows[name]["by_seed"] = [
                            float(each) for each in by_seed[method][name] - by_seed[reference][name]
                        ]
                change = sampled[method]["all"] - sampled[reference]["all"]
                rows[metric] |= {f"{end}_of_all": value for end, value in _ends(change).items()}
                pair = values.values[method], values.values[reference]
                rows[metric]["clients"] = dict(_by_client(*pair, values.counts, resamples, seed))


def _resampled(values: FloatArray, counts: FloatArray, drawn: Sequence[Draws]) -> FloatArray:
    """A client's figure [seeds, resamples], from its records' values [seeds, records]."""
    return np.stack([resampled(each, counts, drawn) for each in values])


def _drawn_seeds(ratios: FloatArray, seed: int) -> FloatArray:
    """The clients' figures [resamples, clients], from [seeds, resamples, clients], with the seeds resampled too."""
    num_seeds, resamples = ratios.shape[:2]
    drawn = stream(seed, "bootstrap of seeds").integers(num_seeds, size=(num_seeds, resamples, 1))
    mean: FloatArray = np.take_along_axis(ratios, drawn, axis=0).mean(axis=0)
    return mean


def _add_method(
    figures: Figures,
    method: str,
    metric: str,
    by_seed: FloatArray,
    point: Mapping[str, float],
    points: Mapping[str, float],
    sampled: Mapping[str, FloatArray],
) -> None:
    """A method's rows. Intervals are over records; for the deviation, the least and the greatest over seeds.

    `by_seed`: the clients' figures [seeds, clients].
    """
    seeds = figures["by_seed"].setdefault(method, {})
    seeds[metric] = [_mean(each) for each in by_seed]
    worst = by_seed.max(axis=1) if LOWER_IS_BETTER[metric] else by_seed.min(axis=1)
    seeds[f"{metric}_worst"] = worst.tolist()
    rows = figures["methods"].setdefault(method, {})
    for name, value in points.items():
        rows[name] = {"mean": value, **_ends(sampled[name]), "seeds": len(by_seed)}
    deviations = dict(enumerate(by_seed.std(axis=1).tolist()))
    _add_by_seed(figures, method, f"{metric}_deviation_over_clients", deviations)
    figures["clients"].setdefault(method, {})[metric] = dict(point)


def _add_by_seed(figures: Figures, method: str, name: str, values: Mapping[int, float]) -> None:
    """A figure that is not measured on records: its mean, least and greatest over seeds."""
    given = list(values.values())
    ends = {"low": min(given), "high": max(given), "seeds": len(given)}
    figures["methods"].setdefault(method, {})[name] = {"mean": _mean(given), **ends}
    figures["by_seed"].setdefault(method, {})[name] = given


def _add_worse_than_local(figures: Figures, outcomes: Outcomes) -> None:
    """The clients, and their number, that do worse under a method than with training alone, by mean NLL over seeds."""
    own = figures["clients"].get("local", {}).get("response_nll")
    if own is None:
        return
    figures["worse_than_local"] = {
        method: list(worse_than_local(each["response_nll"], own, lower_is_better=True))
        for method, each in figures["clients"].items()
    }
    for method, names in figures["worse_than_local"].items():
        count = float(len(names))
        row = {"mean": count, "low": count, "high": count, "seeds": len(outcomes[method])}
        figures["methods"][method]["clients_worse_than_local"] = row


def _has_diverged(run: RunOutcome) -> bool:
    return any(each.nll_sums and not np.isfinite(each.nll_sums).any() for each in run.clients.values())


def _likelihoods(outcomes: Outcomes) -> Values:
    """The records' NLL sums, with their response tokens as counts."""
    sums = {
        method: {
            name: np.array([run.clients[name].nll_sums for run in runs.values()], np.float64) for name in _names(runs)
        }
        for method, runs in outcomes.items()
    }
    first = _first(outcomes)
    counts = {name: np.array(each.num_tokens, np.float64) for name, each in first.clients.items()}
    return _finite(sums, counts)


def _choices(outcomes: Outcomes) -> Values:
    """The records' credits in the choice by likelihood; 1 for the right answer."""
    values = {
        method: {
            name: np.array([_credits(run.clients[name]) for run in runs.values()], np.float64)
            for name in _names(runs)
            if all(run.clients[name].choices for each in outcomes.values() for run in each.values())
        }
        for method, runs in outcomes.items()
    }
    first = next(iter(values.values()))
    return _finite(values, {name: np.ones(each.shape[1]) for name, each in first.items()})


def _credits(measured: Measured) -> list[float]:
    """A credit per record; NaN if it has no choice, or if the NLL of its right answer is not a number."""
    credit = []
    for sums, lengths in zip(measured.choices, measured.lengths, strict=True):
        if not sums or not math.isfinite(sums[0]):
            credit.append(math.nan)
            continue
        finite = [each if math.isfinite(each) else math.inf for each in sums]
        credit.append(float(choice_accuracy([finite], [lengths]).correct[0]))
    return credit


def _finite(values: Mapping[str, Mapping[str, FloatArray]], counts: Mapping[str, FloatArray]) -> Values:
    """The same values without records that are not finite everywhere, and without clients that have no record left."""
    kept = {
        name: np.all([np.isfinite(each[name]).all(axis=0) for each in values.values()], axis=0)
        for name, each in counts.items()
        if len(each)
    }
    left = {name: mask for name, mask in kept.items() if mask.any()}
    return Values(
        {method: {name: each[name][:, mask] for name, mask in left.items()} for method, each in values.items()},
        {name: counts[name][mask] for name, mask in left.items()},
        sum(int((~mask).sum()) for mask in kept.values()),
    )


def _by_client(
    method: Mapping[str, FloatArray],
    reference: Mapping[str, FloatArray],
    counts: Mapping[str, FloatArray],
    resamples: int,
    seed: int,
) -> Iterator[tuple[str, Figures]]:
    """Each client's difference with its interval."""
    for name, tokens in counts.items():
        means = method[name].mean(axis=0), reference[name].mean(axis=0)
        interval = paired_bootstrap(*means, tokens, resamples=resamples, seed=seed)
        yield name, {"difference": interval.value, "low": interval.low, "high": interval.high}


def _ends(values: FloatArray) -> dict[str, float]:
    return dict(zip(("low", "high"), ends(values), strict=True))


def _worst(point: Mapping[str, float], lower_is_better: bool) -> str:
    return max(point, key=lambda name: point[name] if lower_is_better else -point[name])


def _mean(values: Any) -> float:
    given = list(values)
    return math.fsum(given) / len(given)


def _names(runs: Mapping[int, RunOutcome]) -> list[str]:
    return list(next(iter(runs.values())).clients)


def _first(outcomes: Outcomes) -> RunOutcome:
    return next(iter(next(iter(outcomes.values())).values()))


def _check_same_records(outcomes: Outcomes) -> None:
    first = {name: each.record_ids for name, each in _first(outcomes).clients.items()}
    for method, runs in outcomes.items():
        for seed, run in runs.items():
            if {name: each.record_ids for name, each in run.clients.items()} != first:
                raise ValueError(f"{method}, seed {seed}: its test records are not those of the other runs")
