"""Missing devices are refused, and the number type follows the instructions of the device."""

from typing import Any

import pytest
import torch

from fedmide.errors import ModelError
from fedmide.model import devices


@pytest.fixture(params=[(), ("cuda",), ("mps",), ("cuda", "mps")], ids=str)
def present(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    """A machine with these devices in addition to its CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: "cuda" in request.param)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: "mps" in request.param)
    given: tuple[str, ...] = request.param
    return given


@pytest.mark.parametrize("wanted", ["cpu", "cuda", "mps"])
def test_a_device_is_used_if_present_and_refused_if_not(present: tuple[str, ...], wanted: Any) -> None:
    if wanted in ("cpu", *present):
        assert devices.device(wanted) == torch.device(wanted)
        return
    with pytest.raises(ModelError, match=f"model.device = '{wanted}': this machine has no such device"):
        devices.device(wanted)


def test_the_default_is_a_cuda_gpu_or_the_cpu(present: tuple[str, ...]) -> None:
    assert devices.device("auto").type == ("cuda" if "cuda" in present else "cpu")


@pytest.mark.parametrize("kind", ["cpu", "cuda", "mps"])
@pytest.mark.parametrize("has", [True, False])
def test_numbers_are_bfloat16_if_the_device_has_instructions_for_it(
    monkeypatch: pytest.MonkeyPatch, kind: str, has: bool
) -> None:
    """An emulated type brings no speed. An older GPU reports support, unless emulation is excluded in the call."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or has)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512": True, "avx512_bf16": has})
    expected = torch.bfloat16 if has and kind != "mps" else torch.float32
    assert devices.dtype("auto", torch.device(kind)) == expected


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_a_named_type_is_that_type(name: Any) -> None:
    assert devices.dtype(name, torch.device("cpu")) == getattr(torch, name)
