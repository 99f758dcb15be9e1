"""The frozen base model with LoRA layers: trains adapters, scores records, generates text.

One base model stays in memory; adapters are copied in and out in place. `passes` scores and trains Llama-shaped models.
Other causal models use their own modules, and so do texts over `attention.MAX_LENGTH` tokens.
Both ways give the same numbers, apart from rounding. Both compute only the needed logits.
For the modules, a hook in front of the output layer keeps only the hidden states of the wanted positions.
This works for any model whose logits at a position depend only on the hidden state there.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from peft import LoraConfig as PeftConfig
from peft import PeftModel
from torch import Tensor, nn
from transformers import GenerationConfig

from fedmide.config.sections import LoraConfig, ModelConfig, Quantization
from fedmide.data.batches import Batch
from fedmide.errors import ModelError
from fedmide.model import adapters, devices, quantization
from fedmide.model.base_weights import BaseWeights
from fedmide.model.decoder import attention, layout, passes
from fedmide.model.decoder.layout import Flat
from fedmide.model.decoder.parts import Dropout
from fedmide.model.decoder.prefixes import Prefixes
from fedmide.model.hooks import OnToken, RowFilter, TokenStreamer
from fedmide.model.interface import Adapter
from fedmide.model.memory import BatchBudget
from fedmide.model.pretrained.hf import checkpoint, load_base, under_lora
from fedmide.model.workers import Workers

TORCH_SEED_BITS = 63


@dataclass(frozen=True, eq=False, kw_only=True)
class LoraModel:
    """A base model under LoRA layers, for adapters of these shapes."""

    network: PeftModel
    tokenizer: Any
    lora: PeftConfig
    shapes: adapters.Shapes
    flat: Flat
    workers: Workers
    base: BaseWeights
    prefixes: Prefixes | None
    """The decoder of the hand-written passes, with its stored states; None if the modules compute all texts."""
    chosen: RowFilter
    """The hook in front of the output layer."""
    device: torch.device
    num_positions: int | None
    """The most tokens of a text that the model was made for; None if its configuration has no limit."""
    quantization: Quantization = "none"
    """The storage of the base's linear layers. Adapters can only be merged into plain ones ("none")."""
    checkpointing: bool = False
    """True to recompute each block's activations in the backward pass, instead of keeping them."""
    training_budget: BatchBudget = field(default_factory=lambda: BatchBudget("training.tokens_per_batch"))
    """The tokens per pass in training; fewer after memory was full."""
    scoring_budget: BatchBudget = field(default_factory=lambda: BatchBudget("scoring.tokens_per_batch"))
    """The tokens per pass in scoring; fewer after memory was full."""
    generation_budget: BatchBudget = field(default_factory=lambda: BatchBudget("generation.batch_size"))
    """The prompts per batch in generation; fewer after memory was full."""
    modules: threading.Lock = field(default_factory=threading.Lock)
    """A lock on the network's own modules: only one worker may use them at a time."""

    def parameters(self) -> dict[str, nn.Parameter]:
        """The trainable tensors, by their names in an adapter."""
        return {
            name.replace(".default.", "."): parameter
            for name, parameter in self.network.named_parameters()
            if parameter.requires_grad
        }

    def put(self, adapter: Adapter) -> None:
        """Copies an adapter into the LoRA layers; raises `ModelError` if it does not fit.

        If its rank is lower than that of the layers, the missing ranks are zeros.
        If it has changes to base weights, they are made too.
        """
        self.base.change(adapters.deltas(adapter))
        with torch.no_grad():
            self.flat.parameter.copy_(self.laid_out(adapter))

    def laid_out(self, adapter: Adapter) -> Tensor:
        """An adapter's values in the order of the flat parameter; raises `ModelError` if it does not fit."""
        adapter = adapters.padded(adapters.without_deltas(adapter), self.shapes)
        if problems := adapters.shape_problems(adapter, self.shapes):
            raise ModelError([f"adapter: {problem}" for problem in problems])
        values = np.concatenate([adapter[name].reshape(-1) for name in self.shapes])
        return torch.from_numpy(values).to(self.device)

    def take(self) -> Adapter:
        """A copy of the adapter that the LoRA layers hold now, at their rank, with the changes to base weights."""
        values = self.flat.parameter.detach().to("cpu", copy=True).numpy()
        ends = np.cumsum([math.prod(shape) for shape in self.shapes.values()])
        pieces = np.split(values, ends[:-1])
        factors = zip(self.shapes.items(), pieces, strict=True)
        return {**{name: piece.reshape(shape) for (name, shape), piece in factors}, **self.base.changes}

    @property
    def dtype(self) -> torch.dtype:
        """The number type that the base computes in, however its weights are stored."""
        weight: Tensor = self.network.get_input_embeddings().weight
        return weight.dtype

    @property
    def extra_parameters(self) -> tuple[nn.Parameter, ...]:
        """Parameters trained in addition to the flat one: FedALT's routers, else none."""
        return ()

    @property
    def prefix_bytes(self) -> int:
        """The bytes of the stored outputs of the blocks below the adapters."""
        return 0 if self.prefixes is None else self.prefixes.num_bytes

    @property
    def unpadded(self) -> int:
        """The most tokens of a text that shares a pass without padding; 0 if the modules compute all texts."""
        return 0 if self.prefixes is None else attention.MAX_LENGTH

    def prepare(self, training: bool) -> None:
        """Prepares the hand-written passes for `nll` or `backpropagate` with the adapter as it is now."""
        if self.prefixes is not None:
            with torch.no_grad():
                self.prefixes.decoder.refresh(self.dropout.rate if training and self.dropout else 0.0)

    def nll(self, batch: Batch) -> Tensor:
        """NLL in nats of each predicted token, float32 (N,), in row-major order of `predicts`."""
        with torch.no_grad():
            if (prefixes := self._prefixes_of(batch)) is None:
                with self.modules:
                    self._switch(training=False)
                    return self.token_nll(torch.from_numpy(batch.ids), torch.from_numpy(batch.predicts))
            states, rows, targets = self._inputs(prefixes, batch)
            above = slice(prefixes.decoder.first_trained, None)
            states = passes.hidden(prefixes.decoder, states, batch.lengths, above)
            return passes.losses(prefixes.decoder, states, rows, targets)

    def backpropagate(
        self, batch: Batch, scale: float, seed: int, weights: NDArray[np.float32] | None = None
    ) -> tuple[Tensor, Tensor]:
        """NLL of each predicted token, as `nll`, and the gradient (P,) of `scale` times their sum.

        P is the length of `flat`. Dropout follows from the seed. `weights` (N,): the weight of each token in the sum.
        """
        counts = None if weights is None else torch.from_numpy(weights).to(self.device)
        if (prefixes := self._prefixes_of(batch)) is None:
            with self.modules:
                return self._through_modules(batch, scale, seed, counts)
        with torch.no_grad():
            states, rows, targets = self._inputs(prefixes, batch)
            gradient = torch.empty_like(self.flat.parameter)
            losses = passes.backpropagate(
                prefixes.decoder,
                states,
                batch.lengths,
                passes.Loss(rows, targets, scale, counts),
                into=gradient,
                dropout=self.dropout and self.dropout.seeded(seed),
                checkpointing=self.checkpointing,
            )
            return losses, gradient

    def _prefixes_of(self, batch: Batch) -> Prefixes | None:
        """The stored prefixes, if the hand-written passes compute this batch; None if the network's modules do.

        The modules compute texts over `attention.MAX_LENGTH` tokens, and models of other shapes.
        """
        return self.prefixes if batch.ids.shape[1] <= attention.MAX_LENGTH else None

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
        """The states below the adapters, the rows that predict a token, and the tokens that they should predict."""
        inside = np.arange(batch.ids.shape[1]) < np.asarray(batch.lengths)[:, None]  # (B, T), padding left out
        rows = np.flatnonzero(batch.predicts[inside])
        targets = batch.ids[inside][rows + 1]
        states = prefixes.states(batch, self.device)
        return states, torch.from_numpy(rows).to(self.device), torch.from_numpy(targets).to(self.device)

    @cached_property
    def dropout(self) -> Dropout | None:
        """Dropout of the adapters' inputs; None without dropout."""
        return Dropout(self.lora.lora_dropout, self.device) if self.lora.lora_dropout else None

    def token_nll(self, ids: Tensor, predicts: Tensor) -> Tensor:
        """NLL in nats of each predicted token, float32 (N,), in row-major order of `predicts`.

        ids: int64 (B, T). predicts: bool (B, T), true at t if token t + 1 is predicted.
        """
        ids, predicts = ids.to(self.device), predicts.to(self.device)
        targets = ids.roll(-1, dims=1)[predicts]  # (N,)
        with self._only(predicts.reshape(-1).nonzero().squeeze(1)):
            logits = self.network(input_ids=ids, use_cache=False).logits[0]  # (N, V)
        return F.cross_entropy(logits.float(), targets, reduction="none")

    def last_state(self, ids: Tensor) -> Tensor:
        """The last layer's state after its norm, at the last of these tokens (T,): float32 (D,)."""
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

    def continuations(self, ids: Tensor, mask: Tensor, max_new_tokens: int, on_token: OnToken | None = None) -> Tensor:
        """Greedy continuations, int64 (B, <= max_new_tokens), of prompts padded on the left (B, T).

        `on_token` is called with each token as soon as it is chosen, which requires B = 1.
        """
        self._switch(training=False)
        eos = self.tokenizer.eos_token_id
        greedy = GenerationConfig(max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=eos, pad_token_id=eos)
        with torch.inference_mode():
            output: Tensor = self.network.generate(
                input_ids=ids.to(self.device),
                attention_mask=mask.to(self.device),
                generation_config=greedy,
                streamer=None if on_token is None else TokenStreamer(on_token),
            )
        return output[:, ids.shape[1] :].cpu()

    def _switch(self, training: bool) -> None:
        """Switches the modules' dropout on or off. It visits many modules, so it does nothing without a change."""
        if self.network.training != training:
            self.network.train(training)

    @contextmanager
    def _only(self, rows: Tensor) -> Iterator[None]:
        self.chosen.rows = rows
        try:
            yield
        finally:
            self.chosen.rows = None


def _flattened(network: PeftModel) -> tuple[Flat, adapters.Shapes]:
    """The flat parameter of a network's LoRA layers, and the shapes of its arrays by their names."""
    names = {id(parameter): name.replace(".default.", ".") for name, parameter in network.named_parameters()}
    trained = layout.trained_parameters(network)
    return Flat(trained), {names[id(parameter)]: tuple(parameter.shape) for parameter in trained}


def load(
    folder: Path,
    model: ModelConfig,
    lora: LoraConfig,
    prefix_bytes: int = 0,
    checkpointing: bool = False,
    num_workers: int = 0,
) -> LoraModel:
    """The model in a folder, frozen, with the LoRA layers that the configuration asks for; raises `ModelError`.

    Weights come from safetensors only.
    `prefix_bytes`: the bytes that `Prefixes` may keep.
    `checkpointing`: recompute activations in the backward pass instead of keeping them.
    `num_workers`: batches that the hand-written passes compute in parallel on a CPU; 0: as many as torch has threads.
    """
    device = devices.device(model.device)
    base, tokenizer = load_base(folder, model.quantization, devices.dtype(model.dtype, device), device)
    if checkpointing:
        checkpoint(base, model.name)
    network, config = under_lora(base, model.name, lora)
    chosen = RowFilter()
    network.get_output_embeddings().register_forward_pre_hook(chosen)
    if model.quantization == "none":
        network.to(device)
    else:  # a quantized base is on the device already
        quantization.keep_in_training_mode(network)
    network.eval()
    flat, shapes = _flattened(network)
    fused = layout.fused(network, flat)
    prefixes = None if fused is None else Prefixes(fused, prefix_bytes)
    num_positions = getattr(base.config.get_text_config(), "max_position_embeddings", None)
    workers = Workers(0 if prefixes is None or device.type != "cpu" else num_workers or torch.get_num_threads())
    return LoraModel(
        network=network,
        tokenizer=tokenizer,
        lora=config,
        shapes=shapes,
        flat=flat,
        workers=workers,
        base=BaseWeights(network),
        prefixes=prefixes,
        chosen=chosen,
        device=device,
        num_positions=num_positions,
        quantization=model.quantization,
        checkpointing=checkpointing,
    )
