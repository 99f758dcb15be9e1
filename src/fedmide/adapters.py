"""An adapter as named arrays: a fresh one, checks, and its bytes.

Arrays are float32 on the processor; nothing here knows a model. Weights are written as safetensors and nothing else.
"""

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from fedmide.errors import MessageError, ModelError
from fedmide.localmodel import Adapter
from fedmide.seeds import stream

Shapes = Mapping[str, tuple[int, ...]]


def shapes(adapter: Adapter) -> dict[str, tuple[int, ...]]:
    """The shape of each array by name."""
    return {name: array.shape for name, array in adapter.items()}


def fresh(expected: Shapes, seed: int) -> Adapter:
    """An adapter that changes nothing yet: B is zero, A uniform within 1 / sqrt(in) as PEFT draws it.

    Each array has its own stream, so the same layer gets the same numbers whichever others there are.
    """
    return {name: _initial(name, shape, seed) for name, shape in sorted(expected.items())}


def _initial(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    if ".lora_B." in name:
        return np.zeros(shape, dtype=np.float32)
    bound = 1 / math.sqrt(shape[-1])
    return stream(seed, f"adapter:{name}").uniform(-bound, bound, shape).astype(np.float32)


def problems(adapter: Adapter, expected: Shapes) -> tuple[str, ...]:
    """Why the adapter can't stand where one of the expected shapes is; empty if it can."""
    if found := shape_problems(adapter, expected):
        return found
    odd = (name for name in sorted(adapter) if not np.isfinite(adapter[name]).all())
    return tuple(f"{name!r} holds a value that is not finite" for name in odd)


def shape_problems(adapter: Adapter, expected: Shapes) -> tuple[str, ...]:
    """The same, whatever the values."""
    missing, extra = sorted(expected.keys() - adapter.keys()), sorted(adapter.keys() - expected.keys())
    found = []
    if missing:
        found.append(f"{len(missing)} arrays missing, first {missing[0]!r}")
    if extra:
        found.append(f"{len(extra)} arrays unknown, first {extra[0]!r}")
    for name in sorted(expected.keys() & adapter.keys()):
        if adapter[name].shape != expected[name]:
            found.append(f"{name!r} has shape {adapter[name].shape}, expected {expected[name]}")
        elif adapter[name].dtype != np.float32:
            found.append(f"{name!r} has type {adapter[name].dtype}, expected float32")
    return tuple(found)


def is_finite(adapter: Adapter) -> bool:
    """Whether every value is a number."""
    return all(bool(np.isfinite(array).all()) for array in adapter.values())


def distance(adapter: Adapter, other: Adapter) -> float:
    """The Euclidean length of the difference of two adapters of the same shapes, summed in float64.

    >>> distance({"a": np.array([3.0, 1.0])}, {"a": np.array([0.0, 5.0])})
    5.0
    """
    differences = (adapter[name].astype(np.float64) - other[name] for name in adapter)
    return math.sqrt(sum(float(np.vdot(each, each)) for each in differences))


def between(start: Adapter, end: Adapter, part: float) -> Adapter:
    """The adapter that lies so far on the way from one to another: 0 is the start, 1 the end."""
    return {
        name: (start[name] + part * (end[name].astype(np.float64) - start[name])).astype(np.float32) for name in end
    }


def encode(adapter: Adapter) -> bytes:
    """The adapter as safetensors, names sorted: equal adapters give equal bytes."""
    return save({name: np.ascontiguousarray(adapter[name]) for name in sorted(adapter)})


def decode(data: bytes) -> Adapter:
    """The adapter in safetensors bytes; raises `MessageError` where they are none."""
    try:
        return dict(load(data))
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise MessageError(f"not an adapter in safetensors: {type(error).__name__}") from None


def read(path: Path, expected: Shapes | None = None) -> Adapter:
    """The adapter in a safetensors file, checked against the expected shapes."""
    try:
        adapter = decode(path.read_bytes())
    except (OSError, MessageError) as error:
        raise ModelError(f"{path}: no adapter can be read: {error}") from None
    found = problems(adapter, expected) if expected is not None else ()
    if found:
        raise ModelError([f"{path}: {problem}" for problem in found])
    return adapter
