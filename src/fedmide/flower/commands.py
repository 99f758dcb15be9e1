"""Flower's own commands, run on the server's machine."""

import json
import subprocess
from typing import Any

from fedmide.errors import UserError
from fedmide.flower.processes import environment
from fedmide.flower.server_folder import ServerFolder

_SECONDS = 60.0


class FlowerCommandError(UserError):
    """One of Flower's commands failed."""


def flwr(folder: ServerFolder, *arguments: str) -> dict[str, Any]:
    """The JSON that one of Flower's commands prints; raises `FlowerCommandError`."""
    command = ["flwr", *arguments, "--format", "json"]
    try:
        done = subprocess.run(
            command, env=environment(folder.home), capture_output=True, text=True, check=False, timeout=_SECONDS
        )
    except subprocess.TimeoutExpired:
        raise FlowerCommandError(f"flwr {arguments[0]} did not answer within {_SECONDS:g} s") from None
    values = _parsed(done.stdout)
    if done.returncode or not values.get("success", True):
        said = values.get("error-message") or (done.stdout + done.stderr).strip()[-300:]
        raise FlowerCommandError(
            f"flwr {arguments[0]}: {said}",
            f"If the server does not run, start it: fedmide flower server start {folder.path}",
        )
    return values


def register(folder: ServerFolder) -> None:
    """Registers the key of each site that the SuperLink does not know yet, and stores the site's node id."""
    if folder.plain:
        return
    there = {int(node["node-id"]) for node in nodes(folder)}
    known = {name: node for name, node in folder.read_nodes().items() if node in there}
    for name in folder.sites:
        if name not in known:
            key = folder.path / "keys" / "sites" / f"{name}.pub"
            known[name] = int(flwr(folder, "supernode", "register", str(key), "fedmide", "--name", name)["node-id"])
            folder.write_nodes(known)


def nodes(folder: ServerFolder) -> list[dict[str, Any]]:
    """The nodes that the SuperLink knows, as it describes them."""
    return list(flwr(folder, "supernode", "list", "fedmide").get("nodes", []))


def _parsed(text: str) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except ValueError:
        return {}
    return values if isinstance(values, dict) else {}
