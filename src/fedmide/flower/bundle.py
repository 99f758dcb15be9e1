"""The app bundle that a Flower run carries: a project file that names the apps of the *installed* package, and no code.

So with this bundle, a site runs the code that it has installed.
fedmide does not check the bundle that a site receives.
"""

import json
from pathlib import Path

from fedmide.atomic import write_file
from fedmide.version import __version__

_PROJECT = """[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "fedmide-app"
version = "VERSION"
description = "Names the apps of the installed fedmide package"
license = { file = "LICENSE" }
dependencies = ["flwr>=1.41,<1.42"]

[tool.hatch.build.targets.wheel]
packages = ["."]

[tool.flwr.app]
publisher = "fedmide"
fab-format-version = 1
flwr-version-target = "1.41.0"

[tool.flwr.app.components]
serverapp = "fedmide.flower.apps:server_app"
clientapp = "fedmide.flower.apps:client_app"

[tool.flwr.app.config]
"""


_LICENSE = "Apache License 2.0, https://www.apache.org/licenses/LICENSE-2.0\n"


def write_bundle(folder: Path) -> None:
    """Writes the bundle into a folder."""
    write_file(folder / "pyproject.toml", _PROJECT.replace("VERSION", __version__).encode())
    write_file(folder / "LICENSE", _LICENSE.encode())


def write_connection(home: Path, port: int, certificate: Path | None) -> None:
    """Writes the address of this machine's SuperLink for Flower's own commands.

    Without a certificate, they connect without encryption.
    """
    secure = f"root-certificates = {json.dumps(str(certificate))}" if certificate else "insecure = true"
    text = f'[superlink]\ndefault = "fedmide"\n\n[superlink.fedmide]\naddress = "127.0.0.1:{port}"\n{secure}\n'
    write_file(home / "config.toml", text.encode())
