"""Values of metrics.json: each client's figures with their protocol and intervals, and the figures over clients.

Each figure comes with its number of records. Records without a finite NLL are left out of it and counted separately.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Literal

import numpy as np

from fedmide.config import Config
from fedmide.data.records import RecordId
from fedmide.evaluation.choice import choice_accuracy, standard_error
from fedmide.evaluation.intervals import bootstrap_mean, bootstrap_ratio
from fedmide.evaluation.measure import Measured
from fedmide.evaluation.over_clients import over_clients, spearman
from fedmide.evaluation.text import score_texts
from fedmide.federation.ledger import Ledger, standing

StageName = Literal["base", "aggregated", "personalized"]


STAGES: tuple[StageName, ...] = ("base", "aggregated", "personalized")


TEXT_METRICS = ("rouge1", "rouge2", "rouge_l", "exact_match", "token_f1", "bleu", "chrf")
"""Metrics of a client's generated responses: means over records, but BLEU and chrF are of all records together."""


Figures = dict[str, Any]
"""Values for a JSON file, by name: figures, and nested values of the same kind."""


def summarize(
    config: Config,
    measured: Mapping[str, Mapping[StageName, Measured]],
    sets: Mapping[str, Figures],
    predictions: Mapping[str, Sequence[Mapping[str, str]]],
    events: Sequence[Mapping[str, Any]],
    prompt_hash: str,
) -> Figures:
    """The figures of every client and over clients, and the cost of the federation."""
    clients = {
        name: {
            "stages": {stage: stage_figures(each, config) for stage, each in stages.items()},
            "sets": sets[name],
            "generation": text_figures(predictions[name], config),
        }
        for name, stages in measured.items()
    }
    return {
        "protocol": _protocol(config, prompt_hash),
        "clients": clients,
        "over_clients": _over(clients),
        "federation": federation_figures(events),
    }


def federation_figures(events: Sequence[Mapping[str, Any]]) -> Figures:
    """Outcomes of the rounds, and the cost of rounds and personalization: bytes as encoded, tokens, optimizer steps."""
    rounds = [event for event in events if event["stage"] != "personalize"]
    numbers = {event["round"] for event in rounds}
    aggregated = {event["round"] for event in rounds if event["num_records"] and not event["refused"]}
    return {
        "rounds": len(numbers),
        "rounds_without_aggregate": len(numbers - aggregated),
        "refused_replies": sum(bool(event["refused"]) for event in events),
        "bytes_down": sum(event["bytes_down"] for event in events),
        "bytes_up": sum(event["bytes_up"] for event in events),
        **{
            name: sum(int(event["metrics"][name]["sum"]) for event in events if name in event["metrics"])
            for name in ("steps", "trained_tokens", "scored_tokens")
        },
    }


def stage_figures(measured: Measured, config: Config) -> Figures:
    """NLL and choice of one client's test records under one adapter; None if there is nothing to measure."""
    finite = [index for index, value in enumerate(measured.nll_sums) if math.isfinite(value)]
    sums = [measured.nll_sums[index] for index in finite]
    counts = [measured.num_tokens[index] for index in finite]
    figures: Figures = {
        "num_records": len(finite),
        "num_not_finite": len(measured.nll_sums) - len(finite),
        "num_truncated": measured.num_truncated,
        "response_nll": None,
        "perplexity": None,
        "choice": choice_figures(measured.choices, measured.lengths, config),
        "options": choice_figures(measured.options, measured.option_lengths, config),
    }
    if finite:
        interval = bootstrap_ratio(sums, counts, config.evaluation.bootstrap, config.seed)
        figures["response_nll"] = {"sum": math.fsum(sums), "count": sum(counts), **asdict(interval)}
        figures["perplexity"] = {name: _exp(value) for name, value in asdict(interval).items()}
    return figures


def set_figures(ledger: Ledger, records: Sequence[RecordId]) -> Figures:
    """A client's sets after the last round and the correlation of its scores with length, from its ledger."""
    now = standing(ledger, records)
    judged = [entry for entry in ledger if entry.reason != "own-nll"]
    first = [entry for entry in judged if entry.round == judged[0].round] if judged else []
    scored = [entry for entry in first if entry.score is not None and math.isfinite(entry.score)]
    return {
        "shared": len(now.shared),
        "personal": len(now.personal),
        "shared_at_split": sum(entry.set == "shared" for entry in first) if first else None,
        "enrolled": sum(entry.set == "shared" for entry in judged[len(first) :]),
        "not_finite": len({entry.record_id for entry in judged if entry.score is None}),
        "spearman_score_tokens": spearman(
            [entry.score for entry in scored if entry.score is not None],
            [entry.num_tokens for entry in scored],
        ),
    }


def text_figures(predictions: Sequence[Mapping[str, str]], config: Config) -> Figures | None:
    """The text metrics of one client's generated responses; None without responses."""
    if not predictions:
        return None
    texts = [line["prediction"] for line in predictions]
    scores = score_texts(texts, [line["reference"] for line in predictions], config.evaluation.bootstrap, config.seed)
    intervals = {
        name: asdict(bootstrap_mean(values, config.evaluation.bootstrap, config.seed))
        for name, values in scores.per_record().items()
    }
    return {
        "num_records": len(texts),
        **intervals,
        "bleu": asdict(scores.bleu),
        "chrf": asdict(scores.chrf),
        "protocol": dict(scores.protocol),
    }


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf


def choice_figures(
    choices: Sequence[Sequence[float]], lengths: Sequence[Sequence[int]], config: Config
) -> Figures | None:
    """Accuracy of the choice by likelihood, from the NLL sums and lengths of each record's choices, the right first.

    A wrong choice whose NLL is not finite counts as the worst. A record whose right choice has no finite NLL is left
    out. None if no record is left.
    """
    rows = [row for row in zip(choices, lengths, strict=True) if row[0] and math.isfinite(row[0][0])]
    if not rows:
        return None
    sums = [[value if math.isfinite(value) else math.inf for value in values] for values, _ in rows]
    scores = choice_accuracy(sums, [characters for _, characters in rows])
    interval = bootstrap_mean(scores.correct, config.evaluation.bootstrap, config.seed)
    return {
        "accuracy": interval.value,
        "low": interval.low,
        "high": interval.high,
        "accuracy_norm": float(np.mean(scores.correct_norm)),
        "standard_error": standard_error(scores.correct),
        "num_records": len(sums),
        "num_left_out": len(choices) - len(sums),
        "num_options": int(scores.num_options.max()),
        "chance": scores.chance(),
    }


def _over(clients: Mapping[str, Figures]) -> Figures:
    """The figures over all clients that have any, per stage and for the generated responses."""
    figures: Figures = {}
    for stage in STAGES:
        rows = {name: each["stages"].get(stage) for name, each in clients.items()}
        likelihoods = {name: row["response_nll"] for name, row in rows.items() if row and row["response_nll"]}
        choices = {name: row["choice"] for name, row in rows.items() if row and row["choice"]}
        if likelihoods:
            figures[stage] = {
                "response_nll": _figures_over(likelihoods, "value", rows, lower_is_better=True),
                "choice_accuracy": _figures_over(choices, "accuracy", rows, lower_is_better=False),
            }
    texts = {name: each["generation"] for name, each in clients.items() if each["generation"]}
    if texts:
        figures["generation"] = {metric: _text_over(texts, metric) for metric in TEXT_METRICS}
    return figures


def _figures_over(
    values: Mapping[str, Figures], key: str, rows: Mapping[str, Figures], lower_is_better: bool
) -> Figures | None:
    if not values:
        return None
    weights = {name: rows[name]["num_records"] for name in values}
    return asdict(over_clients({name: each[key] for name, each in values.items()}, weights, lower_is_better))


def _text_over(texts: Mapping[str, Figures], metric: str) -> Figures | None:
    return _figures_over({name: each[metric] for name, each in texts.items()}, "value", texts, lower_is_better=False)


def _protocol(config: Config, prompt_hash: str) -> Figures:
    return {
        "prompt": {"template": config.prompt.template, "hash": prompt_hash},
        "response_nll": "sum of the NLL of all response tokens, end of sequence included / their number; nats",
        "interval": f"95 %, bootstrap over records, {config.evaluation.bootstrap} resamples",
        "choice": f"the reference against up to {config.evaluation.choices - 1} responses of other test records of the "
        "same client, after one prompt, end of sequence included; accuracy: largest summed log-probability; "
        "accuracy_norm: divided by characters; left out: records with a response that the cutoff would cut, or whose "
        "likelihood is not a number",
        "options": "the options that an instruction lists from A on, one per line: their texts, without letter and end "
        "of sequence, after the record's prompt; left out: records whose reference names no single option, or with an "
        "option that the cutoff would cut",
        "decoding": "greedy, special tokens removed",
        "cutoff": config.model.cutoff,
    }
