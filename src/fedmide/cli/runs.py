"""The commands that do a run: the whole method, or one of its stages."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from fedmide.cli import flower
from fedmide.cli.shared import (
    STAGES,
    START,
    AsJson,
    Overrides,
    RunFolderPath,
    TrackerName,
    preset,
    tell_results,
    track_run,
)
from fedmide.errors import UsageError

if TYPE_CHECKING:
    from fedmide.runs.opening import Run
    from fedmide.runs.stages import Sets


app = typer.Typer()


ConfigOrRun = Annotated[Path | None, typer.Argument(help="Configuration (TOML), or a run folder to resume.")]


Out = Annotated[Path | None, typer.Option(help="New run folder. Default: runs/NAME-NNN.")]


Resume = Annotated[Path | None, typer.Option(help="Run folder to resume.")]


RuntimeName = Literal["inprocess", "flower-simulation", "flower"]


RuntimeOption = Annotated[
    RuntimeName,
    typer.Option(
        "--runtime",
        help="Place of the sites: this process, processes that Ray starts (flower-simulation), or real sites (flower).",
    ),
]


ServerFolder = Annotated[Path | None, typer.Option("--server", help="Server folder, for --runtime flower.")]


StageVerb = Literal["train", "personalize", "generate", "evaluate"]


WHOLE: tuple[StageVerb, ...] = ("train", "personalize", "generate", "evaluate")


@app.command(rich_help_panel=START, epilog="Example: fedmide demo --out runs/first-look")
def demo(overrides: Overrides = [], out: Out = None, as_json: AsJson = False) -> None:  # noqa: B006
    """Run everything on demo data (2 minutes, downloads a 93 MB model)."""
    _work(_begun(preset("demo"), overrides, out), WHOLE, as_json)


@app.command(
    rich_help_panel=START, epilog="Example: fedmide run config.toml --set federation.rounds=3 --out runs/first"
)
def run(
    config: ConfigOrRun = None,
    overrides: Overrides = [],  # noqa: B006
    out: Out = None,
    resume: Resume = None,
    runtime: RuntimeOption = "inprocess",
    server: ServerFolder = None,
    tracker: Annotated[
        TrackerName | None, typer.Option("--track", help="Also log the finished run to MLflow or TensorBoard.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Train, tune, evaluate and report.

    The same as train, personalize, generate and evaluate, one after the other. With --runtime flower, it trains and
    tunes only, like fedmide flower run.
    """
    if runtime == "flower":
        if tracker is not None:
            raise UsageError(
                "--track does not work with --runtime flower", "Remove it, and give fedmide track RUN after the run"
            )
        _at_sites(config, overrides, out, resume, server, as_json)
        return
    _check_tracker(tracker)
    _work(_opened(config, overrides, out, resume), WHOLE, as_json, runtime=runtime, tracker=tracker)


@app.command(rich_help_panel=STAGES, epilog="Example: fedmide train config.toml --out runs/first")
def train(
    config: ConfigOrRun = None,
    overrides: Overrides = [],  # noqa: B006
    out: Out = None,
    resume: Resume = None,
    runtime: RuntimeOption = "inprocess",
    as_json: AsJson = False,
) -> None:
    """Train the common adapter: warm-up, split and federated rounds (no tuning, no evaluation)."""
    _work(_opened(config, overrides, out, resume), ["train"], as_json, runtime=runtime)


@app.command(rich_help_panel=STAGES, epilog="Example: fedmide personalize runs/first")
def personalize(path: RunFolderPath, as_json: AsJson = False) -> None:
    """Tune the model of each site on its own records.

    It starts from the common adapter or, with personalization.start = "own", from the site's last local adapter.
    """
    _work(_earlier(path), ["personalize"], as_json)


@app.command(rich_help_panel=STAGES, epilog="Example: fedmide generate runs/first")
def generate(path: RunFolderPath, as_json: AsJson = False) -> None:
    """Generate responses to each site's test prompts."""
    _work(_earlier(path), ["generate"], as_json)


@app.command(
    rich_help_panel=STAGES,
    epilog="Example: fedmide evaluate runs/first --choice medqa:copies/medqa --max-questions 200",
)
def evaluate(
    path: RunFolderPath,
    choice: Annotated[
        list[str],
        typer.Option(
            "--choice",
            help="Also measure a public benchmark: SET:PATH. SET is medqa, medmcqa, pubmedqa or careqa; "
            "PATH is your copy of it or its hub id (repeatable).",
        ),
    ] = [],  # noqa: B006
    max_questions: Annotated[
        int, typer.Option(min=0, help="Maximum number of questions per set, drawn at random; 0: all.")
    ] = 0,
    as_json: AsJson = False,
) -> None:
    """Measure the models on each site's test records.

    The models are the base model, the common adapter and, after the tuning, the site's tuned adapter.
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
    """Does stages of a run, then prints the results. `questions` are for the evaluation."""
    with opening as opened:
        from fedmide.runs import stages
        from fedmide.terminal import bars

        if names == ["generate"] and not opened.config.generation.enabled:
            raise UsageError(
                f"{opened.folder.path}: generation.enabled is false in this run",
                "Start a new run with --set generation.enabled=true",
            )
        with _reached(opened, runtime) as run:
            if "train" in names:
                stages.train(run, bars)
            if "personalize" in names:
                stages.personalize(run, bars)
        if "generate" in names:
            stages.generate(opened, bars)
        metrics = stages.evaluate(opened, bars, questions or {}) if "evaluate" in names else None
        tell_results(opened, as_json, metrics)
        if tracker is not None:
            from fedmide.terminal import tell

            tell(track_run(opened.folder, tracker))


def _check_tracker(tracker: TrackerName | None) -> None:
    """Refuses a tracker that is not installed, before any long work."""
    if tracker is not None:
        from fedmide.runs.tracking import check_installed

        check_installed(tracker)


def _at_sites(
    config: Path | None, overrides: list[str], out: Path | None, resume: Path | None, server: Path | None, as_json: bool
) -> None:
    """Starts or resumes a run at the sites of a federation."""
    if server is None:
        raise UsageError("--runtime flower needs --server", "Give the server folder, which fedmide flower init creates")
    if resume is not None:
        if config is not None or overrides or out is not None:
            raise UsageError(
                f"with --runtime flower, the run in {resume} is resumed unchanged", "Remove CONFIG, --set and --out"
            )
        flower.resume(server, resume, as_json)
    else:
        flower.run_(server, config, overrides, out, as_json)


def _reached(run: "Run", runtime: RuntimeName) -> AbstractContextManager["Run"]:
    """The same run, with its sites in the wanted runtime."""
    if runtime == "inprocess":
        return nullcontext(run)
    if runtime == "flower":
        raise UsageError("train has no --runtime flower", "Use fedmide flower run SERVER")
    from fedmide.flower.remote_runs import simulated

    return simulated(run)


def _questions(run: Path, wanted: Sequence[str], most: int) -> "Sets":
    """The public questions named as SET:PATH, at most `most` per set, drawn by `data.seed`."""
    if not wanted:
        if most:
            raise UsageError(f"--max-questions {most}: there are no questions", "Add --choice SET:PATH")
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
            raise UsageError(f"--choice names {known} twice", "Give each set once")
        found[known] = draw_questions(read_questions(known, Path(path).expanduser(), tell), most, seed)
    return found


def _opened(
    path: Path | None, overrides: list[str], out: Path | None, resume: Path | None
) -> AbstractContextManager["Run"]:
    """The run that the command line names: a new one from a configuration, or an earlier one."""
    if path is not None and path.is_dir():
        if resume is not None:
            raise UsageError(f"{path} and --resume {resume} are both run folders", "Give only one of them")
        path, resume = None, path
    if resume is not None and out is not None:
        raise UsageError(f"--out {out} can't be given for the run in {resume}", "Remove --out")
    if resume is not None:
        return _earlier(resume, path, overrides)
    if path is None:
        raise UsageError(
            "nothing to run", "Give a configuration (TOML) or --resume RUN. fedmide demo runs without either"
        )
    return _begun(path, overrides, out)


def _begun(config: Path, overrides: list[str], out: Path | None) -> AbstractContextManager["Run"]:
    """A new run."""
    from fedmide.config import load
    from fedmide.journal.creation import RUNS, check_new, free_folder

    path, loaded = out or free_folder(RUNS, config.stem), load(config, overrides)
    check_new(path, loaded)  # refuse a mistake before the slow imports
    from fedmide.runs import opening
    from fedmide.terminal import tell

    return opening.start(loaded, path, tell)


def _earlier(path: Path, config: Path | None = None, overrides: Sequence[str] = ()) -> AbstractContextManager["Run"]:
    """An earlier run. If a configuration is given too, it must be that of the run."""
    from fedmide.config import load
    from fedmide.journal.creation import reopen

    if config is None and overrides:
        raise UsageError(
            "--set can't change a run that has begun", "Start a new run: fedmide run CONFIG --set section.key=value"
        )
    loaded = None if config is None else load(config, overrides)
    reopen(path, loaded)
    from fedmide.runs import opening
    from fedmide.terminal import tell

    return opening.resume(path, loaded, tell)
