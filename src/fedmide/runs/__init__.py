"""A run: open it, do its stages, and use its results."""
