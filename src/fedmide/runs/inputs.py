"""The inputs that a configuration names (records, model, prompt), read and checked before anything is written."""

import hashlib
import platform
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import torch

from fedmide import version
from fedmide.config import Config
from fedmide.config.knobs import agreed
from fedmide.config.knobs import fingerprint as config_fingerprint
from fedmide.config.sections import DataConfig, ModelConfig
from fedmide.data import load as load_data
from fedmide.data.prompts import prompt_hash, resolve
from fedmide.data.records import ClientData
from fedmide.data.tokens import Encoder, Example, encode_all, encoder
from fedmide.errors import DataError, ModelError, UserError
from fedmide.federation.messages import Facts
from fedmide.journal.manifest import now
from fedmide.model.interface import Adapter
from fedmide.model.pretrained.locate import fingerprint as model_fingerprint
from fedmide.model.pretrained.locate import locate
from fedmide.progress import Tell, quiet
from fedmide.runs.resident import Opener, Resident, open_model
from fedmide.version import __version__

T = TypeVar("T")


LoadData = Callable[[DataConfig, int], tuple[ClientData, ...]]
"""A function that reads the clients that a configuration names, for a seed."""


VERSIONED = ("torch", "transformers", "peft", "safetensors", "numpy")
"""The packages whose versions the manifest names."""


@dataclass(frozen=True)
class SiteExamples:
    """One client's records as token sequences, by split."""

    training: tuple[Example, ...]
    validation: tuple[Example, ...]
    test: tuple[Example, ...]

    @property
    def num_truncated(self) -> int:
        """Number of examples that were cut to fit the cutoff."""
        return sum(example.truncated for example in self.training + self.validation + self.test)


@dataclass(frozen=True)
class Inputs:
    """Records and examples by client, the encoder that turns one into the other, the loaded model, and the manifest."""

    clients: Mapping[str, ClientData]
    examples: Mapping[str, SiteExamples]
    encode: Encoder
    resident: Resident
    manifest: Mapping[str, Any]

    def fresh_adapter(self) -> Adapter:
        """The adapter that the federation starts from."""
        return self.resident.fresh(self.resident.config.seed)

    @property
    def federation(self) -> str:
        """The identity of this federation: a hash of everything that must be equal at all its sites and the server."""
        return str(self.manifest["federation"])

    def facts(self, client: str = "") -> Facts:
        """The facts that a site or the server states, so that others see what differs; `client`: the site's name."""
        model, prompt = self.manifest["model"]["fingerprint"], self.manifest["prompt"]
        return Facts(self.federation, client, __version__, model, prompt, agreed(self.resident.config))

    @property
    def prompt_hash(self) -> str:
        """The identity of the prompt: a hash of its template, which may be the tokenizer's own chat template."""
        return prompt_hash(self.encode.template, str(self.resident.model.tokenizer.chat_template or ""))


def only(name: str) -> LoadData:
    """A function that reads this client only: a site loads its own records, even if the configuration names others."""

    def load(config: DataConfig, seed: int) -> tuple[ClientData, ...]:
        clients = load_data(config, seed, name)
        if own := tuple(client for client in clients if client.name == name):
            return own
        found = ", ".join(client.name for client in clients)
        raise DataError(
            f"{config.path}: no site {name!r} there, only {found}",
            f"Set data.path to the file or folder of site {name}",
        )

    return load


def without_records(names: Sequence[str]) -> LoadData:
    """A function that gives clients without records: the server of a federation does not hold the sites' records."""
    return lambda config, seed: tuple(ClientData(name, ()) for name in names)


def read(
    config: Config,
    tell: Tell = quiet,
    threads: int = 0,
    load: LoadData = load_data,
    opener: Opener = open_model,
) -> Inputs:
    """Reads everything that the configuration names; `tell` gets a message before each step that takes time.

    `threads`: CPU threads to use; 0 stands for the configured number. `load` reads the records, `opener` the model.

    Problems of the records, the prompt and the model's folder are raised together. If there are none, the model is
    loaded and its problems are raised. Last come the records that do not fit the model.
    """
    tell("reading the records")
    errors: list[UserError] = []
    clients = _attempt(errors, lambda: load(config.data, config.data_seed))
    _attempt(errors, lambda: resolve(config.prompt.template))
    folder = None
    if not errors or Path(config.model.name).expanduser().is_dir():  # any other name may mean a long download
        folder = _attempt(errors, lambda: locate(config.model.name, progress=tell))
    if errors:
        raise _together(errors)
    assert clients is not None and folder is not None  # no error
    tell(f"loading {config.model.name}")
    resident = opener(config, folder, threads, tell)
    _check_positions(config.model, resident.model.num_positions)
    encode = encoder(resident.model.tokenizer, config.model, config.prompt)
    examples = _encode_clients(encode, clients)
    inputs = Inputs({client.name: client for client in clients}, examples, encode, resident, {})
    return replace(inputs, manifest=_manifest(config, inputs, model_fingerprint(folder)))


def _check_positions(model: ModelConfig, num_positions: int | None) -> None:
    if num_positions is not None and model.cutoff > num_positions:
        raise ModelError(
            f"model.cutoff = {model.cutoff}: {model.name} reads at most {num_positions} tokens", "Lower model.cutoff"
        )


def _encode_clients(encode: Encoder, clients: Sequence[ClientData]) -> dict[str, SiteExamples]:
    errors: list[UserError] = []
    examples: dict[str, SiteExamples] = {}
    for client in clients:
        parts = [
            _attempt(errors, partial(encode_all, encode, records, f"site {client.name!r}, {part}")) or ()
            for part, records in client.parts().items()
        ]
        examples[client.name] = SiteExamples(*parts)
    if errors:
        raise _together(errors)
    return examples


def _attempt(errors: list[UserError], step: Callable[[], T]) -> T | None:
    """The result of a step. If it fails: None, and its error goes into the list, so that later steps can add theirs."""
    try:
        return step()
    except UserError as error:
        errors.append(error)
        return None


def _together(errors: Sequence[UserError]) -> UserError:
    """One error that holds the problems and remedies of all of them."""
    kinds = {type(error) for error in errors}
    kind = kinds.pop() if len(kinds) == 1 else UserError
    remedies = dict.fromkeys(error.remedy for error in errors if error.remedy)
    return kind([problem for error in errors for problem in error.problems], ". ".join(remedies))


def _manifest(config: Config, inputs: Inputs, model_hash: str) -> dict[str, Any]:
    model = inputs.resident.model
    dtype = str(model.dtype).removeprefix("torch.")
    return {
        "fedmide": __version__,
        "commit": _commit(),
        "versions": {name: metadata.version(name) for name in _versioned(config.model)},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "device": str(model.device),
        "seed": config.seed,
        "config": config_fingerprint(config),
        "model": {"name": config.model.name, "fingerprint": model_hash, "dtype": dtype},
        "prompt": inputs.prompt_hash,
        "federation": _federation(config, model_hash, inputs.prompt_hash),
        "data": {
            client.name: {
                "fingerprint": _data_fingerprint(client),
                **{part: len(records) for part, records in client.parts().items()},
                "truncated": inputs.examples[client.name].num_truncated,
            }
            for client in inputs.clients.values()
        },
        "started": now(),
        "seconds": {},
        "peak_memory_mb": 0,
        "status": "started",
    }


def _versioned(model: ModelConfig) -> tuple[str, ...]:
    return VERSIONED if model.quantization == "none" else (*VERSIONED, "bitsandbytes")


def _federation(config: Config, model_hash: str, prompt: str) -> str:
    facts = [f"{name} = {value}" for name, value in agreed(config).items()]
    return hashlib.sha256("\n".join([*facts, model_hash, prompt]).encode()).hexdigest()[:16]


def _data_fingerprint(client: ClientData) -> str:
    ids = "\n".join(f"{part} {record.id}" for part, records in client.parts().items() for record in records)
    return hashlib.sha256(ids.encode()).hexdigest()[:16]


def _commit() -> str | None:
    """The commit of this code, with "-dirty" if files were changed since; None outside a checkout."""
    checkout = Path(version.__file__).resolve().parents[2]
    if not (checkout / ".git").exists():
        return None
    command = [
        "git",
        "--no-optional-locks",
        "-C",
        str(checkout),
        "describe",
        "--always",
        "--dirty",
        "--abbrev=40",
        "--exclude=*",
    ]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
