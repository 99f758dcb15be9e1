"""Texts of records for a page that stays on the site: records held back, records shared, and answers of the model.

Used only if the user asks for it. Even then the page has no ids, because readers do not need them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from fedmide.data import load
from fedmide.data.records import ClientData, Record
from fedmide.federation.ledger import Entry, Ledger
from fedmide.journal.folder import RunFolder
from fedmide.report.facts import RunFacts
from fedmide.report.figure import number

MAX_SHOWN = 20
"""At most this many records are shown per kind and client."""


MAX_CHARACTERS = 2000
"""Longer texts are cut on the page."""


@dataclass(frozen=True)
class Passage:
    """One record on the page: its client, the reason for showing it, and its texts by name."""

    client: str
    kind: str
    remark: str
    texts: tuple[tuple[str, str], ...]


def passages(folder: RunFolder, facts: RunFacts) -> tuple[Passage, ...]:
    """Training records with the highest and lowest scores at the split, and predictions, of each client.

    Reads the records from the place that the configuration names. Raises `DataError` if they are no longer there.
    """
    found: list[Passage] = []
    for client in load(folder.config.data, folder.config.data_seed):
        if client.name in facts.clients:
            found += _extremes(client, folder.read_ledger(client.name))
            found += _predictions(client, folder)
    return tuple(found)


def _extremes(client: ClientData, ledger: Ledger) -> list[Passage]:
    """Records with the highest and the lowest scores at the split."""
    records = {record.id: record for record in client.training}
    judged = [entry for entry in ledger if entry.reason != "own-nll"]
    split = [entry for entry in judged if entry.round == judged[0].round and entry.score is not None]
    ordered = sorted(split, key=lambda entry: entry.score or 0.0, reverse=True)
    last = {entry.record_id: entry for entry in judged}
    high = ordered[:MAX_SHOWN]
    low = ordered[len(high) :][-MAX_SHOWN:]
    ends = (("high score at the split", high), ("low score at the split", low))
    return [
        _trained(client.name, kind, entry, last[entry.record_id], records[entry.record_id])
        for kind, entries in ends
        for entry in entries
        if entry.record_id in records
    ]


def _trained(client: str, kind: str, split: Entry, last: Entry, record: Record) -> Passage:
    remark = f"score {number(split.score)}, {split.set} at the split"
    if last.set != split.set:
        remark += f", enrolled later with score {number(last.score)}"
    texts = (("instruction", record.instruction), ("context", record.context), ("response", record.response))
    return Passage(client, kind, remark, _shown(texts))


def _predictions(client: ClientData, folder: RunFolder) -> list[Passage]:
    lines = folder.read_predictions(client.name)[:MAX_SHOWN]
    names = (("instruction", "instruction"), ("reference", "reference"), ("prediction", "the model's response"))
    return [
        Passage(client.name, "test prompt", "", _shown([(title, line[name]) for name, title in names]))
        for line in lines
    ]


def _shown(texts: Sequence[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
    return tuple((name, _cut(text)) for name, text in texts if text.strip())


def _cut(text: str) -> str:
    return text if len(text) <= MAX_CHARACTERS else f"{text[:MAX_CHARACTERS]} […]"
