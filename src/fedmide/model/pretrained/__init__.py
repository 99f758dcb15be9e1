"""Base models on disk: located, read, converted, exported."""
