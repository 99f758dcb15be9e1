"""A run opened: its folder, which no other process gets at meanwhile, and what its configuration points at.

All input is read and checked before anything is written, and again whenever a run goes on.
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
from fedmide.federation.client_state import has_trained, is_lost, keeps_memory
from fedmide.federation.ledger import before, standing
from fedmide.federation.rounds import Runtime
from fedmide.federation.server import ServerState
from fedmide.journal.creation import check_new, create, locked, reopen
from fedmide.journal.folder import RunFolder
from fedmide.journal.manifest import changed, other_versions
from fedmide.model import adapters
from fedmide.progress import Tell
from fedmide.runs.inputs import Inputs, read, without_records
from fedmide.runs.resident import Opener, open_model


@dataclass(frozen=True)
class Run:
    """A run folder and what its configuration points at."""

    folder: RunFolder
    inputs: Inputs
    tell: Tell
    federation: str
    runtime: Runtime | None = None
    """How sites are reached that are not in this process."""

    @property
    def config(self) -> Config:
        """The run's configuration."""
        return self.folder.config


@contextmanager
def start(
    config: Config,
    path: Path,
    tell: Tell = lambda message: None,
    opener: Opener = open_model,
    elsewhere: Sequence[str] = (),
) -> Iterator[Run]:
    """A new run in a new folder, which no other process gets at meanwhile.

    All input is read and checked before anything is written. `elsewhere` are the names of sites whose records this
    machine does not hold; each such run is a federation of its own, told from others by a drawn ending.
    """
    check_new(path, config)
    reader = partial(read, load=without_records(elsewhere)) if elsewhere else read
    inputs = reader(config, tell, opener=opener)
    num_adapters = config.warmup.rounds + config.federation.rounds + len(inputs.clients) + 1
    num_adapters += 4 * len(inputs.clients) if keeps_memory(config) else 0  # two rounds' memory of at most two adapters
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
    tell: Tell = lambda message: None,
    opener: Opener = open_model,
    elsewhere: Sequence[str] = (),
) -> Iterator[Run]:
    """An earlier run, to go on with, which no other process gets at meanwhile, on as many threads as it began with.

    Refused where its configuration, its data, its model or its ledgers are no longer the same, and where it is what a
    site keeps of a federation: without the others the site would train alone, over the ledger that it needs there.
    """
    folder = reopen(path, config)
    with locked(path):
        earlier = folder.read_manifest()
        if folder.is_site:
            raise RunFolderError(
                f"{path} is what site {earlier['site']} keeps of a federation, whose rounds are the server's",
                "At the server: fedmide flower resume SERVER RUN; here: fedmide flower site evaluate SITE",
            )
        tell(f"going on with {path}")
        reader = partial(read, load=without_records(elsewhere)) if elsewhere else read
        inputs = reader(folder.config, tell, earlier["threads"], opener=opener)
        if problems := list(changed(earlier, inputs.manifest)):
            raise RunFolderError([f"{path}: {problem}" for problem in problems], "Bring it back, or start a new run")
        for difference in other_versions(earlier, inputs.manifest):
            tell(f"{difference}: from here on bytes may differ")
        folder.rebuild_events(list(inputs.clients))
        run = Run(folder, inputs, tell, earlier.get("federation", inputs.federation))
        if not elsewhere:  # sites that are elsewhere are asked by who reaches them
            next_round = folder.last_round(begin(run)).round
            _check_ledgers(run, next_round)
            _check_memories(run, next_round)
        commit = inputs.manifest["commit"]
        if str(commit) not in folder.commits:
            folder.update_manifest(later_commits=[*earlier.get("later_commits", []), commit])
        yield run


def set_sizes(run: Run) -> dict[str, tuple[int, int]]:
    """How many shared and personal records each site told of in the last round, where its reply in that counted."""
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
    """Refuses a run whose ledgers do not say what the sites said of them in the last round that they answered in."""
    if not methods.of(run.config).enrolls:
        return
    problems = []
    for name, told in set_sizes(run).items():
        now = standing(before(run.folder.read_ledger(name), next_round), record_ids(run, name))
        if told != (len(now.shared), len(now.personal)):
            problems.append(f"{run.folder.site(name)}: the ledger is not the one that its last round left")
    if problems:
        raise RunFolderError(problems, "Bring the files in clients/ back, or start a new run")


def _check_memories(run: Run, next_round: int) -> None:
    """The same for what a method keeps on the sites: of the last round that counted for each, or of a later one."""
    if not keeps_memory(run.config):
        return
    trained = {event["client"]: event["round"] for event in _round_events(run) if has_trained(event["metrics"])}
    problems = [
        f"{run.folder.site(name)}: the memory of round {number} is missing"
        for name, number in trained.items()
        if is_lost(run.folder.read_memory(name, next_round), number)
    ]
    if problems:
        raise RunFolderError(problems, "Bring the files in clients/ back, or start a new run")


def _round_events(run: Run) -> list[dict[str, Any]]:
    """What is told of clients and rounds, without the tuning after them."""
    return [event for event in run.folder.events() if event["stage"] != "personalize"]
