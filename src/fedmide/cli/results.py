"""The verbs of what a run has left: seen, compared, taken elsewhere; and the split of records scored already."""

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from fedmide.cli.shared import AsJson, RunFolderPath, TrackerName, print_json, track_run
from fedmide.errors import UsageError

app = typer.Typer()


Beside = Literal["aggregated", "base", "both", "nobody"]


Rule = Literal[  # those of config, which takes long to import
    "otsu-256", "otsu-exact", "otsu-log", "lower-quartile", "median", "upper-quartile", "natural"
]


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
    from fedmide.journal.creation import reopen

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


@app.command(epilog="Example: fedmide track runs/demo-001 --to mlflow")
def track(
    path: RunFolderPath,
    tracker: Annotated[TrackerName, typer.Option("--to", help="Which tracker.")],
    place: Annotated[
        str,
        typer.Option(
            "--uri",
            help="An MLflow store; otherwise MLFLOW_TRACKING_URI or mlflow.db here. A TensorBoard log folder; "
            "otherwise RUN/tensorboard.",
        ),
    ] = "",
    as_json: AsJson = False,
) -> None:
    """Put a run's configuration and figures into MLflow or TensorBoard; nothing of a single record.

    Giving it again brings the entry up to date.
    """
    from fedmide.journal.creation import reopen

    folder = reopen(path)
    where = track_run(folder, tracker, place)
    if as_json:
        print_json({"run": str(path), "tracked": where})
    else:
        sys.stdout.write(f"{where}\n")


@app.command(epilog="Example: fedmide export runs/demo-001 radiology-model --client radiology --merge --dtype bfloat16")
def export(
    path: RunFolderPath,
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    client: Annotated[str, typer.Option(help="Whose personalised model; otherwise the common one.")] = "",
    merge: Annotated[bool, typer.Option("--merge", help="A whole model with the adapter in its weights.")] = False,
    dtype: Annotated[
        Literal["float32", "bfloat16"], typer.Option(help="Type of a merged model's weights.")
    ] = "float32",
    gguf: Annotated[bool, typer.Option("--gguf", help="A merged model also as one GGUF file, for llama.cpp.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write a run's model for use elsewhere: a PEFT folder, or merged."""
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
        sys.stdout.write(f"{written.gguf}: read back, every weight and token is the merged model's\n")
    sys.stdout.writelines(f"{line}\n" for line in (f"written: {out}", "to serve:", *commands))


@app.command(epilog="Example: fedmide chat runs/demo-001 --client radiology --with base")
def chat(
    path: RunFolderPath,
    client: Annotated[str, typer.Option(help="Whose personalised model.")],
    beside: Annotated[Beside, typer.Option("--with", help="Whose answers to show beside it.")] = "nobody",
    ask: Annotated[str, typer.Option(help="One question; otherwise they are typed.")] = "",
    context: Annotated[Path | None, typer.Option(help="File with the text that questions are about.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=0, help="Longest answer, in tokens; 0: as in the run.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Talk to a client's personalised model; answers come as they are made.

    Each question stands alone, the form that the model was trained in: it knows nothing of the questions before. /quit
    or control-D ends it.
    """
    from fedmide.journal.creation import reopen

    if as_json and not ask:
        raise UsageError("--json needs --ask", "Give one question")
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

    from fedmide.cli.run_view import follow, look
    from fedmide.journal.creation import reopen

    folder = reopen(path)
    if as_json:
        print_json(asdict(look(folder, datetime.now(UTC))))
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
    from fedmide.studies.given_scores import split_file

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


def _text(path: Path) -> str:
    """What a text file holds."""
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError:
        raise UsageError(f"{path}: no text in UTF-8", "Convert it") from None
