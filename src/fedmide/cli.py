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
    from collections.abc import Callable

    from fedmide.stages import Run, Sets

app = typer.Typer(
    help="Federated instruction tuning on records that never leave their owner, personalised by data alone.",
    no_args_is_help=True,
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

Rule = Literal["otsu-256", "otsu-exact", "otsu-log", "median", "natural"]  # those of config, which takes long to import

WhichScenario = Literal["own-style", "own-labels", "both"]  # those of sources.identification
Part = Literal["training", "validation", "test"]

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
        code = _refuse(str(error), error.problems, type(error).__name__)
    except click.ClickException as error:
        code = _refuse(*_usage(error)) if error.format_message() else error.exit_code  # else help has been shown
    except OSError as error:
        if error.filename is None:
            raise
        code = _refuse(f"{error.filename}: {error.strerror}", explained="OSError")
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


@app.command(epilog="Example: fedmide demo --out runs/first-look")
def demo(overrides: Overrides = [], out: Out = None, as_json: AsJson = False) -> None:  # noqa: B006
    """The whole method in minutes: medical sites, a small real model."""
    _work(_begun(_preset("demo"), overrides, out), WHOLE, as_json)


@app.command(epilog="Example: fedmide run examples/tiny.toml --set federation.rounds=3 --out runs/tiny")
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
    _work(_opened(config, overrides, out, resume), WHOLE, as_json, runtime=runtime)


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
    """Tune the aggregated adapter on each client's own records."""
    _work(_earlier(path), ["personalize"], as_json)


@app.command(epilog="Example: fedmide generate runs/tiny")
def generate(path: RunFolderPath, as_json: AsJson = False) -> None:
    """Write each client's responses to its test prompts."""
    _work(_earlier(path), ["generate"], as_json)


@app.command(epilog="Example: fedmide evaluate runs/tiny --choice medqa:copies/medqa --max-questions 200")
def evaluate(
    path: RunFolderPath,
    choice: Annotated[
        list[str], typer.Option("--choice", help="Also SET:PATH, your copy of medqa, medmcqa, pubmedqa or careqa.")
    ] = [],  # noqa: B006
    max_questions: Annotated[int, typer.Option(min=0, help="At most so many questions of a set, drawn; 0: all.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Measure each client's test records.

    Under the base model, the aggregated adapter and, once there is one, the client's personalised adapter.
    """
    _work(_earlier(path), ["evaluate"], as_json, _questions(path, choice, max_questions))


@app.command(epilog="Example: fedmide identify --scenario own-style --set federation.rounds=1")
def identify(
    config: Annotated[
        Path | None, typer.Argument(help="A configuration (TOML); otherwise a preset of minutes.")
    ] = None,
    overrides: Overrides = [],  # noqa: B006
    scenario: Annotated[WhichScenario, typer.Option(help="Which kind of sites.")] = "both",
    clients: Annotated[int, typer.Option(min=1, help="Number of sites.")] = 8,
    records: Annotated[int, typer.Option(min=2, help="Shared records a site; as many are personal.")] = 30,
    match_lengths: Annotated[bool, typer.Option(help="Shared records about as long as the personal ones.")] = True,
    out: Annotated[Path | None, typer.Option(help="File for the figures (JSON).")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure how well the score finds personal records, on sites where they are known."""
    from rich.console import Console

    from fedmide.atomic import to_json, write_file
    from fedmide.config import load

    if out is not None and out.exists():
        raise UsageError(f"{out} exists already", "Give another --out")
    loaded = load(config or _preset("identify"), overrides)
    from fedmide import identify as bench
    from fedmide.console import bars, rivals_table, sets_table, tell
    from fedmide.sources.identification import SCENARIOS

    sizes = bench.Sizes(clients, records, match_lengths)
    wanted = [name for name in SCENARIOS if scenario in (name, "both")]
    scenarios = {name: bench.identify(loaded, name, sizes, tell, bars) for name in wanted}
    result = {"scenarios": scenarios}
    if out is not None:
        write_file(out, to_json(result))
    if as_json:
        _print_json(result)
        return
    for name, figures in scenarios.items():
        Console().print(rivals_table(name, figures), sets_table(name, figures))


@app.command(epilog="Example: fedmide compare examples/compare-medical.toml --methods fedmide,fedavg-ft --seeds 0,1")
def compare(
    config: Annotated[Path, typer.Argument(help="A configuration (TOML); it may have tables [variants.NAME].")],
    methods: Annotated[str, typer.Option(help="Methods and variants, with commas between.")],
    seeds: Annotated[str, typer.Option(help="Seeds of the training, with commas between.")] = "0,1,2",
    learning_rates: Annotated[str, typer.Option(help="Rates to choose from on validation; otherwise as set.")] = "",
    against: Annotated[str, typer.Option(help="Whom all others are held against.")] = "fedavg-ft,fedmide",
    validation: Annotated[
        bool, typer.Option("--validation", help="Look at validation records only: to choose settings by.")
    ] = False,
    overrides: Overrides = [],  # noqa: B006
    out: Annotated[
        Path | None, typer.Option(help="Folder; otherwise comparisons/NAME. It goes on where it is.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compare methods on the same records, with the same budget of local steps.

    Does the runs that are missing in the folder, then tells of all of them: a comparison that was stopped goes on.
    """
    from rich.console import Console

    from fedmide.config import apply_overrides, read_toml

    values = apply_overrides(read_toml(config), overrides)
    numbers = [int(each) for each in _listed("seeds", seeds, str.isdecimal)]
    rates = [float(each) for each in _listed("learning-rates", learning_rates, _is_number)]
    from fedmide import compare as comparing
    from fedmide.console import bars, sheet_table, tell
    from fedmide.evaluation.tables import sheets, validation_sheet

    folder = out or Path("comparisons") / config.stem
    plan = comparing.planned(values, _names(methods), numbers, folder, rates, _names(against), validation)
    figures = comparing.run(plan, tell, bars)
    if as_json:
        _print_json(figures)
        return
    tables = [validation_sheet(figures)] if validation else sheets(figures)
    Console().print(*(sheet_table(each) for each in tables))
    sys.stdout.write(f"{folder / ('validation.md' if validation else 'comparison.html')}\n")


@app.command(epilog="Example: fedmide sweep examples/tiny.toml --knob enrollment.threshold=0.9,1.0,1.1 --seeds 0")
def sweep(
    config: Annotated[Path, typer.Argument(help="A configuration (TOML).")],
    knob: Annotated[list[str], typer.Option(help="KNOB=VALUE,VALUE,...; may be given again.")],
    methods: Annotated[str, typer.Option(help="Methods, with commas between; otherwise the configuration's.")] = "",
    seeds: Annotated[str, typer.Option(help="Seeds of the training, with commas between.")] = "0,1,2",
    overrides: Overrides = [],  # noqa: B006
    out: Annotated[Path | None, typer.Option(help="Folder; otherwise sweeps/NAME. It goes on where it is.")] = None,
    as_json: AsJson = False,
) -> None:
    """Turn a knob, and see what the mean and the worst client make of it.

    Does the runs that are missing in the folder, then draws a picture of each knob.
    """
    from rich.console import Console

    from fedmide.config import apply_overrides, read_toml, without_variants

    values = without_variants(apply_overrides(read_toml(config), overrides))
    numbers = [int(each) for each in _listed("seeds", seeds, str.isdecimal)]
    from fedmide import sweep as sweeping
    from fedmide.console import bars, sweep_table, tell

    names = _names(methods) or [str(values.get("method", "fedmide"))]
    folder = out or Path("sweeps") / config.stem
    plans = [sweeping.planned(values, each, names, numbers, folder) for each in knob]
    results = {plan.knob: sweeping.run(plan, tell, bars) for plan in plans}
    if as_json:
        _print_json({"knobs": results})
        return
    for plan in plans:
        Console().print(sweep_table(results[plan.knob]))
        sys.stdout.write(f"{plan.out / 'sweep.svg'}\n")


@app.command(epilog="Example: fedmide report runs/tiny")
def report(
    paths: Annotated[list[Path], typer.Argument(help="A run folder; several are compared with the first.")],
    out: Annotated[
        Path | None, typer.Option(help="File to write; otherwise RUN/report.html or comparison.html.")
    ] = None,
    with_records: Annotated[
        bool, typer.Option("--with-records", help="Show texts of records: for the site only.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Write a page that shows what a run did, or compares runs.

    One file that needs no network: open RUN/report.html from disk.
    """
    from fedmide import report as pages
    from fedmide.journal import reopen

    folders = [reopen(path) for path in paths]
    if len(folders) > 1 and with_records:
        raise UsageError("--with-records goes with one run", "Name one run folder")
    if len(folders) > 1:
        written = pages.compare(folders, out or Path("comparison.html"))
    else:
        written = pages.write(folders[0], out, with_records)
    if as_json:
        _print_json({"report": str(written), "bytes": written.stat().st_size})
    else:
        sys.stdout.write(f"{written}\n")


@app.command(epilog="Example: fedmide export runs/demo-001 radiology-model --client radiology --merge --dtype bfloat16")
def export(
    path: RunFolderPath,
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    client: Annotated[str, typer.Option(help="Whose personalised model; otherwise the common one.")] = "",
    merge: Annotated[bool, typer.Option("--merge", help="A whole model with the adapter in its weights.")] = False,
    dtype: Annotated[
        Literal["float32", "bfloat16"], typer.Option(help="Type of a merged model's weights.")
    ] = "float32",
    as_json: AsJson = False,
) -> None:
    """Write a run's model for use elsewhere: a PEFT folder, or merged."""
    from dataclasses import asdict

    from fedmide.journal import reopen

    folder = reopen(path)
    from fedmide import export as exports

    written = exports.export(folder, out, client, merge, dtype)
    commands = exports.serving(folder, written)
    if as_json:
        _print_json({"folder": str(out), "parity": written.parity and asdict(written.parity), "commands": commands})
        return
    if written.parity is not None:
        sys.stdout.write(
            f"against the adapter: largest logit difference {written.parity.largest_logit_difference:.2g}, "
            f"{written.parity.divergence:.2g} nats apart, same first choice {written.parity.same_choice:.1%}\n"
        )
    sys.stdout.writelines(f"{line}\n" for line in (f"written: {out}", "to serve:", *commands))


@app.command(epilog="Example: fedmide watch runs/demo-001")
def watch(
    path: RunFolderPath,
    seconds: Annotated[float, typer.Option(min=0.1, help="How often to look.")] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="Look once and end.")] = False,
    as_json: AsJson = False,
) -> None:
    """Watch a run as it goes, from its folder alone.

    For a second terminal. It ends with the run; control-C ends it sooner and harms nothing.
    """
    from dataclasses import asdict
    from datetime import UTC, datetime

    from fedmide.journal import reopen
    from fedmide.watch import follow, look

    folder = reopen(path)
    if as_json:
        _print_json(asdict(look(folder, datetime.now(UTC))))
    else:
        follow(folder, seconds, once)


@app.command(epilog="Example: fedmide split scores.json --rule otsu-exact --out sets")
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


@app.command("methods", epilog="Example: fedmide methods")
def list_methods(as_json: AsJson = False) -> None:
    """List the federated methods that a configuration can choose."""
    from rich.console import Console

    from fedmide.console import methods_table
    from fedmide.methods import METHODS

    if as_json:
        _print_json({name: {"summary": each.summary, "source": each.source} for name, each in METHODS.items()})
    else:
        Console().print(methods_table(METHODS.values()))


@app.command(epilog="Example: fedmide explain DataError")
def explain(
    name: Annotated[str, typer.Argument(help="The name that a message ends with.")], as_json: AsJson = False
) -> None:
    """Say what an error means and what to do about it."""
    from fedmide.explanations import PAGE, explanation, sections

    text = explanation(name)
    if not text:
        raise UsageError(f"{name!r} is no error", f"Known: {', '.join(sections(PAGE.read_text('utf-8')))}")
    if as_json:
        _print_json({"name": name, "text": text})
    else:
        sys.stdout.write(text)


@data_app.command("check", epilog="Example: fedmide data check records --set data.fields.response=answer")
def data_check(
    path: Annotated[Path, typer.Argument(help="A folder or file of records.")],
    overrides: Overrides = [],  # noqa: B006
    as_json: AsJson = False,
) -> None:
    """Report counts, lengths, duplicates, leaks, categories and what looks like an identifier of a person.

    The parts are as given: nothing is split off, unless --set data.test_fraction=... asks for it.
    """
    from dataclasses import asdict

    from rich.console import Console

    from fedmide.config import apply_overrides, parse
    from fedmide.console import category_lines, check_table, identifier_lines, leak_lines
    from fedmide.sources import check, detect, load

    as_given = {"path": str(path), "source": detect(path), "validation_fraction": 0.0, "test_fraction": 0.0}
    config = parse(apply_overrides({"data": as_given}, overrides))
    report = check.check(load(config.data, config.seed))
    if as_json:
        _print_json(asdict(report))
    else:
        Console().print(check_table(report))
        for lines in (category_lines(report), leak_lines(report), identifier_lines(report)):
            sys.stdout.writelines(f"{line}\n" for line in lines)


@data_app.command("show", epilog="Example: fedmide data show examples/tiny.toml --count 5")
def data_show(
    path: Annotated[Path, typer.Argument(help="A configuration (TOML), or a folder or file of records.")],
    client: Annotated[str, typer.Option(help="Whose records; otherwise of every client.")] = "",
    part: Annotated[Part, typer.Option(help="Which of them.")] = "training",
    count: Annotated[int, typer.Option(min=1, help="So many of each client, from the first one on.")] = 2,
    overrides: Overrides = [],  # noqa: B006
    as_json: AsJson = False,
) -> None:
    """Show records as the model sees them: what carries loss, how many tokens, what is cut.

    It prints texts of records.
    """
    from dataclasses import asdict

    from rich.console import Console

    from fedmide.config import apply_overrides, load, parse
    from fedmide.sources import detect
    from fedmide.sources import load as load_data

    if path.suffix == ".toml":
        config = load(path, overrides)
    else:
        config = parse(apply_overrides({"data": {"path": str(path), "source": detect(path)}}, overrides))
    clients = load_data(config.data, config.seed)
    if client and client not in [each.name for each in clients]:
        raise UsageError(f"--client {client}: no such client", f"Known: {', '.join(each.name for each in clients)}")
    chosen = [
        (f"{each.name}, {part} record {number}", record)
        for each in clients
        if client in ("", each.name)
        for number, record in enumerate(getattr(each, part)[:count], 1)
    ]
    if not chosen:
        raise UsageError(f"no {part} records", "Give another --part")
    from fedmide.checkpoints import locate
    from fedmide.console import tell
    from fedmide.model import load_tokenizer
    from fedmide.showing import render, see

    seen = list(see(load_tokenizer(locate(config.model.name, progress=tell)), config, chosen))
    if as_json:
        _print_json({"records": [asdict(each) for each in seen]})
    for each in [] if as_json else seen:
        Console().print(render(each))


@data_app.command(
    "build", epilog="Example: fedmide data build records --clients 3 --training 12 --validation 4 --test 6"
)
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


@data_app.command(
    "partition", epilog="Example: fedmide data partition all.jsonl records --clients 8 --by dirichlet:0.5:category"
)
def data_partition(
    path: Annotated[Path, typer.Argument(help="A file of records: JSON, JSONL or Parquet.")],
    out: Annotated[Path, typer.Argument(help="Folder to write, one subfolder a client.")],
    by: Annotated[str, typer.Option(help="iid, field:NAME, dirichlet:ALPHA:NAME or size:EXPONENT.")] = "iid",
    clients: Annotated[
        int, typer.Option(min=0, help="Number of clients; 0: as many as the field of field:NAME has values.")
    ] = 0,
    seed: Annotated[int, typer.Option(min=0, help="Every draw follows from it.")] = 0,
    validation_fraction: Annotated[float, typer.Option(min=0, max=0.9, help="Of each client's records.")] = 0.1,
    test_fraction: Annotated[float, typer.Option(min=0, max=0.9, help="Of each client's records.")] = 0.2,
    overrides: Overrides = [],  # noqa: B006
    as_json: AsJson = False,
) -> None:
    """Make clients out of one data set, as a folder that fedmide run reads.

    Records that share an instruction or a concept stay together.
    """
    from rich.console import Console

    from fedmide.config import apply_overrides, parse
    from fedmide.console import partition_table
    from fedmide.sources import partition, picture

    rule = partition.parse_rule(by)
    if clients == 0 and rule.kind != "field":
        raise UsageError(f"--clients is missing, which --by {by} needs", "Say --clients N")
    if validation_fraction + test_fraction > 0.9:
        raise UsageError("--validation-fraction and --test-fraction leave less than a tenth for training")
    partition.check_free(out)
    fields = parse(apply_overrides({}, overrides)).data.fields
    records = partition.read_labelled(path, fields, rule.field or fields.category)
    dealt = partition.deal(records, rule, clients, seed, {"test": test_fraction, "validation": validation_fraction})
    title = f"{path.name}: {len(records)} records, {by}, seed {seed}"
    partition.write(dealt, out, picture.bars_svg(partition.counts(dealt), title))
    if as_json:
        parts = {name: {part: len(each) for part, each in parts.items()} for name, parts in dealt.items()}
        _print_json({"folder": str(out), "by": by, "seed": seed, "clients": parts, "values": partition.counts(dealt)})
    else:
        Console().print(partition_table(dealt))
        sys.stdout.write(f"{len(dealt)} clients in {out}; how they differ: {out / 'partition.svg'}\n")


def _names(text: str) -> list[str]:
    """What stands between the commas."""
    return [name for each in text.split(",") if (name := each.strip())]


def _listed(option: str, text: str, is_right: "Callable[[str], bool]") -> list[str]:
    """The numbers between the commas; refused where one is none."""
    names = _names(text)
    if wrong := [name for name in names if not is_right(name)]:
        raise UsageError(f"--{option} {text!r}: {wrong[0]!r} is no number of this kind", "Put commas between numbers")
    return names


def _is_number(text: str) -> bool:
    try:
        return 0 < float(text) < float("inf")
    except ValueError:
        return False


def _work(
    opening: AbstractContextManager["Run"],
    names: Sequence[StageVerb],
    as_json: bool,
    questions: "Sets | None" = None,
    runtime: RuntimeName = "inprocess",
) -> None:
    """Does stages of a run, then tells of them; `questions` are for the evaluation."""
    with opening as opened:
        from fedmide import stages
        from fedmide.console import bars

        if names == ["generate"] and not opened.config.generation.enabled:
            raise UsageError(
                f"{opened.folder.path}: generation.enabled is false in this run", "Start a new run with it"
            )
        more = {"questions": questions} if questions else {}
        with _reached(opened, runtime) as run:
            results = [getattr(stages, name)(run, bars) for name in names if name in BY_SITES]
        # each verb is called like its stage
        results += [getattr(stages, name)(opened, bars, **more) for name in names if name not in BY_SITES]
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


def _questions(run: Path, wanted: Sequence[str], most: int) -> "Sets":
    """The public questions that the command line names as SET:PATH, of each set at most so many, by the run's seed."""
    if not wanted:
        if most:
            raise UsageError(f"--max-questions {most}: there are no questions", "Say --choice SET:PATH too")
        return {}
    from fedmide.console import tell
    from fedmide.evaluation.questions import draw_questions
    from fedmide.journal import reopen
    from fedmide.sources.questions import SETS, read_questions

    seed, found = reopen(run).config.seed, {}
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

    from fedmide.console import questions_table, results_table

    manifest = opened.folder.read_manifest()
    if as_json:
        facts = {"run": str(opened.folder.path), "status": manifest["status"], "seconds": manifest["seconds"]}
        _print_json({**facts, **(metrics or {})})
        return
    if metrics is not None:
        Console().print(results_table(metrics) if metrics["over_clients"] else "no test records, so no figures")
        if "questions" in metrics:
            Console().print(questions_table(metrics))
    sys.stdout.write(f"{manifest['status']}: {opened.folder.path}\n")


def _refuse(message: str, problems: Sequence[str] = (), explained: str = "") -> int:
    """The exit code of a mistake, after it has been told; `explained`: the section that says more."""
    more = f"fedmide explain {explained}" if explained else ""
    sys.stderr.write(f"fedmide: {message}\n" + (f"More: {more}\n" if more else ""))
    if "--json" in sys.argv:
        _print_json({"error": message, "problems": list(problems) or [message], "more": more})
    return EXIT_USER_ERROR


def _usage(error: click.ClickException) -> tuple[str, list[str]]:
    """A mistake in the command line as one paragraph, and its problem."""
    problem = error.format_message().rstrip(".")
    command = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else "fedmide"
    return f"{problem}. See {command} --help", [problem]


def _print_json(values: Mapping[str, Any]) -> None:
    sys.stdout.write(json.dumps(without_nan(values), indent=2, allow_nan=False) + "\n")
