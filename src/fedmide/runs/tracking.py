"""A run's entry in a tracker (MLflow or TensorBoard), made from its run folder alone.

The entry holds the configuration and each client's metrics per round, which the server gets too. It also holds the
figures over each client's test records, and the report without the sites' scores.

It holds nothing of a single record: no ledger and no prediction. If a client's figures are over one record, these
figures and the files that hold them are left out.

Tracking a run again updates its entry.
"""

import hashlib
import importlib.util
import math
import os
import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from fedmide.atomic import to_json
from fedmide.config import to_toml
from fedmide.config.knobs import flat, used
from fedmide.errors import TrackerError, first_line
from fedmide.journal.folder import RunFolder
from fedmide.report.facts import RunFacts, read
from fedmide.report.write import page

Tracker = Literal["mlflow", "tensorboard"]


NEEDS: Mapping[Tracker, tuple[str, ...]] = MappingProxyType(
    {"mlflow": ("mlflow", "sqlalchemy", "alembic"), "tensorboard": ("tensorboard",)}
)
"""The modules that the extra of a tracker installs."""


EXPERIMENT = "fedmide"
"""The MLflow experiment that holds all runs."""


STORE = "sqlite:///mlflow.db"
"""MLflow's default store: a file in the working directory, as `mlflow ui` expects it."""


OURS = ".fedmide"
"""The ending of TensorBoard files that fedmide wrote."""


ALONE = "a site's figures are over a single record, so neither they nor the report are tracked"


_NOT_IN_A_NAME = re.compile(r"[^A-Za-z0-9_\-./ ]")


@dataclass(frozen=True)
class Point:
    """One figure. `step`: its round, negative in the warm-up. Figures after all rounds have the last round plus one."""

    name: str
    value: float
    step: int


@dataclass(frozen=True)
class Tracked:
    """The data of a run for a tracker. `key` identifies the run; `withheld`: what was left out, and why.

    `rounds` never change. `final` may change if the run is evaluated again.
    """

    name: str
    key: str
    begun: datetime
    updated: datetime
    is_finished: bool
    knobs: Mapping[str, str]
    rounds: tuple[Point, ...]
    final: tuple[Point, ...]
    files: Mapping[str, bytes]
    withheld: str


def check_installed(tracker: Tracker) -> None:
    """Raises `TrackerError` if a module that the tracker needs is not installed."""
    if missing := [name for name in NEEDS[tracker] if importlib.util.find_spec(name) is None]:
        raise TrackerError(f"{', '.join(missing)} is not installed", f"Install it: pip install 'fedmide[{tracker}]'")


def track(folder: RunFolder, tracker: Tracker, place: str = "") -> tuple[str, str]:
    """Writes the run to a tracker. The result: its place there, and what was left out.

    `place`: for MLflow the URI of a store, by default MLFLOW_TRACKING_URI's or `STORE`; for TensorBoard a log folder,
    by default `tensorboard/` in the run folder. Raises `TrackerError`.
    """
    check_installed(tracker)
    told = tracked(folder)
    if tracker == "mlflow":
        where = _to_mlflow(told, place or os.environ.get("MLFLOW_TRACKING_URI") or STORE)
    else:
        where = _to_tensorboard(told, Path(place) / told.name if place else folder.path / "tensorboard")
    return where, told.withheld


def tracked(folder: RunFolder) -> Tracked:
    """The data of a run for a tracker, finished or not."""
    facts = read(folder)
    manifest, alone = facts.manifest, _is_over_one(facts.metrics.get("clients", {}))
    begun = datetime.fromisoformat(manifest["started"])
    knobs = {name: str(value) for name, value in flat(used(facts.config)).items()}
    files = {"config.toml": to_toml(facts.config).encode()}
    if not alone:
        # made here, because the run folder's own report may show scores
        files["report.html"] = page(replace(facts, scores={})).encode()
        files |= {"metrics.json": to_json(facts.metrics)} if facts.metrics else {}
    return Tracked(
        name=facts.name,
        key=hashlib.sha256(f"{manifest['federation']} {manifest['config']} {manifest['started']}".encode()).hexdigest(),
        begun=begun,
        updated=datetime.fromisoformat(manifest.get("updated", manifest["started"])),
        is_finished=manifest["status"] == "evaluated",
        knobs=knobs | {f"version.{name}": version for name, version in manifest["versions"].items()},
        rounds=_finite(_round_points(facts)),
        final=_finite(_final_points(facts, alone)),
        files=files,
        withheld=ALONE if alone else "",
    )


def _round_points(facts: RunFacts) -> Iterator[Point]:
    """The metrics of each client and round, and the training loss over all clients."""
    for turn in facts.turns:
        about = "personalization/" if turn.stage == "personalize" else ""
        for name in ("loss", "shared", "personal", "enrolled", "steps", "trained_tokens", "bytes_up", "seconds"):
            if (value := getattr(turn, name)) is not None:
                yield Point(f"clients/{turn.client}/{about}{name}", value, turn.round)
    for step, title in {turn.round: turn.title for turn in facts.rounds}.items():
        if (loss := facts.mean_loss(title)) is not None:
            yield Point("rounds/loss", loss, step)


def _final_points(facts: RunFacts, alone: bool) -> Iterator[Point]:
    """The cost of the run and, unless they are over one record, the figures of the test records."""
    found = {"cost": facts.metrics.get("federation", {}), "seconds": facts.manifest["seconds"]}
    if not alone:
        found["final"] = facts.metrics.get("over_clients", {})
        found["questions"] = facts.metrics.get("questions", {})
        for name, client in facts.metrics.get("clients", {}).items():
            found[f"clients/{name}/final"] = {**client["stages"], "generation": client["generation"]}
    for about, figures in found.items():
        for name, value in _numbers(figures):
            yield Point(f"{about}/{name}", value, facts.config.federation.rounds)


def _numbers(values: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Each number in nested values, with the path of names to it."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from ((f"{name}/{inner}", number) for inner, number in _numbers(value))
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield name, value


def _is_over_one(values: Mapping[str, Any]) -> bool:
    """True if any of the nested figures is over a single record."""
    inner = [value for value in values.values() if isinstance(value, Mapping)]
    return values.get("num_records") == 1 or any(map(_is_over_one, inner))


def _finite(points: Iterator[Point]) -> tuple[Point, ...]:
    """The points with finite values, under names that a tracker accepts."""
    return tuple(
        replace(point, name=_NOT_IN_A_NAME.sub("_", point.name)) for point in points if math.isfinite(point.value)
    )


def _to_mlflow(told: Tracked, uri: str) -> str:
    """Writes the run to MLflow's store; an earlier entry of the same run is updated."""
    # MLflow reads these during its import
    for name, value in {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
        "MLFLOW_LOGGING_LEVEL": "ERROR",
    }.items():
        os.environ.setdefault(name, value)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MLflow itself uses functions that SQLAlchemy deprecates
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param
        from mlflow.exceptions import MlflowException

        try:
            client = MlflowClient(uri)
            run_id = _mlflow_run(client, told, uri)
            metrics = [
                Metric(point.name, point.value, _milliseconds(at), point.step)
                for points, at in ((told.rounds, told.begun), (told.final, told.updated))
                for point in points
            ]
            for first in range(0, len(metrics), 1000):  # the most that MLflow takes in one call
                client.log_batch(run_id, metrics=metrics[first : first + 1000])
            knobs = [Param(name, value) for name, value in told.knobs.items()]
            for first in range(0, len(knobs), 100):
                client.log_batch(run_id, params=knobs[first : first + 100])
            with tempfile.TemporaryDirectory() as scratch:
                for name, data in told.files.items():
                    (Path(scratch) / name).write_bytes(data)
                client.log_artifacts(run_id, scratch)
            if told.is_finished:
                client.set_terminated(run_id, end_time=_milliseconds(told.updated))
        except MlflowException as error:
            raise TrackerError(
                f"MLflow at {uri}: {first_line(error)}",
                "Check that the store's address is right and that it can be reached",
            ) from None
    return f"MLflow run {run_id} at {uri}"


def _mlflow_run(client: Any, told: Tracked, uri: str) -> str:
    """The id of the run's entry, which is created if there is none."""
    known = client.get_experiment_by_name(EXPERIMENT)
    experiment = known.experiment_id if known else client.create_experiment(EXPERIMENT, _artifacts(uri))
    for found in client.search_runs([experiment], f"tags.`fedmide.run` = '{told.key}'", max_results=1):
        return str(found.info.run_id)
    tags = {"fedmide.run": told.key}
    return str(client.create_run(experiment, _milliseconds(told.begun), tags, told.name).info.run_id)


def _artifacts(uri: str) -> str | None:
    """The folder for files, next to a local store: MLflow would use the working directory. None: the store decides."""
    if not uri.startswith("sqlite:///"):
        return None
    return (Path(uri.removeprefix("sqlite:///")).resolve().parent / "mlruns" / EXPERIMENT).as_uri()


def _to_tensorboard(told: Tracked, folder: Path) -> str:
    """Writes the run as TensorBoard events, and removes the files of an earlier call."""
    from torch.utils.tensorboard import SummaryWriter

    earlier = list(folder.glob(f"events.out.tfevents.*{OURS}"))
    try:
        with SummaryWriter(str(folder), filename_suffix=OURS) as writer:
            for points, at in ((told.rounds, told.begun), (told.final, told.updated)):
                for point in points:
                    writer.add_scalar(point.name, point.value, point.step, at.timestamp())
            knobs = "\n".join(f"    {name} = {value}" for name, value in told.knobs.items())
            writer.add_text("configuration", knobs, 0, told.begun.timestamp())
    except OSError as error:
        raise TrackerError(
            f"{folder}: can't be written: {error.strerror}",
            "Give another log folder: fedmide track RUN --to tensorboard --uri FOLDER",
        ) from None
    for path in earlier:
        path.unlink()
    return f"TensorBoard's log folder {folder}"


def _milliseconds(at: datetime) -> int:
    return round(at.timestamp() * 1000)
