"""The parts of a Llama-shaped decoder under LoRA, in the layout that the hand-written passes need.

Layers with the same input are fused into one: query, key and value; gate and up.
An adapter's factor B is stored in extra columns of its layer's weight, so it needs no product of its own.
`passes` describes the passes and their reasons.
"""

import copy
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

PAD_COLUMNS = 32
"""The extra columns of a weight are a multiple of this, as matrix units require for speed."""


HEAD_ROWS = 128
"""Rows of logits computed at a time. More rows do not fit the cache together with the output layer's weights."""


EXACT_LOGITS = 2**18
"""The number of float32 logits computed at a time. They fit a core's own cache.

With 49,152 logits per row, 5 rows at a time take a third of the time of 128 rows at a time."""


class Dropout:
    """Dropout of the adapters' inputs.

    A mask needs 16 random bits per value. On a CPU this takes a tenth of the time of torch's own draws.
    So the rate is a multiple of 2^-16.
    """

    def __init__(self, rate: float, device: torch.device, seed: int = 0) -> None:
        self._below = min(round(rate * 2**16), 2**16 - 1)  # below 1, so some values are always kept
        self.rate = self._below / 2**16
        self.device = device
        self._draws = np.random.Generator(np.random.SFC64(seed))

    def seeded(self, seed: int) -> "Dropout":
        """The same dropout with masks that follow from the seed."""
        return Dropout(self.rate, self.device, seed)

    def copy(self) -> "Dropout":
        """The same dropout in the same state: it draws the same masks next."""
        return copy.deepcopy(self)

    def draw(self, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        """A mask (rows, columns) for `masked`: all bits set for kept values. Its integers are as wide as `dtype`."""
        words = self._draws.integers(0, 2**64, -(-rows * columns // 4), dtype=np.uint64)
        bits = torch.from_numpy(words.view(np.int16)[: rows * columns]).to(self.device)
        # the draws are signed, so the threshold is shifted; 1 becomes -1, which has all bits set
        mask = torch.ge(bits, self._below - 2**15, out=torch.empty_like(bits)).neg_()
        return mask.to(BITS[dtype]).view(rows, columns)


BITS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}


def masked(values: Tensor, mask: Tensor, out: Tensor | None = None) -> Tensor:
    """The values that the mask keeps, else 0. Works on bits: a quarter of the time of a multiplication in bfloat16."""
    bits = values.view(mask.dtype)
    return torch.bitwise_and(bits, mask, out=None if out is None else out.view(mask.dtype)).view(values.dtype)


@dataclass(frozen=True, eq=False)
class Lora:
    """The adapter of one layer within a fused layer."""

    b: Tensor  # (out, r) float32
    place: slice  # of B in the flat parameter, and of its gradient in the flat gradient
    columns: slice  # of the fused layer's output
    rows: slice  # of the fused layer's A


@dataclass(frozen=True, eq=False)
class Adapters:
    """The adapters of a fused layer: y += scale * (x A^T) B^T, with the factors A stacked."""

    a: Tensor  # (R, in) float32
    place: slice  # of A in the flat parameter, and of its gradient in the flat gradient
    a_scaled: Tensor  # (R, in), scaled, in the weight's type, as the passes use it
    scale: float
    loras: tuple[Lora, ...]


@dataclass(frozen=True, eq=False)
class Layer:
    """Linear layers with the same input: their weights stacked, and extra columns for the adapters' B."""

    weight: Tensor  # (out, in + R), with R padded to a multiple of PAD_COLUMNS
    num_in: int
    adapters: Adapters | None = None

    def refresh(self, boost: float) -> None:
        """Copies the adapters as they are now. `boost`: the factor of kept values under dropout."""
        if self.adapters is None:
            return
        torch.mul(self.adapters.a, self.adapters.scale * boost, out=self.adapters.a_scaled)
        for room, b in self._extra_columns:
            room.copy_(b)

    @cached_property
    def _extra_columns(self) -> tuple[tuple[Tensor, Tensor], ...]:
        """Pairs of B's place in the weight and B. Made once, as making views takes longer than filling them."""
        room, loras = self.weight[:, self.num_in :], self.adapters.loras if self.adapters else ()
        return tuple((room[lora.columns, lora.rows], lora.b) for lora in loras)


@dataclass(frozen=True, eq=False)
class Block:
    """One decoder block: D hidden, F inner; H heads for queries and K for keys and values, each of size d."""

    attention_norm: Tensor  # (D,) float32
    query_key_value: Layer  # D -> (H + 2 K) d
    attention_out: Layer  # H d -> D
    mlp_norm: Tensor  # (D,) float32
    gate_up: Layer  # D -> 2 F
    down: Layer  # F -> D


class HeadScratch(threading.local):
    """Scratch tensors for some rows of logits, one set per thread: allocating them takes longer than filling them."""

    def __init__(self, head: Tensor) -> None:
        self.logits = head.new_empty(HEAD_ROWS, len(head))
        num_rows = min(HEAD_ROWS, max(1, EXACT_LOGITS // len(head)))
        self.exact = torch.empty(num_rows, len(head), device=head.device)


@dataclass(frozen=True, eq=False)
class Decoder:
    """The parts of a Llama-shaped model, on which `passes` works. It shares its tensors with the model.

    V tokens in the vocabulary, D hidden.
    """

    embedding: Tensor  # (V, D)
    blocks: tuple[Block, ...]
    norm: Tensor  # (D,) float32
    head: Tensor  # (V, D)
    num_heads: int
    num_key_value_heads: int
    head_size: int
    epsilon: float
    rotary: Callable[[int], tuple[Tensor, Tensor]]
    """A function that returns the cosines and sines (T, d), float32, of T positions."""
    scratch: HeadScratch

    @cached_property
    def first_trained(self) -> int:
        """The lowest block with an adapter. The outputs of the blocks below never change for a text."""
        trained = (number for number, block in enumerate(self.blocks) if any(each.adapters for each in layers(block)))
        return next(trained, len(self.blocks))

    def refresh(self, dropout: float = 0.0) -> None:
        """Copies the adapters as they are now, for passes with dropout at this rate."""
        for block in self.blocks[self.first_trained :]:
            for layer in layers(block):
                layer.refresh(1 / (1 - dropout))


def layers(block: Block) -> tuple[Layer, Layer, Layer, Layer]:
    """A block's linear layers, in the order of use."""
    return block.query_key_value, block.attention_out, block.gate_up, block.down
