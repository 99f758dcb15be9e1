"""An adapter as named arrays: fresh adapters, arithmetic, checks, and bytes.

Arrays are float32 on the CPU. Nothing here needs a model. Weights are written as safetensors only.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from fedmide.errors import MessageError, ModelError
from fedmide.model.interface import Adapter
from fedmide.seeds import stream

Shapes = Mapping[str, tuple[int, ...]]


Array = NDArray[np.float32]


A, B = ".lora_A.weight", ".lora_B.weight"


DELTA = ".base_delta.weight"
"""The ending of the name of a change to a layer's base weights. A few methods use such arrays next to the factors."""


ROUTER = ".router.weight"
"""The ending of the name of a layer's router (2, in): softmax(router x) weights the halves of the ranks per token."""


OWN, COMMON, REFERENCES, MOST = "own", "common", "references", "most"
"""Names in an adapter that holds a local and a common adapter, which are weighted per record.

In order: the prefix of the local adapter's factors; that of the common adapter's; the states (N, D) to compare
records with; the highest weight of the local adapter."""


def shapes(adapter: Adapter) -> dict[str, tuple[int, ...]]:
    """The shape of each array by name."""
    return {name: array.shape for name, array in adapter.items()}


def fresh(expected: Shapes, seed: int) -> Adapter:
    """An adapter that changes nothing yet: B is zero, A is uniform within 1 / sqrt(in) as in PEFT.

    Each array has its own random stream, so a layer gets the same numbers whatever other layers there are.
    """
    return {name: _initial(name, shape, seed) for name, shape in sorted(expected.items())}


def _initial(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    if ".lora_B." in name:
        return np.zeros(shape, dtype=np.float32)
    bound = 1 / math.sqrt(shape[-1])
    return stream(seed, f"adapter:{name}").uniform(-bound, bound, shape).astype(np.float32)


def named(adapter: Adapter, part: str) -> Adapter:
    """The arrays whose names contain this part, such as `.lora_A.`."""
    return {name: array for name, array in adapter.items() if part in name}


def prefixed(prefix: str, adapter: Adapter) -> Adapter:
    """The same arrays with a prefix before their names, so that they can be stored or sent with other arrays."""
    return {f"{prefix}.{name}": array for name, array in adapter.items()}


def under(prefix: str, arrays: Adapter) -> Adapter:
    """The arrays that have this prefix, by their names without it: the inverse of `prefixed`."""
    start = f"{prefix}."
    return {name.removeprefix(start): array for name, array in arrays.items() if name.startswith(start)}


def layers(adapter: Adapter) -> tuple[str, ...]:
    """The names of the layers that have factors, in order."""
    return tuple(name.removesuffix(A) for name in adapter if name.endswith(A))


def factors(adapter: Adapter, layer: str) -> tuple[Array, Array]:
    """A layer's A (r, in) and B (out, r)."""
    return adapter[layer + A], adapter[layer + B]


def deltas(adapter: Adapter) -> Adapter:
    """The changes to base weights, (out, in), without the factors."""
    return {name: array for name, array in adapter.items() if name.endswith(DELTA)}


def without_deltas(adapter: Adapter) -> Adapter:
    """The arrays without changes to base weights."""
    return {name: array for name, array in adapter.items() if not name.endswith(DELTA)}


def padded(adapter: Adapter, expected: Shapes) -> Adapter:
    """The factors at the ranks of the expected shapes. Missing ranks are filled with zeros, which keeps the product.

    Zeros stay zero in training: if a rank's A and B are zero, so are their gradients.
    """
    return {
        name: _padded(array, expected[name], rank_axis(name)) if name in expected else array
        for name, array in adapter.items()
    }


def rank_axis(name: str) -> int:
    """The axis of a factor along which its ranks lie."""
    return 0 if name.endswith(A) else 1


def cut_like(adapter: Adapter, like: Adapter) -> Adapter:
    """The arrays cut to the shapes of `like`, which must not be larger. This removes what `padded` added."""
    return {
        name: array[tuple(map(slice, like[name].shape))] if name in like else array for name, array in adapter.items()
    }


def _padded(array: Array, shape: tuple[int, ...], axis: int) -> Array:
    missing = shape[axis] - array.shape[axis] if array.ndim == len(shape) else 0
    if missing <= 0:
        return array  # `shape_problems` reports what is wrong with it
    return np.pad(array, [(0, missing if each == axis else 0) for each in range(array.ndim)])


def without_routers(adapter: Adapter) -> Adapter:
    """The arrays without routers, for a model that has none."""
    return {name: array for name, array in adapter.items() if not name.endswith(ROUTER)}


def stacked(own: Adapter, other: Adapter, weight: float = 1.0, other_weight: float = 1.0) -> Adapter:
    """Two adapters as one with the ranks of both, `own` first. Its product is the weighted sum of their products."""
    return joined([(own, weight), (other, other_weight)])


def joined(parts: Sequence[tuple[Adapter, float]]) -> Adapter:
    """Weighted adapters as one with all their ranks, in order. Its product is the weighted sum of their products."""
    return {
        name: np.concatenate(
            [each[name] * np.float32(weight) if name.endswith(B) else each[name] for each, weight in parts],
            axis=rank_axis(name),
        )
        for name in parts[0][0]
    }


def unstacked(stack: Adapter, like: Adapter, weight: float = 1.0, other_weight: float = 1.0) -> tuple[Adapter, Adapter]:
    """The two adapters that `stacked` joined: the inverse of it. The first one has the ranks of `like`."""
    halves: tuple[dict[str, Array], dict[str, Array]] = {}, {}
    for name in like:
        axis = rank_axis(name)
        parts = np.split(stack[name], [like[name].shape[axis]], axis)
        for half, part, share in zip(halves, parts, (weight, other_weight), strict=True):
            half[name] = part / np.float32(share) if name.endswith(B) else part
    return halves


def as_factors(adapter: Adapter, scale: float) -> Adapter:
    """The adapter as factors alone. A change to base weights becomes additional ranks: min(out, in), its highest rank.

    `scale` is the factor by which the model multiplies the product of the factors.
    If the weights of two adapters depend on the record, the local one gets its highest weight.
    A router is left out, so each of its two adapters counts half.
    """
    if MOST in adapter:
        most = float(adapter[MOST][0])
        return stacked(under(OWN, adapter), under(COMMON, adapter), most, 1 - most)
    if any(name.endswith(ROUTER) for name in adapter):
        kept = without_routers(adapter)
        return {name: array * np.float32(0.5 if name.endswith(B) else 1) for name, array in kept.items()}
    result = dict(without_deltas(adapter))
    for name, delta in deltas(adapter).items():
        layer = name.removesuffix(DELTA)
        a, b = factors(adapter, layer)
        unit = np.eye(min(delta.shape), dtype=np.float32)
        left, right = (unit, delta / scale) if len(unit) == len(delta) else (delta / scale, unit)
        result[layer + A] = np.concatenate([a, right.astype(np.float32)])
        result[layer + B] = np.concatenate([b, left.astype(np.float32)], axis=1)
    return result


def between(start: Adapter, end: Adapter, beta: float) -> Adapter:
    """start + beta (end - start), array by array. It is exactly `start` if beta is 0, and exactly `end` if beta is 1.

    >>> between({"x": np.float32([1])}, {"x": np.float32([3])}, 0.25)["x"]
    array([1.5], dtype=float32)
    """
    if beta in (0, 1):
        return end if beta else start
    return {
        name: (start[name] + beta * (array.astype(np.float64) - start[name])).astype(np.float32)
        for name, array in end.items()
    }


def problems(adapter: Adapter, expected: Shapes) -> tuple[str, ...]:
    """The problems of an adapter of which these shapes are expected; empty if there are none."""
    if found := shape_problems(adapter, expected):
        return found
    odd = (name for name in sorted(adapter) if not np.isfinite(adapter[name]).all())
    return tuple(f"{name!r} holds a value that is not finite" for name in odd)


def shape_problems(adapter: Adapter, expected: Shapes) -> tuple[str, ...]:
    """The problems of names, shapes and types alone. The values are not checked."""
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
    """True if every value is finite."""
    return all(bool(np.isfinite(array).all()) for array in adapter.values())


def distance(adapter: Adapter, other: Adapter) -> float:
    """The Euclidean distance of two adapters of the same shapes, summed in float64.

    >>> distance({"a": np.array([3.0, 1.0])}, {"a": np.array([0.0, 5.0])})
    5.0
    """
    differences = (adapter[name].astype(np.float64) - other[name] for name in adapter)
    return math.sqrt(sum(float(np.vdot(each, each)) for each in differences))


def encode(adapter: Adapter) -> bytes:
    """The adapter as safetensors, with sorted names: equal adapters give equal bytes."""
    return save({name: np.ascontiguousarray(adapter[name]) for name in sorted(adapter)})


def decode(data: bytes) -> Adapter:
    """The adapter in safetensors bytes; raises `MessageError` if they are not safetensors."""
    try:
        return dict(load(data))
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise MessageError(f"not an adapter in safetensors: {type(error).__name__}") from None


def read(path: Path, expected: Shapes | None = None) -> Adapter:
    """The adapter in a safetensors file, checked against the expected shapes; raises `ModelError`."""
    try:
        adapter = decode(path.read_bytes())
    except (OSError, MessageError) as error:
        raise ModelError(f"{path}: the adapter can't be read: {error}") from None
    found = problems(adapter, expected) if expected is not None else ()
    if found:
        raise ModelError([f"{path}: {problem}" for problem in found])
    return adapter
