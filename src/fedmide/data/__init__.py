"""Records: their sources, their split into training, validation and test, and their tokens."""

from fedmide.data.loading import detect, load

__all__ = ["detect", "load"]
