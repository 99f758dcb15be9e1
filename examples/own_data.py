"""Run on your own records: one table with a site column (or one file per site). Takes seconds, downloads nothing."""

# %% Records of two sites, as your program may have them: a question, an answer, and the name of the site.
import json
import tempfile
from pathlib import Path

import fedmide

folder = Path(tempfile.mkdtemp())
organs = ("liver", "heart", "kidney", "lung", "skin", "brain", "colon", "spleen", "bone", "ear", "eye", "nerve")
rows = [
    {
        "hospital": hospital,
        "question": f"Which specialty sees a patient's {organ}?",
        "answer": f"{hospital}: {organ} clinic",
    }
    for hospital in ("north", "south")
    for organ in organs
]
table = folder / "records.jsonl"
table.write_text("".join(json.dumps(row) + "\n" for row in rows))

# %% The configuration names the file and its fields. `model` and the settings after it make the run quick.
config = {
    "data": {
        "source": "table",
        "path": str(table),
        "fields": {"client": "hospital", "instruction": "question", "response": "answer"},
    },
    "model": {"name": "tiny-random"},
    "prompt": {"template": "plain"},
    "training": {"batch_size": 4, "learning_rate": 1e-2},
    "federation": {"rounds": 2},
    "personalization": {"epochs": 2},
    "generation": {"max_new_tokens": 8},
}

# %% Run. By default a fifth of the records is split off for testing, and a tenth of the others for validation.
results = fedmide.run(config, out=folder / "run", quiet=True)
for name, counts in results.manifest["data"].items():
    print(name, {part: counts[part] for part in ("training", "validation", "test")})

# %% Did it help? Response NLL in nats per token on each site's test records; lower is better.
for row in results.clients():
    print(f"{row['client']:8}{row['adapter']:14}{row['response_nll']:.3f}")
