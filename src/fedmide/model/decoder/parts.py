"""A Llama-shaped decoder under LoRA as its parts, laid out for the passes that are written out over it.

Layers with one input are one: query, key and value, and gate and up. An adapter's factor B stands in extra columns of
its layer's weight, so that it costs no pass of its own. What the passes are and why: `passes`.
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
"""Extra columns of a weight come in multiples of so many, which matrix units want."""


HEAD_ROWS = 128
"""Rows of logits made at a time: more do not fit the cache beside the output layer's weights."""


EXACT_LOGITS = 2**18
"""Logits in float32 at a time, which a core's own cache holds: 5 of 49,152 take a third of the time of 128."""


class Dropout:
    """Dropout of the adapters' inputs.

    Masks are drawn as 16 random bits a value, which is a tenth of the time of torch's own draws on a processor; so the
    rate is a multiple of 2^-16.
    """

    def __init__(self, rate: float, device: torch.device, seed: int = 0) -> None:
        self._below = min(round(rate * 2**16), 2**16 - 1)  # something is always kept
        self.rate = self._below / 2**16
        self.device = device
        self._draws = np.random.Generator(np.random.SFC64(seed))

    def seeded(self, seed: int) -> "Dropout":
        """The same dropout, whose masks follow from the seed."""
        return Dropout(self.rate, self.device, seed)

    def copy(self) -> "Dropout":
        """The same dropout, about to draw the same masks."""
        return copy.deepcopy(self)

    def draw(self, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        """A mask (rows, columns) for `masked`: all bits of what is kept, in the integer type as wide as the values'."""
        words = self._draws.integers(0, 2**64, -(-rows * columns // 4), dtype=np.uint64)
        bits = torch.from_numpy(words.view(np.int16)[: rows * columns]).to(self.device)
        mask = torch.ge(bits, self._below - 2**15, out=torch.empty_like(bits)).neg_()
        return mask.to(BITS[dtype]).view(rows, columns)


BITS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}


def masked(values: Tensor, mask: Tensor, out: Tensor | None = None) -> Tensor:
    """The values where the mask keeps them, else 0: on their bits, a quarter of a product's time in bfloat16."""
    bits = values.view(mask.dtype)
    return torch.bitwise_and(bits, mask, out=None if out is None else out.view(mask.dtype)).view(values.dtype)


@dataclass(frozen=True, eq=False)
class Lora:
    """An adapter of one layer, in these columns of the fused layer's output."""

    b: Tensor  # (out, r) float32
    place: slice  # of B in the parameters laid out flat, and of its gradient in theirs
    columns: slice
    rows: slice  # of the fused layer's A


@dataclass(frozen=True, eq=False)
class Adapters:
    """The adapters of a fused layer: y += scale * (x A^T) B^T, the factors A one under the other."""

    a: Tensor  # (R, in) float32
    place: slice  # of A in the parameters laid out flat, and of its gradient in theirs
    a_scaled: Tensor  # (R, in) in the weight's type, as the passes use it
    scale: float
    loras: tuple[Lora, ...]


@dataclass(frozen=True, eq=False)
class Layer:
    """Linear layers with one input: their weights one under the other, room for the adapters' B beside them."""

    weight: Tensor  # (out, in + R, padded)
    num_in: int
    adapters: Adapters | None = None

    def refresh(self, boost: float) -> None:
        """Takes over the adapters as they are now; with dropout, what is kept is boosted."""
        if self.adapters is None:
            return
        torch.mul(self.adapters.a, self.adapters.scale * boost, out=self.adapters.a_scaled)
        for room, b in self._rooms:
            room.copy_(b)

    @cached_property
    def _rooms(self) -> tuple[tuple[Tensor, Tensor], ...]:
        """Where in the weight each B stands, and the B. Made once: to make views takes longer than to fill them."""
        room, loras = self.weight[:, self.num_in :], self.adapters.loras if self.adapters else ()
        return tuple((room[lora.columns, lora.rows], lora.b) for lora in loras)


@dataclass(frozen=True, eq=False)
class Block:
    """One decoder block."""

    attention_norm: Tensor  # (D,) float32
    query_key_value: Layer  # D -> (H + 2 K) d
    attention_out: Layer  # H d -> D
    mlp_norm: Tensor  # (D,) float32
    gate_up: Layer  # D -> 2 F
    down: Layer  # F -> D


class HeadRoom(threading.local):
    """Room for some rows of logits, a thread's own: to ask for it anew each time takes longer than to fill it."""

    def __init__(self, head: Tensor) -> None:
        self.logits = head.new_empty(HEAD_ROWS, len(head))
        num_rows = min(HEAD_ROWS, max(1, EXACT_LOGITS // len(head)))
        self.exact = torch.empty(num_rows, len(head), device=head.device)


@dataclass(frozen=True, eq=False)
class Decoder:
    """The parts of a Llama-shaped model, on which the passes below work; its tensors are shared with the model."""

    embedding: Tensor  # (V, D)
    blocks: tuple[Block, ...]
    norm: Tensor  # (D,) float32
    head: Tensor  # (V, D)
    num_heads: int
    num_key_value_heads: int
    head_size: int
    epsilon: float
    rotary: Callable[[int], tuple[Tensor, Tensor]]
    """Cosines and sines (T, d) float32 of so many positions."""
    room: HeadRoom

    @cached_property
    def first_trained(self) -> int:
        """The lowest block with an adapter: what those below make of a text never changes."""
        trained = (number for number, block in enumerate(self.blocks) if any(each.adapters for each in layers(block)))
        return next(trained, len(self.blocks))

    def refresh(self, dropout: float = 0.0) -> None:
        """Takes over the adapters as they are now, for passes with dropout at this rate."""
        for block in self.blocks[self.first_trained :]:
            for layer in layers(block):
                layer.refresh(1 / (1 - dropout))


def layers(block: Block) -> tuple[Layer, Layer, Layer, Layer]:
    """A block's linear layers, in the order in which they are used."""
    return block.query_key_value, block.attention_out, block.gate_up, block.down
