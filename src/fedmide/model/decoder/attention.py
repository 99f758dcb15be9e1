"""Causal attention over short texts as plain products, forward and backward, with rotary embedding.

Hidden states of texts are N rows, one text after the other.
Here they are spread to B texts of T tokens with padding, and computed in pieces.
A piece fits a core's cache: some texts, or some queries of a long text with the keys that they see.
The attention weights are kept for the backward pass. On a CPU, for texts of 100 tokens, this backward pass takes a
twentieth of the time of torch's own.

H heads for queries, K heads for keys and values, each of size d. G = H / K.
A piece has b texts, t queries and T' keys.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fedmide.model.decoder.parts import Decoder

MAX_LENGTH = 1024
"""The longest text in tokens. T² weights are kept per head and block, so other ways are better for longer texts."""


QUERIES = 128
"""Queries of a text per piece. Keys after the last of them are skipped."""


STRIDE = 32
"""Texts are padded to a multiple of this many tokens: with 94 instead of 96, attention takes twice as long."""


SCORES = 2**19
"""The most attention scores per piece, so that they stay in a core's cache. Only a piece of one text may have more."""


@dataclass(frozen=True, eq=False)
class Piece:
    """Some queries of some texts, with the keys up to the last of these queries."""

    texts: slice
    queries: slice
    mask: Tensor  # (G t, T'), 0 where a query sees a key, else -inf


@dataclass(frozen=True, eq=False)
class Texts:
    """The layout of texts in the rows of hidden states, which attention spreads to B T rows."""

    decoder: Decoder
    num_texts: int
    length: int
    places: Tensor | None  # (N,), the place of each row among the B T rows; None if N = B T
    cosine: Tensor  # (N, 1, d)
    sine: Tensor  # (N, 1, d / 2), for the first half of a head; the second half has the same

    @cached_property
    def pieces(self) -> tuple[Piece, ...]:
        """The pieces in which training computes attention; scoring does not need them."""
        return tuple(_pieces(self.decoder, self.num_texts, self.length, self.cosine.device))


@dataclass(frozen=True, eq=False)
class Attended:
    """The tensors of attention that the backward pass needs."""

    query: Tensor  # (B, K, G, T, d), rotated
    key: Tensor  # (B, K, T, d), rotated
    value: Tensor  # (B, K, T, d)
    weights: tuple[Tensor, ...]  # (b K, G t, T') for each piece


def texts_of(decoder: Decoder, lengths: Sequence[int], device: torch.device) -> Texts:
    """The layout of texts of these lengths, one after the other."""
    length = -(-max(lengths) // STRIDE) * STRIDE
    places = None
    if min(lengths) < length:
        inside = np.arange(length) < np.asarray(lengths)[:, None]  # (B, T)
        places = torch.from_numpy(np.flatnonzero(inside)).to(device)
    positions = torch.cat([torch.arange(each, device=device) for each in lengths])
    cosine, sine = (values[positions].unsqueeze(1) for values in decoder.rotary(max(lengths)))
    return Texts(decoder, len(lengths), length, places, cosine, sine[..., : decoder.head_size // 2])


def _pieces(decoder: Decoder, num_texts: int, length: int, device: torch.device) -> Iterator[Piece]:
    """The pieces of attention. They fit the cache, and leave out most of the keys that their queries don't see."""
    groups = decoder.num_heads // decoder.num_key_value_heads
    future = torch.full((length, length), -torch.inf, device=device).triu(1)
    for start in range(0, length, QUERIES):
        end = min(start + QUERIES, length)
        mask = future[start:end, :end].repeat(groups, 1)
        at_once = max(1, SCORES // (decoder.num_heads * (end - start) * end))
        for first in range(0, num_texts, at_once):
            yield Piece(slice(first, min(first + at_once, num_texts)), slice(start, end), mask)


def _spread(rows: Tensor, view: Texts) -> Tensor:
    """Rows (N, C) as (B, T, C), with zeros after shorter texts."""
    if view.places is None:
        return rows.reshape(view.num_texts, view.length, -1)
    spread = torch.zeros(view.num_texts * view.length, rows.shape[1], dtype=rows.dtype, device=rows.device)
    return spread.index_copy_(0, view.places, rows).view(view.num_texts, view.length, -1)


def _gather(spread: Tensor, view: Texts) -> Tensor:
    """The rows (N, C) out of (B, T, C), without padding."""
    rows = spread.reshape(view.num_texts * view.length, -1)
    return rows if view.places is None else rows.index_select(0, view.places)


def attention(projected: Tensor, view: Texts) -> Tensor:
    """The heads' outputs (N, H d) from query, key and value (N, (H + 2 K) d), by torch's own fused forward pass.

    Applies the rotary embedding to query and key in place.
    """
    query, key, value = _heads(projected, view)
    output = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)  # (B, H, T, d)
    return _gather(output.transpose(1, 2), view)


def kept_attention(projected: Tensor, view: Texts) -> tuple[Tensor, Attended]:
    """The heads' outputs, as `attention`, and the tensors that the backward pass needs."""
    query, key, value = _heads(projected, view)
    query = query.unflatten(1, (key.shape[1], -1))  # (B, K, G, T, d)
    outputs, weights = torch.empty(query.shape, dtype=value.dtype, device=value.device), []
    for piece in view.pieces:
        queries, keys = _flat(query[piece.texts, :, :, piece.queries]), _seen(key, piece)
        exact = queries.float(), keys.float().transpose(1, 2)
        scores = torch.baddbmm(piece.mask, *exact, alpha=view.decoder.head_size**-0.5)
        weights.append(torch.softmax(scores, -1).to(value.dtype))
        part = outputs[piece.texts, :, :, piece.queries]
        part.copy_(torch.bmm(weights[-1], _seen(value, piece)).view(part.shape))
    return _gather(outputs.permute(0, 3, 1, 2, 4), view), Attended(query, key, value, tuple(weights))


def _flat(queries: Tensor) -> Tensor:
    """Queries (b, K, G, t, d) of a piece as (b K, G t, d)."""
    texts, pairs, groups, count, size = queries.shape
    return queries.reshape(texts * pairs, groups * count, size)


def _seen(keys: Tensor, piece: Piece) -> Tensor:
    """Keys or values (B, K, T, d) that a piece's queries see, (b K, T', d)."""
    return keys[piece.texts, :, : piece.queries.stop].flatten(0, 1)


def attention_backward(attended: Attended, mixed: Tensor, view: Texts) -> Tensor:
    """The gradient of query, key and value (N, (H + 2 K) d), from that of the heads' outputs (N, H d)."""
    heads, pairs, size = view.decoder.num_heads, view.decoder.num_key_value_heads, view.decoder.head_size
    spread = _spread(mixed, view).view(view.num_texts, view.length, pairs, heads // pairs, size)
    outputs = spread.permute(0, 2, 3, 1, 4)  # (B, K, G, T, d)
    gradient = torch.zeros(view.num_texts, heads + 2 * pairs, view.length, size, device=mixed.device)
    query, key, value = gradient.split((heads, pairs, pairs), 1)
    query = query.unflatten(1, (pairs, -1))
    for piece, weights in zip(view.pieces, attended.weights, strict=True):
        queries, above = (_flat(each[piece.texts, :, :, piece.queries]) for each in (attended.query, outputs))
        scores = torch.bmm(above, _seen(attended.value, piece).transpose(1, 2))
        mean = (scores * weights).sum(-1, keepdim=True)
        scores.sub_(mean).mul_(weights)
        part = query[piece.texts, :, :, piece.queries]
        part.copy_(torch.bmm(scores, _seen(attended.key, piece)).view(part.shape))
        for total, made in ((key, scores.transpose(1, 2) @ queries), (value, weights.transpose(1, 2) @ above)):
            part = total[piece.texts, :, : piece.queries.stop]
            part.add_(made.view(part.shape))
    rows = _gather(gradient.transpose(1, 2), view)  # (N, (H + 2 K) d) float32
    turned = _turned(rows[:, : (heads + pairs) * size], view, -1).mul_(size**-0.5)
    return torch.cat([turned, rows[:, (heads + pairs) * size :]], dim=1).to(mixed.dtype)


def _heads(projected: Tensor, view: Texts) -> tuple[Tensor, Tensor, Tensor]:
    """Query (B, H, T, d) and key (B, K, T, d) with rotary embedding, and value (B, K, T, d)."""
    heads, pairs, size = view.decoder.num_heads, view.decoder.num_key_value_heads, view.decoder.head_size
    placed = projected[:, : (heads + pairs) * size]
    placed.copy_(_turned(placed, view, 1))
    by_head = _spread(projected, view).view(view.num_texts, view.length, heads + 2 * pairs, size).transpose(1, 2)
    query, key, value = by_head.split((heads, pairs, pairs), 1)
    return query, key, value


def _turned(rows: Tensor, view: Texts, direction: int) -> Tensor:
    """Rotary embedding of rows (N, heads d), float32; direction -1 undoes it."""
    half = view.decoder.head_size // 2
    heads = rows.unflatten(1, (-1, 2 * half)).to(torch.float32, memory_format=torch.contiguous_format)
    turned = heads * view.cosine
    turned[..., :half].addcmul_(heads[..., half:], view.sine, value=-direction)
    turned[..., half:].addcmul_(heads[..., :half], view.sine, value=direction)
    flat: Tensor = turned.flatten(1)
    return flat
