"""FedMIDE and the methods that it is compared with; each is a `Method` in a short module."""

from fedmide.methods.method import Method
from fedmide.methods.registry import METHODS, of, register

__all__ = ["METHODS", "Method", "of", "register"]
