"""Adapters: fresh ones, problems, and bytes."""

import json
import math
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save

from fedmide.errors import MessageError, ModelError
from fedmide.model import adapters

A, B = "base.layers.0.q_proj.lora_A.weight", "base.layers.0.q_proj.lora_B.weight"
SHAPES = {A: (8, 100), B: (50, 8), A.replace("0", "1"): (8, 100), B.replace("0", "1"): (50, 8)}

# --- fresh


def test_a_fresh_adapter_changes_nothing_and_its_a_is_uniform_within_one_over_the_root_of_its_inputs() -> None:
    fresh = adapters.fresh(SHAPES, seed=0)
    bound = 1 / math.sqrt(100)
    assert adapters.shapes(fresh) == SHAPES
    assert adapters.problems(fresh, SHAPES) == ()
    assert not any(fresh[name].any() for name in SHAPES if ".lora_B." in name)
    drawn = fresh[A].ravel()
    assert np.abs(drawn).max() <= bound
    assert abs(drawn.mean()) < bound / 10  # 800 draws: five standard errors are 0.1 of the bound
    assert drawn.std() == pytest.approx(bound / math.sqrt(3), rel=0.1)


def test_a_fresh_adapter_follows_from_the_seed() -> None:
    first, again, other = (adapters.fresh(SHAPES, seed) for seed in (3, 3, 4))
    assert adapters.encode(first) == adapters.encode(again)
    assert not np.array_equal(first[A], other[A])


@given(st.sets(st.sampled_from(sorted(SHAPES)), min_size=1), st.randoms(use_true_random=False))
def test_each_array_has_its_own_random_stream(names: set[str], random: Any) -> None:
    order = sorted(names)
    random.shuffle(order)
    whole, part = adapters.fresh(SHAPES, 5), adapters.fresh({name: SHAPES[name] for name in order}, 5)
    assert all(np.array_equal(part[name], whole[name]) for name in names)


def test_layers_start_with_different_numbers() -> None:
    fresh = adapters.fresh(SHAPES, seed=0)
    assert not np.array_equal(fresh[A], fresh[A.replace("0", "1")])


# --- problems


def changed(name: str, value: Any) -> Any:
    return {**adapters.fresh(SHAPES, 0), name: value}


@pytest.mark.parametrize(
    ("array", "told"),
    [
        (np.zeros((100, 8), np.float32), "has shape (100, 8), expected (8, 100)"),
        (np.zeros((4, 100), np.float32), "has shape (4, 100), expected (8, 100)"),
        (np.zeros((8, 100)), "has type float64, expected float32"),
        (np.zeros((8, 100), np.float16), "has type float16, expected float32"),
        (np.full((8, 100), np.nan, np.float32), "holds a value that is not finite"),
        (np.full((8, 100), -np.inf, np.float32), "holds a value that is not finite"),
    ],
)
def test_a_wrong_array_is_reported_by_its_name(array: Any, told: str) -> None:
    assert adapters.problems(changed(A, array), SHAPES) == (f"{A!r} {told}",)


def test_one_value_that_is_not_finite_is_enough() -> None:
    array = np.zeros((8, 100), np.float32)
    array[7, 99] = np.inf
    assert len(adapters.problems(changed(A, array), SHAPES)) == 1


def test_all_problems_are_reported_at_once() -> None:
    wrong = {B: np.zeros((1, 1), np.float32), "another": np.zeros(1, np.float32)}
    missing, extra, shape = adapters.problems(wrong, {A: (8, 100), B: (50, 8)})
    assert missing == f"1 arrays missing, first {A!r}"
    assert extra == "1 arrays unknown, first 'another'"
    assert shape.startswith(repr(B))


# --- bytes


@given(st.permutations(sorted(SHAPES)))
def test_equal_adapters_give_equal_bytes_that_decode_to_the_adapter(order: list[str]) -> None:
    fresh = adapters.fresh(SHAPES, 0)
    data = adapters.encode({name: fresh[name] for name in order})
    assert data == adapters.encode(fresh)
    back = adapters.decode(data)
    assert sorted(back) == sorted(SHAPES)
    assert all(back[name].tobytes() == fresh[name].tobytes() and back[name].dtype == np.float32 for name in back)


def test_a_transposed_view_is_written_in_its_own_order() -> None:
    array = np.arange(6, dtype=np.float32).reshape(2, 3).T
    assert np.array_equal(adapters.decode(adapters.encode({"a": array}))["a"], array)


def tensors(header: Any, payload: bytes = b"\1" * 8) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + payload


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0" * 8,
        struct.pack("<Q", 2**63) + b"{}",
        tensors(b"null"),
        tensors(b"\xff"),
        tensors(b"[" * 5000),
        tensors({"a": {"dtype": "BF16", "shape": [4], "data_offsets": [0, 8]}}),
        tensors({"a": {"dtype": "F8_E4M3", "shape": [8], "data_offsets": [0, 8]}}),
        tensors({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}),
        tensors({"a": {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 8]}}),
        tensors({"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}),
        tensors({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, b"\1" * 7),
    ],
)
def test_bytes_without_an_adapter_are_a_message_error(data: bytes) -> None:
    with pytest.raises(MessageError, match=r"^not an adapter in safetensors: "):
        adapters.decode(data)


def test_pickled_weights_are_not_loaded(tmp_path: Path) -> None:
    path = tmp_path / "adapter_model.bin"
    path.write_bytes(b"\x80\x04cposix\nsystem\n.")
    with pytest.raises(ModelError, match="the adapter can't be read"):
        adapters.read(path)


# --- files


def test_a_file_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "adapter.safetensors"
    path.write_bytes(adapters.encode(adapters.fresh(SHAPES, 1)))
    assert adapters.encode(adapters.read(path, SHAPES)) == path.read_bytes()


def test_a_missing_or_cut_file_is_a_model_error_with_its_path(tmp_path: Path) -> None:
    path = tmp_path / "adapter.safetensors"
    with pytest.raises(ModelError, match=re.escape(f"{path}: the adapter can't be read")):
        adapters.read(path)
    path.write_bytes(adapters.encode(adapters.fresh(SHAPES, 1))[:-1])
    with pytest.raises(ModelError, match=re.escape(f"{path}: the adapter can't be read")):
        adapters.read(path)


def test_a_file_of_another_model_is_refused_with_all_problems(tmp_path: Path) -> None:
    path = tmp_path / "adapter.safetensors"
    path.write_bytes(save({A: np.zeros((4, 100), np.float32), "another": np.zeros(2, np.float32)}))
    with pytest.raises(ModelError) as caught:
        adapters.read(path, SHAPES)
    assert len(caught.value.problems) == 3
    assert all(problem.startswith(f"{path}: ") for problem in caught.value.problems)


# --- distances


def test_the_distance_of_an_adapter_between_two_others() -> None:
    start, end = adapters.fresh(SHAPES, 0), adapters.fresh(SHAPES, 1)
    whole = adapters.distance(start, end)
    flat = np.concatenate([(end[name].astype(float) - start[name]).ravel() for name in SHAPES])
    assert whole == pytest.approx(float(np.linalg.norm(flat)), rel=1e-12)
    for part in (0.0, 0.25, 1.0):
        assert adapters.distance(start, adapters.between(start, end, part)) == pytest.approx(part * whole, rel=1e-6)
    assert adapters.encode(adapters.between(start, end, 1.0)) == adapters.encode(end)
    assert adapters.distance(end, end) == 0.0
