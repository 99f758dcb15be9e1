"""Going on where the memory has no room for a pass: with half the tokens at a time, and told.

A pass's tokens are a matter of memory and speed only, so results stay the same but for rounding and dropout's draws.
"""

from collections.abc import Callable
from typing import TypeVar

import torch

from fedmide.errors import ModelError, first_line

T = TypeVar("T")


SAYS = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDA error: out of memory",
    "MPS backend out of memory",
    "could not create a primitive",  # oneDNN, where its code or scratch found no room
    "could not create a memory object",
)
"""What errors of torch say that are no `torch.OutOfMemoryError` and yet mean it, or may."""


REMEDY = (
    "Lower model.cutoff, say training.checkpointing = true or model.quantization = 'int8', or take a smaller model.name"
)


class Room:
    """How much of one kind of work is done at a time: as many tokens as wanted, until memory has no room for them.

    Within a run it never grows again, so that it does not stumble over and over. `knob` is where the wish stands;
    `tell` hears of every smaller number.
    """

    def __init__(self, knob: str) -> None:
        self.knob = knob
        self.tell: Callable[[str], None] = lambda message: None
        self._most: int | None = None

    def begin(self, tell: Callable[[str], None]) -> None:
        """Another run, which is to be as if it were the first: as many as wanted, until memory ends again."""
        self.tell, self._most = tell, None

    def within(self, wanted: int, longest: int, act: Callable[[int], T]) -> T:
        """What `act` gives for a number of tokens; done again from its start with half of them where memory ends.

        `longest`: tokens of the longest record, which is taken whole. Raises `ModelError` where even that is too much.
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
            _release()  # here the error and what its frames held are gone
            tokens = max(tokens // 2, 1)
        if tokens < first:
            self._most = tokens
            self.tell(
                f"memory has no room for {self.knob} = {first}: from here on {tokens}; "
                "bytes may differ from those of a run that had room"
            )
        return result


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that a device or the processor has no memory left."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in SAYS)


def _release() -> None:
    """Gives back to the device what torch keeps for later."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if torch.backends.mps.is_available():
        torch.mps.empty_cache()
