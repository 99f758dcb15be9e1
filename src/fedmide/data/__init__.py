"""Records: their sources, their split into parts, and the tokens that the model reads of them."""

from fedmide.data.loading import detect, load

__all__ = ["detect", "load"]
