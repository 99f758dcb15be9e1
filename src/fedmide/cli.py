"""The command line. Heavy imports are inside the commands, so that help comes at once.

Results go to stdout, as a table or with --json as one JSON object; progress and messages go to stderr. A user's
mistake is one paragraph and exit code 2.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import click
import typer

from fedmide import __version__
from fedmide.atomic import without_nan
from fedmide.errors import UsageError, UserError
from fedmide.flower import commands as flower_commands

if TYPE_CHECKING:
    from fedmide.stages import Run

app = typer.Typer(
    help="Federated instruction tuning on records that never leave their owner, personalised by data alone.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
data_app = typer.Typer(help="Look at records, or make some.", no_args_is_help=True)
app.add_typer(data_app, name="data")
app.add_typer(flower_commands.app, name="flower")

ConfigOrRun = Annotated[Path | None, typer.Argument(help="A configuration (TOML), or a run folder to go on with.")]
RunFolderPath = Annotated[Path, typer.Argument(help="A run folder.")]
Overrides = Annotated[list[str], typer.Option("--set", help="section.key=value, over the configuration's own.")]
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
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]

Rule = Literal["otsu-256", "otsu-exact", "median"]  # as in config.ThresholdRule, which takes too long to import here

StageVerb = Literal["train", "personalize", "generate", "evaluate"]
BY_SITES = ("train", "personalize")
WHOLE: tuple[StageVerb, ...] = ("train", "personalize", "generate", "evaluate")

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130


def main() -> None:
    """The entry point: what a user can mend is one paragraph on stderr, without a traceback."""
    try:
        code = app(prog_name="fedmide", standalone_mode=False)
    except UserError as error:
        code = _refuse(str(error), error.problems)
    except click.ClickException as error:
        code = _refuse(*_usage(error)) if error.format_message() else error.exit_code  # else help has been shown
    except OSError as error:
        if error.filename is None:
            raise
        code = _refuse(f"{error.filename}: {error.strerror}")
    except (KeyboardInterrupt, click.Abort):
        code = EXIT_INTERRUPTED
    if code == EXIT_INTERRUPTED:
        sys.stderr.write("\nfedmide: stopped; a run that has begun goes on with fedmide run --resume RUN\n")
    sys.exit(code)


def _show_version(wanted: bool) -> None:
    if wanted:
        sys.stdout.write(f"fedmide {__version__}\n")
        raise typer.Exit


Version = Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")]


@app.callback()
def _root(version: Version = False) -> None:
    """Takes the options that go before a command."""


@app.command()
def demo(overrides: Overrides = [], out: Out = None, as_json: AsJson = False) -> None:  # noqa: B006
    """The whole method in minutes: medical sites, a small real model."""
    _work(_begun(_preset("demo"), overrides, out), WHOLE, as_json)


@app.command()
def run(
    config: ConfigOrRun = None,
    overrides: Overrides = [],  # noqa: B006
    out: Out = None,
    resume: Resume = None,
    runtime: RuntimeOption = "inprocess",
    server: ServerFolder = None,
    as_json: AsJson = False,
) -> None:
    """The whole method, from records to metrics.

    Warm-up, split, rounds with enrollment, personalisation, generation and metrics: what train, personalize, generate
    and evaluate do one by one. With --runtime flower, rounds and personalisation: what fedmide flower run does.
    """
    if runtime == "flower":
        _at_sites(config, overrides, out, resume, server, as_json)
        return
    _work(_opened(config, overrides, out, resume), WHOLE, as_json, runtime)


@app.command()
def train(
    config: ConfigOrRun = None,
    overrides: Overrides = [],  # noqa: B006
    out: Out = None,
    resume: Resume = None,
    runtime: RuntimeOption = "inprocess",
    as_json: AsJson = False,
) -> None:
    """Warm-up, split and federated rounds only."""
    _work(_opened(config, overrides, out, resume), ["train"], as_json, runtime)


@app.command()
def personalize(path: RunFolderPath, as_json: AsJson = False) -> None:
    """Tune the aggregated adapter on each client's own records."""
    _work(_earlier(path), ["personalize"], as_json)


@app.command()
def generate(path: RunFolderPath, as_json: AsJson = False) -> None:
    """Write each client's responses to its test prompts."""
    _work(_earlier(path), ["generate"], as_json)


@app.command()
def evaluate(path: RunFolderPath, as_json: AsJson = False) -> None:
    """Measure each client's test records.

    Under the base model, the aggregated adapter and, once there is one, the client's personalised adapter.
    """
    _work(_earlier(path), ["evaluate"], as_json)


@app.command()
def split(
    path: Annotated[Path, typer.Argument(help="Scored records, JSON or JSONL.")],
    rule: Annotated[Rule, typer.Option(help="How the threshold is found.")] = "otsu-256",
    out: Annotated[Path | None, typer.Option(help="Folder for shared.json and personal.json.")] = None,
    as_json: AsJson = False,
) -> None:
    """Tell shared records from personal ones by their scores."""
    from fedmide.sources.scored import split_file

    result = split_file(path, rule, out)
    if failed := result.pop("not_finite"):
        sys.stderr.write(
            f"fedmide: {failed} scores are no number; where there is a threshold their records are personal\n"
        )
    if as_json:
        _print_json(result)
    else:
        threshold = "none" if result["threshold"] is None else f"{result['threshold']:.6f}"
        counts = f"{result['shared']} shared, {result['personal']} personal"
        sys.stdout.write(f"{counts}, threshold {threshold} ({result['rule']})\n")


@data_app.command("check")
def data_check(
    path: Annotated[Path, typer.Argument(help="A folder or file of records.")],
    overrides: Overrides = [],  # noqa: B006
    as_json: AsJson = False,
) -> None:
    """Report counts, duplicates and leaks of records.

    The parts are as given: nothing is split off, unless --set data.test_fraction=... asks for it.
    """
    from dataclasses import asdict

    from rich.console import Console

    from fedmide.config import apply_overrides, parse
    from fedmide.console import check_table, leak_lines
    from fedmide.sources import check, detect, load

    as_given = {"path": str(path), "source": detect(path), "validation_fraction": 0.0, "test_fraction": 0.0}
    config = parse(apply_overrides({"data": as_given}, overrides))
    report = check.check(load(config.data, config.seed))
    if as_json:
        _print_json(asdict(report))
    else:
        Console().print(check_table(report))
        sys.stdout.writelines(f"{line}\n" for line in leak_lines(report))


@data_app.command("build")
def data_build(
    out: Annotated[Path, typer.Argument(help="Folder to write, one subfolder a site.")],
    seed: Annotated[int, typer.Option(help="Every draw follows from it.")] = 0,
    clients: Annotated[int, typer.Option(min=1, help="Number of sites.")] = 8,
    training: Annotated[int, typer.Option(min=1, help="Training records a site.")] = 48,
    validation: Annotated[int, typer.Option(min=0, help="Validation records a site.")] = 12,
    test: Annotated[int, typer.Option(min=0, help="Test records a site.")] = 24,
    as_json: AsJson = False,
) -> None:
    """Write the medical sites as JSON lines that anyone can read."""
    from fedmide.sources import medical

    sites = medical.build(seed, clients, training, validation, test)
    medical.write(sites, out)
    if as_json:
        _print_json({"folder": str(out), "clients": [site.name for site in sites]})
    else:
        sys.stdout.write(f"{len(sites)} sites in {out}: {', '.join(site.name for site in sites)}\n")


def _work(
    opening: AbstractContextManager["Run"],
    names: Sequence[StageVerb],
    as_json: bool,
    runtime: RuntimeName = "inprocess",
) -> None:
    """Does stages of a run, then tells of them."""
    with opening as opened:
        from fedmide import stages
        from fedmide.console import bars

        if names == ["generate"] and not opened.config.generation.enabled:
            raise UsageError(
                f"{opened.folder.path}: generation.enabled is false in this run", "Start a new run with it"
            )
        with _reached(opened, runtime) as run:
            results = [getattr(stages, name)(run, bars) for name in names if name in BY_SITES]
        # each verb is called like its stage
        results += [getattr(stages, name)(opened, bars) for name in names if name not in BY_SITES]
        _report(opened, as_json, results[-1])


def _at_sites(
    config: Path | None, overrides: list[str], out: Path | None, resume: Path | None, server: Path | None, as_json: bool
) -> None:
    """Begins or goes on with a run at a consortium's sites."""
    if server is None:
        raise UsageError("--runtime flower needs --server", "Make a consortium with fedmide flower init")
    if resume is not None:
        flower_commands.resume(server, resume, as_json)
    else:
        flower_commands.run_(server, config, overrides, out, as_json)


def _reached(run: "Run", runtime: RuntimeName) -> AbstractContextManager["Run"]:
    """The same run, its clients reached as wanted."""
    if runtime == "inprocess":
        return nullcontext(run)
    if runtime == "flower":
        raise UsageError("train has no --runtime flower", "Use fedmide flower run")
    from fedmide.flower.runs import simulated

    return simulated(run)


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
    from fedmide.journal import check_new

    path, loaded = out or _free_folder(config.stem), load(config, overrides)
    check_new(path, loaded)  # a mistake is told before anything that takes long to import
    from fedmide import stages
    from fedmide.console import tell

    return stages.start(loaded, path, tell)


def _earlier(path: Path, config: Path | None = None, overrides: Sequence[str] = ()) -> AbstractContextManager["Run"]:
    """An earlier run; a configuration beside it must be its own."""
    from fedmide.config import load
    from fedmide.journal import reopen

    if config is None and overrides:
        raise UsageError("--set can't change a run that has begun", "Start a new run with CONFIG and --set")
    loaded = None if config is None else load(config, overrides)
    reopen(path, loaded)
    from fedmide import stages
    from fedmide.console import tell

    return stages.resume(path, loaded, tell)


def _free_folder(name: str) -> Path:
    number = 1
    while (folder := Path("runs") / f"{name}-{number:03d}").exists():
        number += 1
    return folder


def _preset(name: str) -> Path:
    return Path(__file__).parent / "presets" / f"{name}.toml"


def _report(opened: "Run", as_json: bool, metrics: Mapping[str, Any] | None = None) -> None:
    """What a run command ends with: where the folder lies, and the table where there is one."""
    from rich.console import Console

    from fedmide.console import results_table

    manifest = opened.folder.read_manifest()
    if as_json:
        facts = {"run": str(opened.folder.path), "status": manifest["status"], "seconds": manifest["seconds"]}
        _print_json({**facts, **(metrics or {})})
        return
    if metrics is not None:
        Console().print(results_table(metrics) if metrics["over_clients"] else "no test records, so no figures")
    sys.stdout.write(f"{manifest['status']}: {opened.folder.path}\n")


def _refuse(message: str, problems: Sequence[str] = ()) -> int:
    """The exit code of a mistake, after it has been told."""
    sys.stderr.write(f"fedmide: {message}\n")
    if "--json" in sys.argv:
        _print_json({"error": message, "problems": list(problems) or [message]})
    return EXIT_USER_ERROR


def _usage(error: click.ClickException) -> tuple[str, list[str]]:
    """A mistake in the command line as one paragraph, and its problem."""
    problem = error.format_message().rstrip(".")
    command = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else "fedmide"
    return f"{problem}. See {command} --help", [problem]


def _print_json(values: Mapping[str, Any]) -> None:
    sys.stdout.write(json.dumps(without_nan(values), indent=2, allow_nan=False) + "\n")
