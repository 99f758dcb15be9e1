"""The settings of a run: read from TOML, checked, written back."""

from fedmide.config.config import Config
from fedmide.config.loading import apply_overrides, load, parse, read_toml, to_toml

__all__ = ["Config", "apply_overrides", "load", "parse", "read_toml", "to_toml"]
