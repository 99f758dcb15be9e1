"""What the hub gives by an id such as owner/name: a snapshot in the hub client's own cache."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from fedmide.errors import UserError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def snapshot(
    name: str,
    kind: Literal["model", "dataset"],
    files: Sequence[str],
    refused: Callable[[str], UserError],
    without: Sequence[str] = (),
) -> Path:
    """The folder with those files of a repository that patterns name.

    Where the hub does not give it, raises what `refused` makes of its reason, a line.
    """
    import huggingface_hub
    from huggingface_hub.utils import httpx  # type: ignore[attr-defined]  # httpx or httpx2, as the client has it

    try:
        return Path(
            huggingface_hub.snapshot_download(
                name, repo_type=kind, allow_patterns=list(files), ignore_patterns=list(without)
            )
        )
    except (OSError, ValueError, httpx.HTTPError) as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise refused(reason) from error
