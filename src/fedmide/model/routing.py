"""A model whose LoRA layers hold two adapters, which a router mixes for each token.

The router of a layer is softmax(R x) with R (2, in) and the layer's input x. It weights the two halves of the ranks.
Routers need hooks on PEFT's modules. So the fast hand-written passes can't be used, and this model is slow.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedmide.data.batches import Batch
from fedmide.model.adapters import ROUTER, A, without_routers
from fedmide.model.decoder.layout import Flat
from fedmide.model.hooks import OnToken
from fedmide.model.interface import Adapter
from fedmide.model.lora import LoraModel
from fedmide.model.workers import Workers


@dataclass(frozen=True, eq=False)
class RoutedModel(LoraModel):
    """A model with routers, which are trained together with the adapters."""

    routers: dict[str, nn.Parameter] = field(kw_only=True)
    flat_routers: Flat = field(kw_only=True)

    @property
    def extra_parameters(self) -> tuple[nn.Parameter, ...]:
        """The routers."""
        return (self.flat_routers.parameter,)

    def put(self, adapter: Adapter) -> None:
        """Copies both adapters and the routers into the model."""
        super().put(without_routers(adapter))
        with torch.no_grad():
            for name, parameter in self.routers.items():
                parameter.copy_(torch.from_numpy(np.ascontiguousarray(adapter[name])))

    def take(self) -> Adapter:
        """A copy of both adapters and the routers."""
        routers = {name: each.detach().to("cpu", copy=True).numpy().copy() for name, each in self.routers.items()}
        return {**super().take(), **routers}

    def nll(self, batch: Batch) -> Tensor:
        """NLL of each predicted token, as `LoraModel.nll`, with the routers."""
        with self._routed():
            return super().nll(batch)

    def _through_modules(self, batch: Batch, scale: float, seed: int, weights: Tensor | None) -> tuple[Tensor, Tensor]:
        """The same as in `LoraModel`, with the routers; adds each router's gradient to its `grad`."""
        with self._routed():
            losses = self._training_losses(batch, seed)
        counted = losses if weights is None else losses * weights
        own, parameters = list(self.routers.values()), self.parameters()
        factors = [parameters[name] for name in self.shapes]
        gradients = torch.autograd.grad(counted.sum() * scale, [*factors, *own])
        for router, gradient in zip(own, gradients[len(factors) :], strict=True):
            assert router.grad is not None
            router.grad.add_(gradient)
        return losses.detach(), torch.cat([each.reshape(-1) for each in gradients[: len(factors)]])

    def continuations(self, ids: Tensor, mask: Tensor, max_new_tokens: int, on_token: OnToken | None = None) -> Tensor:
        """Greedy continuations, as `LoraModel.continuations`, with the routers."""
        with self._routed():
            return super().continuations(ids, mask, max_new_tokens, on_token)

    @contextmanager
    def _routed(self) -> Iterator[None]:
        """A context with the routers' hooks. Afterwards they are removed, as the next adapter may have no routers."""
        with ExitStack() as stack:
            for name, router in self.routers.items():
                layer: Any = self.network.get_submodule(name.removesuffix(ROUTER))
                gate = _Gate(router)
                stack.callback(layer.register_forward_pre_hook(gate.see).remove)
                stack.callback(layer.lora_A["default"].register_forward_hook(gate.weight).remove)
            yield


class _Gate:
    """A layer's router: it reads the layer's input, and weights the output of the layer's A."""

    def __init__(self, router: nn.Parameter) -> None:
        self.router = router
        self.gates = torch.empty(0)

    def see(self, _module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.gates = torch.softmax(args[0].to(self.router.dtype) @ self.router.T, dim=-1)  # (..., 2)

    def weight(self, _module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        return output * self.gates.repeat_interleave(output.shape[-1] // 2, dim=-1).to(output.dtype)


def routed(model: LoraModel, names: Sequence[str]) -> RoutedModel:
    """The model with routers of these names, each of which ends in `ROUTER`."""
    inner = {name: model.shapes[name.removesuffix(ROUTER) + A][1] for name in names}
    routers = {name: nn.Parameter(torch.zeros(2, size, device=model.device)) for name, size in inner.items()}
    parts = {each.name: getattr(model, each.name) for each in fields(LoraModel)}
    changes = {"prefixes": None, "workers": Workers(0)}  # a hook must see one batch at a time
    return RoutedModel(**{**parts, **changes}, routers=routers, flat_routers=Flat(list(routers.values())))
