"""fedmide: federated instruction tuning, personalized by data alone (FedMIDE).

`run` does a run and `read_run` reads one; both give `Results`. `register` adds a method of your own. These names are
imported at their first use, so that importing the package costs nothing.
"""

from typing import TYPE_CHECKING, Any

from fedmide.version import __version__

if TYPE_CHECKING:
    from fedmide.api import Results, read_run, run
    from fedmide.methods import register
__all__ = ["Results", "__version__", "read_run", "register", "run"]


def __getattr__(name: str) -> Any:
    if name in ("Results", "read_run", "run"):
        from fedmide import api

        return getattr(api, name)
    if name == "register":
        from fedmide.methods import register

        return register
    raise AttributeError(f"module 'fedmide' has no attribute {name!r}")
