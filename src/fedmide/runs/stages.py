"""The stages of a run, each on its run folder: train, personalize, generate, evaluate.

Each stage can be stopped at any moment and started again: it keeps every complete result and makes the missing ones.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from types import MappingProxyType
from typing import Any

from fedmide import methods, report
from fedmide.atomic import to_json, write_file, write_folder
from fedmide.data.questions import Question, SetName
from fedmide.errors import RunFolderError
from fedmide.evaluation import summary
from fedmide.evaluation.measure import Measured
from fedmide.federation import server
from fedmide.federation.client_state import ClientState
from fedmide.federation.messages import Metric
from fedmide.federation.rounds import Runtime
from fedmide.federation.rounds import run as run_rounds
from fedmide.federation.runtimes.inprocess import InProcess
from fedmide.federation.server import RoundSummary, ServerState
from fedmide.model.interface import Adapter, Nll, total
from fedmide.model.pretrained.hf import peft_files, read_peft
from fedmide.progress import Progress, silent
from fedmide.runs.measuring import (
    ask_all,
    figures_of_sets,
    is_personalized,
    measurements,
    method_figures,
    personal_adapter,
    responses,
)
from fedmide.runs.opening import Run, begin
from fedmide.runs.site import EVERYONE, client_state, keep
from fedmide.runs.timing import listening, noted, timed

Sets = Mapping[SetName, Sequence[Question]]
"""Public multiple-choice questions, by the name of their set."""


WRITERS = 8
"""The number of sites whose files are written at once, while later sites train: writing mostly waits for the disk."""


def train(run: Run, progress: Progress = silent) -> None:
    """Stages 0 and 1: warm-up, split and federated rounds. Writes `adapter/` and the ledgers."""
    state = run.folder.last_round(_begin_training(run))
    writing: list[Future[None]] = []
    writers = ThreadPoolExecutor(WRITERS)
    runtime = run.runtime or _in_process(
        run, state, lambda site: writing.append(writers.submit(keep, run.folder, run.inputs, site))
    )
    ahead = range(state.round, run.config.federation.rounds)
    num_tasks = sum(len(server.asked(replace(state, round=number), run.config)) for number in ahead)
    shown = listening(run, progress("rounds", num_tasks, "site rounds"))

    def commit(after: ServerState, summary: RoundSummary) -> None:
        """Commits the round, after the files of all its sites are on disk."""
        if run.runtime:
            _check_quorum(run, summary)
        for written in writing:
            written.result()
        writing.clear()
        run.folder.commit_round(after, summary)
        for trouble in _troubles(run, summary):
            run.tell(trouble)

    with timed(run, "trained", num_tasks), shown as advance, writers:
        state = run_rounds(state, run.config, noted(run, runtime, advance), commit)
        if not run.folder.adapter.is_dir():
            write_folder(run.folder.adapter, peft_files(state.adapter, run.inputs.resident.model.lora))


def personalize(run: Run, progress: Progress = silent) -> None:
    """Stage 2: each client tunes the common adapter, or its own last one. Writes `clients/ID/adapter/`."""
    state = _trained(run)
    plan = server.plan(state, run.config)
    tasks = [task for task in plan if not run.folder.is_personalized(task.client)]
    waiting = replace(state, clients=tuple(task.client for task in tasks))
    runtime = run.runtime or _in_process(run, waiting, partial(keep, run.folder, run.inputs))
    problems: list[str] = []
    shown = listening(run, progress("personalization", len(tasks), "sites"))
    with timed(run, "personalized", len(tasks)), shown as advance:
        for delivery in noted(run, runtime, advance)(tasks):
            _, tuned = server.apply(state, [delivery], run.config)
            if refused := tuned.clients[0].refused:
                problems.append(f"site {delivery.client} is not personalized: {refused}")
                continue
            run.folder.commit_personalization(tuned)
            if tuned.clients[0].metrics.get("epoch") == Metric(0):
                run.tell(f"site {delivery.client}: no epoch of its tuning can be used, so it keeps the common adapter")
        if problems:
            raise RunFolderError(problems, f"Fix this, then resume the run: {_resuming(run)}")


def generate(run: Run, progress: Progress = silent) -> None:
    """Stage 3: each client's responses to its test prompts, with its tuned adapter. Writes `predictions/`."""
    _aggregated(run)
    if not run.config.generation.enabled:
        return
    if not is_personalized(run):
        raise RunFolderError(
            f"{run.folder.path}: no site is personalized", f"First: fedmide personalize {run.folder.path}"
        )
    names = [name for name in run.inputs.clients if not run.folder.predictions(name).exists()]
    shown = listening(run, progress("generation", len(names), "sites"))
    with timed(run, "generated", len(names)), shown as advance:
        for name in names:
            write_file(run.folder.predictions(name), responses(run, name))
            advance(1, f"site {name}")


def validate(run: Run) -> dict[str, Nll]:
    """The response NLL of each client's validation records under its tuned adapter; also written to validation.json.

    Test records are not used, so settings may be chosen by these figures.
    """
    _trained(run)
    measured = {
        name: total(run.inputs.resident.nll(personal_adapter(run, name), examples.validation, "response"))
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
    """The content of metrics.json: NLL, choice and text metrics of each client's test records.

    They are measured under the base model, the common adapter and, if there is one, the client's tuned adapter.
    `wanted` names the ones to use. Each client's measurements are stored on its site, so that an evaluation
    can be resumed. Public `questions` are asked too. Figures of question sets that were asked earlier stay in the file.
    """
    aggregated = _aggregated(run)
    there = {"base": True, "aggregated": bool(aggregated), "personalized": is_personalized(run)}
    present = [stage for stage in summary.STAGES if there[stage]]
    stages = [stage for stage in present if stage in wanted]
    work = [(name, stage) for name in run.inputs.clients for stage in stages]
    measured: dict[str, dict[summary.StageName, Measured]] = {name: {} for name in run.inputs.clients}
    num_asked = len(questions) * (2 + there["personalized"] * len(run.inputs.clients))
    shown = listening(run, progress("evaluation", len(work) + num_asked, "adapters"))
    with timed(run, "evaluated", len(work) + num_asked), shown as advance:
        for asked in questions:
            ask_all(run, asked, questions[asked], aggregated, advance)
        for name, stage in work:
            measured[name][stage] = measurements(run, name, stage, aggregated)
            advance(1, f"site {name}, {stage}")
        metrics = summary.summarize(
            run.config,
            measured,
            {name: figures_of_sets(run, name) for name in measured},
            {name: run.folder.read_predictions(name) for name in measured},
            run.folder.events(),
            run.inputs.prompt_hash,
        )
        metrics |= {"questions": figures} if (figures := run.folder.question_figures()) else {}
        metrics["method"] = method_figures(run)
        write_file(run.folder.path / "metrics.json", to_json(metrics))
    _write_report(run)
    return metrics


def _write_report(run: Run) -> None:
    """Writes `report.html`. If that fails, a message reports it, and the run does not fail."""
    try:
        run.tell(f"the report is in {report.write(run.folder)}")
    except Exception as error:  # noqa: BLE001
        run.tell(f"no report could be written ({type(error).__name__}); to see why: fedmide report {run.folder.path}")


def _begin_training(run: Run) -> ServerState:
    """The state before the first round. If a method trains in one place, its only client holds all records."""
    begun = begin(run)
    return replace(begun, clients=(EVERYONE,)) if methods.of(run.config).in_one_place else begun


def _trained(run: Run) -> ServerState:
    """The state after the last federated round; a run with rounds left to do is refused."""
    state = run.folder.last_round(begin(run))
    if state.round < run.config.federation.rounds or not run.folder.adapter.is_dir():
        raise RunFolderError(
            f"{run.folder.path}: the rounds are not finished", f"First: fedmide train --resume {run.folder.path}"
        )
    return state


def _aggregated(run: Run) -> Adapter:
    """The common adapter after the last round. At a site: the one it got for tuning, or {} if it got only a part."""
    if not run.folder.is_site:
        return _trained(run).adapter
    kept = run.folder.adapter
    return read_peft(kept, run.inputs.resident.model.shapes) if kept.is_dir() else {}


def _troubles(run: Run, summary: RoundSummary) -> Iterator[str]:
    """Messages on replies that did not count in a round that counts."""
    title = run.folder.round_name(summary.round)
    for row in summary.clients:
        if row.refused:
            yield f"{title}, site {row.client}: its reply does not count: {row.refused}"
    if not summary.aggregated and methods.of(run.config).travels:
        yield f"{title}: no adapter counts, so the common adapter stays as it was"


def _resuming(run: Run) -> str:
    """The commands that resume a run, in one process or between sites."""
    return f"fedmide run --resume {run.folder.path}, between sites fedmide flower resume SERVER {run.folder.path}"


def _in_process(run: Run, state: ServerState, save: Callable[[ClientState], None]) -> Runtime:
    """The runtime of sites that are all in this process, in their state before a round."""
    sites = {name: client_state(run.folder, run.inputs, name, run.federation, state.round) for name in state.clients}
    return InProcess(sites, run.inputs.resident, save)


def _check_quorum(run: Run, summary: RoundSummary) -> None:
    """Refuses a round with too few replies that count, before it is committed."""
    counted = sum(not row.refused for row in summary.clients)
    needed = math.ceil(run.config.replies.quorum * len(summary.clients))
    if counted < needed:
        reasons = dict.fromkeys(row.refused for row in summary.clients if row.refused)
        raise RunFolderError(
            f"{run.folder.round_name(summary.round)}: {counted} of {len(summary.clients)} replies count, "
            f"{needed} are needed: {'; '.join(reasons)}",
            f"Fix this, then resume the run: {_resuming(run)}; or lower replies.quorum in a new run",
        )
