"""Devices that are not there are refused, and a type of numbers is chosen by what the device computes with."""

from typing import Any

import pytest
import torch

from fedmide.errors import ModelError
from fedmide.model import devices


@pytest.fixture(params=[(), ("cuda",), ("mps",), ("cuda", "mps")], ids=str)
def present(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    """A machine with these devices beside its processor."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: "cuda" in request.param)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: "mps" in request.param)
    given: tuple[str, ...] = request.param
    return given


@pytest.mark.parametrize("wanted", ["cpu", "cuda", "mps"])
def test_a_device_is_taken_where_it_is_and_refused_where_it_is_not(present: tuple[str, ...], wanted: Any) -> None:
    if wanted in ("cpu", *present):
        assert devices.device(wanted) == torch.device(wanted)
        return
    with pytest.raises(ModelError, match=f"model.device = '{wanted}': this machine has no such device"):
        devices.device(wanted)


def test_left_to_itself_it_is_a_cuda_gpu_or_the_processor(present: tuple[str, ...]) -> None:
    assert devices.device("auto").type == ("cuda" if "cuda" in present else "cpu")


@pytest.mark.parametrize("kind", ["cpu", "cuda", "mps"])
@pytest.mark.parametrize("has", [True, False])
def test_numbers_are_bfloat16_where_the_device_computes_with_them(
    monkeypatch: pytest.MonkeyPatch, kind: str, has: bool
) -> None:
    """An emulated type is no gain: an older GPU says that it supports it where it is not asked to leave that out."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or has)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512": True, "avx512_bf16": has})
    expected = torch.bfloat16 if has and kind != "mps" else torch.float32
    assert devices.dtype("auto", torch.device(kind)) == expected


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_a_named_type_is_that_type(name: Any) -> None:
    assert devices.dtype(name, torch.device("cpu")) == getattr(torch, name)
