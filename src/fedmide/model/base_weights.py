"""The base weights under the adapters, for the few methods that change them: changed in place, restored exactly.

One base model serves all sites, so a change for one site is undone for the next.
For each layer that was ever changed, a copy of the loaded weights is kept. Other layers need no copy.
A change is added to the loaded weights in float32, then rounded.
"""

from typing import Any

import torch
from torch import Tensor

from fedmide.errors import ModelError
from fedmide.model.adapters import DELTA
from fedmide.model.interface import Adapter


class BaseWeights:
    """The base weights of a PEFT model's adapted layers. `changes` are the changes that are in them now."""

    def __init__(self, network: Any) -> None:
        self.changes: Adapter = {}
        self._network = network
        self._loaded: dict[str, Tensor] = {}

    @torch.no_grad()
    def change(self, changes: Adapter) -> None:
        """Sets the weights to the loaded ones plus these changes; raises `ModelError` if one does not fit."""
        if changes.keys() == self.changes.keys() and all(changes[name] is self.changes[name] for name in changes):
            return
        for name in {**self.changes, **changes}:
            weight = self._weight(name)
            if not weight.is_floating_point():
                raise ModelError("a quantized base model can't be changed", "Set model.quantization = 'none'")
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
