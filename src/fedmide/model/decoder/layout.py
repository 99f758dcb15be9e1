"""A Llama-shaped transformers model under PEFT's LoRA layers, as a `Decoder`.

The base weights are copied to a new layout: those with the same input are stacked. The model's own weights become views
of it. So memory holds one copy, and the model works as before.
This module imports neither transformers nor PEFT. It uses the names of their modules.
"""

import threading
from collections.abc import Sequence
from itertools import accumulate, chain, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from fedmide.model.decoder.parts import PAD_COLUMNS, Adapters, Block, Decoder, HeadScratch, Layer, Lora

MODEL_TYPES = ("llama", "mistral")


class Flat:
    """Parameters joined into one flat parameter, to be copied, converted and updated in one operation.

    Each parameter keeps its name and shape, and becomes a view of the flat one. So does its gradient.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameter = nn.Parameter(torch.cat([each.detach().reshape(-1) for each in parameters]))
        self.parameter.grad = torch.zeros_like(self.parameter)
        starts = accumulate((each.numel() for each in parameters), initial=0)
        self._start = {id(each): start for each, start in zip(parameters, starts, strict=False)}
        for each in parameters:
            each.data, each.grad = (
                part[self.place([each])].view(each.shape) for part in (self.parameter.data, self.gradient)
            )

    @property
    def gradient(self) -> Tensor:
        """The gradient (P,), float32."""
        assert self.parameter.grad is not None
        return self.parameter.grad

    def place(self, parameters: Sequence[nn.Parameter]) -> slice:
        """The slice of consecutive parameters in the flat one."""
        start = self._start[id(parameters[0])]
        return slice(start, start + sum(each.numel() for each in parameters))


def trained_parameters(network: Any) -> list[nn.Parameter]:
    """A PEFT model's trainable parameters, in the order that `fused` needs."""
    base = network.get_base_model()
    if not is_llama_shaped(base.config):
        return [each for each in network.parameters() if each.requires_grad]
    return [each for layer in base.model.layers for part in _parts(layer) for each in chain(*_factors(part))]


def fused(network: Any, flat: Flat) -> Decoder | None:
    """The decoder of a PEFT model; None if it is not Llama-shaped. Moves the model's weights to the new layout."""
    base = network.get_base_model()
    if not is_llama_shaped(base.config):
        return None
    config, model, head = base.config, base.model, base.lm_head.weight
    return Decoder(
        embedding=model.embed_tokens.weight,
        blocks=tuple(_block(layer, flat) for layer in model.layers),
        norm=model.norm.weight.float(),
        head=head,
        num_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_size=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        epsilon=config.rms_norm_eps,
        rotary=_Rotary(model.rotary_emb),
        scratch=HeadScratch(head),
    )


def is_llama_shaped(config: Any) -> bool:
    """True if `decoder` can compute a model's blocks: no biases, SiLU, attention to all earlier tokens.

    The passes need plain weights, which a quantized model does not have.
    """
    return (
        config.model_type in MODEL_TYPES
        and getattr(config, "quantization_config", None) is None
        and config.hidden_act == "silu"
        and not getattr(config, "attention_bias", False)
        and not getattr(config, "mlp_bias", False)
        and not getattr(config, "attention_dropout", 0.0)
        and getattr(config, "sliding_window", None) is None
    )


class _Rotary(threading.local):
    """Cosines and sines for a number of positions, by the model's own module. Each thread keeps the last result."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.length = 0
        self.values: tuple[Tensor, Tensor] = (torch.empty(0), torch.empty(0))

    def __call__(self, length: int) -> tuple[Tensor, Tensor]:
        if length != self.length:
            device = next(self.module.buffers()).device
            like = torch.empty(0, dtype=torch.float32, device=device)
            cosine, sine = self.module(like, torch.arange(length, device=device)[None])
            self.length, self.values = length, (cosine[0], sine[0])
        return self.values


def _parts(layer: Any) -> tuple[tuple[Any, ...], ...]:
    """A block's linear modules in the order of `Block`, grouped by their input."""
    attention, mlp = layer.self_attn, layer.mlp
    queries = (attention.q_proj, attention.k_proj, attention.v_proj)
    return queries, (attention.o_proj,), (mlp.gate_proj, mlp.up_proj), (mlp.down_proj,)


def _factors(modules: Sequence[Any]) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The adapters' A and B of modules with the same input."""
    adapted = [module for module in modules if hasattr(module, "lora_A")]
    return [each.lora_A["default"].weight for each in adapted], [each.lora_B["default"].weight for each in adapted]


def _block(layer: Any, flat: Flat) -> Block:
    query_key_value, attention_out, gate_up, down = (_layer(modules, flat) for modules in _parts(layer))
    norms = layer.input_layernorm.weight.float(), layer.post_attention_layernorm.weight.float()
    return Block(norms[0], query_key_value, attention_out, norms[1], gate_up, down)


def _layer(modules: Sequence[Any], flat: Flat) -> Layer:
    """Linear modules with the same input, with or without LoRA, as one layer. Their weights become views of it."""
    linears: list[nn.Linear] = [getattr(module, "base_layer", module) for module in modules]
    ends = [0, *accumulate(linear.out_features for linear in linears)]
    columns = [slice(first, last) for first, last in pairwise(ends)]
    like, num_in = linears[0].weight, linears[0].in_features
    adapters = _adapters(modules, columns, flat, like.dtype)
    room = 0 if adapters is None else -(-len(adapters.a) // PAD_COLUMNS) * PAD_COLUMNS
    weight = torch.zeros(ends[-1], num_in + room, dtype=like.dtype, device=like.device)
    for linear, rows in zip(linears, columns, strict=True):
        weight[rows, :num_in] = linear.weight.detach()
        linear.weight.data = weight[rows, :num_in]
    return Layer(weight, num_in, adapters)


def _adapters(modules: Sequence[Any], columns: Sequence[slice], flat: Flat, dtype: torch.dtype) -> Adapters | None:
    """The adapters of modules with the same input; None if no module has one."""
    factors = _factors(modules)
    if not factors[0]:
        return None
    adapted = [number for number, module in enumerate(modules) if hasattr(module, "lora_A")]
    ends = [0, *accumulate(len(a) for a in factors[0])]
    loras = tuple(
        Lora(b.data, flat.place([b]), columns[number], slice(first, last))
        for number, b, (first, last) in zip(adapted, factors[1], pairwise(ends), strict=True)
    )
    place = flat.place(factors[0])
    a = flat.parameter.data[place].view(-1, factors[0][0].shape[1])
    scale = modules[adapted[0]].scaling["default"]
    return Adapters(a, place, torch.empty_like(a, dtype=dtype), scale, loras)
