"""The stages of a run, each on its run folder: train, personalise, generate, evaluate.

Each can be stopped at any moment and started again: what is whole is kept, what is not is made anew.
"""

import json
import math
import resource
import secrets
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

from fedmide import adapters, methods, report, server
from fedmide.atomic import check_room, to_json, write_file, write_folder
from fedmide.client import ClientState
from fedmide.config import Config
from fedmide.errors import RunFolderError
from fedmide.evaluation import summary
from fedmide.evaluation.measure import Measured, measure
from fedmide.evaluation.questions import Scored, score_questions, set_figures
from fedmide.generation import default_max_new_tokens
from fedmide.inputs import Inputs, Tell, changed, now, other_versions, read, without_records
from fedmide.journal import RunFolder, check_new, create, locked, reopen
from fedmide.ledger import before, standing
from fedmide.localmodel import Adapter, Nll, total
from fedmide.messages import ClientTask, Metric
from fedmide.model import peft_files, read_peft
from fedmide.records import RecordId
from fedmide.resident import Opener, open_model
from fedmide.rounds import Runtime
from fedmide.rounds import run as run_rounds
from fedmide.runtimes.inprocess import InProcess
from fedmide.server import Delivery, RoundSummary, ServerState
from fedmide.site import EVERYONE, client_state, keep
from fedmide.sources.questions import Question, SetName, fingerprint

STATUSES = ("started", "trained", "personalized", "generated", "evaluated")
"""How far a run is, as its manifest says."""

Sets = Mapping[SetName, Sequence[Question]]
"""Public multiple-choice questions by the set that they are from."""

WRITERS = 8
"""Sites whose files are written at a time, while the next ones train: a disk takes longest to say that it has them."""

Advance = Callable[[int, str], None]
"""Tells how many units of work were done, and a word on the latest."""


class Progress(Protocol):
    """Shows long work to whoever waits for it."""

    def __call__(self, stage: str, total: int, unit: str) -> AbstractContextManager[Advance]:
        """A stage of `total` units; within it the returned function is called as units are done."""


def silent(stage: str, total: int, unit: str) -> AbstractContextManager[Advance]:
    """Shows nothing."""
    return nullcontext(lambda units, note: None)


@dataclass(frozen=True)
class Run:
    """A run folder and what its configuration points at."""

    folder: RunFolder
    inputs: Inputs
    tell: Tell
    federation: str
    runtime: Runtime | None = None
    """How sites are reached that are not in this process."""

    @property
    def config(self) -> Config:
        """The run's configuration."""
        return self.folder.config


@contextmanager
def start(
    config: Config,
    path: Path,
    tell: Tell = lambda message: None,
    opener: Opener = open_model,
    elsewhere: Sequence[str] = (),
) -> Iterator[Run]:
    """A new run in a new folder, which no other process gets at meanwhile.

    All input is read and checked before anything is written. `elsewhere` are the names of sites whose records this
    machine does not hold; each such run is a federation of its own, told from others by a drawn ending.
    """
    check_new(path, config)
    reader = partial(read, load=without_records(elsewhere)) if elsewhere else read
    inputs = reader(config, tell, opener=opener)
    num_adapters = config.warmup.rounds + config.federation.rounds + len(inputs.clients) + 1
    num_adapters += 2 * len(inputs.clients) if methods.of(config).remembers else 0
    begin = server.begin("", inputs.clients, inputs.fresh_adapter(), config)
    check_room(path, num_adapters * len(adapters.encode(begin.adapter)))
    with locked(path):
        tell(f"the run is in {path}")
        federation = f"{inputs.federation}-{secrets.token_hex(4)}" if elsewhere else inputs.federation
        folder = create(path, config, {**inputs.manifest, "federation": federation})
        folder.rebuild_events(())
        yield Run(folder, inputs, tell, federation)


@contextmanager
def resume(
    path: Path,
    config: Config | None = None,
    tell: Tell = lambda message: None,
    opener: Opener = open_model,
    elsewhere: Sequence[str] = (),
) -> Iterator[Run]:
    """An earlier run, to go on with, which no other process gets at meanwhile, on as many threads as it began with.

    Refused where its configuration, its data, its model or its ledgers are no longer the same.
    """
    folder = reopen(path, config)
    with locked(path):
        tell(f"going on with {path}")
        earlier = folder.read_manifest()
        reader = partial(read, load=without_records(elsewhere)) if elsewhere else read
        inputs = reader(folder.config, tell, earlier["threads"], opener=opener)
        if problems := list(changed(earlier, inputs.manifest)):
            raise RunFolderError([f"{path}: {problem}" for problem in problems], "Bring it back, or start a new run")
        for difference in other_versions(earlier, inputs.manifest):
            tell(f"{difference}: from here on bytes may differ")
        folder.rebuild_events(list(inputs.clients))
        run = Run(folder, inputs, tell, earlier.get("federation", inputs.federation))
        if not elsewhere:  # sites that are elsewhere are asked by who reaches them
            _check_ledgers(run)
        yield run


def set_sizes(run: Run) -> dict[str, tuple[int, int]]:
    """How many shared and personal records each site told of in the last round, where its reply in that counted."""
    last = {event["client"]: event for event in run.folder.events() if event["stage"] != "personalize"}
    told = {name: event["metrics"] for name, event in last.items() if "shared" in event["metrics"]}
    return {name: (int(each["shared"]["sum"]), int(each["personal"]["sum"])) for name, each in told.items()}


def train(run: Run, progress: Progress = silent) -> None:
    """Stages 0 and 1: warm-up, split and federated rounds. Leaves `adapter/` and the ledgers."""
    state = run.folder.last_round(_begin_training(run))
    writing: list[Future[None]] = []
    writers = ThreadPoolExecutor(WRITERS)
    runtime = run.runtime or _in_process(
        run, state, lambda site: writing.append(writers.submit(keep, run.folder, run.inputs, site))
    )
    ahead = range(state.round, run.config.federation.rounds)
    num_tasks = sum(len(server.plan(replace(state, round=number), run.config)) for number in ahead)
    shown = _listening(run, progress("rounds", num_tasks, "client rounds"))

    def commit(after: ServerState, summary: RoundSummary) -> None:
        """Makes the round last, once what its sites keep does."""
        if run.runtime:
            _check_quorum(run, summary)
        for written in writing:
            written.result()
        writing.clear()
        run.folder.commit_round(after, summary)
        for trouble in _troubles(run, summary):
            run.tell(trouble)

    with _timed(run, "trained", num_tasks), shown as advance, writers:
        state = run_rounds(state, run.config, _shown(run, runtime, advance), commit)
        if not run.folder.adapter.is_dir():
            write_folder(run.folder.adapter, peft_files(state.adapter, run.inputs.resident.model.lora))


def personalize(run: Run, progress: Progress = silent) -> None:
    """Stage 2: each client tunes the aggregated adapter on its own records. Leaves `clients/ID/adapter/`."""
    state = _trained(run)
    plan = server.plan(state, run.config)
    tasks = [task for task in plan if not run.folder.is_personalized(task.client)]
    waiting = replace(state, clients=tuple(task.client for task in tasks))
    runtime = run.runtime or _in_process(run, waiting, partial(keep, run.folder, run.inputs))
    problems: list[str] = []
    shown = _listening(run, progress("personalisation", len(tasks), "clients"))
    with _timed(run, "personalized", len(tasks)), shown as advance:
        for delivery in _shown(run, runtime, advance)(tasks):
            _, tuned = server.apply(state, [delivery], run.config)
            if refused := tuned.clients[0].refused:
                problems.append(f"client {delivery.client} is not personalised: {refused}")
                continue
            run.folder.commit_personalization(tuned)
            if tuned.clients[0].metrics.get("epoch") == Metric(0):
                run.tell(
                    f"client {delivery.client}: no epoch of its tuning is fit to be kept, the aggregated adapter is"
                )
        if problems:
            raise RunFolderError(problems, f"Mend that, then go on with {run.folder.path}")


def generate(run: Run, progress: Progress = silent) -> None:
    """Stage 3: each client's responses to its test prompts, with its personalised adapter. Leaves `predictions/`."""
    _trained(run)
    if not run.config.generation.enabled:
        return
    if not _is_personalized(run):
        raise RunFolderError(
            f"{run.folder.path}: no client is personalised", f"First: fedmide personalize {run.folder.path}"
        )
    names = [name for name in run.inputs.clients if not run.folder.predictions(name).exists()]
    shown = _listening(run, progress("generation", len(names), "clients"))
    with _timed(run, "generated", len(names)), shown as advance:
        for name in names:
            write_file(run.folder.predictions(name), _responses(run, name))
            advance(1, f"client {name}")


def validate(run: Run) -> dict[str, Nll]:
    """The response NLL of each client's validation records under its personalised adapter; kept in validation.json.

    Test records are not looked at: this is what settings may be chosen by.
    """
    _trained(run)
    measured = {
        name: total(run.inputs.resident.nll(_personal_adapter(run, name), examples.validation, "response"))
        for name, examples in run.inputs.examples.items()
    }
    write_file(run.folder.path / "validation.json", to_json({name: asdict(nll) for name, nll in measured.items()}))
    return measured


def evaluate(
    run: Run,
    progress: Progress = silent,
    questions: Sets = MappingProxyType({}),
    wanted: Sequence[summary.StageName] = summary.STAGES,
) -> dict[str, Any]:
    """What metrics.json holds: likelihood, choice and text metrics of each client's test records.

    Under the base model, the aggregated adapter and, where there is one, the client's personalised one; or under the
    `wanted` ones of these. What a client measured is kept on its site, so that an evaluation that was stopped goes on.
    Public `questions` are asked too; the figures of those that were asked before stay.
    """
    aggregated = _trained(run).adapter
    present = summary.STAGES if _is_personalized(run) else summary.STAGES[:2]
    stages = [stage for stage in present if stage in wanted]
    work = [(name, stage) for name in run.inputs.clients for stage in stages]
    measured: dict[str, dict[summary.StageName, Measured]] = {name: {} for name in run.inputs.clients}
    num_asked = len(questions) * (2 + (len(present) > 2) * len(run.inputs.clients))
    shown = _listening(run, progress("evaluation", len(work) + num_asked, "adapters"))
    with _timed(run, "evaluated", len(work) + num_asked), shown as advance:
        for asked in questions:
            _ask(run, asked, questions[asked], aggregated, advance)
        for name, stage in work:
            measured[name][stage] = _measured(run, name, stage, aggregated)
            advance(1, f"client {name}, {stage}")
        metrics = summary.summarize(
            run.config,
            measured,
            {name: _set_figures(run, name) for name in measured},
            {name: run.folder.read_predictions(name) for name in measured},
            run.folder.events(),
            run.inputs.prompt_hash,
        )
        metrics |= {"questions": figures} if (figures := run.folder.question_figures()) else {}
        metrics["method"] = _method_figures(run)
        write_file(run.folder.path / "metrics.json", to_json(metrics))
    _write_report(run)
    return metrics


def _write_report(run: Run) -> None:
    """Leaves `report.html`. Whatever goes wrong with it is told, and is no reason for a run to fail."""
    try:
        run.tell(f"the report is in {report.write(run.folder)}")
    except Exception as error:  # noqa: BLE001
        run.tell(f"no report could be written ({type(error).__name__}); see fedmide report {run.folder.path}")


def _begin(run: Run) -> ServerState:
    return server.begin(run.federation, run.inputs.clients, run.inputs.fresh_adapter(), run.config)


def _begin_training(run: Run) -> ServerState:
    """The state before the first round; where all train in one place, of a single client that has all records."""
    begin = _begin(run)
    return replace(begin, clients=(EVERYONE,)) if methods.of(run.config).in_one_place else begin


def _trained(run: Run) -> ServerState:
    """The state after the last federated round; a run that is not there yet is refused."""
    state = run.folder.last_round(_begin(run))
    if state.round < run.config.federation.rounds or not run.folder.adapter.is_dir():
        raise RunFolderError(
            f"{run.folder.path}: the rounds are not finished", f"First: fedmide train --resume {run.folder.path}"
        )
    return state


def _check_ledgers(run: Run) -> None:
    """Refuses a run whose ledgers do not say what the sites said of them in the last round that they answered in."""
    state = run.folder.last_round(_begin(run))
    last = {event["client"]: event for event in run.folder.events() if event["stage"] != "personalize"}
    if run.config.method != "fedmide":
        if methods.of(run.config).remembers:
            _check_memories(run, last, state.round)
        return
    problems = []
    for name, told in set_sizes(run).items():
        now = standing(before(run.folder.read_ledger(name), state.round), _record_ids(run, name))
        if told != (len(now.shared), len(now.personal)):
            problems.append(f"{run.folder.site(name)}: the ledger is not the one that its last round left")
    if problems:
        raise RunFolderError(problems, "Bring the files in clients/ back, or start a new run")
    if run.config.scoring.without_own:
        _check_memories(run, last, state.round)


def _check_memories(run: Run, last: Mapping[str, Mapping[str, Any]], next_round: int) -> None:
    """The same for what a method keeps on the sites: it must be of the last round that each trained in."""
    trained = {name: event["round"] for name, event in last.items() if "steps" in event["metrics"]}
    kept = {name: run.folder.read_memory(name, next_round)[-1:] for name in trained}
    problems = [
        f"{run.folder.site(name)}: the memory of round {number} is missing"
        for name, number in trained.items()
        if [memory.round for memory in kept[name]] != [number]
    ]
    if problems:
        raise RunFolderError(problems, "Bring the files in clients/ back, or start a new run")


def _troubles(run: Run, summary: RoundSummary) -> Iterator[str]:
    """What went wrong in a round that went on."""
    title = run.folder.round_name(summary.round)
    for row in summary.clients:
        if row.refused:
            yield f"{title}, client {row.client}: its reply does not count: {row.refused}"
    if not summary.aggregated and methods.of(run.config).travels:
        yield f"{title}: nobody's adapter counts, the aggregated one stays as it was"


def _record_ids(run: Run, name: str) -> list[RecordId]:
    return [example.id for example in run.inputs.examples[name].training]


def _is_personalized(run: Run) -> bool:
    """Whether the clients are personalised; some of them, and others not, is refused."""
    missing = [name for name in run.inputs.clients if not run.folder.is_personalized(name)]
    if 0 < len(missing) < len(run.inputs.clients):
        raise RunFolderError(
            f"{run.folder.path}: clients not yet personalised: {', '.join(missing)}",
            f"First: fedmide personalize {run.folder.path}",
        )
    return not missing


def _in_process(run: Run, state: ServerState, save: Callable[[ClientState], None]) -> Runtime:
    """The runtime of sites that are all in this process, as they stand before a round."""
    sites = {name: client_state(run.folder, run.inputs, name, run.federation, state.round) for name in state.clients}
    return InProcess(sites, run.inputs.resident, save)


def _check_quorum(run: Run, summary: RoundSummary) -> None:
    """Stops a run before a round that too few sites took part in would count."""
    counted = sum(not row.refused for row in summary.clients)
    needed = math.ceil(run.config.replies.quorum * len(summary.clients))
    if counted < needed:
        reasons = dict.fromkeys(row.refused for row in summary.clients if row.refused)
        raise RunFolderError(
            f"{run.folder.round_name(summary.round)}: {counted} of {len(summary.clients)} replies count, "
            f"{needed} are needed: {'; '.join(reasons)}",
            f"Mend that, then go on with {run.folder.path}; or lower replies.quorum",
        )


def _personal_adapter(run: Run, name: str) -> Adapter:
    return read_peft(run.folder.personal_adapter(name), run.inputs.resident.model.shapes)


def _responses(run: Run, name: str) -> bytes:
    """A client's predictions as JSON lines: record, reference and what the model says."""
    config, examples = run.config.generation, run.inputs.examples[name]
    count = config.max_records or len(examples.test)
    longest = config.max_new_tokens or default_max_new_tokens(examples.training)
    if run.inputs.resident.model.num_positions is not None:
        prompts = max((example.prompt_length for example in examples.test[:count]), default=0)
        longest = min(longest, run.inputs.resident.model.num_positions - prompts)
    records = run.inputs.clients[name].test[:count]
    texts = run.inputs.resident.generate(_personal_adapter(run, name), examples.test[:count], longest)
    lines = [
        {
            "record_id": record.id,
            "instruction": record.instruction,
            "reference": record.response,
            "prediction": text,
        }
        for record, text in zip(records, texts, strict=True)
    ]
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()


def _measured(run: Run, name: str, stage: summary.StageName, aggregated: Adapter) -> Measured:
    """What a client's test records measure under an adapter; kept, so that it is measured once."""
    earlier = run.folder.read_evaluation(name, stage)
    if earlier is not None:
        return Measured.from_dict(earlier)
    measured = measure(
        run.inputs.resident,
        _adapter(run, name, stage, aggregated),
        run.inputs.encode,
        run.inputs.clients[name],
        run.config,
    )
    run.folder.save_evaluation(name, stage, asdict(measured))
    return measured


def _ask(run: Run, name: SetName, questions: Sequence[Question], aggregated: Adapter, advance: Advance) -> None:
    """Asks every adapter a public set; what one makes of it is kept, so that it is asked once."""
    longest = run.inputs.resident.model.num_positions or run.config.model.cutoff
    own: list[tuple[summary.StageName, str]] = [("personalized", client) for client in run.inputs.clients]
    scored: dict[tuple[summary.StageName, str], Scored] = {}
    asked = fingerprint(questions)
    for stage, client in [("base", ""), ("aggregated", ""), *(own if _is_personalized(run) else ())]:
        about = f"{stage}-{client}" if client else stage
        earlier = run.folder.read_questions(name, about)
        if earlier is None or earlier["questions"] != asked:
            adapter = _adapter(run, client, stage, aggregated)
            found = score_questions(run.inputs.resident, adapter, run.inputs.encode, questions, longest)
            run.folder.save_questions(name, about, asdict(found))
            earlier = run.folder.read_questions(name, about) or {}  # sums that are no number read alike, now and later
        scored[stage, client] = Scored.from_dict(earlier)
        advance(1, f"{name}, {about}")
    run.folder.save_questions(name, "figures", set_figures(name, questions, scored, run.config))


def _adapter(run: Run, name: str, stage: summary.StageName, aggregated: Adapter) -> Adapter:
    if stage == "personalized":
        return _personal_adapter(run, name)
    return aggregated if stage == "aggregated" else run.inputs.fresh_adapter()


def _method_figures(run: Run) -> dict[str, Any]:
    method = methods.of(run.config)
    return {"name": method.name, "source": method.source, **asdict(method.sizes(run.inputs.fresh_adapter()))}


def _set_figures(run: Run, name: str) -> dict[str, Any]:
    return summary.set_figures(run.folder.read_ledger(name), _record_ids(run, name))


def _shown(run: Run, runtime: Runtime, advance: Advance) -> Runtime:
    """The same runtime, with progress told after every delivery."""

    def deliver(tasks: Sequence[ClientTask]) -> Iterator[Delivery]:
        for delivery in runtime(tasks):
            advance(1, _note(run, tasks[0].round, delivery))
            yield delivery

    return deliver


def _note(run: Run, round_number: int, delivery: Delivery) -> str:
    """A word on what a client has just done."""
    title = f"{run.folder.round_name(round_number)}, " if round_number < run.config.federation.rounds else ""
    loss = delivery.reply.metrics.get("loss") if delivery.reply else None
    return f"{title}client {delivery.client}" + (f", loss {loss.sum / loss.count:.3f}" if loss else "")


@contextmanager
def _listening(run: Run, shown: AbstractContextManager[Advance]) -> Iterator[Advance]:
    """The same progress, which also tells of the model's work within a client."""
    resident = run.inputs.resident
    with shown as advance:
        resident.heard = lambda kind, total: advance(0, f"{total:,} {kind}")
        try:
            yield advance
        finally:
            resident.heard = lambda kind, total: None


@contextmanager
def _timed(run: Run, status: str, work: int) -> Iterator[None]:
    """Notes in the manifest that a stage ended, and how long it has worked, restarts included.

    A stage that had no work left does not set the status back to its own.
    """
    begun = time.perf_counter()
    ended = {}
    try:
        yield
        earlier = run.folder.read_manifest()["status"]
        if work or STATUSES.index(status) > STATUSES.index(earlier):
            ended = {"status": status, "updated": now()}
    finally:
        seconds = run.folder.read_manifest()["seconds"]
        spent = seconds.get(status, 0.0) + time.perf_counter() - begun
        peak = max(run.folder.read_manifest()["peak_memory_mb"], _peak_memory_mb())
        held = {"peak_memory_mb": peak, "prefix_cache_mb": run.inputs.resident.model.prefix_bytes // 10**6}
        run.folder.update_manifest(seconds={**seconds, status: round(spent, 3)}, **held, **ended)


def _peak_memory_mb() -> int:
    """The most memory that this process has held so far, in 10^6 bytes."""
    with suppress(OSError, StopIteration):  # Linux; what getrusage tells there counts a parent's memory too
        lines = Path("/proc/self/status").read_text().splitlines()
        return round(int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) * 1024 / 1e6)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak * (1 if sys.platform == "darwin" else 1024) / 1e6)
