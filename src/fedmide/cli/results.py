"""The commands for a run that exists: report, track, export, chat, watch; and the split of a file of scored records."""

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from fedmide.cli.shared import MORE, RECORDS, START, AsJson, RunFolderPath, TrackerName, print_json, track_run
from fedmide.errors import UsageError

app = typer.Typer()


Beside = Literal["aggregated", "base", "both", "nobody"]


Rule = Literal[  # the rules of the configuration, which is slow to import
    "otsu-256", "otsu-exact", "otsu-log", "lower-quartile", "median", "upper-quartile", "natural"
]


@app.command(rich_help_panel=START, epilog="Example: fedmide report runs/first")
def report(
    paths: Annotated[
        list[Path], typer.Argument(help="Run folders. With several, the others are compared with the first.")
    ],
    out: Annotated[
        Path | None, typer.Option(help="File to write. Default: RUN/report.html; for several runs, comparison.html.")
    ] = None,
    with_records: Annotated[
        bool, typer.Option("--with-records", help="Include texts of records. Such a report must stay at the site.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Write the report of a run, or a comparison of several runs.

    The report is one file that needs no network: open RUN/report.html from disk.
    """
    from fedmide import report as pages
    from fedmide.journal.creation import reopen

    folders = [reopen(path) for path in paths]
    if len(folders) > 1 and with_records:
        raise UsageError("--with-records goes with one run", "Give one run folder")
    if len(folders) > 1:
        written = pages.compare(folders, out or Path("comparison.html"))
    else:
        written = pages.write(folders[0], out, with_records)
    if as_json:
        print_json({"report": str(written), "bytes": written.stat().st_size})
    else:
        sys.stdout.write(f"{written}\n")


@app.command(rich_help_panel=MORE, epilog="Example: fedmide track runs/demo-001 --to mlflow")
def track(
    path: RunFolderPath,
    tracker: Annotated[TrackerName, typer.Option("--to", help="Tracker to write to.")],
    place: Annotated[
        str,
        typer.Option(
            "--uri",
            help="MLflow: the store. Default: MLFLOW_TRACKING_URI, else mlflow.db in the working directory. "
            "TensorBoard: the log folder. Default: RUN/tensorboard.",
        ),
    ] = "",
    as_json: AsJson = False,
) -> None:
    """Log a run's configuration and results to MLflow or TensorBoard.

    Nothing of a single record is sent. Give the command again to update the entry.
    """
    from fedmide.journal.creation import reopen

    folder = reopen(path)
    where = track_run(folder, tracker, place)
    if as_json:
        print_json({"run": str(path), "tracked": where})
    else:
        sys.stdout.write(f"{where}\n")


@app.command(
    rich_help_panel=MORE,
    epilog="Example: fedmide export runs/demo-001 radiology-model --client radiology --merge --dtype bfloat16",
)
def export(
    path: RunFolderPath,
    out: Annotated[Path, typer.Argument(help="New folder to write.")],
    client: Annotated[str, typer.Option(help="Site whose tuned model is exported. Default: the common model.")] = "",
    merge: Annotated[
        bool, typer.Option("--merge", help="Write a whole model with the adapter merged into its weights.")
    ] = False,
    dtype: Annotated[
        Literal["float32", "bfloat16"], typer.Option(help="Type of the merged model's weights.")
    ] = "float32",
    gguf: Annotated[
        bool, typer.Option("--gguf", help="Also write the merged model as one GGUF file, for llama.cpp.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Write a run's model for use elsewhere: as a PEFT folder, or merged."""
    from dataclasses import asdict

    from fedmide.journal.creation import reopen

    folder = reopen(path)
    from fedmide.runs import export as exports

    written = exports.export(folder, out, client, merge, dtype, gguf)
    commands = exports.serving(folder, written)
    if as_json:
        print_json({"folder": str(out), "parity": written.parity and asdict(written.parity), "commands": commands})
        return
    if written.parity is not None:
        sys.stdout.write(
            f"against the adapter: largest logit difference {written.parity.largest_logit_difference:.2g}, "
            f"{written.parity.divergence:.2g} nats apart, same first choice {written.parity.same_choice:.1%}\n"
        )
    if written.gguf is not None:
        sys.stdout.write(f"{written.gguf}: read back; every weight and token equals the merged model's\n")
    sys.stdout.writelines(f"{line}\n" for line in (f"written: {out}", "to serve:", *commands))


@app.command(rich_help_panel=START, epilog="Example: fedmide chat runs/demo-001 --client radiology --with base")
def chat(
    path: RunFolderPath,
    client: Annotated[str, typer.Option(help="Site whose tuned model answers.")],
    beside: Annotated[
        Beside, typer.Option("--with", help="Models whose answers appear next to that of the tuned model.")
    ] = "nobody",
    ask: Annotated[str, typer.Option(help="Ask one question and end. Default: type questions.")] = "",
    context: Annotated[Path | None, typer.Option(help="File with the text that the questions are about.")] = None,
    max_new_tokens: Annotated[
        int, typer.Option(min=0, help="Maximum length of an answer in tokens; 0: as in the run.")
    ] = 0,
    as_json: AsJson = False,
) -> None:
    """Chat with a site's tuned model; the answer appears while it is generated.

    Each question stands alone, because the model was trained in that form: it does not see earlier questions. /quit or
    control-D ends the chat.
    """
    from fedmide.journal.creation import reopen

    if as_json and not ask:
        raise UsageError("--json needs --ask", "Add --ask QUESTION")
    folder = reopen(path)
    about = "" if context is None else _text(context)
    from fedmide.cli.chat_view import converse, talk
    from fedmide.cli.record_view import harmless
    from fedmide.runs import chat as chats
    from fedmide.terminal import tell

    others = [voice for voice in chats.OTHERS if beside in (voice, "both")]
    begun = chats.begin(folder, client, others, max_new_tokens, tell)
    if as_json:
        print_json({"client": client, "answers": {voice: begun.answer(voice, ask, about) for voice in begun.voices}})
    elif ask:
        talk(begun, ask, about, harmless)
    else:
        converse(begun, about, harmless)


@app.command(rich_help_panel=MORE, epilog="Example: fedmide watch runs/demo-001")
def watch(
    path: RunFolderPath,
    seconds: Annotated[float, typer.Option(min=0.1, help="Seconds between two updates.")] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="Print the state once and end.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show the progress of a run, in a second terminal.

    It only reads the run folder. It ends with the run; control-C ends it earlier and does not affect the run.
    """
    from dataclasses import asdict
    from datetime import UTC, datetime

    from fedmide.cli.run_view import follow, look
    from fedmide.journal.creation import reopen

    folder = reopen(path)
    if as_json:
        print_json(asdict(look(folder, datetime.now(UTC))))
    else:
        follow(folder, seconds, once)


@app.command(rich_help_panel=RECORDS, epilog="Example: fedmide split scores.json --rule otsu-exact --out sets")
def split(
    path: Annotated[Path, typer.Argument(help="File of scored records: JSON or JSONL.")],
    rule: Annotated[Rule, typer.Option(help="Rule for the threshold.")] = "otsu-256",
    out: Annotated[Path | None, typer.Option(help="Folder to write shared.json and personal.json to.")] = None,
    as_json: AsJson = False,
) -> None:
    """Split a file of scored records at a threshold: shared below, personal above."""
    from fedmide.studies.given_scores import split_file

    result = split_file(path, rule, out)
    if failed := result.pop("not_finite"):
        sys.stderr.write(
            f"fedmide: scores that are not finite: {failed}; their records are personal if there is a threshold\n"
        )
    if as_json:
        print_json(result)
    else:
        threshold = "none" if result["threshold"] is None else f"{result['threshold']:.6f}"
        counts = f"{result['shared']} shared, {result['personal']} personal"
        sys.stdout.write(f"{counts}, threshold {threshold} ({result['rule']})\n")


def _text(path: Path) -> str:
    """The content of a text file."""
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError:
        raise UsageError(f"{path} is not a text in UTF-8", "Convert the file to UTF-8") from None
