"""Programs and data that some tests need, and that do not come with Python or make."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from fedmide.errors import UsageError
from fedmide.flower.simulation import namespace

ROOT = Path(__file__).resolve().parents[1]
"""The repository."""

SHARED = ROOT.parent / "shared"
"""The folder next to the repository, with the published data set and the method in words."""

PUBLISHED = SHARED / "fedmide-data"


def find_chromium() -> str | None:
    """The path of a Chromium or Chrome."""
    return os.environ.get("FEDMIDE_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")


def find_nginx() -> str | None:
    """The path of nginx, which Debian installs outside a user's PATH."""
    return os.environ.get("FEDMIDE_NGINX") or shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")


def can_isolate() -> bool:
    """True if a process can be started in a network namespace that has only loopback."""
    try:
        namespace()
    except UsageError:
        return False
    return True


NEEDS: dict[str, tuple[Callable[[], object], str]] = {
    "chromium": (
        find_chromium,
        "Chromium: apt-get install chromium (Debian, Ubuntu), or set FEDMIDE_CHROMIUM to its path",
    ),
    "nginx": (find_nginx, "nginx: apt-get install nginx-light (Debian, Ubuntu), or set FEDMIDE_NGINX to its path"),
    "git": (lambda: shutil.which("git") and (ROOT / ".git").exists(), "git, and the repository as a clone"),
    "published": (PUBLISHED.is_dir, "the published data set in ../shared/fedmide-data, next to the repository"),
    "method": ((SHARED / "method.md").is_file, "../shared/method.md, next to the repository"),
    "bash": (lambda: shutil.which("bash"), "bash"),
    "namespaces": (can_isolate, "network namespaces: run as root, or allow unprivileged user namespaces"),
}
"""Things that do not come with Python or make, each with a function that looks for it and a way to get it."""
