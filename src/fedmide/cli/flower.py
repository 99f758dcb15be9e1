"""The commands of `fedmide flower`: the set-up of a federation, its processes and its runs."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from fedmide.cli.shared import AsJson, print_json, tell_results
from fedmide.errors import UsageError

app = typer.Typer(help="Set up and run a federation between hospitals.", no_args_is_help=True)


server_app = typer.Typer(help="Commands for the server of a federation.", no_args_is_help=True)


site_app = typer.Typer(help="Commands for a site of a federation.", no_args_is_help=True)


app.add_typer(server_app, name="server")


app.add_typer(site_app, name="site")


ServerPath = Annotated[Path, typer.Argument(help="Server folder.")]


SitePath = Annotated[Path, typer.Argument(help="Site folder.")]


Overrides = Annotated[
    list[str],
    typer.Option("--set", help="Override a setting that each party sets for itself: section.key=value (repeatable)."),
]


@app.command(epilog="Example: fedmide flower init consortium --config federation.toml --sites north,south")
def init(
    path: Annotated[Path, typer.Argument(help="New folder. It gets server/, and site-NAME/ for each site.")],
    config: Annotated[Path, typer.Option(help="Configuration of the federation (TOML).")],
    sites: Annotated[str, typer.Option(help="Names of the sites, separated by commas.")],
    address: Annotated[
        str, typer.Option(help="Address at which sites reach the server, HOST:PORT.")
    ] = "127.0.0.1:9092",
    port: Annotated[int, typer.Option(help="Port of the SuperLink on loopback.")] = 9092,
    plain: Annotated[bool, typer.Option("--plain", help="Use no encryption and no keys; loopback only.")] = False,
) -> None:
    """Write certificates, keys, scripts and configurations of a federation."""
    _check_installed()
    from fedmide.config import load
    from fedmide.flower.consortium import Consortium, create, named
    from fedmide.terminal import tell

    create(Consortium(path, named(sites), address, port, plain), load(config), tell)
    sys.stdout.write(f"{path}: read CHECKLIST.md in this folder\n")


@server_app.command("start", epilog="Example: fedmide flower server start consortium/server")
def server_start(path: ServerPath) -> None:
    """Run the server in the foreground: the SuperLink and its executor."""
    _check_installed()
    from fedmide.flower.server_folder import ServerFolder
    from fedmide.flower.supervision import server
    from fedmide.terminal import tell

    server(ServerFolder.read(path), tell)


@site_app.command("start", epilog="Example: fedmide flower site start consortium/site-north")
def site_start(path: SitePath) -> None:
    """Run the site in the foreground: its SuperNode, executor and worker."""
    _check_installed()
    from fedmide.flower.site_folder import SiteFolder
    from fedmide.flower.supervision import site
    from fedmide.terminal import tell

    site(SiteFolder.read(path), tell)


@server_app.command("unit", epilog="Example: fedmide flower server unit consortium/server")
def server_unit(path: ServerPath) -> None:
    """Print a systemd unit that keeps the server running: as the folder's owner, with this Python."""
    from fedmide.flower.server_folder import ServerFolder
    from fedmide.flower.texts import unit

    sys.stdout.write(unit("server", ServerFolder.read(path).path))


@site_app.command("unit", epilog="Example: fedmide flower site unit consortium/site-north")
def site_unit(path: SitePath) -> None:
    """Print a systemd unit that keeps the site running: as the folder's owner, with this Python."""
    from fedmide.flower.site_folder import SiteFolder
    from fedmide.flower.texts import unit

    folder = SiteFolder.read(path)
    sys.stdout.write(unit(f"site {folder.name}", folder.path))


@site_app.command("check", epilog="Example: fedmide flower site check consortium/site-north")
def site_check(path: SitePath, as_json: AsJson = False) -> None:
    """Check the site's data, model, version, key and connection."""
    _check_installed()
    from fedmide.flower.check import check
    from fedmide.flower.site_folder import SiteFolder
    from fedmide.terminal import tell

    findings = check(SiteFolder.read(path), tell)
    problems = [finding.problem for finding in findings if finding.problem]
    if as_json:
        print_json({"checks": {finding.what: finding.problem or "ok" for finding in findings}})
    else:
        sys.stdout.writelines(f"{finding.what}: {finding.problem or finding.found}\n" for finding in findings)
    if problems:
        raise UsageError(problems)


@site_app.command("evaluate", epilog="Example: fedmide flower site evaluate consortium/site-north")
def site_evaluate(
    path: SitePath,
    run: Annotated[
        Path | None, typer.Argument(help="Folder in the site's runs/. Default: that of its last run.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure the models on the site's own test records, after its tuning.

    The models are the base model, the common adapter and the site's tuned adapter. Responses, results and the report
    are in the site's run folder; nothing leaves the site.
    """
    from fedmide.flower.site_folder import SiteFolder
    from fedmide.runs import stages
    from fedmide.terminal import bars, tell

    with SiteFolder.read(path).personalized(run, tell) as opened:
        stages.generate(opened, bars)
        tell_results(opened, as_json, stages.evaluate(opened, bars))


@app.command("run", epilog="Example: fedmide flower run consortium/server --set replies.quorum=0.8")
def run_(
    path: ServerPath,
    config: Annotated[
        Path | None,
        typer.Argument(help="Another configuration (TOML). It must keep the settings that the sites agreed to."),
    ] = None,
    overrides: Overrides = [],  # noqa: B006
    out: Annotated[Path | None, typer.Option(help="New run folder. Default: runs/NNN in the server folder.")] = None,
    as_json: AsJson = False,
) -> None:
    """Train and tune at all sites. Then each site measures for itself: fedmide flower site evaluate."""
    _check_installed()
    from fedmide.flower.server_folder import ServerFolder
    from fedmide.journal.creation import free_folder
    from fedmide.runs.opening import start
    from fedmide.terminal import tell

    folder = ServerFolder.read(path)
    loaded = folder.configuration(config, overrides)
    _work(folder, start(loaded, out or free_folder(folder.path / "runs"), tell, elsewhere=folder.sites), as_json)


@app.command(epilog="Example: fedmide flower resume consortium/server consortium/server/runs/001")
def resume(path: ServerPath, run: Annotated[Path, typer.Argument(help="Run folder.")], as_json: AsJson = False) -> None:
    """Resume a run from its last complete round."""
    _check_installed()
    from fedmide.flower.server_folder import ServerFolder
    from fedmide.runs.opening import resume as resume_run
    from fedmide.terminal import tell

    folder = ServerFolder.read(path)
    _work(folder, resume_run(run, None, tell, elsewhere=folder.sites), as_json)


@app.command(epilog="Example: fedmide flower status consortium/server")
def status(path: ServerPath, as_json: AsJson = False) -> None:
    """Show each site's connection and the progress of the last run."""
    _check_installed()
    from fedmide.flower.deployment import status as status_of
    from fedmide.flower.server_folder import ServerFolder

    facts = status_of(ServerFolder.read(path))
    if as_json:
        print_json(facts)
        return
    sites = facts.pop("sites")
    assert isinstance(sites, Mapping)
    sys.stdout.writelines(f"{name}: {value}\n" for name, value in {**sites, **facts}.items())


@app.command(epilog="Example: fedmide flower stop consortium/server")
def stop(path: ServerPath) -> None:
    """Stop the current run. fedmide flower resume continues it."""
    from fedmide.flower.deployment import stop as stop_run
    from fedmide.flower.server_folder import ServerFolder

    sys.stdout.write(f"{stop_run(ServerFolder.read(path))}\n")


def _work(folder: Any, opening: Any, as_json: bool) -> None:
    from fedmide.flower.deployment import deployed
    from fedmide.runs import stages
    from fedmide.terminal import bars

    with opening as opened:
        with deployed(opened, folder) as run:
            stages.train(run, bars)
            stages.personalize(run, bars)
        manifest = opened.folder.read_manifest()
    facts = {"run": str(opened.folder.path), "status": manifest["status"], "seconds": manifest["seconds"]}
    if as_json:
        print_json(facts)
    else:
        sys.stdout.write(f"{facts['status']}: {facts['run']}\n")


def _check_installed() -> None:
    from importlib.util import find_spec

    if find_spec("flwr") is None:
        raise UsageError("flwr is not installed", "Install it: pip install 'fedmide[flower]'")
