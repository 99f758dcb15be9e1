"""The sites of a simulation. Each of its processes has all records and one model, which stays loaded."""

from functools import lru_cache
from pathlib import Path

from fedmide.journal.creation import reopen
from fedmide.journal.folder import RunFolder
from fedmide.runs.inputs import Inputs, read
from fedmide.runs.site import Site
from fedmide.terminal import tell


def site_of(run: Path, index: int) -> Site:
    """The site with this number. Its ledger is in the run folder."""
    folder, inputs = _opened(run)
    return Site(list(inputs.clients)[index], inputs, lambda federation: folder, tell)


@lru_cache(maxsize=1)
def _opened(run: Path) -> tuple[RunFolder, Inputs]:
    folder = reopen(run)
    return folder, read(folder.config, threads=folder.read_manifest()["threads"])
