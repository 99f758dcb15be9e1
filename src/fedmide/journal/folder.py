"""The run folder: writing, reading, resuming.

    RUN/config.toml          the resolved configuration
        manifest.json        versions, fingerprints, times, status
        events.jsonl         one line per client and round
        server/round-NNN/    after each round (warmup-NNN in the warm-up): adapter.safetensors, state.json, and
                             memory.safetensors if the method keeps something; the folder is written at once
        clients/ID/          files that stay on the site: ledger.jsonl, personalization.json, adapter/,
                             evaluation-*.json, and memory/ if the method keeps something
        adapter/             the last common adapter, as a PEFT folder
        predictions/ID.jsonl generated responses with their references
        questions/SET/       each adapter's scores on a public multiple-choice set, and the set's figures
        metrics.json report.html
        .lock                empty; locked while a process works on the run

Each file is written under another name and then renamed. The exception is events.jsonl, which grows by a few lines per
round. Readers skip an incomplete last line, and a resumed run writes the file again. A round counts once its folder is
in `server/`. A resumed run ignores files that sites wrote for a later round, and writes them again with the same bytes.
"""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fedmide.atomic import append_file, lines_of, to_json, without_nan, write_file, write_folder
from fedmide.config import Config
from fedmide.errors import RunFolderError
from fedmide.federation import ledger
from fedmide.federation.client_state import ClientState, MethodState
from fedmide.federation.ledger import Ledger
from fedmide.federation.server import RoundSummary, ServerState
from fedmide.model import adapters
from fedmide.model.interface import Adapter


@dataclass(frozen=True)
class RunFolder:
    """An existing run folder, with its configuration."""

    path: Path
    config: Config

    @property
    def is_site(self) -> bool:
        """True for the folder that one site keeps of a federation, whose rounds are at the server."""
        return "site" in self.read_manifest()

    @property
    def commits(self) -> tuple[str, ...]:
        """Commits of the code that started and resumed the run, in order."""
        manifest = self.read_manifest()
        return tuple(dict.fromkeys(map(str, (manifest["commit"], *manifest.get("later_commits", ())))))

    @property
    def adapter(self) -> Path:
        """The PEFT folder of the last common adapter."""
        return self.path / "adapter"

    # --- the server's side

    def commit_round(self, state: ServerState, summary: RoundSummary) -> None:
        """Writes a round durably: the state after it, and its figures."""
        values = asdict(summary)
        # On one line: indents would need Python's slow encoder, and there is one row per client.
        as_json = json.dumps(without_nan({"next_round": state.round, "summary": values}))
        files = {
            "adapter.safetensors": adapters.encode(state.adapter),
            "state.json": as_json.encode(),
            **({"memory.safetensors": adapters.encode(state.method_state)} if state.method_state else {}),
        }
        write_folder(self.path / "server" / self.round_name(summary.round), files)
        self._append_events(values)

    def last_round(self, begin: ServerState) -> ServerState:
        """The state after the last complete round; `begin` if there is none."""
        folders = self._round_folders()
        if not folders:
            return begin
        last = folders[-1]
        adapter = adapters.read(last / "adapter.safetensors", adapters.shapes(begin.adapter))
        next_round = _read_json(last / "state.json")["next_round"]
        kept = last / "memory.safetensors"
        method_state = adapters.read(kept) if kept.exists() else {}
        return ServerState(begin.federation, begin.clients, next_round, adapter, method_state)

    @property
    def has_rounds(self) -> bool:
        """True if at least one round is complete."""
        return bool(self._round_folders())

    def take_rounds(self, other: "RunFolder", clients: Sequence[str]) -> None:
        """Copies the rounds of another run, with the files that its sites kept of them.

        The caller ensures that this run's rounds would be the same: both runs differ only in what follows the rounds.
        """
        for client in clients:
            for path in filter(Path.exists, [other.site(client) / "ledger.jsonl", *other._method_state_files(client)]):
                write_file(self.path / path.relative_to(other.path), path.read_bytes())
        aside, place = self.path / ".server.partial", self.path / "server"
        for left in (aside, place):  # may hold an incomplete round
            shutil.rmtree(left, ignore_errors=True)
        for path in other._round_folders():
            write_folder(aside / path.name, {each.name: each.read_bytes() for each in path.iterdir()})
        aside.replace(place)  # after the sites' files: some methods can't resume without them
        self.rebuild_events(clients)

    def round_adapters(self) -> Iterator[tuple[int, Adapter]]:
        """The common adapter after each complete round, with the round's number."""
        for number, folder in zip(self._round_numbers(), self._round_folders(), strict=False):
            yield number, adapters.read(folder / "adapter.safetensors")

    def rebuild_events(self, clients: Sequence[str]) -> None:
        """Writes events.jsonl again, from complete rounds and personalizations only."""
        paths = [folder / "state.json" for folder in self._round_folders()]
        if len(paths) == len(self._round_numbers()):
            paths += [self._personalization(client) for client in clients if self.is_personalized(client)]
        summaries = [_read_json(path)["summary"] for path in paths]
        lines = [line for summary in summaries for line in _event_lines(summary)]
        write_file(self.path / "events.jsonl", "".join(lines).encode())

    def events(self) -> list[dict[str, Any]]:
        """The events so far, without an incomplete last line."""
        path = self.path / "events.jsonl"
        text = _read_text(path) if path.exists() else ""
        return _parsed_lines(text[: text.rfind("\n") + 1], path)

    # --- the sites' side

    def site(self, client: str) -> Path:
        """The folder of the files that stay on a client's site."""
        return self.path / "clients" / client

    def save_site(self, state: ClientState) -> None:
        """Writes the state that the client keeps: its ledger, and its method's state of the last rounds."""
        self.save_ledger(state)
        for each in state.method_state:
            write_file(self._method_state(state.name, each.round), adapters.encode(each.arrays))
        kept = {self._method_state(state.name, each.round) for each in state.method_state}
        for path in set(self._method_state_files(state.name)) - kept:
            path.unlink()

    def read_method_state(self, client: str, next_round: int) -> tuple[MethodState, ...]:
        """The arrays that the client's method kept of the rounds before `next_round`."""
        rounds = {int(path.stem): path for path in self._method_state_files(client)}
        return tuple(
            MethodState(number, adapters.read(path)) for number, path in sorted(rounds.items()) if number < next_round
        )

    def save_ledger(self, state: ClientState) -> None:
        """Writes the client's ledger."""
        write_file(self.site(state.name) / "ledger.jsonl", ledger.to_lines(state.ledger).encode())

    def read_ledger(self, client: str) -> Ledger:
        """The client's ledger so far."""
        path = self.site(client) / "ledger.jsonl"
        return ledger.from_lines(_read_text(path), str(path)) if path.exists() else ()

    def personal_adapter(self, client: str) -> Path:
        """The PEFT folder of the client's tuned adapter."""
        return self.site(client) / "adapter"

    def save_personal_adapter(self, client: str, files: Mapping[str, bytes]) -> None:
        """Writes the PEFT folder of the client's tuned adapter."""
        write_folder(self.personal_adapter(client), files)

    def commit_personalization(self, summary: RoundSummary) -> None:
        """Records that one client is personalized. Its tuned adapter must already be in the client's folder."""
        (row,) = summary.clients
        values = asdict(summary)
        write_file(self._personalization(row.client), to_json({"summary": values}))
        self._append_events(values)

    def is_personalized(self, client: str) -> bool:
        """True if the client's personalization is recorded."""
        return self._personalization(client).exists()

    def predictions(self, client: str) -> Path:
        """The file of the client's generated responses."""
        return self.path / "predictions" / f"{client}.jsonl"

    def read_predictions(self, client: str) -> list[dict[str, str]]:
        """The client's generated responses with their references; empty if there are none."""
        return _read_lines(self.predictions(client))

    def save_evaluation(self, client: str, stage: str, values: Mapping[str, Any]) -> None:
        """Writes the measures of the client's test records under an adapter."""
        write_file(self._evaluation(client, stage), to_json(values))

    def read_evaluation(self, client: str, stage: str) -> dict[str, Any] | None:
        """The measures of the client's test records under an adapter; None if not yet measured."""
        path = self._evaluation(client, stage)
        return _read_json(path) if path.exists() else None

    # --- models

    def tuned(self, client: str = "") -> Path:
        """The PEFT folder of a client's tuned adapter; without a client, of the common adapter.

        Raises `RunFolderError` if there is no such client, or no adapter yet.
        """
        clients = self.read_manifest()["data"]
        if client and client not in clients:
            raise RunFolderError(f"{self.path}: there is no site {client!r}", f"Known: {', '.join(clients)}")
        path = self.personal_adapter(client) if client else self.adapter
        if not path.is_dir():
            what = f"no adapter of site {client}" if client else "no common adapter"
            verb = "personalize" if client else "train"
            raise RunFolderError(f"{self.path}: {what} yet", f"First: fedmide {verb} {self.path}")
        return path

    # --- public questions

    def save_questions(self, name: str, about: str, values: Mapping[str, Any]) -> None:
        """Writes an adapter's scores on the public set `name`, or the set's figures. `about`: which of them."""
        write_file(self.path / "questions" / name / f"{about}.json", to_json(values))

    def read_questions(self, name: str, about: str) -> dict[str, Any] | None:
        """The values that `save_questions` stored under the same names; None if there are none."""
        path = self.path / "questions" / name / f"{about}.json"
        return _read_json(path) if path.exists() else None

    def question_figures(self) -> dict[str, Any]:
        """Figures of the public sets scored so far, by name of the set."""
        files = sorted((self.path / "questions").glob("*/figures.json"))
        return {path.parent.name: _read_json(path) for path in files}

    # --- the run

    def read_metrics(self) -> dict[str, Any]:
        """The values of metrics.json; empty before the evaluation."""
        path = self.path / "metrics.json"
        return _read_json(path) if path.exists() else {}

    def read_manifest(self) -> dict[str, Any]:
        """The values of manifest.json."""
        return _read_json(self.path / "manifest.json")

    def update_manifest(self, **changes: Any) -> None:
        """Sets entries of the manifest."""
        write_file(self.path / "manifest.json", to_json({**self.read_manifest(), **changes}))

    def round_name(self, round_number: int) -> str:
        """Name of a round, for its folder and for people."""
        if round_number < 0:
            return f"warmup-{round_number + self.config.warmup.rounds:03d}"
        return f"round-{round_number:03d}"

    def _round_folders(self) -> list[Path]:
        """Folders of the complete rounds, in order, up to the first gap."""
        names = [self.round_name(number) for number in self._round_numbers()]
        folders = [self.path / "server" / name for name in names]
        present = [folder.is_dir() for folder in folders]
        last = present.index(False) if False in present else len(present)
        return folders[:last]

    def _round_numbers(self) -> range:
        return range(-self.config.warmup.rounds, self.config.federation.rounds)

    def _append_events(self, summary: Mapping[str, Any]) -> None:
        """Appends the lines of a round."""
        append_file(self.path / "events.jsonl", "".join(_event_lines(summary)).encode())

    def _personalization(self, client: str) -> Path:
        return self.site(client) / "personalization.json"

    def _method_state(self, client: str, round_number: int) -> Path:
        return self.site(client) / "memory" / f"{round_number:03d}.safetensors"

    def _method_state_files(self, client: str) -> list[Path]:
        return sorted(self._method_state(client, 0).parent.glob("*.safetensors"))

    def _evaluation(self, client: str, stage: str) -> Path:
        return self.site(client) / f"evaluation-{stage}.json"


def _event_lines(summary: Mapping[str, Any]) -> Sequence[str]:
    return [
        json.dumps({"stage": summary["stage"], "round": summary["round"], **row}) + "\n" for row in summary["clients"]
    ]


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a file of the run folder."""
    return _parsed(_read_text(path), path)


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects in a file of JSON lines; empty if there is no file."""
    return _parsed_lines(_read_text(path), path) if path.exists() else []


def _parsed_lines(text: str, path: Path) -> list[dict[str, Any]]:
    return [_parsed(line, path) for line in lines_of(text)]


def _read_text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RunFolderError(f"{path}: can't be read: {error}", _DAMAGED) from None


def _parsed(text: str, path: Path) -> dict[str, Any]:
    try:
        values: dict[str, Any] = json.loads(text)
    except ValueError as error:
        raise RunFolderError(f"{path}: broken JSON: {error}", _DAMAGED) from None
    return values


_DAMAGED = "The run folder was changed from outside: restore the file, or start a new run"
