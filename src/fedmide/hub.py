"""What the hub gives by an id such as owner/name: a snapshot in the hub client's own cache."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


class HubError(Exception):
    """The hub did not give it; the text is its reason, in a line. Who asked says what that means to the user."""


def snapshot(name: str, kind: Literal["model", "dataset"], files: Sequence[str], without: Sequence[str] = ()) -> Path:
    """The folder with those files of a repository that patterns name; raises `HubError`."""
    import huggingface_hub
    from huggingface_hub.utils import httpx  # type: ignore[attr-defined]  # httpx or httpx2, as the client has it

    try:
        return Path(
            huggingface_hub.snapshot_download(
                name, repo_type=kind, allow_patterns=list(files), ignore_patterns=list(without)
            )
        )
    except (OSError, ValueError, httpx.HTTPError) as error:
        raise HubError(
            next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        ) from error
