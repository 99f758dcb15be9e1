"""The verbs of what a run has left: seen, compared, taken elsewhere; and the split of records scored already."""

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from fedmide.cli.shared import AsJson, RunFolderPath, print_json
from fedmide.errors import UsageError

app = typer.Typer()

Rule = Literal["otsu-256", "otsu-exact", "otsu-log", "median", "natural"]  # those of config, which takes long to import


@app.command()
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

    One file without network: fedmide report runs/demo-001, then open runs/demo-001/report.html.
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
        print_json({"report": str(written), "bytes": written.stat().st_size})
    else:
        sys.stdout.write(f"{written}\n")


@app.command()
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
    """Write a run's model for use elsewhere: a PEFT folder, or merged.

    For example: fedmide export runs/demo-001 radiology-model --client radiology --merge --dtype bfloat16
    """
    from dataclasses import asdict

    from fedmide.journal import reopen

    folder = reopen(path)
    from fedmide import export as exports

    written = exports.export(folder, out, client, merge, dtype)
    commands = exports.serving(folder, written)
    if as_json:
        print_json({"folder": str(out), "parity": written.parity and asdict(written.parity), "commands": commands})
        return
    if written.parity is not None:
        sys.stdout.write(
            f"against the adapter: largest logit difference {written.parity.largest_logit_difference:.2g}, "
            f"{written.parity.divergence:.2g} nats apart, same first choice {written.parity.same_choice:.1%}\n"
        )
    sys.stdout.writelines(f"{line}\n" for line in (f"written: {out}", "to serve:", *commands))


@app.command()
def watch(
    path: RunFolderPath,
    seconds: Annotated[float, typer.Option(min=0.1, help="How often to look.")] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="Look once and end.")] = False,
    as_json: AsJson = False,
) -> None:
    """Watch a run as it goes, from its folder alone.

    In a second terminal: fedmide watch runs/demo-001. It ends with the run; control-C ends it sooner and harms nothing.
    """
    from dataclasses import asdict
    from datetime import UTC, datetime

    from fedmide.journal import reopen
    from fedmide.watch import follow, look

    folder = reopen(path)
    if as_json:
        print_json(asdict(look(folder, datetime.now(UTC))))
    else:
        follow(folder, seconds, once)


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
        print_json(result)
    else:
        threshold = "none" if result["threshold"] is None else f"{result['threshold']:.6f}"
        counts = f"{result['shared']} shared, {result['personal']} personal"
        sys.stdout.write(f"{counts}, threshold {threshold} ({result['rule']})\n")
