"""Products with a decoder's fused layers, and its norms, forward and backward. Base weights get no gradient.

N tokens; R ranks, summed over the adapters of a fused layer. In `in + R`, R is padded as in the layer's weight.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fedmide.model.decoder.parts import Dropout, Layer, masked


@dataclass(frozen=True, eq=False)
class ForBackward:
    """Marks a pass that a backward pass will follow, and gives its dropout.

    `dropout`: of the adapters' inputs; None: no dropout.
    """

    dropout: Dropout | None


@dataclass(frozen=True, eq=False)
class Product:
    """The tensors of a fused layer's product that the backward pass needs."""

    layer: Layer
    extended: Tensor  # (N, in + R): the input and its products with the adapters' A; empty without adapters
    mask: Tensor | None  # (N, in), of dropout
    boost: float  # 1 / (1 - rate) under dropout


def input_of(layer: Layer, like: Tensor) -> Tensor:
    """An empty tensor for a layer's input (N, in + R), with zeros in the adapters' columns."""
    extended = torch.empty(like.shape[0], layer.weight.shape[1], dtype=layer.weight.dtype, device=like.device)
    extended[:, layer.num_in :] = 0
    return extended


def product(
    layer: Layer, extended: Tensor, keep: ForBackward | None, residual: Tensor | None = None
) -> tuple[Tensor, Product]:
    """The layer's output (N, out), added to the residual if there is one; fills the adapters' columns of `extended`.

    All adapters of an input share one dropout mask. PEFT does the same if the base model itself has such a fused layer.
    For each adapter this is the same dropout as if it were alone.
    """
    mask, boost = None, 1.0
    if layer.adapters is not None:
        given, room = extended[:, : layer.num_in], extended[:, layer.num_in :]
        if keep is not None and keep.dropout is not None:
            boost = 1 / (1 - keep.dropout.rate)
            mask = keep.dropout.draw(len(given), layer.num_in, given.dtype)
            given = masked(given, mask)
        a = layer.adapters.a_scaled
        room[:, : a.shape[0]] = given @ a.t()
    used = extended if layer.adapters is not None else extended[:0].clone()  # a view would keep the whole tensor
    product = Product(layer, used, mask, boost)
    if residual is None:
        return F.linear(extended, layer.weight), product
    return torch.addmm(residual, extended, layer.weight.t()), product


def product_backward(product: Product, gradient: Tensor, into: Tensor, is_wanted: bool = True) -> Tensor:
    """The gradient of a layer's input (N, in), from that of its output; writes the adapters' gradients `into`.

    Without `is_wanted`, the input's gradient is not needed, and the returned tensor has no use.
    """
    layer, num_in, adapters = product.layer, product.layer.num_in, product.layer.adapters
    if adapters is None:
        return gradient @ layer.weight[:, :num_in]
    num_ranks = adapters.a.shape[0]
    extended = gradient @ (layer.weight if is_wanted else layer.weight[:, num_in:])
    inner = extended[:, num_in if is_wanted else 0 :][:, :num_ranks]  # (N, R), the gradient of x A^T
    given, made = product.extended[:, :num_in], product.extended[:, num_in:][:, :num_ranks]
    b_gradients = made.t() @ gradient  # (R, out); each adapter's gradient is the block of its rows and columns
    for lora in adapters.loras:
        into[lora.place].view_as(lora.b).copy_(b_gradients[lora.rows, lora.columns].t())
    dropped = given if product.mask is None else masked(given, product.mask)
    into[adapters.place].view_as(adapters.a).copy_(inner.t() @ dropped).mul_(adapters.scale * product.boost)
    if not is_wanted:
        return extended
    if product.mask is None:
        return extended[:, :num_in].addmm_(inner, adapters.a_scaled)
    back = inner @ adapters.a_scaled
    return extended[:, :num_in].add_(masked(back, product.mask, out=back))


def normed_input(states: Tensor, weight: Tensor, epsilon: float, layer: Layer) -> tuple[Tensor, Tensor]:
    """A layer's input (N, in + R) from normed states, and the norm's factor (N, 1)."""
    extended = input_of(layer, states)
    normed, factor = norm(states, weight, epsilon)
    extended[:, : layer.num_in] = normed
    return extended, factor


def norm(states: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """RMS norm (N, D), and the factor (N, 1) by which it scaled each row, both float32."""
    normed = states.to(torch.float32, copy=True)
    length = torch.linalg.vector_norm(normed, dim=-1, keepdim=True)
    factor = length.square_().div_(states.shape[-1]).add_(epsilon).rsqrt_()
    return normed.mul_(factor).mul_(weight), factor


def norm_backward(gradient: Tensor, states: Tensor, weight: Tensor, factor: Tensor) -> Tensor:
    """The gradient of the states before the norm, float32."""
    scaled, states = gradient.to(torch.float32, copy=True).mul_(weight), states.float()
    pull = (scaled * states).sum(-1, keepdim=True).mul_(factor.pow(3)).div_(-states.shape[-1])
    return scaled.mul_(factor).addcmul_(states, pull)
