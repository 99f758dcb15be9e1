"""The folder of one site in a deployment, and the site that it describes.

It contains:

    site.toml          the federation's configuration, with the path of this site's records, relative to this folder
    site.json          the site's name and the server's address
    federation.json    version, hashes and settings of the federation, with which `check` compares the site's own
    keys/              node key (0600), superexec secret (0600), the server's CA certificate
    runs/ID/           a run folder per federation: ledger, adapters and measurements; it never leaves the site
    logs/              the output of the site's processes; it never leaves the site either
    flwr/              Flower's own files
    start.sh           the script that starts the site
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
    """A site's folder. `plain` means no encryption and no keys, which is for one machine only."""

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
            raise UsageError(
                f"{path} is not the folder of a site", "Give a folder site-NAME/ that fedmide flower init wrote"
            ) from None

    def write(self) -> None:
        """Writes `site.json`."""
        values = {key: value for key, value in asdict(self).items() if key != "path"}
        write_file(self.path / "site.json", to_json(values))

    @property
    def config(self) -> Config:
        """The site's configuration."""
        return load(self.path / "site.toml")

    def inputs(self, tell: "Tell") -> "Inputs":
        """The site's own records and the model. Paths are relative to the folder, whatever the working directory is."""
        from fedmide.runs.inputs import only, read

        config = self.config
        with chdir(self.path):
            return read(config, tell, load=only(self.name))

    def site(self, tell: "Tell") -> "Site":
        """The site, ready to answer messages."""
        from fedmide.runs.site import Site

        inputs = self.inputs(tell)
        return Site(self.name, inputs, lambda federation: self.run_folder(federation, inputs), tell)

    @contextmanager
    def personalized(self, path: Path | None, tell: "Tell") -> Iterator["Run"]:
        """The run in the folder `path`, ready to be measured.

        Without `path`, it is the run begun last of those with a tuned adapter of this site.

        Raises `RunFolderError` if the run has no tuned adapter of this site, or if settings, model, prompt or
        records have changed since.
        """
        from fedmide.journal.creation import locked
        from fedmide.runs.opening import Run

        federation = self._last_personalized(path).name
        inputs = self.inputs(tell)
        if federation.partition("-")[0] != inputs.federation:
            raise RunFolderError(
                f"{federation}: settings, base model or prompt have changed since its rounds",
                "Restore the earlier ones",
            )
        folder = self.run_folder(federation, inputs)
        with locked(folder.path):
            yield Run(folder, inputs, tell, federation)

    def _last_personalized(self, wanted: Path | None) -> Path:
        """The wanted run folder, or else that of the run begun last. It has a tuned adapter of this site."""
        from fedmide.journal.creation import reopen

        found = [adapter.parents[2] for adapter in (self.path / "runs").glob(f"*/clients/{self.name}/adapter")]
        if wanted is not None:
            found = [path for path in found if path.resolve() == wanted.resolve()]
        if not found:
            raise RunFolderError(
                f"{wanted or self.path}: site {self.name} has no tuned adapter there yet",
                "A run tunes it after its last round. At the server, fedmide flower resume continues a run",
            )
        return max(found, key=lambda path: str(reopen(path).read_manifest()["started"]))

    def run_folder(self, federation: str, inputs: "Inputs") -> "RunFolder":
        """The run folder of this site for a federation; created if there is none.

        Raises `RunFolderError` if the site's records have changed since its rounds, because its ledger
        describes the earlier ones.
        """
        from fedmide.journal.creation import create, reopen
        from fedmide.journal.manifest import changed_records

        if not _FEDERATION.fullmatch(federation):
            raise MessageError("not the name of a federation")
        path = self.path / "runs" / federation
        if (path / "config.toml").exists():
            folder = reopen(path)
            # the federation's name covers settings, model and prompt; paths and machines may have changed
            if problems := list(changed_records(folder.read_manifest(), inputs.manifest)):
                raise RunFolderError([f"{path}: {problem}" for problem in problems], "Restore the earlier records")
            return folder
        return create(path, inputs.resident.config, {**inputs.manifest, "federation": federation, "site": self.name})
