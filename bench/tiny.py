"""One run of the tiny model: `python -m bench.tiny CLIENTS ROUNDS RECORDS FOLDER` prints a JSON object of figures."""

import json
import sys
import time
from pathlib import Path

from bench.ours import timed_work
from fedmide.config import load
from fedmide.runs import opening, stages

CONFIG = """
[data]
source = "files"
path = "{folder}/data"
validation_fraction = 0
test_fraction = 0
[model]
name = "tiny-random"
dtype = "float32"
device = "cpu"
cutoff = 128
[prompt]
template = "plain"
[lora]
dropout = 0
[federation]
rounds = {rounds}
[runtime]
threads = 1
"""


def main() -> None:
    """Writes the records, trains, and prints peak memory, overhead per client round, and seconds."""
    num_clients, num_rounds, num_records = map(int, sys.argv[1:4])
    folder = Path(sys.argv[4])
    (folder / "data").mkdir()
    for client in range(num_clients):
        rows = [{"instruction": f"What is {client} and {number}?", "response": "So."} for number in range(num_records)]
        (folder / "data" / f"c{client}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "tiny.toml").write_text(CONFIG.format(folder=folder, rounds=num_rounds))
    with opening.start(load(folder / "tiny.toml"), folder / "run") as run:
        begun = time.perf_counter()
        with timed_work(run.inputs.resident.model) as busy:
            stages.train(run)
        whole = time.perf_counter() - begun
        beside = (whole - busy.seconds) / (num_clients * (num_rounds + run.config.warmup.rounds))
        peak = run.folder.read_manifest()["peak_memory_mb"]
    figures = {"peak_memory_mb": peak, "overhead_ms": round(1e3 * beside, 3), "seconds": round(whole, 3)}
    sys.stdout.write(json.dumps(figures))


if __name__ == "__main__":
    main()
