"""Hooks into the network's own modules: the rows that reach the output layer, and the tokens as they are generated."""

from collections.abc import Callable

from torch import Tensor, nn
from transformers.generation.streamers import BaseStreamer

OnToken = Callable[[int], None]
"""A function that is called with each new token id."""


class RowFilter(nn.Module):
    """A hook that keeps only chosen rows of the hidden states (B, T, D), as (1, N, D)."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: Tensor | None = None

    def __call__(self, _module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        """The arguments of the output layer with the chosen rows only; None leaves them unchanged."""
        if self.rows is None:
            return None
        hidden = args[0]
        return (hidden.reshape(-1, hidden.shape[-1])[self.rows].unsqueeze(0), *args[1:])


class TokenStreamer(BaseStreamer):
    """Passes each new token of one text to a callback; skips the prompt, which transformers puts first."""

    def __init__(self, on_token: OnToken) -> None:
        self.on_token = on_token
        self.begun = False

    def put(self, value: Tensor) -> None:
        """Receives the prompt (1, T), then one token (1,) at a time."""
        if self.begun:
            self.on_token(int(value.item()))
        self.begun = True

    def end(self) -> None:
        """Does nothing, as every token has been passed on already."""
