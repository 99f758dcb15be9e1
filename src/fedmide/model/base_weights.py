"""The base weights under the adapters, which a few methods merge into: changed in place, and taken back exactly.

One base model serves all clients, so what is changed for one is undone for the next. The weights as they were loaded
are kept for the layers that were ever changed, and for no others; a change is added to those in float32, then rounded.
"""

from typing import Any

import torch
from torch import Tensor

from fedmide.errors import ModelError
from fedmide.model.adapters import DELTA
from fedmide.model.interface import Adapter


class BaseWeights:
    """The base weights of a PEFT model's adapted layers. `changes` is what they are changed by now."""

    def __init__(self, network: Any) -> None:
        self.changes: Adapter = {}
        self._network = network
        self._loaded: dict[str, Tensor] = {}

    @torch.no_grad()
    def change(self, changes: Adapter) -> None:
        """Makes the weights those that were loaded plus these; raises `ModelError` where one does not fit."""
        if changes.keys() == self.changes.keys() and all(changes[name] is self.changes[name] for name in changes):
            return
        for name in {**self.changes, **changes}:
            weight = self._weight(name)
            if not weight.is_floating_point():
                raise ModelError("nothing can be merged into a quantised base model", "Say model.quantization = 'none'")
            loaded = self._loaded.setdefault(name, weight.clone())
            if name not in changes:
                weight.copy_(loaded)
                continue
            if changes[name].shape != tuple(weight.shape):
                raise ModelError(f"adapter: {name!r} has shape {changes[name].shape}, expected {tuple(weight.shape)}")
            weight.copy_(loaded.float() + torch.from_numpy(changes[name]).to(weight.device))
        self.changes = dict(changes)

    def _weight(self, name: str) -> Tensor:
        try:
            weight: Tensor = self._network.get_submodule(name.removesuffix(DELTA)).base_layer.weight
        except AttributeError:
            raise ModelError(f"adapter: {name!r} changes a layer that has no adapter") from None
        return weight
