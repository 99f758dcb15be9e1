"""Texts of records for a page that stays on the site: what was kept back, what was shared, what the model answered.

Only called where the user asks for it. Ids stay out of the page all the same: nobody needs them to read it.
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
"""So many records of each kind and client."""


MAX_CHARACTERS = 2000
"""A longer text is cut on the page."""


@dataclass(frozen=True)
class Passage:
    """One record on the page: whose it is, why it is shown, and its texts by what they are."""

    client: str
    kind: str
    remark: str
    texts: tuple[tuple[str, str], ...]


def passages(folder: RunFolder, facts: RunFacts) -> tuple[Passage, ...]:
    """For each client the training records with the highest and lowest scores at the split, and its predictions.

    The records are read from where the configuration points; raises `DataError` where they are not there any more.
    """
    found: list[Passage] = []
    for client in load(folder.config.data, folder.config.data_seed):
        if client.name in facts.clients:
            found += _extremes(client, folder.read_ledger(client.name))
            found += _predictions(client, folder)
    return tuple(found)


def _extremes(client: ClientData, ledger: Ledger) -> list[Passage]:
    """Records at both ends of the scores at the split."""
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
