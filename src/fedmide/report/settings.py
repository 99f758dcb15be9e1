"""Tables of a run's configuration, versions, fingerprints and protocol."""

from fedmide.config import Config
from fedmide.config.knobs import flat, knobs
from fedmide.report.facts import RunFacts
from fedmide.report.figure import Row, Table, table


def provenance_table(facts: RunFacts) -> Table:
    """Versions, seed, machine and fingerprints."""
    manifest, model = facts.manifest, facts.manifest["model"]
    rows = {
        "status": manifest["status"],
        "started": manifest["started"],
        "last stage ended": manifest.get("updated", "–"),
        "fedmide": f"{manifest['fedmide']}, commit {manifest.get('commit') or 'unknown'}",
        "seed": str(manifest["seed"]),
        "base model": f"{model['name']}, {model['dtype']}, fingerprint {model['fingerprint']}",
        "prompt's hash": str(manifest["prompt"]),
        "configuration's fingerprint": str(manifest["config"]),
        "machine": f"{manifest['platform']}, {manifest['device']}, {manifest['threads']} threads",
        "Python": manifest["python"],
        "libraries": ", ".join(f"{name} {version}" for name, version in manifest["versions"].items()),
        "peak memory": f"{manifest['peak_memory_mb']:,} MB",
    }
    return table(("what", "value"), [Row((name, value)) for name, value in rows.items()])


def data_table(facts: RunFacts) -> Table:
    """Each client's records per split, the number that were cut, and the records' fingerprint."""
    parts = ("training", "validation", "test", "truncated", "fingerprint")
    rows = [
        Row((name, *(str(each.get(part, "–")) for part in parts)), name)
        for name, each in facts.manifest["data"].items()
    ]
    return table(("site", "training", "validation", "test", "cut to fit", "fingerprint"), rows)


def config_table(facts: RunFacts) -> Table:
    """Every setting: its value, the default (the published method's value) if that differs, and its meaning."""
    own, published = (flat(config.model_dump()) for config in (facts.config, Config()))
    rows = []
    for name, meaning in knobs():
        differs = own[name] != published[name]
        rows.append(Row((name, shown(own[name]), shown(published[name]) if differs else "", meaning)))
    return table(("setting", "value", "default, if different", "meaning"), rows)


def protocol_table(facts: RunFacts) -> Table:
    """The protocol of each figure."""
    return table(
        ("figure", "protocol"),
        [Row((name, shown(value))) for name, value in flat(facts.metrics.get("protocol", {})).items()],
    )


def shown(value: object) -> str:
    """A setting's value as text for people."""
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return '""' if value == "" else str(value).lower() if isinstance(value, bool) else str(value)
