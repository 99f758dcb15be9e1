"""Recovery from a full memory: repeat the pass with half the tokens at a time, and report it.

The tokens per pass affect only memory and speed. Results stay the same, apart from rounding and dropout's draws.
"""

from collections.abc import Callable
from typing import TypeVar

import torch

from fedmide.errors import ModelError, first_line
from fedmide.progress import quiet

T = TypeVar("T")


SAYS = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDA error: out of memory",
    "MPS backend out of memory",
    "could not create a primitive",  # oneDNN, if memory has no room for its code or scratch
    "could not create a memory object",
)
"""Words in torch's other errors that mean, or may mean, the same as `torch.OutOfMemoryError`."""


REMEDY = (
    "Lower model.cutoff, set training.checkpointing = true or model.quantization = 'int8', or use a smaller model.name"
)


class BatchBudget:
    """The number of tokens per pass of one kind of work: the configured number, or less once memory has no room for it.

    Within a run it never grows again, so the same failure does not repeat.
    In generation it counts prompts instead of tokens.
    `setting` is the name of the setting. `tell` is called with a message at each reduction.
    """

    def __init__(self, setting: str) -> None:
        self.setting = setting
        self.tell: Callable[[str], None] = quiet
        self._most: int | None = None

    def reset(self, tell: Callable[[str], None]) -> None:
        """Forgets the reduced size: each run starts with the configured one."""
        self.tell, self._most = tell, None

    def within(self, wanted: int, longest: int, act: Callable[[int], T]) -> T:
        """The result of `act` with a number of tokens. If memory is full, `act` is repeated with half as many.

        `longest`: the tokens of the longest record, which is never divided. Raises `ModelError` if it does not fit.
        """
        first = tokens = min(wanted, self._most or wanted)
        while True:
            try:
                result = act(tokens)
                break
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                if tokens <= longest:
                    raise ModelError(f"memory has no room for one record alone: {first_line(error)}", REMEDY) from None
            _release()  # by now the error is gone, and so are the tensors that its frames held
            tokens = max(tokens // 2, 1)
        if tokens < first:
            self._most = tokens
            self.tell(
                f"memory has no room for {self.setting} = {first}: using {tokens} from now on; "
                "the results' bytes may differ from those of a run with enough memory"
            )
        return result


def is_out_of_memory(error: BaseException) -> bool:
    """True if an error means that a device or the CPU has no memory left."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in SAYS)


def _release() -> None:
    """Frees the device memory that torch keeps for later use."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if torch.backends.mps.is_available():
        torch.mps.empty_cache()
