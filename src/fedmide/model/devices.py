"""The device and the number type that a model computes with."""

import torch

from fedmide.config.sections import Device, Dtype
from fedmide.errors import ModelError

CPU_BFLOAT16 = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")
"""Torch's names for the CPU instructions that multiply in bfloat16, on x86 and ARM."""


def device(wanted: Device) -> torch.device:
    """The device that the configuration asks for; raises `ModelError` if this machine does not have it."""
    here = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if wanted == "auto":
        return torch.device("cuda" if here["cuda"] else "cpu")
    if not here[wanted]:
        raise ModelError(
            f"model.device = {wanted!r}: this machine has no such device", "Set model.device to 'auto' or 'cpu'"
        )
    return torch.device(wanted)


def dtype(wanted: Dtype, device: torch.device) -> torch.dtype:
    """The type of the base weights. "auto" means bfloat16 if the device has instructions for it, else float32."""
    if wanted != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[wanted]
    return torch.bfloat16 if _has_bfloat16(device) else torch.float32


def _has_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    computes = torch.cpu.get_capabilities()
    return device.type == "cpu" and any(computes.get(name) for name in CPU_BFLOAT16)
