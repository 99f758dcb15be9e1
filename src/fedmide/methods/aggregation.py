"""The weighted mean of the clients' adapters: a fold over replies, one adapter in memory at a time.

A and B are averaged separately, as FedIT and FedMIDE do: mean(B) mean(A) is not mean(BA).
"""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from fedmide.model.interface import Adapter


def weighted_mean(adapters: Iterable[tuple[Adapter, int]]) -> Adapter | None:
    """The mean of the adapters weighted by their numbers of records; None if all weights are zero.

    Sums are float64: a float32 value times a record count is exact there. So equal adapters have exactly themselves as
    mean, and the order of the replies shows in the float32 result only where large values cancel. The adapters must
    have been checked before.
    """
    sums: dict[str, NDArray[np.float64]] = {}
    total = 0
    for adapter, weight in adapters:
        if weight == 0:
            continue
        total += weight
        for name, array in adapter.items():
            scaled = array.astype(np.float64) * weight
            sums[name] = sums[name] + scaled if name in sums else scaled
    if total == 0:
        return None
    return {name: (value / total).astype(np.float32) for name, value in sums.items()}
