"""Base models on disk: find, read, convert and export them."""
