"""A base model in 8 or 4 bits by bitsandbytes: to save memory, not time. Adapters stay float32.

Linear layers inside the blocks are quantized. Embeddings, norms and the output layer keep the model's type.
A quantized model uses the modules of transformers and PEFT. An adapter can't be merged into it without loss.
"""

import importlib.util
from typing import Any

import torch
from torch import nn

from fedmide.config.sections import Quantization
from fedmide.errors import ModelError

LAYERS = ("Linear8bitLt", "Linear4bit")
"""The classes of quantized layers in bitsandbytes. PEFT's LoRA layers around them have the same class names."""


def settings(quantization: Quantization, dtype: torch.dtype) -> dict[str, Any]:
    """The arguments of transformers' `BitsAndBytesConfig`; raises `ModelError` without bitsandbytes.

    LLM.int8's part for outliers is switched off. It selects columns by all rows of a batch, so a record's NLL would
    depend on its neighbors.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(
            f"model.quantization = {quantization!r} needs bitsandbytes, which is not installed",
            "Run pip install 'fedmide[quant]', or set model.quantization = 'none'",
        )
    if quantization == "int8":
        return {"load_in_8bit": True, "llm_int8_threshold": 0.0}
    return {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype}


def keep_in_training_mode(network: nn.Module) -> None:
    """Makes quantized layers compute the same in scoring and training.

    On a CPU they compute differently outside training. In 8 bits they round activations too. In 4 bits they change the
    layout of their weights for a product without a gradient, and keep it in the next training.
    """
    for module in network.modules():
        if type(module).__name__ in LAYERS and not hasattr(module, "base_layer"):
            module.training = True
            module.train = _unchanged(module)  # type: ignore[method-assign]


def _unchanged(module: nn.Module) -> Any:
    """A replacement for `module.train` that leaves the mode unchanged."""

    def train(mode: bool = True) -> nn.Module:
        return module

    return train
