"""The commands of `fedmide data`: check, show, split and generate records."""

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from fedmide.cli.shared import AsJson, Overrides, print_json
from fedmide.errors import UsageError

app = typer.Typer(help="Check, show, split or generate records.", no_args_is_help=True)


Part = Literal["training", "validation", "test"]


@app.command("check", epilog="Example: fedmide data check records --set data.fields.response=answer")
def check(
    path: Annotated[Path, typer.Argument(help="Folder or file of records.")],
    overrides: Overrides = [],  # noqa: B006
    as_json: AsJson = False,
) -> None:
    """Report counts, lengths, duplicates, leaks, categories and possible identifiers of persons.

    The parts (training, validation, test) are those of the files. Add --set data.test_fraction=... to split
    off test records.
    """
    from dataclasses import asdict

    from rich.console import Console

    from fedmide.cli.tables import category_lines, check_table, identifier_lines, leak_lines
    from fedmide.config import apply_overrides, parse
    from fedmide.data import check, detect, load

    as_given = {"path": str(path), "source": detect(path), "validation_fraction": 0.0, "test_fraction": 0.0}
    config = parse(apply_overrides({"data": as_given}, overrides))
    report = check.check(load(config.data, config.data_seed))
    if as_json:
        print_json(asdict(report))
    else:
        Console().print(check_table(report))
        for lines in (category_lines(report), leak_lines(report), identifier_lines(report)):
            sys.stdout.writelines(f"{line}\n" for line in lines)


@app.command("show", epilog="Example: fedmide data show records --count 5")
def show(
    path: Annotated[Path, typer.Argument(help="Configuration (TOML), or a folder or file of records.")],
    client: Annotated[str, typer.Option(help="Site whose records are shown. Default: every site.")] = "",
    part: Annotated[Part, typer.Option(help="Part to show.")] = "training",
    count: Annotated[int, typer.Option(min=1, help="Number of records to show per site, from the first.")] = 2,
    overrides: Overrides = [],  # noqa: B006
    as_json: AsJson = False,
) -> None:
    """Show records as the model sees them: tokens with loss, token counts, and cut text.

    The output contains texts of records.
    """
    from dataclasses import asdict

    from rich.console import Console

    from fedmide.config import apply_overrides, load, parse
    from fedmide.data import detect
    from fedmide.data import load as load_data

    if path.suffix == ".toml":
        config = load(path, overrides)
    else:
        config = parse(apply_overrides({"data": {"path": str(path), "source": detect(path)}}, overrides))
    clients = load_data(config.data, config.data_seed)
    if client and client not in [each.name for each in clients]:
        raise UsageError(f"--client {client}: no such site", f"Known: {', '.join(each.name for each in clients)}")
    chosen = [
        (f"{each.name}, {part} record {number}", record)
        for each in clients
        if client in ("", each.name)
        for number, record in enumerate(getattr(each, part)[:count], 1)
    ]
    if not chosen:
        raise UsageError(f"no {part} records", "Choose another part with --part")
    from fedmide.cli.record_view import render, see
    from fedmide.model.pretrained.hf import load_tokenizer
    from fedmide.model.pretrained.locate import locate
    from fedmide.terminal import tell

    seen = list(see(load_tokenizer(locate(config.model.name, progress=tell)), config, chosen))
    if as_json:
        print_json({"records": [asdict(each) for each in seen]})
    for each in [] if as_json else seen:
        Console().print(render(each))


@app.command("build", epilog="Example: fedmide data build records --clients 3 --training 12 --validation 4 --test 6")
def build(
    out: Annotated[Path, typer.Argument(help="New folder to write, with one subfolder per site.")],
    seed: Annotated[int, typer.Option(help="Seed of all draws.")] = 0,
    clients: Annotated[int, typer.Option(min=1, help="Number of sites.")] = 8,
    training: Annotated[int, typer.Option(min=1, help="Training records per site.")] = 48,
    validation: Annotated[int, typer.Option(min=0, help="Validation records per site.")] = 12,
    test: Annotated[int, typer.Option(min=0, help="Test records per site.")] = 24,
    as_json: AsJson = False,
) -> None:
    """Write demo data: medical sites, as JSON lines."""
    from fedmide.data.medical import sites as medical

    sites = medical.build(seed, clients, training, validation, test)
    medical.write(sites, out)
    if as_json:
        print_json({"folder": str(out), "clients": [site.name for site in sites]})
    else:
        sys.stdout.write(f"{len(sites)} sites in {out}: {', '.join(site.name for site in sites)}\n")


@app.command(
    "partition", epilog="Example: fedmide data partition all.jsonl records --clients 8 --by dirichlet:0.5:category"
)
def partition(
    path: Annotated[Path, typer.Argument(help="File of records: JSON, JSONL or Parquet.")],
    out: Annotated[Path, typer.Argument(help="New folder to write, with one subfolder per site.")],
    by: Annotated[str, typer.Option(help="Rule: iid, field:NAME, dirichlet:ALPHA:NAME or size:EXPONENT.")] = "iid",
    clients: Annotated[
        int, typer.Option(min=0, help="Number of sites; 0: one per value of the field in field:NAME.")
    ] = 0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of all draws.")] = 0,
    validation_fraction: Annotated[
        float, typer.Option(min=0, max=0.9, help="Fraction of each site's records for validation.")
    ] = 0.1,
    test_fraction: Annotated[
        float, typer.Option(min=0, max=0.9, help="Fraction of each site's records for testing.")
    ] = 0.2,
    overrides: Overrides = [],  # noqa: B006
    as_json: AsJson = False,
) -> None:
    """Divide one data set into sites, as a folder that fedmide run reads.

    Records with the same question or concept stay together.
    """
    from rich.console import Console

    from fedmide.cli.tables import partition_table
    from fedmide.config import apply_overrides, parse
    from fedmide.data import partition, partition_svg, writing

    rule = partition.parse_rule(by)
    if clients == 0 and rule.kind != "field":
        raise UsageError(f"--clients is missing, which --by {by} needs", "Add --clients N")
    if validation_fraction + test_fraction > 0.9:
        raise UsageError(
            "--validation-fraction and --test-fraction leave less than a tenth for training", "Lower one of them"
        )
    writing.check_free(out)
    fields = parse(apply_overrides({}, overrides)).data.fields
    records = partition.read_labeled(path, fields, rule.field or fields.category)
    dealt = partition.deal(records, rule, clients, seed, {"test": test_fraction, "validation": validation_fraction})
    title = f"{path.name}: {len(records)} records, {by}, seed {seed}"
    partition.write(dealt, out, partition_svg.bars_svg(partition.counts(dealt), title))
    if as_json:
        parts = {name: {part: len(each) for part, each in parts.items()} for name, parts in dealt.items()}
        print_json({"folder": str(out), "by": by, "seed": seed, "clients": parts, "values": partition.counts(dealt)})
    else:
        Console().print(partition_table(dealt))
        sys.stdout.write(f"{len(dealt)} sites in {out}; figure of their differences: {out / 'partition.svg'}\n")
