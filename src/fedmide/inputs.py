"""What a configuration points at, read and checked before anything is written: records, model, examples."""

import hashlib
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from fedmide import __version__
from fedmide.checkpoints import fingerprint as model_fingerprint
from fedmide.checkpoints import locate
from fedmide.config import Config
from fedmide.config import fingerprint as config_fingerprint
from fedmide.errors import DataError
from fedmide.localmodel import Adapter
from fedmide.prompts import prompt_hash
from fedmide.records import ClientData, Record
from fedmide.resident import Resident, open_model
from fedmide.sources import load as load_data
from fedmide.tokens import Encoder, Example, encode_all, encoder

VERSIONED = ("torch", "transformers", "peft", "safetensors", "numpy")


@dataclass(frozen=True)
class SiteExamples:
    """One client's records as examples."""

    training: tuple[Example, ...]
    validation: tuple[Example, ...]
    test: tuple[Example, ...]

    @property
    def num_truncated(self) -> int:
        """Examples that did not fit whole."""
        return sum(example.truncated for example in self.training + self.validation + self.test)


@dataclass(frozen=True)
class Inputs:
    """Records and examples by client, the encoder between them, the loaded model, and what the manifest says."""

    clients: Mapping[str, ClientData]
    examples: Mapping[str, SiteExamples]
    encode: Encoder
    resident: Resident
    manifest: Mapping[str, Any]

    def fresh_adapter(self) -> Adapter:
        """The adapter that the federation starts from."""
        return self.resident.fresh(self.resident.config.seed)

    @property
    def prompt_hash(self) -> str:
        """What tells this prompt from another's: of the template, the tokenizer's own where that is used."""
        return prompt_hash(self.encode.template, str(self.resident.model.tokenizer.chat_template or ""))


def read(config: Config) -> Inputs:
    """All that the configuration points at; each kind of problem is raised with every instance of it."""
    clients = load_data(config.data, config.seed)
    folder = locate(config.model.name)
    resident = open_model(config, folder)
    encode = encoder(resident.model.tokenizer, config.model, config.prompt)
    examples = _encode_clients(encode, clients)
    manifest = _manifest(config, clients, examples, folder, resident)
    return Inputs({client.name: client for client in clients}, examples, encode, resident, manifest)


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _encode_clients(encode: Encoder, clients: Sequence[ClientData]) -> dict[str, SiteExamples]:
    examples: dict[str, SiteExamples] = {}
    problems: list[str] = []
    remedy = ""
    for client in clients:
        try:
            parts = [encode_all(encode, records, f"client {client.name!r}, {part}") for part, records in _parts(client)]
            examples[client.name] = SiteExamples(*parts)
        except DataError as error:
            problems.extend(error.problems)
            remedy = error.remedy
    if problems:
        raise DataError(problems, remedy)
    return examples


def _parts(client: ClientData) -> tuple[tuple[str, Sequence[Record]], ...]:
    return (("training", client.training), ("validation", client.validation), ("test", client.test))


def _manifest(
    config: Config,
    clients: Sequence[ClientData],
    examples: Mapping[str, SiteExamples],
    folder: Path,
    resident: Resident,
) -> dict[str, Any]:
    dtype = str(next(resident.model.network.parameters()).dtype).removeprefix("torch.")
    return {
        "fedmide": __version__,
        "versions": {name: metadata.version(name) for name in VERSIONED},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "device": str(resident.model.device),
        "seed": config.seed,
        "config": config_fingerprint(config),
        "model": {"name": config.model.name, "fingerprint": model_fingerprint(folder), "dtype": dtype},
        "data": {
            client.name: {
                "fingerprint": _data_fingerprint(client),
                **{part: len(records) for part, records in _parts(client)},
                "truncated": examples[client.name].num_truncated,
            }
            for client in clients
        },
        "started": now(),
        "status": "started",
    }


def _data_fingerprint(client: ClientData) -> str:
    ids = "\n".join(f"{part} {record.id}" for part, records in _parts(client) for record in records)
    return hashlib.sha256(ids.encode()).hexdigest()[:16]
