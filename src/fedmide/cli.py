"""The command line. Heavy imports are inside the commands, so that help comes at once.

Results go to stdout, as a table or with --json as one JSON object; progress and messages go to stderr. A user's
mistake is one paragraph and exit code 2.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from fedmide import __version__
from fedmide.errors import UsageError, UserError

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

ConfigOrRun = Annotated[Path | None, typer.Argument(help="A configuration (TOML), or a run folder to go on with.")]
RunFolderPath = Annotated[Path, typer.Argument(help="A run folder.")]
Overrides = Annotated[list[str], typer.Option("--set", help="section.key=value, over the configuration's own.")]
Out = Annotated[Path | None, typer.Option(help="Folder for the run; otherwise runs/NAME-NNN.")]
Resume = Annotated[Path | None, typer.Option(help="A run folder to go on with.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]

Rule = Literal["otsu-256", "otsu-exact", "median"]  # as in config.ThresholdRule, which takes too long to import here

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130


def main() -> None:
    """The entry point: what a user can mend is one paragraph on stderr, without a traceback."""
    try:
        app()
    except UserError as error:
        sys.stderr.write(f"fedmide: {error}\n")
        if "--json" in sys.argv:
            _print_json({"error": str(error), "problems": list(error.problems)})
        sys.exit(EXIT_USER_ERROR)
    except KeyboardInterrupt:
        sys.stderr.write("\nfedmide: stopped; what is whole is kept: go on with fedmide run --resume RUN\n")
        sys.exit(EXIT_INTERRUPTED)


@app.callback()
def _root(version: Annotated[bool, typer.Option("--version", is_eager=True, help="Show the version.")] = False) -> None:
    if version:
        sys.stdout.write(f"fedmide {__version__}\n")
        raise typer.Exit


@app.command()
def demo(overrides: Overrides = [], out: Out = None, as_json: AsJson = False) -> None:  # noqa: B006
    """The whole method on eight medical sites with a small real model: a few minutes on two cores."""
    _whole(_open(_preset("demo"), overrides, out, None), as_json)


@app.command()
def run(
    config: ConfigOrRun = None,
    overrides: Overrides = [],  # noqa: B006
    out: Out = None,
    resume: Resume = None,
    as_json: AsJson = False,
) -> None:
    """The whole method: warm-up, split, rounds with enrollment, personalisation, generation, metrics."""
    _whole(_open(config, overrides, out, resume), as_json)


@app.command()
def train(
    config: ConfigOrRun = None,
    overrides: Overrides = [],  # noqa: B006
    out: Out = None,
    resume: Resume = None,
    as_json: AsJson = False,
) -> None:
    """Warm-up, split and federated rounds only."""
    from fedmide import stages
    from fedmide.console import bars

    opened = _open(config, overrides, out, resume)
    stages.train(opened, bars)
    _report(opened, as_json)


@app.command()
def personalize(path: RunFolderPath, as_json: AsJson = False) -> None:
    """Tune the aggregated adapter of a trained run on each client's own records."""
    from fedmide import stages
    from fedmide.console import bars

    opened = _open(path, [], None, None)
    stages.personalize(opened, bars)
    _report(opened, as_json)


@app.command()
def generate(path: RunFolderPath, as_json: AsJson = False) -> None:
    """Write each client's responses to its test prompts."""
    from fedmide import stages
    from fedmide.console import bars

    opened = _open(path, [], None, None)
    stages.generate(opened, bars)
    _report(opened, as_json)


@app.command()
def evaluate(path: RunFolderPath, as_json: AsJson = False) -> None:
    """Measure each client's test records under base model, aggregated and personalised adapter."""
    from fedmide import stages
    from fedmide.console import bars

    opened = _open(path, [], None, None)
    _report(opened, as_json, stages.evaluate(opened, bars))


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
    """Read records and report counts, duplicates and leaks; every problem is named with its place."""
    from dataclasses import asdict

    from rich.console import Console

    from fedmide.config import apply_overrides, parse
    from fedmide.console import check_table, leak_lines
    from fedmide.sources import check, detect, load

    values = apply_overrides({"data": {"path": str(path), "source": detect(path)}}, overrides)
    config = parse(values)
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
    files = medical.write(sites, out)
    if as_json:
        _print_json({"folder": str(out), "clients": [site.name for site in sites], "files": len(files)})
    else:
        sys.stdout.write(f"{len(sites)} sites in {out}: {', '.join(site.name for site in sites)}\n")


def _whole(opened: "Run", as_json: bool) -> None:
    from fedmide import stages
    from fedmide.console import bars

    stages.train(opened, bars)
    stages.personalize(opened, bars)
    stages.generate(opened, bars)
    _report(opened, as_json, stages.evaluate(opened, bars))


def _open(path: Path | None, overrides: list[str], out: Path | None, resume: Path | None) -> "Run":
    """The run that the command line means: a new one out of a configuration, or an earlier one."""
    from fedmide import stages
    from fedmide.config import load

    if path is not None and path.is_dir():
        if resume is not None:
            raise UsageError(f"{path} and --resume {resume} are both run folders", "Give one of them")
        path, resume = None, path
    if path is None and resume is None:
        raise UsageError("nothing to run", "Give a configuration such as examples/tiny.toml, or --resume RUN")
    if path is None and overrides:
        raise UsageError("--set can't change a run that has begun", "Start a new run with CONFIG and --set")
    config = load(path, overrides) if path is not None else None
    if resume is not None:
        return stages.resume(resume, config)
    assert config is not None and path is not None  # one of the two was given
    return stages.start(config, out or _free_folder(path.stem))


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
        Console().print(results_table(metrics))
    sys.stdout.write(f"{manifest['status']}: {opened.folder.path}\n")


def _print_json(values: Mapping[str, Any]) -> None:
    sys.stdout.write(json.dumps(values, indent=2) + "\n")
