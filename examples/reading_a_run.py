"""Read the results of a run as tables. Makes a small run if there is none: takes seconds, downloads nothing."""

# %% Any run folder works. Start this file in the repository's root.
import tempfile
from pathlib import Path

import fedmide

folder = Path("runs/demo-001")
if folder.exists():
    results = fedmide.read_run(folder)
else:
    results = fedmide.run("examples/tiny.toml", out=Path(tempfile.mkdtemp()) / "run", quiet=True)
print(f"{results.path.name}: {results.manifest['status']}, method {results.config.method}, seed {results.config.seed}")

# %% Rows are dictionaries. The training loss per round and site:
for row in results.rounds():
    if row["loss"] is not None:
        print(f"{row['title']:16}{row['client']:24}loss {row['loss']:.3f}  {row['bytes_up'] / 1e3:.0f} kB up")

# %% With pandas, every table becomes a data frame. Response NLL, one line per site and one column per adapter:
frame = results.clients().to_pandas()
print(frame.pivot(index="client", columns="adapter", values="response_nll").round(3))

# %% The sites that gained most from personalization come first:
wide = frame.pivot(index="client", columns="adapter", values="response_nll")
print((wide["aggregated"] - wide["personalized"]).sort_values(ascending=False).round(3).rename("gain, nats per token"))

# %% At a site: its own records' scores, by round and set. Figures of single records must not leave the site.
client = frame["client"].iloc[0]
scores = results.scores(client).to_pandas().dropna(subset=["score"])
print(scores.groupby(["round", "set"])["score"].agg(["count", "median"]).round(3))

# %% All measurements and their protocol are in one dictionary.
print(results.metrics["protocol"]["response_nll"])
