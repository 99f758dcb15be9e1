"""The run folder: created, locked, written, read and resumed."""
