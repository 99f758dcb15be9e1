"""Opening a run: lock its folder against other processes, and read the inputs that its configuration names.

All input is read and checked before anything is written, and again whenever a run is resumed.
"""

import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fedmide import methods
from fedmide.atomic import check_room
from fedmide.config import Config
from fedmide.data.records import RecordId
from fedmide.errors import RunFolderError
from fedmide.federation import server
from fedmide.federation.client_state import has_trained, is_lost, keeps_method_state
from fedmide.federation.ledger import before, standing
from fedmide.federation.rounds import Runtime
from fedmide.federation.server import ServerState
from fedmide.journal.creation import check_new, create, locked, reopen
from fedmide.journal.folder import RunFolder
from fedmide.journal.manifest import changed, other_versions
from fedmide.model import adapters
from fedmide.progress import Tell, quiet
from fedmide.runs.inputs import Inputs, read, without_records
from fedmide.runs.resident import Opener, open_model


@dataclass(frozen=True)
class Run:
    """A run folder and the inputs that its configuration names."""

    folder: RunFolder
    inputs: Inputs
    tell: Tell
    federation: str
    runtime: Runtime | None = None
    """The way to reach sites outside of this process; None if all are in it."""

    @property
    def config(self) -> Config:
        """The run's configuration."""
        return self.folder.config


@contextmanager
def start(
    config: Config,
    path: Path,
    tell: Tell = quiet,
    opener: Opener = open_model,
    elsewhere: Sequence[str] = (),
) -> Iterator[Run]:
    """A new run in a new folder, which is locked against other processes as long as the run is open.

    All input is read and checked before anything is written. `elsewhere`: names of sites whose records this machine
    does not hold. Each run with such sites is a federation of its own: its name ends in a random suffix.
    """
    check_new(path, config)
    reader = partial(read, load=without_records(elsewhere)) if elsewhere else read
    inputs = reader(config, tell, opener=opener)
    num_adapters = config.warmup.rounds + config.federation.rounds + len(inputs.clients) + 1
    # Each client keeps the method state of two rounds, at most two adapters each.
    num_adapters += 4 * len(inputs.clients) if keeps_method_state(config) else 0
    common = server.begin("", inputs.clients, inputs.fresh_adapter(), config).adapter
    check_room(path, num_adapters * len(adapters.encode(common)))
    with locked(path):
        tell(f"the run is in {path}")
        federation = f"{inputs.federation}-{secrets.token_hex(4)}" if elsewhere else inputs.federation
        folder = create(path, config, {**inputs.manifest, "federation": federation})
        folder.rebuild_events(())
        yield Run(folder, inputs, tell, federation)


@contextmanager
def resume(
    path: Path,
    config: Config | None = None,
    tell: Tell = quiet,
    opener: Opener = open_model,
    elsewhere: Sequence[str] = (),
) -> Iterator[Run]:
    """An earlier run, to be resumed: locked against other processes, and on as many threads as it began with.

    Refused if its configuration, data, model or ledgers have changed. Also refused if the folder is a site's copy of a
    federation: the site would train alone, and overwrite the ledger that it needs in the federation.
    """
    folder = reopen(path, config)
    with locked(path):
        earlier = folder.read_manifest()
        if folder.is_site:
            raise RunFolderError(
                f"{path} is site {earlier['site']}'s folder of a federation, and only the server can resume its rounds",
                "At the server, resume it with: fedmide flower resume SERVER RUN. "
                "At this site, measure with: fedmide flower site evaluate SITE",
            )
        tell(f"resuming {path}")
        reader = partial(read, load=without_records(elsewhere)) if elsewhere else read
        inputs = reader(folder.config, tell, earlier["threads"], opener=opener)
        if problems := list(changed(earlier, inputs.manifest)):
            raise RunFolderError([f"{path}: {problem}" for problem in problems], "Undo the change, or start a new run")
        for difference in other_versions(earlier, inputs.manifest):
            tell(f"{difference}: from here on the bytes of results may differ")
        folder.rebuild_events(list(inputs.clients))
        run = Run(folder, inputs, tell, earlier.get("federation", inputs.federation))
        if not elsewhere:  # otherwise the runtime asks the sites for the sizes of their sets
            next_round = folder.last_round(begin(run)).round
            _check_ledgers(run, next_round)
            _check_method_states(run, next_round)
        commit = inputs.manifest["commit"]
        if str(commit) not in folder.commits:
            folder.update_manifest(later_commits=[*earlier.get("later_commits", []), commit])
        yield run


def set_sizes(run: Run) -> dict[str, tuple[int, int]]:
    """The numbers of shared and personal records in each site's last reply.

    A site is left out if its last reply did not count.
    """
    last = {event["client"]: event for event in _round_events(run)}
    told = {name: event["metrics"] for name, event in last.items() if "shared" in event["metrics"]}
    return {name: (int(each["shared"]["sum"]), int(each["personal"]["sum"])) for name, each in told.items()}


def begin(run: Run) -> ServerState:
    """The state before the first round."""
    return server.begin(run.federation, run.inputs.clients, run.inputs.fresh_adapter(), run.config)


def record_ids(run: Run, name: str) -> list[RecordId]:
    """A client's training records, in order."""
    return [example.id for example in run.inputs.examples[name].training]


def _check_ledgers(run: Run, next_round: int) -> None:
    """Refuses a run if a ledger contradicts the numbers in its site's last reply."""
    if not methods.of(run.config).enrolls:
        return
    problems = []
    for name, told in set_sizes(run).items():
        now = standing(before(run.folder.read_ledger(name), next_round), record_ids(run, name))
        if told != (len(now.shared), len(now.personal)):
            problems.append(f"{run.folder.site(name)}: the ledger is not the one that its last round left")
    if problems:
        raise RunFolderError(problems, "Restore the files in clients/ from a backup, or start a new run")


def _check_method_states(run: Run, next_round: int) -> None:
    """Refuses a run if a site's method state is older than the last round that counted for it, or missing."""
    if not keeps_method_state(run.config):
        return
    trained = {event["client"]: event["round"] for event in _round_events(run) if has_trained(event["metrics"])}
    problems = [
        f"{run.folder.site(name)}: the method state of round {number} is missing"
        for name, number in trained.items()
        if is_lost(run.folder.read_method_state(name, next_round), number)
    ]
    if problems:
        raise RunFolderError(problems, "Restore the files in clients/ from a backup, or start a new run")


def _round_events(run: Run) -> list[dict[str, Any]]:
    """The events of the rounds, without those of the tuning after them."""
    return [event for event in run.folder.events() if event["stage"] != "personalize"]
