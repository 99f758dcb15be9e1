"""The overhead of Flower: seconds per round in process, simulated and deployed, and the time of a reload.

    python -m bench.flower [CLIENTS] [inprocess simulation deployment reload]

prints a JSON object. The federation trains the tiny model on four records per site, so its work takes milliseconds.
The reload is of SmolLM2-135M: a process that loads it for a message, against a message to a worker that has it loaded.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from bench.tiny import CONFIG
from fedmide.atomic import write_file
from fedmide.config import apply_overrides, load, parse, to_toml
from fedmide.federation.codec import encode_hello
from fedmide.federation.messages import Hello
from fedmide.flower.asking import ask
from fedmide.flower.consortium import Consortium, create
from fedmide.flower.processes import environment, free_port, started
from fedmide.flower.site_folder import SiteFolder
from fedmide.journal.creation import reopen

ROUNDS, MANY = 3, 100
"""Rounds, and the number of clients from which on there is only one round, because it takes long."""
FEDMIDE = (sys.executable, "-m", "fedmide")


def main() -> None:
    """Runs the chosen measurements in order, in temporary folders."""
    numbers = [int(word) for word in sys.argv[1:] if word.isdigit()]
    wanted = [word for word in sys.argv[1:] if not word.isdigit()] or list(MEASURES)
    found = {}
    for name in wanted:
        with tempfile.TemporaryDirectory(prefix="bench-") as folder:
            found[name] = MEASURES[name](Path(folder), numbers[0] if numbers else 8)
    sys.stdout.write(json.dumps(found, indent=2) + "\n")


def in_process(folder: Path, clients: int) -> dict[str, Any]:
    """All sites in one process."""
    return _run(folder, ["train", str(_federation(folder, clients)), "--out", str(folder / "run")])


def simulation(folder: Path, clients: int) -> dict[str, Any]:
    """All sites in processes that Ray starts."""
    command = ["train", str(_federation(folder, clients)), "--out", str(folder / "run")]
    return _run(folder, [*command, "--runtime", "flower-simulation"])


def deployment(folder: Path, clients: int) -> dict[str, Any]:
    """Each site with processes of its own, TLS and keys, on loopback."""
    config = _federation(folder, clients)
    with _consortium(folder, config, tuple(f"c{number}" for number in range(clients))) as made:
        return _run(folder, ["flower", "run", str(made / "server"), "--out", str(folder / "run")])


def reload(folder: Path, clients: int) -> dict[str, Any]:
    """Seconds until a site with SmolLM2-135M answers: to the first message, which loads it, and to later ones."""
    config = folder / "federation.toml"
    overrides = ["data.source=medical", "data.clients=1", "data.max_records=16", "runtime.threads=1"]
    config.write_text(to_toml(parse(apply_overrides({}, overrides))))
    site = folder / "site"
    SiteFolder(site, "phenotype-definitions", "127.0.0.1:1", True).write()
    write_file(site / "site.toml", config.read_bytes())
    work = "import sys; from pathlib import Path; from fedmide.flower.worker import work; work(Path(sys.argv[1]))"
    seconds = []
    begun = time.perf_counter()
    with started([sys.executable, "-c", work, str(site)], environment(folder / "home"), folder / "log"):
        for number in range(6):
            ask(site, encode_hello(Hello("0" * 16, number)))
            seconds.append(time.perf_counter() - begun)
            begun = time.perf_counter()
    return {"process_and_model_seconds": round(seconds[0], 3), "resident_seconds": round(min(seconds[1:]), 4)}


MEASURES: dict[str, Callable[[Path, int], dict[str, Any]]] = {
    "inprocess": in_process,
    "simulation": simulation,
    "deployment": deployment,
    "reload": reload,
}


def _federation(folder: Path, clients: int) -> Path:
    """Writes a configuration, and the records of this many clients."""
    (folder / "data").mkdir()
    for client in range(clients):
        rows = [{"instruction": f"What is {client} and {number}?", "response": "So."} for number in range(4)]
        (folder / "data" / f"c{client}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = folder / "federation.toml"
    path.write_text(
        CONFIG.format(folder=folder, rounds=ROUNDS if clients < MANY else 1) + "[generation]\nenabled = false\n"
    )
    load(path)
    return path


@contextmanager
def _consortium(folder: Path, config: Path, sites: tuple[str, ...]) -> Iterator[Path]:
    made, port = folder / "made", free_port()
    create(Consortium(made, sites, f"127.0.0.1:{port}", port), load(config), lambda message: None)
    with ExitStack() as stack:
        for name, verb in [("server", "server"), *((f"site-{site}", "site") for site in sites)]:
            command = [*FEDMIDE, "flower", verb, "start", str(made / name)]
            stack.enter_context(started(command, environment(folder / "home"), folder / f"{name}.log"))
            while "is up" not in (folder / "server.log").read_text():
                time.sleep(0.2)
        yield made


def _run(folder: Path, command: list[str]) -> dict[str, Any]:
    """Figures from a run's events: the longest wait of each round, and the bytes each way."""
    begun = time.perf_counter()
    subprocess.run([*FEDMIDE, *command], check=True, capture_output=True)
    whole = time.perf_counter() - begun
    events = [event for event in reopen(folder / "run").events() if event["stage"] == "train"]
    numbers = sorted({event["round"] for event in events})
    rounds = [[event for event in events if event["round"] == number] for number in numbers]
    in_turn = command[0] == "train" and "--runtime" not in command
    waits = [(sum if in_turn else max)(event["seconds"] for event in each) for each in rounds]
    return {
        "clients": len(rounds[0]),
        "seconds_a_round": round(min(waits), 3),
        "seconds_of_the_command": round(whole, 1),
        "bytes_down_a_client": rounds[0][0]["bytes_down"],
        "bytes_up_a_client": rounds[0][0]["bytes_up"],
        "peak_memory_mb": reopen(folder / "run").read_manifest()["peak_memory_mb"],
    }


if __name__ == "__main__":
    main()
