"""The verbs of a run: the whole method, or a stage of it."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from fedmide.cli import flower
from fedmide.cli.shared import AsJson, Overrides, RunFolderPath, TrackerName, preset, tell_results, track_run
from fedmide.errors import UsageError

if TYPE_CHECKING:
    from fedmide.runs.opening import Run
    from fedmide.runs.stages import Sets


app = typer.Typer()


ConfigOrRun = Annotated[Path | None, typer.Argument(help="A configuration (TOML), or a run folder to go on with.")]


Out = Annotated[Path | None, typer.Option(help="Folder for the run; otherwise runs/NAME-NNN.")]


Resume = Annotated[Path | None, typer.Option(help="A run folder to go on with.")]


RuntimeName = Literal["inprocess", "flower-simulation", "flower"]


RuntimeOption = Annotated[
    RuntimeName,
    typer.Option(
        "--runtime", help="Where the clients are: here, in processes that Ray starts, or at a consortium's sites."
    ),
]


ServerFolder = Annotated[Path | None, typer.Option("--server", help="With --runtime flower: the server's folder.")]


StageVerb = Literal["train", "personalize", "generate", "evaluate"]


BY_SITES = ("train", "personalize")


WHOLE: tuple[StageVerb, ...] = ("train", "personalize", "generate", "evaluate")


@app.command(epilog="Example: fedmide demo --out runs/first-look")
def demo(overrides: Overrides = [], out: Out = None, as_json: AsJson = False) -> None:  # noqa: B006
    """The whole method in minutes: medical sites, a small real model."""
    _work(_begun(preset("demo"), overrides, out), WHOLE, as_json)


@app.command(epilog="Example: fedmide run examples/tiny.toml --set federation.rounds=3 --out runs/tiny")
def run(
    config: ConfigOrRun = None,
    overrides: Overrides = [],  # noqa: B006
    out: Out = None,
    resume: Resume = None,
    runtime: RuntimeOption = "inprocess",
    server: ServerFolder = None,
    tracker: Annotated[TrackerName | None, typer.Option("--track", help="Then also put it where track does.")] = None,
    as_json: AsJson = False,
) -> None:
    """The whole method, from records to metrics.

    Warm-up, split, rounds with enrollment, personalisation, generation and metrics: what train, personalize, generate
    and evaluate do one by one. With --runtime flower, rounds and personalisation: what fedmide flower run does.
    """
    if runtime == "flower":
        if tracker is not None:
            raise UsageError("--track does not go with --runtime flower", "Give fedmide track RUN afterwards")
        _at_sites(config, overrides, out, resume, server, as_json)
        return
    _check_tracker(tracker)
    _work(_opened(config, overrides, out, resume), WHOLE, as_json, runtime=runtime, tracker=tracker)


@app.command(epilog="Example: fedmide train examples/tiny.toml --out runs/tiny")
def train(
    config: ConfigOrRun = None,
    overrides: Overrides = [],  # noqa: B006
    out: Out = None,
    resume: Resume = None,
    runtime: RuntimeOption = "inprocess",
    as_json: AsJson = False,
) -> None:
    """Warm-up, split and federated rounds only."""
    _work(_opened(config, overrides, out, resume), ["train"], as_json, runtime=runtime)


@app.command(epilog="Example: fedmide personalize runs/tiny")
def personalize(path: RunFolderPath, as_json: AsJson = False) -> None:
    """Tune the aggregated adapter, or each client's own last one, on its own records."""
    _work(_earlier(path), ["personalize"], as_json)


@app.command(epilog="Example: fedmide generate runs/tiny")
def generate(path: RunFolderPath, as_json: AsJson = False) -> None:
    """Write each client's responses to its test prompts."""
    _work(_earlier(path), ["generate"], as_json)


@app.command(epilog="Example: fedmide evaluate runs/tiny --choice medqa:copies/medqa --max-questions 200")
def evaluate(
    path: RunFolderPath,
    choice: Annotated[
        list[str],
        typer.Option("--choice", help="Also SET:PATH, your copy of medqa, medmcqa, pubmedqa or careqa, or its hub id."),
    ] = [],  # noqa: B006
    max_questions: Annotated[int, typer.Option(min=0, help="At most so many questions of a set, drawn; 0: all.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Measure each client's test records.

    Under the base model, the aggregated adapter and, once there is one, the client's personalised adapter.
    """
    _work(_earlier(path), ["evaluate"], as_json, _questions(path, choice, max_questions))


def _work(
    opening: AbstractContextManager["Run"],
    names: Sequence[StageVerb],
    as_json: bool,
    questions: "Sets | None" = None,
    runtime: RuntimeName = "inprocess",
    tracker: TrackerName | None = None,
) -> None:
    """Does stages of a run, then tells of them; `questions` are for the evaluation."""
    with opening as opened:
        from fedmide.runs import stages
        from fedmide.terminal import bars

        if names == ["generate"] and not opened.config.generation.enabled:
            raise UsageError(
                f"{opened.folder.path}: generation.enabled is false in this run", "Start a new run with it"
            )
        more = {"questions": questions} if questions else {}
        with _reached(opened, runtime) as run:
            results = [getattr(stages, name)(run, bars) for name in names if name in BY_SITES]
        # each verb is called like its stage
        results += [getattr(stages, name)(opened, bars, **more) for name in names if name not in BY_SITES]
        tell_results(opened, as_json, results[-1])
        if tracker is not None:
            from fedmide.terminal import tell

            tell(track_run(opened.folder, tracker))


def _check_tracker(tracker: TrackerName | None) -> None:
    """Refuses a tracker that is not installed, before anything that takes long."""
    if tracker is not None:
        from fedmide.runs.tracking import check_installed

        check_installed(tracker)


def _at_sites(
    config: Path | None, overrides: list[str], out: Path | None, resume: Path | None, server: Path | None, as_json: bool
) -> None:
    """Begins or goes on with a run at a consortium's sites."""
    if server is None:
        raise UsageError("--runtime flower needs --server", "Make a consortium with fedmide flower init")
    if resume is not None:
        if config is not None or overrides or out is not None:
            raise UsageError(
                f"with --runtime flower, the run in {resume} goes on as it is", "Leave CONFIG, --set and --out away"
            )
        flower.resume(server, resume, as_json)
    else:
        flower.run_(server, config, overrides, out, as_json)


def _reached(run: "Run", runtime: RuntimeName) -> AbstractContextManager["Run"]:
    """The same run, its clients reached as wanted."""
    if runtime == "inprocess":
        return nullcontext(run)
    if runtime == "flower":
        raise UsageError("train has no --runtime flower", "Use fedmide flower run")
    from fedmide.flower.remote_runs import simulated

    return simulated(run)


def _questions(run: Path, wanted: Sequence[str], most: int) -> "Sets":
    """The public questions named as SET:PATH, at most `most` per set, drawn by `data.seed`."""
    if not wanted:
        if most:
            raise UsageError(f"--max-questions {most}: there are no questions", "Say --choice SET:PATH too")
        return {}
    from fedmide.data.questions import SETS, read_questions
    from fedmide.evaluation.questions import draw_questions
    from fedmide.journal.creation import reopen
    from fedmide.terminal import tell

    seed, found = reopen(run).config.data_seed, {}
    for each in wanted:
        name, _, path = each.partition(":")
        known = next((known for known in SETS if known == name), None)
        if known is None or not path:
            raise UsageError(f"--choice {each!r}: expected SET:PATH", f"The sets are {', '.join(SETS)}")
        if known in found:
            raise UsageError(f"--choice names {known} twice", "Give one copy of it")
        found[known] = draw_questions(read_questions(known, Path(path).expanduser(), tell), most, seed)
    return found


def _opened(
    path: Path | None, overrides: list[str], out: Path | None, resume: Path | None
) -> AbstractContextManager["Run"]:
    """The run that the command line means: a new one out of a configuration, or an earlier one."""
    if path is not None and path.is_dir():
        if resume is not None:
            raise UsageError(f"{path} and --resume {resume} are both run folders", "Give one of them")
        path, resume = None, path
    if resume is not None and out is not None:
        raise UsageError(f"--out {out} can't be given for the run in {resume}", "Leave it away")
    if resume is not None:
        return _earlier(resume, path, overrides)
    if path is None:
        raise UsageError("nothing to run", "Give a configuration such as examples/tiny.toml, or --resume RUN")
    return _begun(path, overrides, out)


def _begun(config: Path, overrides: list[str], out: Path | None) -> AbstractContextManager["Run"]:
    """A new run."""
    from fedmide.config import load
    from fedmide.journal.creation import RUNS, check_new, free_folder

    path, loaded = out or free_folder(RUNS, config.stem), load(config, overrides)
    check_new(path, loaded)  # a mistake is told before anything that takes long to import
    from fedmide.runs import opening
    from fedmide.terminal import tell

    return opening.start(loaded, path, tell)


def _earlier(path: Path, config: Path | None = None, overrides: Sequence[str] = ()) -> AbstractContextManager["Run"]:
    """An earlier run; a configuration beside it must be its own."""
    from fedmide.config import load
    from fedmide.journal.creation import reopen

    if config is None and overrides:
        raise UsageError("--set can't change a run that has begun", "Start a new run with CONFIG and --set")
    loaded = None if config is None else load(config, overrides)
    reopen(path, loaded)
    from fedmide.runs import opening
    from fedmide.terminal import tell

    return opening.resume(path, loaded, tell)
