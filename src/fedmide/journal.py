"""The run folder: writing, reading, resuming.

    RUN/config.toml          the resolved configuration
        manifest.json        versions, fingerprints, times, status
        events.jsonl         a line per client and round
        server/round-NNN/    adapter.safetensors and state.json: a round is there whole or not
        clients/ID/          ledger.jsonl, personalization.json, adapter/, evaluation.json: what stays on the site
        adapter/             the last aggregated adapter, as a PEFT folder
        predictions/ID.jsonl
        metrics.json

Everything is written aside and renamed. A round counts once its folder stands in `server/`; what the sites wrote for a
later round is left out when the run goes on, and made anew with the same bytes.
"""

import fcntl
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fedmide import adapters, ledger
from fedmide.atomic import to_json, write_file, write_folder
from fedmide.client import ClientState
from fedmide.config import Config, fingerprint, load, to_toml
from fedmide.errors import RunFolderError
from fedmide.ledger import Ledger
from fedmide.server import RoundSummary, ServerState


@dataclass(frozen=True)
class RunFolder:
    """A run folder that exists and whose configuration has been read."""

    path: Path
    config: Config

    # --- the server's side

    def commit_round(self, state: ServerState, summary: RoundSummary) -> None:
        """Makes a round last: state after it, and its figures."""
        files = {
            "adapter.safetensors": adapters.encode(state.adapter),
            "state.json": to_json({"next_round": state.round, "summary": asdict(summary)}),
        }
        write_folder(self.path / "server" / self._round_name(summary.round), files)
        self._append_events(summary)

    def last_round(self, begin: ServerState) -> ServerState:
        """The state after the last whole round; `begin` if there is none."""
        folders = self._round_folders()
        if not folders:
            return begin
        last = folders[-1]
        adapter = adapters.read(last / "adapter.safetensors", adapters.shapes(begin.adapter))
        next_round = json.loads((last / "state.json").read_text(encoding="utf-8"))["next_round"]
        return ServerState(begin.federation, begin.clients, next_round, adapter)

    def rebuild_events(self) -> None:
        """Writes events.jsonl anew from what is whole, so that it tells of that and of nothing else."""
        told = [folder / "state.json" for folder in self._round_folders()]
        if len(told) == len(self._round_numbers()):
            sites = sorted(self.path.glob("clients/*/personalization.json"))
            told += [path for path in sites if (path.parent / "adapter").is_dir()]
        summaries = [json.loads(path.read_text("utf-8"))["summary"] for path in told]
        lines = [line for summary in summaries for line in _event_lines(summary)]
        write_file(self.path / "events.jsonl", "".join(lines).encode())

    def events(self) -> list[dict[str, Any]]:
        """The events so far."""
        path = self.path / "events.jsonl"
        return [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []

    # --- the sites' side

    def site(self, client: str) -> Path:
        """The folder of what stays on a client's site."""
        return self.path / "clients" / client

    def save_ledger(self, state: ClientState) -> None:
        """Writes the client's ledger."""
        write_file(self.site(state.name) / "ledger.jsonl", ledger.to_lines(state.ledger).encode())

    def read_ledger(self, client: str) -> Ledger:
        """The client's ledger so far."""
        path = self.site(client) / "ledger.jsonl"
        return ledger.from_lines(path.read_text("utf-8"), str(path)) if path.exists() else ()

    def personal_adapter(self, client: str) -> Path:
        """The PEFT folder of the client's personalised adapter."""
        return self.site(client) / "adapter"

    def commit_personalization(self, summary: RoundSummary, files: Mapping[str, bytes]) -> None:
        """Makes one client's personalised adapter last, with its figures."""
        (row,) = summary.clients
        write_file(self.site(row.client) / "personalization.json", to_json({"summary": asdict(summary)}))
        write_folder(self.personal_adapter(row.client), files)
        self._append_events(summary)

    def predictions(self, client: str) -> Path:
        """The file of the client's generated responses."""
        return self.path / "predictions" / f"{client}.jsonl"

    def read_predictions(self, client: str) -> list[dict[str, str]]:
        """The client's generated responses beside their references; empty where none were generated."""
        path = self.predictions(client)
        return [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []

    # --- the run

    def read_manifest(self) -> dict[str, Any]:
        """What manifest.json holds."""
        manifest: dict[str, Any] = json.loads((self.path / "manifest.json").read_text("utf-8"))
        return manifest

    def update_manifest(self, **changes: Any) -> None:
        """Sets entries of the manifest."""
        write_file(self.path / "manifest.json", to_json({**self.read_manifest(), **changes}))

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps every other process out of the run folder."""
        with (self.path / ".lock").open("w") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise RunFolderError(f"{self.path}: another process works on this run") from None
            yield

    def _round_name(self, round_number: int) -> str:
        if round_number < 0:
            return f"warmup-{round_number + self.config.warmup.rounds:03d}"
        return f"round-{round_number:03d}"

    def _round_folders(self) -> list[Path]:
        """The whole rounds, in order, without a gap."""
        names = [self._round_name(number) for number in self._round_numbers()]
        folders = [self.path / "server" / name for name in names]
        present = [folder.is_dir() for folder in folders]
        last = present.index(False) if False in present else len(present)
        return folders[:last]

    def _round_numbers(self) -> range:
        return range(-self.config.warmup.rounds, self.config.federation.rounds)

    def _append_events(self, summary: RoundSummary) -> None:
        with (self.path / "events.jsonl").open("a", encoding="utf-8") as handle:
            handle.writelines(_event_lines(asdict(summary)))


def create(path: Path, config: Config, manifest: Mapping[str, Any]) -> RunFolder:
    """A new run folder, whole from the start; one that exists already is refused."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise RunFolderError(f"{path} exists already", _remedy_for_existing(path, config))
    files = {"config.toml": to_toml(config).encode(), "manifest.json": to_json(manifest)}
    write_folder(path, files)
    return RunFolder(path, config)


def reopen(path: Path, config: Config | None = None) -> RunFolder:
    """The run folder at a path; one that belongs to another configuration is refused."""
    if not (path / "config.toml").is_file():
        raise RunFolderError(f"{path} is no run folder: it has no config.toml", "Start one with fedmide run CONFIG")
    own = load(path / "config.toml")
    if config is not None and fingerprint(config) != fingerprint(own):
        changed = ", ".join(sorted(_differences(config.model_dump(), own.model_dump())))
        raise RunFolderError(
            f"{path} belongs to another configuration: {changed} differ",
            "Give another --out, or leave CONFIG away",
        )
    return RunFolder(path, own)


def _event_lines(summary: Mapping[str, Any]) -> Sequence[str]:
    return [
        json.dumps({"stage": summary["stage"], "round": summary["round"], **row}) + "\n" for row in summary["clients"]
    ]


def _remedy_for_existing(path: Path, config: Config) -> str:
    if (path / "config.toml").is_file():
        reopen(path, config)  # says what differs, where something does
        return f"To go on with it: fedmide run --resume {path}"
    return "Give another --out"


def _differences(first: Mapping[str, Any], second: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in first.items():
        if isinstance(value, Mapping):
            yield from _differences(value, second[name], f"{prefix}{name}.")
        elif value != second[name]:
            yield f"{prefix}{name}"
