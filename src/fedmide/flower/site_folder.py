"""The folder of one site in a deployment, and the site that it describes.

site.toml      the federation's configuration, with the place of this site's records, from here
site.json      the site's name and where the server is
keys/          node key (0600), superexec secret (0600), the server's CA certificate
runs/ID/       a run folder per federation: ledger, adapters, and what they measure here; it never leaves
logs/          what its processes say; it never leaves either
"""

import json
import re
from collections.abc import Iterator
from contextlib import chdir, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fedmide.atomic import to_json, write_file
from fedmide.config import Config, load
from fedmide.errors import MessageError, RunFolderError, UsageError

if TYPE_CHECKING:
    from fedmide.journal.folder import RunFolder
    from fedmide.progress import Tell
    from fedmide.runs.inputs import Inputs
    from fedmide.runs.opening import Run
    from fedmide.runs.site import Site


_FEDERATION = re.compile(r"[0-9a-f]{16}(-[0-9a-f]{8})?")


@dataclass(frozen=True)
class SiteFolder:
    """A site's folder. `plain`: without encryption and keys, which is for one machine only."""

    path: Path
    name: str
    superlink: str
    plain: bool = False

    @classmethod
    def read(cls, path: Path) -> "SiteFolder":
        """The folder as its `site.json` describes it; raises `UsageError`."""
        try:
            values = json.loads((path / "site.json").read_text("utf-8"))
            return cls(path, str(values["name"]), str(values["superlink"]), bool(values["plain"]))
        except (OSError, ValueError, KeyError, TypeError):
            raise UsageError(f"{path} is no folder of a site", "Give one that fedmide flower init has made") from None

    def write(self) -> None:
        """Writes `site.json`."""
        values = {key: value for key, value in asdict(self).items() if key != "path"}
        write_file(self.path / "site.json", to_json(values))

    @property
    def config(self) -> Config:
        """The site's configuration."""
        return load(self.path / "site.toml")

    def inputs(self, tell: "Tell") -> "Inputs":
        """The site's own records, and the model. Paths count from the folder, wherever it is worked on from."""
        from fedmide.runs.inputs import only, read

        config = self.config
        with chdir(self.path):
            return read(config, tell, load=only(self.name))

    def site(self, tell: "Tell") -> "Site":
        """The site at work."""
        from fedmide.runs.site import Site

        inputs = self.inputs(tell)
        return Site(self.name, inputs, lambda federation: self.run_folder(federation, inputs), tell)

    @contextmanager
    def personalized(self, path: Path | None, tell: "Tell") -> Iterator["Run"]:
        """What this site keeps in `path` of a federation that it is personalised in, to be measured; None: of the last.

        Raises `RunFolderError` where there is none, or where settings, model, prompt or records are others by now.
        """
        from fedmide.journal.creation import locked
        from fedmide.runs.opening import Run

        federation = self._last_personalized(path).name
        inputs = self.inputs(tell)
        if federation.partition("-")[0] != inputs.federation:
            raise RunFolderError(
                f"{federation}: settings, base model or prompt are not those of its rounds", "Bring them back"
            )
        folder = self.run_folder(federation, inputs)
        with locked(folder.path):
            yield Run(folder, inputs, tell, federation)

    def _last_personalized(self, wanted: Path | None) -> Path:
        """The run folder that is wanted, or the one begun last, among those that have a personalised adapter."""
        from fedmide.journal.creation import reopen

        found = [adapter.parents[2] for adapter in (self.path / "runs").glob(f"*/clients/{self.name}/adapter")]
        if wanted is not None:
            found = [path for path in found if path.resolve() == wanted.resolve()]
        if not found:
            raise RunFolderError(
                f"{wanted or self.path}: site {self.name} is not personalised there yet",
                "That is the end of a run at the server; fedmide flower resume goes on with one",
            )
        return max(found, key=lambda path: str(reopen(path).read_manifest()["started"]))

    def run_folder(self, federation: str, inputs: "Inputs") -> "RunFolder":
        """Where this site keeps what belongs to a federation.

        Raises `RunFolderError` where its records are no longer those of the rounds so far: its ledger is of those.
        """
        from fedmide.journal.creation import create, reopen
        from fedmide.journal.manifest import changed_records

        if not _FEDERATION.fullmatch(federation):
            raise MessageError("not the name of a federation")
        path = self.path / "runs" / federation
        if (path / "config.toml").exists():
            folder = reopen(path)
            # settings, model and prompt are in the federation's name; paths and machines may be others by now
            if problems := list(changed_records(folder.read_manifest(), inputs.manifest)):
                raise RunFolderError([f"{path}: {problem}" for problem in problems], "Bring them back")
            return folder
        return create(path, inputs.resident.config, {**inputs.manifest, "federation": federation, "site": self.name})
