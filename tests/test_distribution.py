"""The wheel is the package with its data; the source distribution is the repository, and nothing else."""

import shutil
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.needs import ROOT

pytestmark = pytest.mark.needs("git")

PRIVATE = (
    "runs/a/clients/b/ledger.jsonl",
    "consortium/site-a/site.key",
    "records/a.json",
    ".env",
    "mine.toml",
    "dist/old.whl",
)
MADE = {"PKG-INFO", "setup.cfg"}
"""Files that setuptools adds to a source distribution, in addition to its egg-info."""


def tracked() -> set[str]:
    """The paths of the repository's files."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    return {path for path in listed.stdout.splitlines() if (ROOT / path).is_file()}


@dataclass(frozen=True)
class Built:
    wheel: frozenset[str]
    source: frozenset[str]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """The names in both, built from a copy of the repository that also has private files."""
    copy, out = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("out")
    for path in tracked():
        (copy / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, copy / path)
    for path in PRIVATE:
        (copy / path).parent.mkdir(parents=True, exist_ok=True)
        (copy / path).write_text("private")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(copy)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,), (source,) = out.glob("*.whl"), out.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as opened, tarfile.open(source) as unpacked:
        files = [member.name.split("/", 1)[1] for member in unpacked.getmembers() if member.isfile()]
        return Built(frozenset(opened.namelist()), frozenset(files))


@pytest.mark.slow
def test_the_wheel_holds_the_package_with_its_data_and_no_more(built: Built) -> None:
    package = {path.removeprefix("src/") for path in tracked() if path.startswith("src/")}
    assert {name for name in built.wheel if not name.startswith("fedmide-")} == package
    suffixes = {Path(name).suffix for name in package}
    assert {".py", ".toml", ".j2", ".js", ".css", ".md"} <= suffixes
    assert any(name.endswith("licenses/LICENSE") for name in built.wheel)


@pytest.mark.slow
def test_the_source_distribution_is_the_repository(built: Built) -> None:
    held = {name for name in built.source if ".egg-info/" not in name} - MADE
    assert held == tracked()
    assert not held & set(PRIVATE)
