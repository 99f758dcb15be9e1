"""Plain facts of a run folder, whatever stage the run has reached. Nothing is drawn or judged here.

Files in `clients/` are optional: the run folder of a server gives a report without scores.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedmide.config import Config
from fedmide.evaluation.intervals import Interval
from fedmide.journal.folder import RunFolder
from fedmide.model.adapters import shapes
from fedmide.model.interface import Adapter
from fedmide.report.gains import ResponseNlls, client_change, mean_change
from fedmide.report.scores import ScoreRound, score_rounds

STAGE_NAMES = {"base": "base model", "aggregated": "common adapter", "personalized": "tuned adapter"}
"""Names, for people, of the three stages under which a client's test records are measured."""


@dataclass(frozen=True)
class Turn:
    """One client's part in one round, or its personalization. `title`: the name of either, for people.

    `loss`: nats per token over the round's training; None if not reported. `shared`, `personal`: numbers of training
    records after the round's verdicts; None if not reported. `enrolled`: records that became shared in this round.
    `warnings`: verdicts given without a threshold. `refused`: the reason why the reply did not count, empty if it did.
    """

    round: int
    title: str
    stage: str
    client: str
    num_records: int
    loss: float | None
    shared: int | None
    personal: int | None
    enrolled: int
    warnings: int
    steps: int
    trained_tokens: int
    scored_tokens: int
    bytes_down: int
    bytes_up: int
    seconds: float
    refused: str


@dataclass(frozen=True)
class ClientOutcome:
    """The figures of one client's test records. Keys of the mappings are stages.

    `change` is the change of the response NLL by personalization: tuned minus common adapter. `learned` is the change
    by the common training: common adapter minus base model. Below 0 is better. Each is paired on the same records,
    and is None if the run folder has no figures of the records.
    """

    client: str
    num_records: int
    nll: Mapping[str, Interval]
    choice: Mapping[str, Interval]
    chance: float | None
    learned: Interval | None
    change: Interval | None
    texts: Mapping[str, Interval]
    sets: Mapping[str, Any]


@dataclass(frozen=True)
class Step:
    """The change of the common adapter in a round: length of the change divided by the adapter's own length."""

    title: str
    relative_change: float


@dataclass(frozen=True)
class RunFacts:
    """Everything that a report shows of a run. `scores` is empty without ledgers.

    `measures`: response NLLs of each client's test records, by stage.
    """

    name: str
    config: Config
    manifest: Mapping[str, Any]
    clients: tuple[str, ...]
    turns: tuple[Turn, ...]
    steps: tuple[Step, ...]
    outcomes: tuple[ClientOutcome, ...]
    mean_change: Interval | None
    scores: Mapping[str, tuple[ScoreRound, ...]]
    metrics: Mapping[str, Any]
    measures: Mapping[str, Mapping[str, ResponseNlls]]

    @property
    def is_sent(self) -> bool:
        """True if messages travel to sites elsewhere. Only then a random suffix follows the federation's name."""
        return "-" in self.manifest.get("federation", "")

    @property
    def rounds(self) -> tuple[Turn, ...]:
        """The turns of warm-up and federated rounds."""
        return tuple(turn for turn in self.turns if turn.stage != "personalize")

    @property
    def titles(self) -> tuple[str, ...]:
        """Names of the rounds, in order."""
        return tuple(dict.fromkeys(turn.title for turn in self.rounds))

    def mean_loss(self, title: str) -> float | None:
        """The training loss over all tokens of a round. Clients that reported no loss are left out."""
        reported = [(turn.loss, turn.trained_tokens) for turn in self.rounds if turn.title == title]
        known = [(loss, tokens) for loss, tokens in reported if loss is not None]
        count = sum(tokens for _, tokens in known)
        return sum(loss * tokens for loss, tokens in known) / count if count else None


def read(folder: RunFolder) -> RunFacts:
    """The facts of a run at any stage. Raises `RunFolderError` if one of its files is damaged."""
    manifest, metrics = folder.read_manifest(), folder.read_metrics()
    clients = tuple(manifest["data"])
    measures = {client: _measures(folder, client) for client in clients}
    ledgers = {client: folder.read_ledger(client) for client in clients}
    return RunFacts(
        name=folder.path.resolve().name,
        config=folder.config,
        manifest=manifest,
        clients=clients,
        turns=turns(folder),
        steps=tuple(_steps(folder)),
        outcomes=tuple(_outcome(name, each, measures[name], folder.config) for name, each in _measured(metrics)),
        mean_change=mean_change(_pairs(measures), folder.config.evaluation.bootstrap, folder.config.seed),
        scores={
            name: rounds for name, ledger in ledgers.items() if (rounds := score_rounds(ledger, folder.round_name))
        },
        metrics=metrics,
        measures=measures,
    )


def turns(folder: RunFolder) -> tuple[Turn, ...]:
    """Each client's part in each round so far."""
    return tuple(_turn(folder, event) for event in folder.events())


def _measured(metrics: Mapping[str, Any]) -> Sequence[tuple[str, Mapping[str, Any]]]:
    return tuple(metrics.get("clients", {}).items())


def _measures(folder: RunFolder, client: str) -> dict[str, ResponseNlls]:
    """The measures of the client's test records by stage, as far as their files are here."""
    found = {stage: folder.read_evaluation(client, stage) for stage in STAGE_NAMES}
    return {stage: ResponseNlls.from_dict(values) for stage, values in found.items() if values is not None}


def _pairs(measures: Mapping[str, Mapping[str, ResponseNlls]]) -> dict[str, tuple[ResponseNlls, ResponseNlls]]:
    """Measures under the common and the tuned adapter, for each client that has both."""
    return {
        name: (each["aggregated"], each["personalized"])
        for name, each in measures.items()
        if "aggregated" in each and "personalized" in each
    }


def _outcome(
    client: str, figures: Mapping[str, Any], measures: Mapping[str, ResponseNlls], config: Config
) -> ClientOutcome:
    stages = figures["stages"]
    choices = {stage: each["choice"] for stage, each in stages.items() if each["choice"]}
    texts = figures["generation"] or {}
    settings = (config.evaluation.bootstrap, config.seed)
    return ClientOutcome(
        client=client,
        num_records=max((each["num_records"] for each in stages.values()), default=0),
        nll={stage: _interval(each["response_nll"]) for stage, each in stages.items() if each["response_nll"]},
        choice={stage: _interval({"value": each["accuracy"], **each}) for stage, each in choices.items()},
        chance=next((each["chance"] for each in choices.values()), None),
        learned=client_change(measures.get("base"), measures.get("aggregated"), *settings),
        change=client_change(measures.get("aggregated"), measures.get("personalized"), *settings),
        texts={name: _interval(each) for name, each in texts.items() if isinstance(each, dict) and "low" in each},
        sets=figures["sets"],
    )


def _interval(values: Mapping[str, float]) -> Interval:
    return Interval(values["value"], values["low"], values["high"])


def _turn(folder: RunFolder, event: Mapping[str, Any]) -> Turn:
    metrics = event["metrics"]
    personalizes = event["stage"] == "personalize"
    return Turn(
        round=event["round"],
        title="personalization" if personalizes else folder.round_name(event["round"]),
        stage=event["stage"],
        client=event["client"],
        num_records=event["num_records"],
        loss=_mean(metrics.get("loss")),
        shared=_count(metrics, "shared"),
        personal=_count(metrics, "personal"),
        enrolled=_count(metrics, "enrolled") or 0,
        warnings=_count(metrics, "warnings") or 0,
        steps=_count(metrics, "steps") or 0,
        trained_tokens=_count(metrics, "trained_tokens") or 0,
        scored_tokens=_count(metrics, "scored_tokens") or 0,
        bytes_down=event["bytes_down"],
        bytes_up=event["bytes_up"],
        seconds=event["seconds"],
        refused=event["refused"],
    )


def _mean(metric: Mapping[str, float] | None) -> float | None:
    return metric["sum"] / metric["count"] if metric and metric["count"] else None


def _count(metrics: Mapping[str, Any], name: str) -> int | None:
    return int(metrics[name]["sum"]) if name in metrics else None


def _steps(folder: RunFolder) -> list[Step]:
    """The change of the common adapter in each round but the first. A restart from a fresh adapter does not count."""
    steps = []
    earlier: Adapter | None = None
    for number, adapter in folder.round_adapters():
        restarted = number == 0 and folder.config.warmup.reset
        if earlier is not None and not restarted and shapes(earlier) == shapes(adapter):
            steps.append(Step(folder.round_name(number), _relative_change(earlier, adapter)))
        earlier = adapter
    return steps


def _relative_change(earlier: Adapter, later: Adapter) -> float:
    """Euclidean length of the difference divided by that of the later adapter."""
    change = sum(float(np.sum((later[name] - earlier[name]) ** 2, dtype=np.float64)) for name in later)
    length = sum(float(np.sum(later[name] ** 2, dtype=np.float64)) for name in later)
    return float(np.sqrt(change / length)) if length else 0.0
