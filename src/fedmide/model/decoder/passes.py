"""The forward and backward pass of Llama-shaped decoders under LoRA, written by hand.

With transformers' modules, most of a training step on a CPU is not spent on matrix products.
It is spent on attention's backward pass, casts and small kernels.
Here a block has about thirty operations per direction, and layers with the same input are one product.
Logits are computed a few rows at a time, and only where a token is predicted. Only attention pads texts.

In float32 the numbers are the same as with the modules, apart from rounding.
In bfloat16 they are as near to those of float32 as the modules' numbers are.
Rotary embedding, softmax and norms are in float32.
Base weights are frozen, so their gradients are never computed.

Sizes: N tokens of all texts, one text after the other; D hidden; F inner; V the vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fedmide.model.decoder.attention import Attended, Texts, attention, attention_backward, kept_attention, texts_of
from fedmide.model.decoder.parts import HEAD_ROWS, Block, Decoder, Dropout
from fedmide.model.decoder.products import (
    ForBackward,
    Product,
    input_of,
    norm,
    norm_backward,
    normed_input,
    product,
    product_backward,
)


def embed(decoder: Decoder, ids: Tensor) -> Tensor:
    """Hidden states (N, D) of ids (N,) before the first block."""
    return F.embedding(ids, decoder.embedding)


def hidden(decoder: Decoder, states: Tensor, lengths: Sequence[int], blocks: slice) -> Tensor:
    """Hidden states (N, D) of texts of these lengths, after the given blocks."""
    view = texts_of(decoder, lengths, states.device)
    for block in decoder.blocks[blocks]:
        states = _forward(block, states, view, None)[0]
    return states


def losses(decoder: Decoder, states: Tensor, rows: Tensor, targets: Tensor) -> Tensor:
    """NLL (M,) float32 of the targets, each predicted from one of the rows of the last block's hidden states."""
    normed = norm(states[rows], decoder.norm, decoder.epsilon)[0].to(states.dtype)
    return torch.cat([_chunk_losses(decoder, *chunk)[0] for chunk in _chunks(normed, targets)])


@dataclass(frozen=True, eq=False)
class Loss:
    """The quantity to minimize: `scale` times the sum of the targets' NLL.

    `rows` (M,): the hidden states that predict `targets` (M,). `weights` (M,): the weight of each target in the sum.
    """

    rows: Tensor
    targets: Tensor
    scale: float
    weights: Tensor | None = None


def backpropagate(
    decoder: Decoder,
    states: Tensor,
    lengths: Sequence[int],
    loss: Loss,
    *,
    into: Tensor,
    dropout: Dropout | None = None,
    checkpointing: bool = False,
) -> Tensor:
    """NLL (M,) of the loss's targets; writes the gradient of the loss `into` that of the flat parameter.

    `states` (N, D) are the hidden states before the lowest block with an adapter.
    With checkpointing only each block's input is kept, and the backward pass computes the block again: the same bits
    (Chen et al. 2016, arXiv:1604.06174).
    """
    view = texts_of(decoder, lengths, states.device)
    traces: list[Trace | Checkpoint] = []
    for block in decoder.blocks[decoder.first_trained :]:
        before = Checkpoint(block, states, dropout and dropout.copy()) if checkpointing else None
        states, trace = _forward(block, states, view, ForBackward(dropout))
        traces.append(before or trace)
        del trace  # else this name would keep it during the next block
    chosen = states[loss.rows]
    normed, factor = norm(chosen, decoder.norm, decoder.epsilon)
    made = [_chunk_losses(decoder, *chunk, loss.scale) for chunk in _chunks(normed.to(states.dtype), loss.targets)]
    gradient = torch.zeros_like(states)
    wanted = torch.cat([each for _, each in made])
    if loss.weights is not None:
        wanted.mul_(loss.weights[:, None])
    gradient[loss.rows] = norm_backward(wanted, chosen, decoder.norm, factor).to(states.dtype)
    while traces:
        gradient = _backward(_trace(traces.pop(), view), gradient, view, into, is_lowest=not traces)
    return torch.cat([each for each, _ in made])


@dataclass(frozen=True, eq=False)
class Trace:
    """The tensors of a block that the backward pass needs."""

    block: Block
    states: Tensor
    attention_factor: Tensor  # (N, 1), of the norm before attention
    query_key_value: Product
    attended: Attended | None
    attention_out: Product
    middle: Tensor  # (N, D), between attention and MLP
    mlp_factor: Tensor  # (N, 1), of the norm before the MLP
    gate_up: Product
    gate: Tensor  # (N, 2 F), gate and up
    opened: Tensor  # (N, F), SiLU of the gate
    down: Product


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """The input of a block, from which its trace can be computed again."""

    block: Block
    states: Tensor
    dropout: Dropout | None  # in its state before the block


def _trace(kept: Trace | Checkpoint, view: Texts) -> Trace:
    """The trace of a block, computed again if only a checkpoint was kept."""
    if isinstance(kept, Trace):
        return kept
    return _forward(kept.block, kept.states, view, ForBackward(kept.dropout))[1]


def _forward(block: Block, states: Tensor, view: Texts, keep: ForBackward | None) -> tuple[Tensor, Trace]:
    """Hidden states (N, D) after a block, and the trace for its backward pass."""
    epsilon = view.decoder.epsilon
    fused, attention_factor = normed_input(states, block.attention_norm, epsilon, block.query_key_value)
    projected, first = product(block.query_key_value, fused, keep)
    attended = None
    if keep is None:
        output = attention(projected, view)
    else:
        output, attended = kept_attention(projected, view)
    mixed = input_of(block.attention_out, states)
    mixed[:, : block.attention_out.num_in] = output
    middle, second = product(block.attention_out, mixed, keep, states)
    fused, mlp_factor = normed_input(middle, block.mlp_norm, epsilon, block.gate_up)
    gate, third = product(block.gate_up, fused, keep)
    inner = gate.shape[1] // 2
    activated = input_of(block.down, states)
    opened = F.silu(gate[:, :inner])
    torch.mul(opened, gate[:, inner:], out=activated[:, :inner])
    after, fourth = product(block.down, activated, keep, middle)
    first_half = states, attention_factor, first, attended, second
    return after, Trace(block, *first_half, middle, mlp_factor, third, gate, opened, fourth)


def _backward(trace: Trace, gradient: Tensor, view: Texts, into: Tensor, is_lowest: bool) -> Tensor:
    """The gradient of the hidden states before a block, from that after it; writes the adapters' gradients `into`."""
    block, inner = trace.block, trace.gate.shape[1] // 2
    gate, up = trace.gate[:, :inner], trace.gate[:, inner:]
    activated = product_backward(trace.down, gradient, into)
    split = torch.empty_like(trace.gate)
    torch.mul(activated, trace.opened, out=split[:, inner:])
    split[:, :inner] = torch.ops.aten.silu_backward(activated.mul_(up), gate)
    normed = product_backward(trace.gate_up, split, into)
    middle = norm_backward(normed, trace.middle, block.mlp_norm, trace.mlp_factor).add_(gradient).to(gradient.dtype)
    mixed = product_backward(trace.attention_out, middle, into)
    assert trace.attended is not None  # kept by every pass that has a backward pass
    projected = attention_backward(trace.attended, mixed, view)
    before = product_backward(trace.query_key_value, projected, into, is_wanted=not is_lowest)
    if is_lowest:
        return middle  # the caller does not use it: no block below has an adapter
    below = norm_backward(before, trace.states, block.attention_norm, trace.attention_factor).add_(middle)
    return below.to(gradient.dtype)


def _chunks(normed: Tensor, targets: Tensor) -> list[tuple[Tensor, Tensor]]:
    return list(zip(normed.split(HEAD_ROWS), targets.split(HEAD_ROWS), strict=True))


def _chunk_losses(
    decoder: Decoder, normed: Tensor, targets: Tensor, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """NLL (M,) of the targets after normed states (M, D), and the gradient of the states.

    Without `scale` there is no gradient, and the second value has no use.
    """
    logits = torch.mm(normed, decoder.head.t(), out=decoder.scratch.logits[: len(targets)])
    few = len(decoder.scratch.exact)
    pairs = zip(logits.split(few), targets[:, None].split(few), strict=True)
    nll = torch.cat([_exact_losses(decoder, *pair, scale is not None) for pair in pairs]).squeeze(1)
    return (nll, normed) if scale is None else (nll, (logits @ decoder.head).mul_(scale))


def _exact_losses(decoder: Decoder, logits: Tensor, index: Tensor, is_wanted: bool) -> Tensor:
    """NLL (M, 1) of the indices (M, 1) under a few rows of logits. If `is_wanted`, the gradient replaces the logits."""
    exact = decoder.scratch.exact[: len(logits)].copy_(logits)
    exact.sub_(exact.amax(-1, keepdim=True))
    wanted = exact.gather(1, index)
    total = exact.exp_().sum(-1, keepdim=True)
    if is_wanted:
        logits.copy_(exact.div_(total).scatter_add_(1, index, torch.full_like(total, -1)))
    return total.log() - wanted
