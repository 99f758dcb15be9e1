"""A run: opened, taken through its stages, and its results put to use."""
