"""A run whose sites are reached through Flower."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

from fedmide import methods
from fedmide.errors import UsageError
from fedmide.federation.runtimes.link import Exchange
from fedmide.federation.runtimes.remote import Remote
from fedmide.flower.simulation import simulation
from fedmide.runs.opening import Run, set_sizes


def remote(run: Run, connect: Callable[[], Exchange], bound: Mapping[int, str] | None = None) -> Run:
    """The same run over an exchange. `bound` maps each node to its site, as the node's registered key proves it.

    Without keys, it is None.
    """
    if methods.of(run.config).in_one_place:
        raise UsageError(
            f'method = "{run.config.method}" trains in one place and has no sites to reach', "Run it without --runtime"
        )
    replies, told = run.config.replies, partial(set_sizes, run)
    own = replace(run.inputs.facts(), federation=run.federation)
    runtime = Remote(connect, own, told, replies.deadline_seconds, run.tell, bound, replies.quorum)
    return replace(run, runtime=runtime)


@contextmanager
def simulated(run: Run) -> Iterator[Run]:
    """The same run in Flower's simulation."""
    manifest = run.folder.read_manifest()
    gpus = float(manifest["device"].startswith("cuda"))
    with simulation(run.folder.path, len(run.inputs.clients), manifest["threads"], gpus) as exchange:
        yield remote(run, lambda: exchange)
