"""One run of a study, started or resumed."""

import json
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

from fedmide.config import Config
from fedmide.config.knobs import fingerprint
from fedmide.config.sections import PersonalizationConfig
from fedmide.evaluation.summary import StageName
from fedmide.journal.creation import reopen
from fedmide.progress import Progress, Tell
from fedmide.runs import opening, stages
from fedmide.runs.resident import Kept
from fedmide.studies.entrants import Entrant

SAME_INPUTS = ("data", "model", "prompt")
"""The parts of the manifests that must be the same for runs to be compared."""


@dataclass(frozen=True)
class Attempt:
    """One run: an entrant with a learning rate and a seed."""

    entrant: Entrant
    rate: float
    seed: int
    path: Path

    @property
    def config(self) -> Config:
        """The run's configuration."""
        return self.entrant.config_for(self.seed, self.rate)


@dataclass
class Work:
    """The runs of a study: they share one loaded model, and report their progress."""

    num_runs: int
    tell: Tell
    progress: Progress
    opener: Kept = field(default_factory=Kept)
    numbers: dict[Path, int] = field(default_factory=dict)
    """The number of each run, by its folder: runs are counted in the order in which they are first asked for."""
    worked: list[float] = field(default_factory=list)
    """The seconds of each run that was worked on, for the estimate of the time left."""
    trained: dict[str, Path] = field(default_factory=dict)
    """Runs with complete rounds, by the hash of the configuration that the rounds depend on."""

    def run(self, attempt: Attempt, wanted: Sequence[StageName]) -> None:
        """Does what a run lacks: its validation, then the wanted measures of its test records."""
        has = _measured(attempt)
        number = self.numbers.setdefault(attempt.path, len(self.numbers) + 1)
        if has is not None and set(wanted) <= has:
            self.trained.setdefault(_before_tuning(attempt.config), attempt.path)
            return
        self.tell(f"{_title(attempt)}: run {number} of {self.num_runs}{self._left()}")
        begun = time.monotonic()
        with self._opened(attempt) as run:
            self._share_rounds(run)
            stages.train(run, self.progress)
            self.trained.setdefault(_before_tuning(attempt.config), attempt.path)
            stages.personalize(run, self.progress)
            if not (attempt.path / "validation.json").exists():
                stages.validate(run)
            if wanted:
                stages.generate(run, self.progress)
                stages.evaluate(run, self.progress, wanted=wanted)
        self.worked.append(time.monotonic() - begun)

    def _opened(self, attempt: Attempt) -> AbstractContextManager[opening.Run]:
        if (attempt.path / "config.toml").exists():
            return opening.resume(attempt.path, attempt.config, self.tell, self.opener)
        return opening.start(attempt.config, attempt.path, self.tell, self.opener)

    def _share_rounds(self, run: opening.Run) -> None:
        """Gives a run without rounds those of a run that differs in its tuning only: they would be the same bytes."""
        path = self.trained.get(_before_tuning(run.config))
        if path is None or run.folder.has_rounds:
            return
        other = reopen(path)
        ours, theirs = run.folder.read_manifest(), other.read_manifest()
        same = all(ours[what] == theirs[what] for what in (*SAME_INPUTS, "threads"))
        if same and other.commits == run.folder.commits:
            self.tell(f"the rounds are those of {path}")
            run.folder.take_rounds(other, list(run.inputs.clients))
            run.folder.update_manifest(
                **{what: {"trained": theirs[what]["trained"]} for what in ("seconds", "model_seconds")}
            )

    def _left(self) -> str:
        if not self.worked:
            return ""
        seconds = sum(self.worked) / len(self.worked) * (self.num_runs - len(self.numbers) + 1)
        return f", about {seconds / 60:.0f} min left"


def _before_tuning(config: Config) -> str:
    """The hash of the configuration that a run's rounds depend on.

    The settings of tuning are left out, except the adapter that it starts from.
    """
    kept = PersonalizationConfig(start=config.personalization.start)
    return fingerprint(config.model_copy(update={"personalization": kept}))


def _title(attempt: Attempt) -> str:
    return f"{attempt.entrant.name}, rate {attempt.rate!r}, seed {attempt.seed}"


def _measured(attempt: Attempt) -> set[str] | None:
    """The adapters that a complete run has measured on test records; None if the run is not complete."""
    if not (attempt.path / "validation.json").exists():
        return None
    reopen(attempt.path, attempt.config)
    path = attempt.path / "metrics.json"
    return set(json.loads(path.read_text("utf-8"))["over_clients"]) - {"generation"} if path.exists() else set()
