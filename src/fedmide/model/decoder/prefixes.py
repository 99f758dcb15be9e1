"""The outputs of the blocks below the lowest adapter. They never change for a text, so they are computed once and kept.

No round, site or adapter changes those blocks. Each text passes through them alone.
So its outputs always have the same bits, whatever the other texts, the order of the work and interruptions.
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

    States beyond that number are computed again at each use.
    """

    def __init__(self, decoder: Decoder, max_bytes: int) -> None:
        self.decoder = decoder
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._kept: dict[bytes, Tensor] = {}
        self._lock = Lock()

    def states(self, batch: Batch, device: torch.device) -> Tensor:
        """Hidden states (N, D) of the batch's texts before that block, one text after the other, without padding."""
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
        with self._lock:  # several workers may add a text at the same time
            if self.num_bytes + size <= self.max_bytes and key not in self._kept:
                self._kept[key] = states
                self.num_bytes += size
        return states
