"""What the blocks below the lowest adapter make of a text: it never changes, so it is computed once and kept.

No round, client or adapter touches those blocks. Each text passes through them alone, so that what is kept does not
depend on the texts beside it, on the order of the work or on where a run was stopped: the same bits, always.
"""

import torch
from torch import Tensor

from fedmide.decoder import Decoder, embed, hidden
from fedmide.tokens import Batch


class Prefixes:
    """Hidden states before the lowest block with an adapter, kept up to a number of bytes.

    Beyond it, states are computed anew whenever they are wanted.
    """

    def __init__(self, decoder: Decoder, max_bytes: int) -> None:
        self.decoder = decoder
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._kept: dict[bytes, Tensor] = {}

    def states(self, batch: Batch, device: torch.device) -> Tensor:
        """The batch's hidden states (B T, D) before that block; zero where it is padded."""
        first = self.decoder.first_trained
        ids = torch.from_numpy(batch.ids).to(device)
        if first == 0 or self.max_bytes == 0:
            return hidden(self.decoder, embed(self.decoder, ids), len(ids), slice(0, first))
        like = self.decoder.embedding
        states = torch.zeros(*ids.shape, like.shape[1], dtype=like.dtype, device=device)
        for row, length in enumerate(batch.lengths):
            states[row, :length] = self._of(ids[row, :length], batch.ids[row, :length].tobytes(), first)
        return states.view(-1, like.shape[1])

    def _of(self, ids: Tensor, key: bytes, first: int) -> Tensor:
        """The states (T, D) of one text."""
        kept = self._kept.get(key)
        if kept is not None:
            return kept
        states = hidden(self.decoder, embed(self.decoder, ids[None]), 1, slice(0, first))
        size = states.numel() * states.element_size()
        if self.num_bytes + size <= self.max_bytes:
            self._kept[key] = states
            self.num_bytes += size
        return states
