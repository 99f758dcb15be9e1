"""The forward and backward pass of Llama-shaped decoders under LoRA, written out by hand.

Module by module, most of a training step on a processor goes into what is not a matrix product: attention's backward
pass, casts, small kernels. Here a block is some twenty operations each way: query, key and value are one product, gate
and up another; an adapter's second factor stands in extra columns of its layer's weight, so that it costs no pass of
its own; attention is plain products over short texts; logits are made a few rows at a time and only where a label is.

Same numbers as module by module: in float32 but for rounding, in bfloat16 nearer to float32's (rotary embedding and
softmax are in float32). Base weights are frozen, so no gradient of theirs is ever made.

Texts stand one after the other, without padding; only attention spreads them out. Dimensions below: N tokens in B
texts, T in the longest, D hidden, F inner, H heads of which K for keys and values, d a head's size, R the ranks of a
fused layer's adapters together.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

MAX_LENGTH = 1024
"""Attention here keeps its weights, T² a head and block: beyond this other ways are better."""

PAD_COLUMNS = 32
"""Extra columns of a weight come in multiples of so many, which matrix units want."""

QUERIES = 128
"""Queries of a text that attention takes at a time: what comes after them is not looked at."""

SCORES = 2**19
"""Scores that attention holds at a time, unless a single text's are more: so many stay in a core's cache."""

HEAD_ROWS = 128
"""Rows of logits in memory at a time: more do not fit the cache beside the output layer's weights."""


class Dropout:
    """Dropout of the adapters' inputs.

    Masks are drawn as 16 random bits a value, which is a tenth of the time of torch's own draws on a processor; so the
    rate is a multiple of 2^-16.
    """

    def __init__(self, rate: float, device: torch.device, seed: int = 0) -> None:
        self._below = round(rate * 2**16)
        self.rate = self._below / 2**16
        self.device = device
        self._draws = np.random.Generator(np.random.SFC64(seed))

    def seeded(self, seed: int) -> "Dropout":
        """The same dropout, whose masks follow from the seed."""
        return Dropout(self.rate, self.device, seed)

    def draw(self, rows: int, columns: int) -> Tensor:
        """A mask (rows, columns), bool, of what is kept."""
        words = self._draws.integers(0, 2**64, -(-rows * columns // 4), dtype=np.uint64)
        bits = torch.from_numpy(words.view(np.int16)[: rows * columns]).to(self.device)
        return (bits >= self._below - 2**15).view(rows, columns)


@dataclass(frozen=True, eq=False)
class Lora:
    """An adapter of one layer, in these columns of the fused layer's output."""

    b: Tensor  # (out, r) float32
    b_gradient: Tensor
    columns: slice
    rows: slice  # of the fused layer's A


@dataclass(frozen=True, eq=False)
class Adapters:
    """The adapters of a fused layer: y += scale * (x A^T) B^T, the factors A one under the other.

    Gradients are added up in place.
    """

    a: Tensor  # (R, in) float32
    a_gradient: Tensor
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
        room = self.weight[:, self.num_in :]
        torch.mul(self.adapters.a, self.adapters.scale * boost, out=self.adapters.a_scaled)
        for lora in self.adapters.loras:
            room[lora.columns, lora.rows].copy_(lora.b)


@dataclass(frozen=True, eq=False)
class Block:
    """One decoder block."""

    attention_norm: Tensor  # (D,) float32
    query_key_value: Layer  # D -> (H + 2 K) d
    attention_out: Layer  # H d -> D
    mlp_norm: Tensor  # (D,) float32
    gate_up: Layer  # D -> 2 F
    down: Layer  # F -> D


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
    logits: Tensor  # (HEAD_ROWS, V), room for some rows: to ask for it anew each time takes longer than to fill it
    exact_logits: Tensor  # (HEAD_ROWS, V) float32

    @property
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


# --- what a text makes of the model


def embed(decoder: Decoder, ids: Tensor) -> Tensor:
    """Hidden states (N, D) before the first block of ids (N,)."""
    return F.embedding(ids, decoder.embedding)


def hidden(decoder: Decoder, states: Tensor, lengths: Sequence[int], blocks: slice) -> Tensor:
    """Hidden states (N, D) of texts of these lengths after some of the blocks."""
    view = _view(decoder, lengths, states.device)
    for block in decoder.blocks[blocks]:
        states = _forward(block, states, view, None)[0]
    return states


def losses(decoder: Decoder, states: Tensor, rows: Tensor, targets: Tensor) -> Tensor:
    """NLL (M,) float32 of the targets after those rows of the last block's hidden states."""
    normed = _norm(states[rows], decoder.norm, decoder.epsilon)[0].to(states.dtype)
    return torch.cat([_chunk_losses(decoder, *chunk)[0] for chunk in _chunks(normed, targets)])


def backpropagate(
    decoder: Decoder,
    states: Tensor,
    lengths: Sequence[int],
    rows: Tensor,
    targets: Tensor,
    scale: float,
    dropout: Dropout | None,
) -> Tensor:
    """NLL (M,) of the targets; adds the gradients of `scale` times their sum to the adapters'.

    `states` (N, D) are those before the lowest block with an adapter.
    """
    view = _view(decoder, lengths, states.device)
    traces = []
    for block in decoder.blocks[decoder.first_trained :]:
        states, trace = _forward(block, states, view, _Keep(dropout))
        traces.append(trace)
    chosen = states[rows]
    normed, factor = _norm(chosen, decoder.norm, decoder.epsilon)
    made = [_chunk_losses(decoder, *chunk, scale) for chunk in _chunks(normed.to(states.dtype), targets)]
    gradient = torch.zeros_like(states)
    wanted = torch.cat([each for _, each in made])
    gradient[rows] = _norm_backward(wanted, chosen, decoder.norm, factor).to(states.dtype)
    while traces:
        gradient = _backward(traces.pop(), gradient, view, is_lowest=not traces)
    return torch.cat([each for each, _ in made])


# --- one block


@dataclass(frozen=True, eq=False)
class _Piece:
    """Some queries of some texts, which see the keys up to the last of them."""

    texts: slice
    queries: slice
    mask: Tensor  # (G t, T'), 0 where a query sees a key, else -inf; G = H / K, t queries, T' keys


@dataclass(frozen=True, eq=False)
class _View:
    """How the rows of hidden states are texts, which attention spreads out to B T rows."""

    decoder: Decoder
    num_texts: int
    length: int
    places: Tensor | None  # (N,), which of the B T rows each is; None where no text is shorter than another
    cosine: Tensor  # (T, d)
    sine: Tensor  # (T, d / 2), of the first half of a head; the second's are the same
    pieces: tuple[_Piece, ...]


@dataclass(frozen=True, eq=False)
class _Keep:
    """That a backward pass follows, and how adapters' inputs are dropped."""

    dropout: Dropout | None


@dataclass(frozen=True, eq=False)
class _Product:
    """What the backward pass needs of a fused layer's product."""

    layer: Layer
    extended: Tensor  # (N, in + R): the input and what the adapters' A made of it
    kept: tuple[Tensor, ...]  # dropout's masks (N, in), one an adapter
    boost: float  # 1 / (1 - rate) under dropout


@dataclass(frozen=True, eq=False)
class _Trace:
    """What the backward pass needs of a block."""

    block: Block
    states: Tensor
    attention_factor: Tensor
    query_key_value: _Product
    query: Tensor  # (B, K, G, T, d), rotated
    key: Tensor  # (B, K, T, d), rotated
    value: Tensor  # (B, K, T, d)
    weights: tuple[Tensor, ...]  # (b K, G t, T'), of each piece
    attention_out: _Product
    middle: Tensor  # (N, D), between attention and MLP
    mlp_factor: Tensor
    gate_up: _Product
    gate: Tensor  # (N, 2 F)
    opened: Tensor  # (N, F), what SiLU makes of the gate
    down: _Product


def _view(decoder: Decoder, lengths: Sequence[int], device: torch.device) -> _View:
    length = max(lengths)
    cosine, sine = decoder.rotary(length)
    places = None
    if min(lengths) < length:
        inside = np.arange(length) < np.asarray(lengths)[:, None]  # (B, T)
        places = torch.from_numpy(np.flatnonzero(inside)).to(device)
    sine = sine[:, : decoder.head_size // 2].contiguous()
    return _View(decoder, len(lengths), length, places, cosine, sine, tuple(_pieces(decoder, lengths, device)))


def _pieces(decoder: Decoder, lengths: Sequence[int], device: torch.device) -> Iterator[_Piece]:
    """Attention in parts that are small enough, each without most of what its queries do not see."""
    length, groups = max(lengths), decoder.num_heads // decoder.num_key_value_heads
    future = torch.full((length, length), -torch.inf, device=device).triu(1)
    for start in range(0, length, QUERIES):
        end = min(start + QUERIES, length)
        mask = future[start:end, :end].repeat(groups, 1)
        at_once = max(1, SCORES // (decoder.num_heads * (end - start) * end))
        for first in range(0, len(lengths), at_once):
            yield _Piece(slice(first, min(first + at_once, len(lengths))), slice(start, end), mask)


def _spread(rows: Tensor, view: _View) -> Tensor:
    """Rows (N, C) as (B, T, C), zero where a text is shorter."""
    if view.places is None:
        return rows.reshape(view.num_texts, view.length, -1)
    spread = torch.zeros(view.num_texts * view.length, rows.shape[1], dtype=rows.dtype, device=rows.device)
    return spread.index_copy_(0, view.places, rows).view(view.num_texts, view.length, -1)


def _gather(spread: Tensor, view: _View) -> Tensor:
    """The rows (N, C) of (B, T, C)."""
    rows = spread.reshape(view.num_texts * view.length, -1)
    return rows if view.places is None else rows.index_select(0, view.places)


def _forward(block: Block, states: Tensor, view: _View, keep: _Keep | None) -> tuple[Tensor, _Trace]:
    """Hidden states (N, D) after a block, and what its backward pass needs."""
    epsilon = view.decoder.epsilon
    fused, attention_factor = _normed_input(states, block.attention_norm, epsilon, block.query_key_value)
    projected, first = _product(block.query_key_value, fused, keep)
    query, key, value = _heads(projected, view)
    output, weights = _attention(query, key, value, view)
    mixed = _input(block.attention_out, states)
    mixed[:, : block.attention_out.num_in] = _gather(output, view)
    middle, second = _product(block.attention_out, mixed, keep, states)
    fused, mlp_factor = _normed_input(middle, block.mlp_norm, epsilon, block.gate_up)
    gate, third = _product(block.gate_up, fused, keep)
    inner = gate.shape[1] // 2
    activated = _input(block.down, states)
    opened = F.silu(gate[:, :inner])
    torch.mul(opened, gate[:, inner:], out=activated[:, :inner])
    after, fourth = _product(block.down, activated, keep, middle)
    kept = (query.to(value.dtype), key.to(value.dtype), value) if keep else (query, key, value)
    attention = (states, attention_factor, first, *kept, weights, second)
    return after, _Trace(block, *attention, middle, mlp_factor, third, gate, opened, fourth)


def _backward(trace: _Trace, gradient: Tensor, view: _View, is_lowest: bool) -> Tensor:
    """The gradient of the hidden states before a block out of that after it; adapters' gradients are added up."""
    block, inner = trace.block, trace.gate.shape[1] // 2
    gate, up = trace.gate[:, :inner], trace.gate[:, inner:]
    activated = _product_backward(trace.down, gradient)
    split = torch.empty_like(trace.gate)
    torch.mul(activated, trace.opened, out=split[:, inner:])
    split[:, :inner] = torch.ops.aten.silu_backward(activated.mul_(up), gate)
    normed = _product_backward(trace.gate_up, split)
    middle = _norm_backward(normed, trace.middle, block.mlp_norm, trace.mlp_factor).add_(gradient).to(gradient.dtype)
    mixed = _product_backward(trace.attention_out, middle)
    projected = _attention_backward(trace, mixed, view)
    normed_input = _product_backward(trace.query_key_value, projected, is_wanted=not is_lowest)
    if is_lowest:
        return middle  # nothing below has an adapter
    below = _norm_backward(normed_input, trace.states, block.attention_norm, trace.attention_factor).add_(middle)
    return below.to(gradient.dtype)


def _attention(query: Tensor, key: Tensor, value: Tensor, view: _View) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The heads' outputs (B, T, K, G, d), and the weights (b K, G t, T') that each piece mixed the values by."""
    output, weights = torch.empty(query.shape, dtype=value.dtype, device=value.device), []
    for piece in view.pieces:
        queries, keys = _flat(query[piece.texts, :, :, piece.queries]), _seen(key, piece)
        scores = torch.baddbmm(piece.mask, queries, keys.transpose(1, 2), alpha=view.decoder.head_size**-0.5)
        weights.append(torch.softmax(scores, -1).to(value.dtype))
        part = output[piece.texts, :, :, piece.queries]
        part.copy_(torch.bmm(weights[-1], _seen(value, piece)).view(part.shape))
    return output.permute(0, 3, 1, 2, 4), tuple(weights)


def _flat(queries: Tensor) -> Tensor:
    """Queries (b, K, G, t, d) of a piece as (b K, G t, d)."""
    texts, pairs, groups, count, size = queries.shape
    return queries.reshape(texts * pairs, groups * count, size)


def _seen(keys: Tensor, piece: _Piece) -> Tensor:
    """Keys or values (B, K, T, d) that a piece's queries see, (b K, T', d)."""
    return keys[piece.texts, :, : piece.queries.stop].flatten(0, 1)


def _attention_backward(trace: _Trace, mixed: Tensor, view: _View) -> Tensor:
    """The gradient of query, key and value (N, (H + 2 K) d) before rotation, out of that of the heads' outputs."""
    heads, pairs = view.decoder.num_heads, view.decoder.num_key_value_heads
    size, texts, length = view.decoder.head_size, view.num_texts, view.length
    output = _spread(mixed, view).view(texts, length, pairs, heads // pairs, size).permute(0, 2, 3, 1, 4)
    query = torch.empty(trace.query.shape, device=mixed.device)
    key, value = (torch.zeros(trace.key.shape, device=mixed.device) for _ in range(2))
    for piece, weights in zip(view.pieces, trace.weights, strict=True):
        queries, outputs = (_flat(each[piece.texts, :, :, piece.queries]) for each in (trace.query, output))
        scores = torch.bmm(outputs, _seen(trace.value, piece).transpose(1, 2))
        mean = (scores * weights).sum(-1, keepdim=True)
        scores.sub_(mean).mul_(weights)
        part = query[piece.texts, :, :, piece.queries]
        part.copy_(torch.bmm(scores, _seen(trace.key, piece)).view(part.shape))
        for total, made in ((key, scores.transpose(1, 2) @ queries), (value, weights.transpose(1, 2) @ outputs)):
            part = total[piece.texts, :, : piece.queries.stop]
            part.add_(made.view(part.shape))
    projected = torch.empty(texts, length, heads + 2 * pairs, size, dtype=mixed.dtype, device=mixed.device)
    by_head = projected.transpose(1, 2)  # (B, H + 2 K, T, d)
    both = torch.cat([query.view(texts, heads, length, size), key.view(texts, pairs, length, size)], dim=1)
    by_head[:, : heads + pairs] = _rotated(both, view, -1).mul_(size**-0.5)
    by_head[:, heads + pairs :] = value.view(texts, pairs, length, size)
    return _gather(projected, view)


def _heads(projected: Tensor, view: _View) -> tuple[Tensor, Tensor, Tensor]:
    """Query (B, K, G, T, d) and key (B, K, T, d), rotated, in float32; value (B, K, T, d)."""
    heads, pairs = view.decoder.num_heads, view.decoder.num_key_value_heads
    size, texts, length = view.decoder.head_size, view.num_texts, view.length
    by_head = _spread(projected, view).view(texts, length, heads + 2 * pairs, size).transpose(1, 2)
    rotated = _rotated(by_head[:, : heads + pairs], view, 1)
    query = rotated[:, :heads].view(texts, pairs, heads // pairs, length, size)
    return query, rotated[:, heads:], by_head[:, heads + pairs :]


def _rotated(heads: Tensor, view: _View, direction: int) -> Tensor:
    """Rotary embedding of (B, heads, T, d), in float32; direction -1 undoes it."""
    half = heads.shape[-1] // 2
    heads = heads.to(torch.float32, memory_format=torch.contiguous_format)
    turned = heads * view.cosine
    turned[..., :half].addcmul_(heads[..., half:], view.sine, value=-direction)
    turned[..., half:].addcmul_(heads[..., :half], view.sine, value=direction)
    return turned


# --- products with fused layers


def _input(layer: Layer, like: Tensor) -> Tensor:
    """Room for a layer's input (N, in + R), the adapters' columns zero."""
    extended = torch.empty(like.shape[0], layer.weight.shape[1], dtype=layer.weight.dtype, device=like.device)
    extended[:, layer.num_in :] = 0
    return extended


def _product(
    layer: Layer, extended: Tensor, keep: _Keep | None, residual: Tensor | None = None
) -> tuple[Tensor, _Product]:
    """The layer's output (N, out), on top of the residual if there is one; fills the adapters' columns."""
    kept: tuple[Tensor, ...] = ()
    boost = 1.0
    if layer.adapters is not None:
        given, room = extended[:, : layer.num_in], extended[:, layer.num_in :]
        a = layer.adapters.a_scaled
        if keep is None or keep.dropout is None:
            room[:, : a.shape[0]] = given @ a.t()
        else:
            boost = 1 / (1 - keep.dropout.rate)
            kept = tuple(keep.dropout.draw(*given.shape) for _ in layer.adapters.loras)
            for mask, lora in zip(kept, layer.adapters.loras, strict=True):
                room[:, lora.rows] = (given * mask) @ a[lora.rows].t()
    product = _Product(layer, extended, kept, boost)
    if residual is None:
        return F.linear(extended, layer.weight), product
    return torch.addmm(residual, extended, layer.weight.t()), product


def _product_backward(product: _Product, gradient: Tensor, is_wanted: bool = True) -> Tensor:
    """The gradient of a layer's input (N, in) out of that of its output; adapters' gradients are added up."""
    layer, num_in, adapters = product.layer, product.layer.num_in, product.layer.adapters
    if adapters is None:
        return gradient @ layer.weight[:, :num_in]
    num_ranks = adapters.a.shape[0]
    extended = gradient @ (layer.weight if is_wanted else layer.weight[:, num_in:])
    inner = extended[:, num_in if is_wanted else 0 :][:, :num_ranks]  # (N, R), the gradient of x A^T
    given, made = product.extended[:, :num_in], product.extended[:, num_in:][:, :num_ranks]
    b_gradients = made.t() @ gradient  # (R, out); an adapter's is the block of its rows and columns
    for lora in adapters.loras:
        lora.b_gradient.add_(b_gradients[lora.rows, lora.columns].t())
    if not product.kept:
        adapters.a_gradient.add_(inner.t() @ given, alpha=adapters.scale)
        return extended[:, :num_in].addmm_(inner, adapters.a_scaled) if is_wanted else extended
    for mask, lora in zip(product.kept, adapters.loras, strict=True):
        kept = inner[:, lora.rows].t() @ (given * mask)
        adapters.a_gradient[lora.rows].add_(kept, alpha=adapters.scale * product.boost)
        if is_wanted:
            extended[:, :num_in].add_((inner[:, lora.rows] @ adapters.a_scaled[lora.rows]).mul_(mask))
    return extended[:, :num_in]


# --- norms and the output layer


def _normed_input(states: Tensor, weight: Tensor, epsilon: float, layer: Layer) -> tuple[Tensor, Tensor]:
    """A layer's input (N, in + R) out of the states' norm, and the norm's factor (N, 1)."""
    extended = _input(layer, states)
    normed, factor = _norm(states, weight, epsilon)
    extended[:, : layer.num_in] = normed
    return extended, factor


def _norm(states: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """RMS norm (N, D), and the factor (N, 1) that it scaled each row by, both float32."""
    normed = states.to(torch.float32, copy=True)
    length = torch.linalg.vector_norm(normed, dim=-1, keepdim=True)
    factor = length.square_().div_(states.shape[-1]).add_(epsilon).rsqrt_()
    return normed.mul_(factor).mul_(weight), factor


def _norm_backward(gradient: Tensor, states: Tensor, weight: Tensor, factor: Tensor) -> Tensor:
    """The gradient of what was normed, float32."""
    scaled, states = gradient.to(torch.float32, copy=True).mul_(weight), states.float()
    pull = (scaled * states).sum(-1, keepdim=True).mul_(factor.pow(3)).div_(-states.shape[-1])
    return scaled.mul_(factor).addcmul_(states, pull)


def _chunks(normed: Tensor, targets: Tensor) -> list[tuple[Tensor, Tensor]]:
    return list(zip(normed.split(HEAD_ROWS), targets.split(HEAD_ROWS), strict=True))


def _chunk_losses(
    decoder: Decoder, normed: Tensor, targets: Tensor, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """NLL (M,) of the targets after normed states (M, D); with `scale` the gradient of the states too."""
    count, index = len(targets), targets[:, None]
    logits = torch.mm(normed, decoder.head.t(), out=decoder.logits[:count])
    exact = decoder.exact_logits[:count].copy_(logits)
    exact.sub_(exact.amax(-1, keepdim=True))
    wanted = exact.gather(1, index)
    total = exact.exp_().sum(-1, keepdim=True)
    nll = (total.log() - wanted).squeeze(1)
    if scale is None:
        return nll, normed
    exact.div_(total).scatter_add_(1, index, torch.full_like(total, -1))
    return nll, (logits.copy_(exact) @ decoder.head).mul_(scale)
