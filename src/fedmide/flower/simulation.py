"""Flower's simulation of a run's sites: several processes on one machine, which Ray starts.

Ray listens on every interface without a password. So all of it runs in a network namespace that has only loopback.
The socket to this process is a file, which works across namespaces.
"""

import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from fedmide.errors import UsageError, UserError
from fedmide.federation.runtimes.link import Exchange, Linked, accepted, listening
from fedmide.flower.bundle import write_bundle, write_connection
from fedmide.flower.processes import environment, free_port, last_words, start, started, wait_for_port
from fedmide.flower.variables import LINK, RUN

_NAMESPACES = (("unshare", "--map-root-user", "--net"), ("unshare", "--net"))


_LOOPBACK = "import sys; from fedmide.flower.simulation import host; host(*sys.argv[1:])"


@contextmanager
def simulation(run: Path, num_sites: int, threads: int, gpus: float = 0.0) -> Iterator[Exchange]:
    """An exchange with simulated nodes, one per site, for a run folder that exists.

    Each node works with `threads` threads and `gpus` GPUs.
    """
    check_installed()
    isolated = namespace()
    with ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fedmide-")))
        listener = stack.enter_context(listening(home / "link"))
        log = home / "log"
        variables = environment(home, **{LINK: str(home / "link"), RUN: str(run.resolve()), "RAY_TMPDIR": str(home)})
        size = f"num-supernodes={num_sites} client-resources-num-cpus={threads} client-resources-num-gpus={gpus}"
        command = [*isolated, sys.executable, "-c", _LOOPBACK, str(home), size]
        process = stack.enter_context(started(command, variables, log))
        connection = accepted(listener, lambda: process.poll() is None)
        if connection is None:
            raise UserError(
                f"Flower's simulation did not start: {last_words(home / 'submitted', 8)} | {last_words(log)}"
            )
        stack.callback(connection.close)  # before the processes are ended: the server app then ends by itself
        yield Linked(connection)


def check_installed() -> None:
    """Refuses to begin if the extra `flower` is not installed."""
    from importlib.util import find_spec

    if missing := [name for name in ("flwr", "ray") if find_spec(name) is None]:
        raise UsageError(f"not installed: {', '.join(missing)}", "Install it: pip install 'fedmide[flower]'")


def host(home: str, size: str) -> None:
    """Runs Flower's simulation: a SuperLink on loopback and one run, until the SuperLink ends."""
    _raise_loopback()
    folder, port = Path(home), free_port()
    variables = dict(os.environ)
    write_bundle(folder / "app")
    write_connection(folder, port, None)
    superlink = ["flower-superlink", "--insecure", "--simulation", "--host", "127.0.0.1", "--port", str(port)]
    log, said = folder / "log", folder / "submitted"
    with started([*superlink, "--disable-runtime-dependency-installation"], variables, log) as process:
        wait_for_port(port, process, log)
        submitted = start(["flwr", "run", str(folder / "app"), "fedmide", "--federation-config", size], variables, said)
        if submitted.wait() == 0:
            process.wait()


def namespace() -> tuple[str, ...]:
    """The words before a command that run it in a network namespace with loopback only.

    There are none if the present namespace has loopback only. Raises `UsageError` if this user may not make one.
    """
    if [name for _, name in socket.if_nameindex() if name != "lo"] == []:
        return ()
    for command in _NAMESPACES:
        try:
            if subprocess.run([*command, "true"], capture_output=True, check=False).returncode == 0:
                return command
        except FileNotFoundError:
            break
    raise UsageError(
        "no network namespace can be made here, and without one Ray would listen on every interface without a password",
        "Allow unprivileged user namespaces, or run fedmide in a container without a network",
    )


def _raise_loopback() -> None:
    """Raises the loopback interface, which is down in a new namespace."""
    import fcntl
    import struct

    get_flags, set_flags, up = 0x8913, 0x8914, 0x1
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        request = struct.pack("16sh14x", b"lo", 0)
        flags = struct.unpack("16sh14x", fcntl.ioctl(control, get_flags, request))[1]
        if not flags & up:
            fcntl.ioctl(control, set_flags, struct.pack("16sh14x", b"lo", flags | up))
