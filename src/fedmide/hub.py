"""Downloads from the hub by an id such as owner/name; snapshots lie in the hub client's own cache."""

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
    """The folder with the files of a repository that match the patterns in `files`.

    If the download fails, `refused` turns the reason, one line, into the error that is raised.
    """
    import huggingface_hub
    from huggingface_hub.utils import httpx  # type: ignore[attr-defined]  # httpx or httpx2, depending on the client's version

    try:
        return Path(
            huggingface_hub.snapshot_download(
                name, repo_type=kind, allow_patterns=list(files), ignore_patterns=list(without)
            )
        )
    except (OSError, ValueError, httpx.HTTPError) as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise refused(reason) from error
