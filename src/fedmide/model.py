"""The frozen base model with LoRA layers: the only module that imports transformers and peft.

One base model stays in memory; adapters are copied in and out in place. Llama-shaped models are scored and trained by
`passes`, any other causal model by its own modules; both give the same numbers. There, too, logits are computed only
where they are asked for: a hook in front of the output layer keeps the hidden states of the wanted positions, which
works for any model whose logits are a function of each position alone.
"""

from __future__ import annotations

import json
import logging
import math
import os
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# PEFT imports bitsandbytes wherever it is installed, which warns of each product whose input it casts
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

import peft
import transformers
from peft import PeftModel
from safetensors import SafetensorError
from transformers.generation.streamers import BaseStreamer
from transformers.pytorch_utils import Conv1D

from fedmide import adapters, attention, devices, fusion, passes, quantization
from fedmide.basis import BaseWeights
from fedmide.decoder import Dropout
from fedmide.errors import ModelError, first_line
from fedmide.fusion import Flat
from fedmide.localmodel import Adapter
from fedmide.memory import Room
from fedmide.prefixes import Prefixes
from fedmide.sections import LoraConfig, ModelConfig, Quantization
from fedmide.tokens import Batch
from fedmide.workers import Workers

TORCH_SEED_BITS = 63
MODULES_MAX_PADDING = 64
OURS = "ours.safetensors"
"""The file in a PEFT folder with what PEFT would not read."""


Hear = Callable[[int], None]
"""Is told a token's id."""


class Positions(nn.Module):
    """A hook that lets only chosen rows of the hidden states (B, T, D) through, as (1, N, D)."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: Tensor | None = None

    def __call__(self, _module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        """The arguments of the output layer, thinned."""
        if self.rows is None:
            return None
        hidden = args[0]
        return (hidden.reshape(-1, hidden.shape[-1])[self.rows].unsqueeze(0), *args[1:])


class _Told(BaseStreamer):
    """Tells of each new token of one text; what transformers puts first is the prompt."""

    def __init__(self, hear: Hear) -> None:
        self.hear = hear
        self.begun = False

    def put(self, value: Tensor) -> None:
        """Takes the prompt (1, T), then one token (1,) at a time."""
        if self.begun:
            self.hear(int(value.item()))
        self.begun = True

    def end(self) -> None:
        """Nothing is held back."""


@dataclass(frozen=True, eq=False)
class LoraModel:
    """A base model under LoRA layers, ready for adapters of these shapes."""

    network: PeftModel
    tokenizer: Any
    lora: peft.LoraConfig
    shapes: adapters.Shapes
    flat: Flat
    workers: Workers
    base: BaseWeights
    prefixes: Prefixes | None
    chosen: Positions
    device: torch.device
    num_positions: int | None
    """The longest text that the model was made for, in tokens, where its configuration says so."""
    quantization: Quantization = "none"
    """How the base's linear layers are kept; into others than plain ones no adapter can be merged."""
    checkpointing: bool = False
    """Whether each block's activations are made again on the way back instead of being kept."""
    training_room: Room = field(default_factory=lambda: Room("training.tokens_per_batch"))
    """What memory has room for in training; it shrinks where memory ends."""
    scoring_room: Room = field(default_factory=lambda: Room("scoring.tokens_per_batch"))
    """The same in scoring."""
    modules: threading.Lock = field(default_factory=threading.Lock)
    """The network's own modules are used by one worker at a time."""

    def parameters(self) -> dict[str, nn.Parameter]:
        """The trainable tensors, by the names that an adapter gives them."""
        return {
            name.replace(".default.", "."): parameter
            for name, parameter in self.network.named_parameters()
            if parameter.requires_grad
        }

    def put(self, adapter: Adapter) -> None:
        """Copies an adapter into the LoRA layers; raises `ModelError` where it does not fit.

        A lower rank than the layers' is filled up with zeros. Changes of base weights beside the factors are made.
        """
        self.base.change(adapters.deltas(adapter))
        with torch.no_grad():
            self.flat.parameter.copy_(self.laid_out(adapter))

    def laid_out(self, adapter: Adapter) -> Tensor:
        """An adapter's values in the order of the flat parameter; raises `ModelError` where it does not fit."""
        adapter = adapters.padded(adapters.without_deltas(adapter), self.shapes)
        if problems := adapters.shape_problems(adapter, self.shapes):
            raise ModelError([f"adapter: {problem}" for problem in problems])
        values = np.concatenate([adapter[name].reshape(-1) for name in self.shapes])
        return torch.from_numpy(values).to(self.device)

    def take(self) -> Adapter:
        """A copy of what the LoRA layers hold now, at their rank, with the changes of base weights."""
        values = self.flat.parameter.detach().to("cpu", copy=True).numpy()
        ends = np.cumsum([math.prod(shape) for shape in self.shapes.values()])
        pieces = np.split(values, ends[:-1])
        factors = zip(self.shapes.items(), pieces, strict=True)
        return {**{name: piece.reshape(shape) for (name, shape), piece in factors}, **self.base.changes}

    @property
    def dtype(self) -> torch.dtype:
        """The type that the base computes in, whatever its weights are kept as."""
        weight: Tensor = self.network.get_input_embeddings().weight
        return weight.dtype

    @property
    def beside(self) -> tuple[nn.Parameter, ...]:
        """What is trained beside the flat parameter."""
        return ()

    @property
    def prefix_bytes(self) -> int:
        """How much is kept of what the blocks below the adapters make of records."""
        return 0 if self.prefixes is None else self.prefixes.num_bytes

    @property
    def max_padding(self) -> int | None:
        """Padding tokens in one batch from which on two passes cost less than one; None where none passes."""
        return MODULES_MAX_PADDING if self.prefixes is None else None

    def prepare(self, training: bool) -> None:
        """Makes the written-out passes ready for `nll` or `backpropagate` with the adapter as it is now."""
        if self.prefixes is not None:
            with torch.no_grad():
                self.prefixes.decoder.refresh(self.dropout.rate if training and self.dropout else 0.0)

    def nll(self, batch: Batch) -> Tensor:
        """NLL in nats of each predicted token, float32 (N,), in row-major order of `predicts`."""
        with torch.no_grad():
            if self.prefixes is None or batch.ids.shape[1] > attention.MAX_LENGTH:
                with self.modules:
                    self._switch(training=False)
                    return self.token_nll(torch.from_numpy(batch.ids), torch.from_numpy(batch.predicts))
            states, rows, targets = self._inputs(self.prefixes, batch)
            above = slice(self.prefixes.decoder.first_trained, None)
            states = passes.hidden(self.prefixes.decoder, states, batch.lengths, above)
            return passes.losses(self.prefixes.decoder, states, rows, targets)

    def backpropagate(
        self, batch: Batch, scale: float, seed: int, weights: NDArray[np.float32] | None = None
    ) -> tuple[Tensor, Tensor]:
        """NLL of each predicted token, as `nll`, and the gradient (P,) of `scale` times their sum.

        P as in `flat`. Dropout follows from the seed. `weights` (N,): what each token counts in the sum.
        """
        counts = None if weights is None else torch.from_numpy(weights).to(self.device)
        if self.prefixes is None or batch.ids.shape[1] > attention.MAX_LENGTH:
            with self.modules:
                return self._through_modules(batch, scale, seed, counts)
        with torch.no_grad():
            states, rows, targets = self._inputs(self.prefixes, batch)
            gradient = torch.empty_like(self.flat.parameter)
            dropout = self.dropout and self.dropout.seeded(seed)
            given = states, batch.lengths, rows, targets, scale, dropout, gradient
            return passes.backpropagate(self.prefixes.decoder, *given, self.checkpointing, counts), gradient

    def _training_losses(self, batch: Batch, seed: int) -> Tensor:
        """NLL of each predicted token through the modules, with dropout."""
        self._switch(training=True)
        torch.manual_seed(seed % 2**TORCH_SEED_BITS)
        return self.token_nll(torch.from_numpy(batch.ids), torch.from_numpy(batch.predicts))

    def _through_modules(self, batch: Batch, scale: float, seed: int, weights: Tensor | None) -> tuple[Tensor, Tensor]:
        losses = self._training_losses(batch, seed)
        parameters = self.parameters()
        counted = losses if weights is None else losses * weights
        gradients = torch.autograd.grad(counted.sum() * scale, [parameters[name] for name in self.shapes])
        return losses.detach(), torch.cat([each.reshape(-1) for each in gradients])

    def _inputs(self, prefixes: Prefixes, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """States below the adapters, the rows that predict, and what they are to predict."""
        inside = np.arange(batch.ids.shape[1]) < np.asarray(batch.lengths)[:, None]  # (B, T), padding left out
        rows = np.flatnonzero(batch.predicts[inside])
        targets = batch.ids[inside][rows + 1]
        states = prefixes.states(batch, self.device)
        return states, torch.from_numpy(rows).to(self.device), torch.from_numpy(targets).to(self.device)

    @cached_property
    def dropout(self) -> Dropout | None:
        """Dropout of the adapters' inputs; None where there is none."""
        return Dropout(self.lora.lora_dropout, self.device) if self.lora.lora_dropout else None

    def token_nll(self, ids: Tensor, predicts: Tensor) -> Tensor:
        """NLL in nats of each predicted token, float32 (N,), in row-major order of `predicts`.

        ids: int64 (B, T). predicts: bool (B, T), true at t where token t + 1 is predicted.
        """
        ids, predicts = ids.to(self.device), predicts.to(self.device)
        targets = ids.roll(-1, dims=1)[predicts]  # (N,)
        with self._only(predicts.reshape(-1).nonzero().squeeze(1)):
            logits = self.network(input_ids=ids, use_cache=False).logits[0]  # (N, V)
        return F.cross_entropy(logits.float(), targets, reduction="none")

    def last_state(self, ids: Tensor) -> Tensor:
        """The last layer's normed state at the last of these tokens (T,), float32 (D,)."""
        self._switch(training=False)
        seen: list[Tensor] = []
        head = self.network.get_output_embeddings()
        handle = head.register_forward_pre_hook(lambda _module, args: seen.append(args[0][0, -1]))
        try:
            with torch.inference_mode(), self._only(torch.tensor([len(ids) - 1], device=self.device)):
                self.network(input_ids=ids[None].to(self.device), use_cache=False)
        finally:
            handle.remove()
        return seen[0].float().cpu()

    def continuations(self, ids: Tensor, mask: Tensor, max_new_tokens: int, hear: Hear | None = None) -> Tensor:
        """Greedy continuations, int64 (B, <= max_new_tokens), of prompts padded on the left (B, T).

        `hear` is told each token as soon as it is chosen; only where B = 1.
        """
        self._switch(training=False)
        eos = self.tokenizer.eos_token_id
        greedy = transformers.GenerationConfig(
            max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=eos, pad_token_id=eos
        )
        with torch.inference_mode():
            output: Tensor = self.network.generate(
                input_ids=ids.to(self.device),
                attention_mask=mask.to(self.device),
                generation_config=greedy,
                streamer=None if hear is None else _Told(hear),
            )
        return output[:, ids.shape[1] :].cpu()

    def _switch(self, training: bool) -> None:
        """The modules' dropout on or off; they are many, so only where it is otherwise."""
        if self.network.training != training:
            self.network.train(training)

    @contextmanager
    def _only(self, rows: Tensor) -> Iterator[None]:
        self.chosen.rows = rows
        try:
            yield
        finally:
            self.chosen.rows = None


def load(
    folder: Path,
    model: ModelConfig,
    lora: LoraConfig,
    prefix_bytes: int = 0,
    checkpointing: bool = False,
    num_workers: int = 0,
) -> LoraModel:
    """The model in a folder, frozen, with LoRA layers where the configuration wants them.

    Weights come from safetensors only. `prefix_bytes`: how much `Prefixes` may keep. `checkpointing`: activations are
    made again on the way back. `num_workers`: batches side by side on a processor, by the passes that are written out;
    0: as many as torch has threads. Raises `ModelError`.
    """
    device = devices.device(model.device)
    base, tokenizer = _load_base(folder, model.quantization, devices.dtype(model.dtype, device), device)
    config = _lora_config(base, model.name, lora)
    if checkpointing:
        _checkpoint(base, model.name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's hints about tied weights and merging do not concern us
        network = peft.get_peft_model(base, config)
    config.base_model_name_or_path = model.name  # PEFT puts the folder of this machine there
    chosen = Positions()
    network.get_output_embeddings().register_forward_pre_hook(chosen)
    if model.quantization == "none":
        network.to(device)
    else:  # the base is there already
        quantization.keep_in_training_mode(network)
    network.eval()
    names = {id(parameter): name.replace(".default.", ".") for name, parameter in network.named_parameters()}
    trained = fusion.trained_parameters(network)
    shapes = {names[id(parameter)]: tuple(parameter.shape) for parameter in trained}
    flat = Flat(trained)
    fused = fusion.fused(network, flat)
    prefixes = None if fused is None else Prefixes(fused, prefix_bytes)
    num_positions = getattr(base.config.get_text_config(), "max_position_embeddings", None)
    workers = Workers(1 if prefixes is None or device.type != "cpu" else num_workers or torch.get_num_threads())
    held = flat, workers, BaseWeights(network), prefixes, chosen
    facts = device, num_positions, model.quantization, checkpointing
    return LoraModel(network, tokenizer, config, shapes, *held, *facts)


def peft_files(adapter: Adapter, lora: peft.LoraConfig) -> dict[str, bytes]:
    """The files of a PEFT folder, which `PeftModel.from_pretrained` loads; equal adapters give equal bytes.

    PEFT knows factors only, so changes of base weights become some. `ours.safetensors` has the arrays as they are where
    the layers' rank is not theirs, or where there is more than factors.
    """
    scale = float(lora.lora_alpha) / lora.r
    factors = adapters.as_factors(adapter, scale)
    ranks = {layer: len(adapters.factors(factors, layer)[0]) for layer in adapters.layers(factors)}
    files = {
        "adapter_config.json": _peft_json(lora, ranks, scale).encode(),
        "adapter_model.safetensors": adapters.encode(factors),
    }
    as_it_is = factors.keys() == adapter.keys() and set(ranks.values()) <= {lora.r}
    return files if as_it_is else {**files, OURS: adapters.encode(adapter)}


def read_peft(folder: Path, shapes: adapters.Shapes) -> Adapter:
    """The adapter that `peft_files` made a folder of; `shapes` are those of the layers that it is for."""
    if (folder / OURS).exists():
        return adapters.read(folder / OURS)
    return adapters.read(folder / "adapter_model.safetensors", shapes)


def _peft_json(lora: peft.LoraConfig, ranks: Mapping[str, int], scale: float) -> str:
    """The configuration as PEFT writes it, but with sets in order: equal ones give equal bytes."""
    values = {**lora.to_dict(), "inference_mode": True, "peft_version": peft.__version__}
    if not set(ranks.values()) <= {lora.r}:
        own = {layer.removeprefix("base_model.model."): rank for layer, rank in ranks.items()}
        values |= {"rank_pattern": own, "alpha_pattern": {layer: scale * rank for layer, rank in own.items()}}
    values.pop("runtime_config", None)
    return json.dumps(values, indent=2, sort_keys=True, default=sorted) + "\n"


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in a model's folder; raises `ModelError`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise ModelError(f"{folder}: the tokenizer can't be loaded: {first_line(error)}") from None


def adapted(folder: Path, adapter: Path) -> PeftModel:
    """The model in a folder, in float32, under the adapter in a PEFT folder; raises `ModelError`."""
    base, _ = _load_base(folder, "none", torch.float32, torch.device("cpu"))
    if getattr(base.config, "quantization_config", None) is not None:
        raise ModelError(f"{folder}: nothing can be merged into a quantised model", "Export without --merge")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's hints about tied weights and merging do not concern us
        network: PeftModel = PeftModel.from_pretrained(base, adapter)
    return network.eval()


def save_merged(network: PeftModel, folder: Path, dtype: torch.dtype) -> None:
    """Writes the network with its adapter in its weights, as a transformers folder; the sums are made in float32.

    The network can't be used any more afterwards.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged: Any = network.merge_and_unload()
        merged.to(dtype).save_pretrained(folder)


def logits(network: Any, ids: Tensor) -> Tensor:
    """The network's logits of token ids (B, T), float32 (B, T, V)."""
    with torch.inference_mode():
        scores: Tensor = network(input_ids=ids).logits
        return scores.float()


def load_merged(folder: Path) -> Any:
    """The model in a folder, in the type that its weights are in."""
    dtype = torch.bfloat16 if _is_bfloat16(folder) else torch.float32
    return _load_base(folder, "none", dtype, torch.device("cpu"))[0].eval()


def _is_bfloat16(folder: Path) -> bool:
    values: dict[str, Any] = json.loads((folder / "config.json").read_text("utf-8"))
    return values.get("dtype") == "bfloat16"


def _load_base(
    folder: Path, kind: Quantization, dtype: torch.dtype, device: torch.device
) -> tuple[transformers.PreTrainedModel, Any]:
    """The frozen base and its tokenizer; a quantised one on the device already."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    how: dict[str, Any] = {}
    if kind != "none":
        config = transformers.BitsAndBytesConfig(**quantization.settings(kind, dtype))
        how = {"quantization_config": config, "device_map": {"": device}}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            only_here = {"local_files_only": True, "trust_remote_code": False}
            loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, use_safetensors=True, output_loading_info=True, **only_here, **how
            )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        raise ModelError(f"{folder}: the model can't be loaded: {first_line(error)}") from None
    base, loading = loaded
    if missing := sorted(loading["missing_keys"]):  # transformers would go on with random ones
        raise ModelError(f"{folder}: {len(missing)} weights missing, first {missing[0]!r}")
    base.requires_grad_(False)
    # what a checkpoint would add to greedy decoding, such as a penalty of repetition, is left out
    base.generation_config = transformers.GenerationConfig()
    return base, load_tokenizer(folder)


def _checkpoint(base: transformers.PreTrainedModel, name: str) -> None:
    """Lets the modules make their activations again on the way back in training."""
    if not base.supports_gradient_checkpointing:
        raise ModelError(
            f"training.checkpointing: the modules of {name} have none", "Say training.checkpointing = false"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # later versions of transformers have another name for it
        base.gradient_checkpointing_enable({"use_reentrant": False})  # the old way needs inputs with a gradient


def _lora_config(base: transformers.PreTrainedModel, name: str, lora: LoraConfig) -> peft.LoraConfig:
    """PEFT's configuration; the layers it will match are found first, so that a miss is one clear message."""
    blocks, problems = _blocks(base, lora.blocks)
    targets = [lora.targets] if isinstance(lora.targets, str) else list(lora.targets)
    names = list(_linear_names(base, blocks))
    present = sorted({name.rsplit(".", 1)[-1] for name in names})
    wanted = present if targets == ["all-linear"] else targets
    unmatched = [target for target in wanted if not any(f".{name}".endswith(f".{target}") for name in names)]
    problems += [f"lora.targets: {target!r} matches no linear layer in the chosen blocks" for target in unmatched]
    if not wanted:
        problems.append("lora.targets: the chosen blocks have no linear layer")
    if problems:
        raise ModelError(problems, f"This model has {', '.join(present) or 'none'}")
    return peft.LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # PEFT types it as int and takes any number
        lora_dropout=lora.dropout,
        target_modules=wanted,
        layers_to_transform=None if blocks is None else blocks,
        bias="none",
        task_type="CAUSAL_LM",
        base_model_name_or_path=name,
    )


def _blocks(base: transformers.PreTrainedModel, blocks: str) -> tuple[list[int] | None, list[str]]:
    """Indices of the blocks that get an adapter, None for all; and what is wrong with the wish."""
    if blocks == "all":
        return None, []
    wanted, present = int(blocks.removeprefix("top:")), int(base.config.get_text_config().num_hidden_layers)
    if wanted > present:
        return None, [f"lora.blocks = {blocks!r}: the model has {present} blocks"]
    return list(range(present - wanted, present)), []


def _linear_names(base: transformers.PreTrainedModel, blocks: Iterable[int] | None) -> Iterator[str]:
    """Full names of the linear layers inside the chosen blocks; the output layer is in none."""
    numbers = None if blocks is None else {str(block) for block in blocks}
    for name, module in base.named_modules():
        inside = [part for part in name.split(".") if part.isdigit()]
        if isinstance(module, nn.Linear | Conv1D) and inside and (numbers is None or inside[0] in numbers):
            yield name
