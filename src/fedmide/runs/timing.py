"""Progress of a stage while it works, and its duration, written to the manifest."""

import resource
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

from fedmide.federation.messages import ClientTask
from fedmide.federation.rounds import Runtime
from fedmide.federation.server import Delivery
from fedmide.journal.manifest import STATUSES, now
from fedmide.progress import Advance
from fedmide.runs.opening import Run


@contextmanager
def listening(run: Run, shown: AbstractContextManager[Advance]) -> Iterator[Advance]:
    """The same progress, which also shows the model's work on the current client."""
    resident = run.inputs.resident
    with shown as advance:
        resident.on_count = lambda kind, total: advance(0, f"{total:,} {kind}")
        try:
            yield advance
        finally:
            resident.on_count = lambda kind, total: None


def noted(run: Run, runtime: Runtime, advance: Advance) -> Runtime:
    """The same runtime, which advances the progress after every delivery."""

    def deliver(tasks: Sequence[ClientTask]) -> Iterator[Delivery]:
        for delivery in runtime(tasks):
            advance(1, _note(run, tasks[0].round, delivery))
            yield delivery

    return deliver


def _note(run: Run, round_number: int, delivery: Delivery) -> str:
    """A short note on a client's finished work: round, name, loss."""
    title = f"{run.folder.round_name(round_number)}, " if round_number < run.config.federation.rounds else ""
    loss = delivery.reply.metrics.get("loss") if delivery.reply else None
    return f"{title}site {delivery.client}" + (f", loss {loss.sum / loss.count:.3f}" if loss else "")


@contextmanager
def timed(run: Run, status: str, work: int) -> Iterator[None]:
    """Writes to the manifest that a stage ended, and its seconds in all and by kind of the model's work.

    The seconds include those before restarts. A stage without work (`work` is 0) never sets the run's status back to
    an earlier one.
    """
    begun, by_kind = time.perf_counter(), Counter(run.inputs.resident.seconds)
    ended = {}
    try:
        yield
        earlier = run.folder.read_manifest()["status"]
        if work or STATUSES.index(status) > STATUSES.index(earlier):
            ended = {"status": status, "updated": now()}
    finally:
        manifest = run.folder.read_manifest()
        seconds, worked = manifest["seconds"], manifest.get("model_seconds", {})
        spent = seconds.get(status, 0.0) + time.perf_counter() - begun
        now_worked = Counter(run.inputs.resident.seconds)
        now_worked.subtract(by_kind)
        now_worked.update(worked.get(status, {}))
        kinds = {kind: round(value, 3) for kind, value in sorted(now_worked.items())}
        peak = max(manifest["peak_memory_mb"], _peak_memory_mb())
        held = {"peak_memory_mb": peak, "prefix_cache_mb": run.inputs.resident.model.prefix_bytes // 10**6}
        times = {"seconds": {**seconds, status: round(spent, 3)}, "model_seconds": {**worked, status: kinds}}
        run.folder.update_manifest(**times, **held, **ended)


def _peak_memory_mb() -> int:
    """The peak memory of this process so far, in 10^6 bytes."""
    with suppress(OSError, StopIteration):  # Linux, where getrusage also counts a parent's memory
        lines = Path("/proc/self/status").read_text().splitlines()
        return round(int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) * 1024 / 1e6)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak * (1 if sys.platform == "darwin" else 1024) / 1e6)
