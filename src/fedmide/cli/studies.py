"""The commands that do many runs, and the benchmark of the score."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import typer

from fedmide.cli.shared import COMPARISON, MORE, AsJson, Overrides, preset, print_json
from fedmide.errors import UsageError

app = typer.Typer()


WhichScenario = Literal["own-style", "own-labels", "both"]  # the scenarios of studies.known_sites


@app.command(rich_help_panel=MORE, epilog="Example: fedmide identify --scenario own-style --set federation.rounds=1")
def identify(
    config: Annotated[
        Path | None, typer.Argument(help="Configuration (TOML). Default: a preset that takes minutes.")
    ] = None,
    overrides: Overrides = [],  # noqa: B006
    scenario: Annotated[WhichScenario, typer.Option(help="Kind of synthetic sites.")] = "both",
    clients: Annotated[int, typer.Option(min=1, help="Number of sites.")] = 8,
    records: Annotated[
        int, typer.Option(min=2, help="Shared records per site; the number of personal records is the same.")
    ] = 30,
    match_lengths: Annotated[bool, typer.Option(help="Make shared records about as long as the personal ones.")] = True,
    out: Annotated[Path | None, typer.Option(help="File for the results (JSON).")] = None,
    as_json: AsJson = False,
) -> None:
    """Benchmark FedMIDE's score on synthetic sites with a known answer."""
    from rich.console import Console

    from fedmide.atomic import to_json, write_file
    from fedmide.config import load

    if out is not None and out.exists():
        raise UsageError(f"{out} exists already", "Give --out another file")
    loaded = load(config or preset("identify"), overrides)
    from fedmide.cli.tables import rivals_table, sets_table
    from fedmide.studies import identify as bench
    from fedmide.studies.known_sites import SCENARIOS
    from fedmide.terminal import bars, tell

    sizes = bench.Sizes(clients, records, match_lengths)
    wanted = [name for name in SCENARIOS if scenario in (name, "both")]
    scenarios = {name: bench.identify(loaded, name, sizes, tell, bars) for name in wanted}
    result = {"scenarios": scenarios}
    if out is not None:
        write_file(out, to_json(result))
    if as_json:
        print_json(result)
        return
    for name, figures in scenarios.items():
        Console().print(rivals_table(name, figures), sets_table(name, figures))


@app.command(
    rich_help_panel=COMPARISON, epilog="Example: fedmide compare config.toml --methods fedmide,fedavg-ft --seeds 0,1"
)
def compare(
    config: Annotated[
        Path, typer.Argument(help="Configuration (TOML). A table variants.NAME in it defines a variant.")
    ],
    methods: Annotated[str, typer.Option(help="Methods and variants, separated by commas.")],
    seeds: Annotated[str, typer.Option(help="Seeds of the training, separated by commas.")] = "0,1,2",
    learning_rates: Annotated[
        str, typer.Option(help="Learning rates to choose from on validation records. Default: the configured one.")
    ] = "",
    against: Annotated[
        str,
        typer.Option(help="Baselines for the difference tables. Default: fedavg-ft and fedmide, if they take part."),
    ] = "",
    validation: Annotated[
        bool, typer.Option("--validation", help="Measure validation records only, to choose settings.")
    ] = False,
    overrides: Overrides = [],  # noqa: B006
    out: Annotated[
        Path | None, typer.Option(help="Folder. Default: comparisons/NAME. An existing comparison is continued.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compare methods on the same records, with the same budget of local steps.

    It does the runs that are missing in the folder, then compares all of them. Give the command again to continue.
    """
    from rich.console import Console

    from fedmide.config import apply_overrides, read_toml

    values = apply_overrides(read_toml(config), overrides)
    numbers = [int(each) for each in _listed("seeds", seeds, str.isdecimal)]
    rates = [float(each) for each in _listed("learning-rates", learning_rates, _is_number)]
    from fedmide.cli.tables import sheet_table
    from fedmide.studies import compare as comparing
    from fedmide.studies.tables import sheets, validation_sheet
    from fedmide.terminal import bars, tell

    folder = out or Path("comparisons") / config.stem
    plan = comparing.planned(values, _names(methods), numbers, folder, rates, _names(against) or None, validation)
    figures = comparing.run(plan, tell, bars)
    if as_json:
        print_json(figures)
        return
    tables = [validation_sheet(figures)] if validation else sheets(figures)
    Console().print(*(sheet_table(each) for each in tables))
    sys.stdout.write(f"{folder / ('validation.md' if validation else 'comparison.html')}\n")


@app.command(
    rich_help_panel=COMPARISON,
    epilog="Example: fedmide sweep config.toml --knob enrollment.threshold=0.9,1.0,1.1 --seeds 0",
)
def sweep(
    config: Annotated[Path, typer.Argument(help="Configuration (TOML).")],
    knob: Annotated[
        list[str], typer.Option(help="Setting to vary and its values: section.key=VALUE,VALUE,... (repeatable).")
    ],
    methods: Annotated[
        str, typer.Option(help="Methods and variants, separated by commas. Default: the method of the configuration.")
    ] = "",
    seeds: Annotated[str, typer.Option(help="Seeds of the training, separated by commas.")] = "0,1,2",
    overrides: Overrides = [],  # noqa: B006
    out: Annotated[
        Path | None, typer.Option(help="Folder. Default: sweeps/NAME. An existing sweep is continued.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Repeat a comparison over several values of one setting, and plot it.

    It does the runs that are missing in the folder, then draws a figure per setting: the mean and the worst site.
    """
    from rich.console import Console

    from fedmide.config import apply_overrides, read_toml

    values = apply_overrides(read_toml(config), overrides)
    numbers = [int(each) for each in _listed("seeds", seeds, str.isdecimal)]
    from fedmide.cli.tables import sweep_table
    from fedmide.studies import sweep as sweeping
    from fedmide.terminal import bars, tell

    names = _names(methods) or [str(values.get("method", "fedmide"))]
    folder = out or Path("sweeps") / config.stem
    plans = [sweeping.planned(values, each, names, numbers, folder) for each in knob]
    results = {plan.knob: sweeping.run(plan, tell, bars) for plan in plans}
    if as_json:
        print_json({"knobs": results})
        return
    for plan in plans:
        Console().print(sweep_table(results[plan.knob]))
        sys.stdout.write(f"{plan.folder / 'sweep.svg'}\n")


def _names(text: str) -> list[str]:
    """The names between the commas."""
    return [name for each in text.split(",") if (name := each.strip())]


def _listed(option: str, text: str, is_right: Callable[[str], bool]) -> list[str]:
    """The numbers between the commas. Refuses anything that is not such a number."""
    names = _names(text)
    if wrong := [name for name in names if not is_right(name)]:
        raise UsageError(f"--{option} {text!r}: {wrong[0]!r} is not a valid number", "Separate the numbers by commas")
    return names


def _is_number(text: str) -> bool:
    try:
        return 0 < float(text) < float("inf")
    except ValueError:
        return False
