"""A transformers model under PEFT's LoRA layers as a `Decoder`, where it is Llama-shaped.

The base weights are laid out anew, those with one input under each other, and the model's own become views of them: one
copy in memory, and the model works as before. It imports neither library; it goes by the names of their modules.
"""

import threading
from collections.abc import Sequence
from itertools import accumulate, chain, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from fedmide.model.decoder.parts import PAD_COLUMNS, Adapters, Block, Decoder, HeadRoom, Layer, Lora

MODEL_TYPES = ("llama", "mistral")


class Flat:
    """Parameters laid out one after the other in one: copied, converted and stepped in one go.

    Each keeps its name and shape and becomes a view, and so does its gradient.
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
        """Where parameters that follow each other are."""
        start = self._start[id(parameters[0])]
        return slice(start, start + sum(each.numel() for each in parameters))


def trained_parameters(network: Any) -> list[nn.Parameter]:
    """A PEFT model's trainable parameters in the order that `fused` needs them in."""
    base = network.get_base_model()
    if not is_llama_shaped(base.config):
        return [each for each in network.parameters() if each.requires_grad]
    return [each for layer in base.model.layers for part in _parts(layer) for each in chain(*_factors(part))]


def fused(network: Any, flat: Flat) -> Decoder | None:
    """The decoder of a PEFT model, whose weights it lays out anew; None where the model has another shape."""
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
        room=HeadRoom(head),
    )


def is_llama_shaped(config: Any) -> bool:
    """Whether a model's blocks are those that `decoder` writes out: no biases, SiLU, attention to all before.

    The passes need plain weights, which a quantised model has not.
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
    """Cosines and sines of so many positions, by the model's own module; a thread keeps those of its last length."""

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
    """A block's linear modules, those with one input together, in the order of `Block`."""
    attention, mlp = layer.self_attn, layer.mlp
    queries = (attention.q_proj, attention.k_proj, attention.v_proj)
    return queries, (attention.o_proj,), (mlp.gate_proj, mlp.up_proj), (mlp.down_proj,)


def _factors(modules: Sequence[Any]) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The adapters' A and B of modules with one input."""
    adapted = [module for module in modules if hasattr(module, "lora_A")]
    return [each.lora_A["default"].weight for each in adapted], [each.lora_B["default"].weight for each in adapted]


def _block(layer: Any, flat: Flat) -> Block:
    query_key_value, attention_out, gate_up, down = (_layer(modules, flat) for modules in _parts(layer))
    norms = layer.input_layernorm.weight.float(), layer.post_attention_layernorm.weight.float()
    return Block(norms[0], query_key_value, attention_out, norms[1], gate_up, down)


def _layer(modules: Sequence[Any], flat: Flat) -> Layer:
    """Linear modules with one input, with or without LoRA, as one layer; their weights become views of its."""
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
    """The adapters of modules with one input; None where none has one."""
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
