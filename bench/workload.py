"""The workload of the bench: records of two clients, SmolLM2-135M, one round of training and scoring."""

from dataclasses import dataclass
from pathlib import Path

from fedmide.config import Config, apply_overrides, parse
from fedmide.model.threads import available_cores
from fedmide.runs.inputs import Inputs, read

PUBLISHED = Path(__file__).resolve().parents[2] / "shared" / "fedmide-data"
SHORT = 24
"""Records per client. Half of them are personal, and are scored before and after the training on the others."""


@dataclass(frozen=True)
class Workload:
    """A configuration and its inputs, loaded."""

    config: Config
    inputs: Inputs


def workload(*overrides: str) -> Workload:
    """Two clients on the published data if it lies next to the repository, else on the demo's sites.

    Uses all cores, even busy ones, because the code that it is compared with uses as many threads.
    """
    source = ["data.source=published", f"data.path={PUBLISHED}"] if PUBLISHED.is_dir() else ["data.source=medical"]
    sizes = [f"data.max_records={SHORT}", "data.max_test_records=16", "data.clients=2", "data.validation_fraction=0"]
    common = ["model.cutoff=256", "prompt.overflow=cut", "lora.targets=all-linear", "training.positions=response"]
    threads = f"runtime.threads={available_cores()}"
    values = apply_overrides({}, [*source, *sizes, *common, threads, "scoring.positions=response", *overrides])
    config = parse(values)
    return Workload(config, read(config))
