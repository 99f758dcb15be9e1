"""A site's worker that fails as its folder's fault.json specifies: {"-1": "nan", "hello": "version", ...}."""

import errno
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from fedmide import atomic
from fedmide.federation import codec
from fedmide.federation.codec import decode_reply, decode_request, encode_reply
from fedmide.federation.messages import Hello
from fedmide.flower import worker
from fedmide.runs import inputs
from fedmide.runs import site as sites
from fedmide.runs.site import Site

SECRET = "Maria Musterfrau, born 1961, carcinoma of the colon"
original = Site.answer


def answer(site: Site, frame: bytes) -> bytes:
    request = decode_request(frame)
    faults = json.loads((FOLDER / "fault.json").read_text()) if (FOLDER / "fault.json").exists() else {}
    fault = faults.get("hello" if isinstance(request, Hello) else str(request.round), "")
    kind, _, seconds = fault.partition(":")
    if kind == "slow":
        time.sleep(float(seconds))
    return WRONG.get(kind, original)(site, frame)


def bent(change: Any) -> Any:
    def wrong(site: Site, frame: bytes) -> bytes:
        reply = decode_reply(original(site, frame))
        assert reply.adapter is not None
        return encode_reply(replace(reply, adapter={name: change(array) for name, array in reply.adapter.items()}))

    return wrong


def raising(site: Site, frame: bytes) -> bytes:
    def fails(*args: Any) -> Any:
        raise ValueError(SECRET)

    handle, sites.handle = sites.handle, fails
    try:
        return original(site, frame)
    finally:
        sites.handle = handle


def without_room(site: Site, frame: bytes) -> bytes:
    def full(path: Path, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    write, atomic._write_synced = atomic._write_synced, full
    try:
        return original(site, frame)
    finally:
        atomic._write_synced = write


def with_manifest(**changes: Any) -> Any:
    def wrong(site: Site, frame: bytes) -> bytes:
        manifest = {**site.inputs.manifest, **changes}
        return original(replace(site, inputs=replace(site.inputs, manifest=manifest)), frame)

    return wrong


def other_version(site: Site, frame: bytes) -> bytes:
    version, inputs.__version__ = inputs.__version__, "0.0.9"
    try:
        return original(site, frame)
    finally:
        inputs.__version__ = version


def other_schema(site: Site, frame: bytes) -> bytes:
    answered = original(site, frame)
    assert answered.startswith(codec.MAGIC)
    return b"FMD9" + answered[4:]


WRONG: dict[str, Any] = {
    "truncated": lambda site, frame: original(site, frame)[:-1000],
    "nan": bent(lambda array: array * np.nan),
    "shape": bent(lambda array: array.repeat(2, axis=0)),
    "huge": bent(lambda array: array * 1000),
    "raise": raising,
    "disk": without_room,
    "version": other_version,
    "model": with_manifest(model={"fingerprint": "0123456789abcdef"}),
    "schema": other_schema,
}

if __name__ == "__main__":
    FOLDER = Path(sys.argv[1])
    Site.answer = answer  # type: ignore[method-assign]
    worker.work(FOLDER)
