"""The identification bench: runs the method on sites with known personal records, and measures how well it finds them.

The method runs as always, on records that do not contain the truth. The bench reads the adapters in the messages
and the sites' ledgers, and compares them with the truth afterwards.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedmide import methods
from fedmide.config import Config
from fedmide.config.knobs import fingerprint
from fedmide.config.sections import Positions
from fedmide.errors import ConfigError
from fedmide.federation import server
from fedmide.federation.client_state import ClientState
from fedmide.federation.ledger import before, standing
from fedmide.federation.messages import ClientTask
from fedmide.federation.rounds import run as run_rounds
from fedmide.federation.runtimes.inprocess import InProcess
from fedmide.federation.server import Delivery
from fedmide.model.interface import Adapter
from fedmide.progress import Advance, Progress, Tell, quiet, silent
from fedmide.runs.inputs import Inputs, read
from fedmide.studies.identification_figures import Moment, ObservedSite, summarize
from fedmide.studies.known_sites import KnownSites, Scenario, build

POSITIONS: tuple[Positions, ...] = ("all", "response")


@dataclass(frozen=True)
class Sizes:
    """The number of sites, the number of shared and of personal records per site (`records` each), and the matching.

    `match_lengths`: shared records are chosen so that they are about as long as the personal ones.
    """

    clients: int = 8
    records: int = 30
    match_lengths: bool = True


@dataclass
class Witness:
    """A runtime that keeps the adapters in its messages: those of the end of the warm-up, and the latest."""

    runtime: InProcess
    advance: Advance
    warmup: dict[str, Adapter] = field(default_factory=dict)
    latest: dict[str, Adapter] = field(default_factory=dict)

    def __call__(self, tasks: Sequence[ClientTask]) -> Iterator[Delivery]:
        """The replies, in the tasks' order."""
        for delivery in self.runtime(tasks):
            if delivery.reply is not None and delivery.reply.adapter is not None:
                self.latest[delivery.client] = delivery.reply.adapter
                if delivery.reply.round < 0:
                    self.warmup[delivery.client] = delivery.reply.adapter
            self.advance(1, f"client {delivery.client}")
            yield delivery


def identify(
    config: Config,
    scenario: Scenario,
    sizes: Sizes = Sizes(),
    tell: Tell = quiet,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Figures of the configured method, and of rival scores, for the personal records of a scenario's sites.

    The configuration's records are not used. Nothing after the rounds is run.
    """
    if not methods.of(config).enrolls:  # checked first: other methods have no warm-up, whatever is set
        raise ConfigError(
            f"method = {config.method!r}: only fedmide separates personal records from shared ones",
            'Set method = "fedmide"',
        )
    if config.warmup.rounds == 0 or config.federation.rounds == 0:
        raise ConfigError(
            "warmup.rounds or federation.rounds = 0: records are split in the first round after a warm-up",
            "Set both to 1 or more",
        )
    known = build(scenario, config.seed, sizes.clients, sizes.records, sizes.match_lengths)
    inputs = read(config, tell, load=lambda data, seed: known.clients)
    sites = _run(config, inputs, known, scenario, progress)
    figures = summarize(sites, config.evaluation.bootstrap, config.seed)
    return {"protocol": _protocol(config, inputs, scenario, sizes), **figures}


def _run(
    config: Config, inputs: Inputs, known: KnownSites, scenario: Scenario, progress: Progress
) -> dict[str, ObservedSite]:
    """The sites after the warm-up and after the last round."""
    name = fingerprint(config)
    states = {client: _state(client, name, config, inputs) for client in inputs.clients}
    begun = server.begin(name, inputs.clients, inputs.fresh_adapter(), config)
    aggregated: dict[int, Adapter] = {}
    num_tasks = (config.warmup.rounds + config.federation.rounds) * len(states)
    with progress(scenario, num_tasks, "client rounds") as advance:
        witness = Witness(InProcess(states, inputs.resident, lambda state: None), advance)
        after = run_rounds(
            begun, config, witness, lambda state, summary: aggregated.update({summary.round: state.adapter})
        )
        return {
            client: ObservedSite(
                known.personal[client],
                _moment(inputs, state, 0, witness.warmup.get(client, begun.adapter), aggregated[-1]),
                _moment(inputs, state, after.round, witness.latest.get(client, begun.adapter), after.adapter),
            )
            for client, state in states.items()
        }


def _state(client: str, name: str, config: Config, inputs: Inputs) -> ClientState:
    examples = inputs.examples[client].training
    return ClientState(client, name, config, {example.id: example for example in examples}, ())


def _moment(inputs: Inputs, state: ClientState, round_number: int, own: Adapter, aggregated: Adapter) -> Moment:
    """A site right after its verdicts in a round, with the NLLs of all its records under both adapters."""
    examples = list(state.training.values())
    nlls = {}
    for positions in POSITIONS:
        pairs = (inputs.resident.nll(adapter, examples, positions) for adapter in (own, aggregated))
        nlls[positions] = dict(zip(state.training, zip(*pairs, strict=True), strict=True))
    ledger = before(state.ledger, round_number + 1)
    judged = [entry for entry in ledger if entry.score is not None]
    latest: Mapping[Any, float] = {entry.record_id: entry.score for entry in judged if entry.score is not None}
    return Moment(nlls, frozenset(standing(ledger, state.training).personal), latest)


def _protocol(config: Config, inputs: Inputs, scenario: Scenario, sizes: Sizes) -> dict[str, Any]:
    return {
        "scenario": scenario,
        "clients": sizes.clients,
        "shared_records": sizes.records,
        "personal_records": sizes.records,
        "match_lengths": sizes.match_lengths,
        "seed": config.seed,
        "model": inputs.manifest["model"],
        "prompt": inputs.prompt_hash,
        "scoring_positions": config.scoring.positions,
        "rule": config.enrollment.rule,
        "commit": inputs.manifest["commit"],
        "truncated": sum(each.num_truncated for each in inputs.examples.values()),
        "interval": f"95 % of the mean AUROC, records resampled on each site, {config.evaluation.bootstrap} resamples",
    }
