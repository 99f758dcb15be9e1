"""What the blocks below the lowest adapter make of a text: it never changes, so it is computed once and kept.

No round, client or adapter touches those blocks. Each text passes through them alone, so that what is kept does not
depend on the texts beside it, on the order of the work or on where a run was stopped: the same bits, always.
"""

from threading import Lock

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedmide.data.batches import Batch
from fedmide.model.decoder.parts import Decoder
from fedmide.model.decoder.passes import embed, hidden


class Prefixes:
    """Hidden states before the lowest block with an adapter, kept up to a number of bytes.

    Beyond it, states are computed anew whenever they are wanted.
    """

    def __init__(self, decoder: Decoder, max_bytes: int) -> None:
        self.decoder = decoder
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._kept: dict[bytes, Tensor] = {}
        self._lock = Lock()

    def states(self, batch: Batch, device: torch.device) -> Tensor:
        """Hidden states (N, D) before that block of the batch's texts, one after the other, padding left out."""
        texts = [batch.ids[row, :length] for row, length in enumerate(batch.lengths)]
        first = self.decoder.first_trained
        if first == 0:
            return embed(self.decoder, torch.from_numpy(np.concatenate(texts)).to(device))
        return torch.cat([self._of(text, first, device) for text in texts])

    def _of(self, text: NDArray[np.int64], first: int, device: torch.device) -> Tensor:
        """The states (T, D) of one text."""
        key = text.tobytes()
        kept = self._kept.get(key)
        if kept is not None:
            return kept
        ids = torch.from_numpy(np.ascontiguousarray(text)).to(device)
        states = hidden(self.decoder, embed(self.decoder, ids), [len(text)], slice(0, first))
        size = states.numel() * states.element_size()
        with self._lock:  # several workers may come with a text each
            if self.num_bytes + size <= self.max_bytes and key not in self._kept:
                self._kept[key] = states
                self.num_bytes += size
        return states
