"""What a run left, as tables. Takes seconds where there is no run yet, for a small one is made; downloads nothing."""

# %% Any run folder will do; paths are from the repository's root.
import tempfile
from pathlib import Path

import fedmide

folder = Path("runs/demo-001")
if folder.exists():
    results = fedmide.read_run(folder)
else:
    results = fedmide.run("examples/tiny.toml", out=Path(tempfile.mkdtemp()) / "run", quiet=True)
print(f"{results.path.name}: {results.manifest['status']}, method {results.config.method}, seed {results.config.seed}")

# %% Rows are dictionaries. The training loss of each round, client by client:
for row in results.rounds():
    if row["loss"] is not None:
        print(f"{row['title']:16}{row['client']:24}loss {row['loss']:.3f}  {row['bytes_up'] / 1e3:.0f} kB up")

# %% Every table becomes a data frame, if you have pandas. Response NLL, a client a line and an adapter a column:
frame = results.clients().to_pandas()
print(frame.pivot(index="client", columns="adapter", values="response_nll").round(3))

# %% Whom did personalisation help most?
wide = frame.pivot(index="client", columns="adapter", values="response_nll")
print((wide["aggregated"] - wide["personalized"]).sort_values(ascending=False).round(3).rename("gain, nats per token"))

# %% On the site: its own records' scores, and which of them moved. Per-record figures are not to leave it.
client = frame["client"].iloc[0]
scores = results.scores(client).to_pandas().dropna(subset=["score"])
print(scores.groupby(["round", "set"])["score"].agg(["count", "median"]).round(3))

# %% All that was measured, with its protocol, stands in one dictionary.
print(results.metrics["protocol"]["response_nll"])
