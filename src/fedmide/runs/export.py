"""The export of a run's model: a PEFT folder, or a transformers folder with the adapter merged into the weights.

Every export has a model card. A merged model is read back and compared with base and adapter. Its folder appears only
if their predictions agree.
"""

import shutil
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Literal

import jinja2
import torch
import torch.nn.functional as F

from fedmide.atomic import clear_errors, to_json, write_folder
from fedmide.errors import ModelError, RunFolderError, UsageError
from fedmide.journal.folder import RunFolder
from fedmide.model.adapters import A
from fedmide.model.adapters import read as read_adapter
from fedmide.model.pretrained.gguf import write_gguf
from fedmide.model.pretrained.hf import adapted, load_merged, load_tokenizer, logits, save_merged
from fedmide.model.pretrained.locate import locate
from fedmide.report.facts import RunFacts, read
from fedmide.report.figure import number, ranged
from fedmide.seeds import stream

Dtype = Literal["float32", "bfloat16"]


TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


MOST_DIVERGENCE = {"float32": 1e-4, "bfloat16": 0.1}
"""The largest allowed `Parity.divergence` of a merged model, in nats, by the type of its weights."""


PROBES = (4, 48)
"""The number of random token sequences on which the merged model is compared, and their length in tokens."""


GGUF_FILE = "model.gguf"


VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""The values that `--max-lora-rank` of vLLM takes."""


@dataclass(frozen=True)
class Parity:
    """Differences between a merged model and base with adapter, over all positions of the probes.

    `divergence`: mean KL divergence between the distributions of the next token, in nats. `same_choice`: share of the
    positions at which both give the same token the highest probability.
    """

    largest_logit_difference: float
    divergence: float
    same_choice: float


@dataclass(frozen=True)
class Exported:
    """The paths that were written, and how close a merged model is to the adapter (None without merging)."""

    path: Path
    parity: Parity | None
    gguf: Path | None = None


def export(
    folder: RunFolder, out: Path, client: str = "", merge: bool = False, dtype: Dtype = "float32", gguf: bool = False
) -> Exported:
    """Writes the common model, or a client's tuned one, into a new folder; with `gguf` a merged one also as GGUF.

    Raises `RunFolderError` if the run has no such adapter or `out` exists. Raises `ModelError` if the adapter can't be
    merged into the base, or if the merged model's predictions differ too much. Raises `UsageError` for `gguf` without
    `merge`.
    """
    adapter = folder.tuned(client)
    if out.exists():
        raise RunFolderError(f"{out} exists already", "Give the name of a folder that does not exist yet")
    if merge and (kind := folder.config.model.quantization) != "none":
        raise ModelError(
            f"{folder.path}: the adapter was trained over a base in {kind}, into which it can't be merged",
            "Give the command without --merge",
        )
    if gguf and not merge:
        raise UsageError("--gguf writes a merged model", "Add --merge to the command")
    facts = read(folder)
    if not merge:
        files = {path.name: path.read_bytes() for path in sorted(adapter.iterdir())}
        write_folder(out, {**files, "README.md": card(facts, client, None, "float32").encode()})
        return Exported(out, None)
    aside = out.with_name(f".{out.name}.partial")
    with clear_errors(out):
        shutil.rmtree(aside, ignore_errors=True)
        try:
            parity = _merged(folder, adapter, aside, dtype)
            (aside / "README.md").write_text(card(facts, client, parity, dtype), "utf-8")
            if gguf:
                write_gguf(aside, aside / GGUF_FILE)
            aside.replace(out)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    return Exported(out, parity, out / GGUF_FILE if gguf else None)


def compare(first: torch.Tensor, second: torch.Tensor) -> Parity:
    """The differences of the second logits (B, T, V) from the first.

    >>> same = torch.zeros(1, 2, 3)
    >>> compare(same, same + 1.0)
    Parity(largest_logit_difference=1.0, divergence=0.0, same_choice=1.0)
    """
    ours, theirs = F.log_softmax(first.double(), -1), F.log_softmax(second.double(), -1)
    divergence = (ours.exp() * (ours - theirs)).sum(-1).mean().clamp(min=0.0)
    same = (first.argmax(-1) == second.argmax(-1)).double().mean()
    return Parity(float((first - second).abs().max()), float(divergence), float(same))


def serving(folder: RunFolder, exported: Exported) -> tuple[str, ...]:
    """A command that serves the common adapter and every client's tuned one; then those that serve a merged model."""
    clients = [name for name in folder.read_manifest()["data"] if folder.personal_adapter(name).is_dir()]
    modules = [f"common={folder.adapter}", *(f"{name}={folder.personal_adapter(name)}" for name in clients)]
    rank = max(_rank(folder.adapter), *(_rank(folder.personal_adapter(name)) for name in clients), 0)
    fitting = next((each for each in VLLM_RANKS if each >= rank), rank)
    base = locate(folder.config.model.name)
    commands = [f"vllm serve {base} --enable-lora --max-lora-rank {fitting} --lora-modules {' '.join(modules)}"]
    if exported.parity is not None:
        commands.append(f"vllm serve {exported.path}")
        made = exported.path / GGUF_FILE
        if exported.gguf is None:
            commands.append(f"python llama.cpp/convert_hf_to_gguf.py {exported.path} --outfile {made}")
        commands.append(f"llama-server --model {made}")
    return tuple(commands)


def card(facts: RunFacts, client: str, parity: Parity | None, dtype: Dtype) -> str:
    """The model card: the model, how it was made, what was measured, its use and its limits."""
    model, config = facts.manifest["model"], facts.config
    is_hub_id = "/" in model["name"] and not Path(model["name"]).expanduser().exists()
    return _template().render(
        name=facts.name,
        client=client,
        manifest=facts.manifest,
        model=model,
        config=config,
        hub_id=model["name"] if is_hub_id else "",
        template=Path(config.prompt.template).name,
        records=[(name, data) for name, data in facts.manifest["data"].items() if client in ("", name)],
        parity=parity,
        dtype=dtype,
        rows=_measured(facts, client),
    )


def _merged(folder: RunFolder, adapter: Path, out: Path, dtype: Dtype) -> Parity:
    """Writes the merged model with its tokenizer, reads it back, and compares it with base and adapter."""
    base = locate(folder.config.model.name)
    tokenizer = load_tokenizer(base)
    draws = stream(folder.config.seed, "parity").integers(len(tokenizer), size=PROBES)
    probes = torch.from_numpy(draws)
    network = adapted(base, adapter)
    expected = logits(network, probes)
    out.mkdir(parents=True)
    save_merged(network, out, TYPES[dtype])
    tokenizer.save_pretrained(out)
    values = {"do_sample": False, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.eos_token_id}
    (out / "generation_config.json").write_bytes(to_json(values))
    parity = compare(expected, logits(load_merged(out), probes))
    if not parity.divergence <= MOST_DIVERGENCE[dtype]:
        raise ModelError(
            "the merged model does not predict what base and adapter predict: "
            f"{parity.divergence:.2g} nats apart, expected at most {MOST_DIVERGENCE[dtype]:g}",
            "Give the command without --merge, or with --dtype float32",
        )
    return parity


def _rank(adapter: Path) -> int:
    """The largest rank of an adapter's layers."""
    weights = read_adapter(adapter / "adapter_model.safetensors")
    return max((array.shape[0] for name, array in weights.items() if name.endswith(A)), default=0)


def _measured(facts: RunFacts, client: str) -> list[tuple[str, ...]]:
    """The test figures, one row per client: under the tuned adapter of `client`, else under the common adapter."""
    stage = "personalized" if client else "aggregated"
    return [
        (
            each.client,
            str(each.num_records),
            ranged(each.nll.get("base")),
            ranged(each.nll[stage]),
            ranged(each.choice.get(stage), 2),
            number(each.chance, 2),
        )
        for each in facts.outcomes
        if client in ("", each.client) and stage in each.nll
    ]


@cache
def _template() -> jinja2.Template:
    text = resources.files("fedmide.runs").joinpath("card.md.j2").read_text("utf-8")
    environment = jinja2.Environment(
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=jinja2.StrictUndefined
    )
    return environment.from_string(text)
