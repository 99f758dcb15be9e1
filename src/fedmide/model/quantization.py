"""A base model in 8 or 4 bits by bitsandbytes: for less memory, not for speed. Adapters stay float32.

Linear layers within the blocks are quantised; embeddings, norms and the output layer keep the model's type. A model so
loaded goes through transformers' and PEFT's modules, and an adapter can't be merged into it without loss.
"""

import importlib.util
from typing import Any

import torch
from torch import nn

from fedmide.config.sections import Quantization
from fedmide.errors import ModelError

LAYERS = ("Linear8bitLt", "Linear4bit")


def settings(quantization: Quantization, dtype: torch.dtype) -> dict[str, Any]:
    """What transformers' `BitsAndBytesConfig` is to be made of; raises `ModelError` without bitsandbytes.

    LLM.int8's part for outliers is left out: which columns it takes depends on all rows of a batch, so a record's NLL
    would depend on its neighbours.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(
            f"model.quantization = {quantization!r} needs bitsandbytes, which is not installed",
            "pip install 'fedmide[quant]', or say model.quantization = 'none'",
        )
    if quantization == "int8":
        return {"load_in_8bit": True, "llm_int8_threshold": 0.0}
    return {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype}


def keep_in_training_mode(network: nn.Module) -> None:
    """Lets quantised layers compute alike in scoring and training.

    On a processor they do otherwise outside of training: in 8 bits they round activations too; in 4 bits they lay
    their weights out for a product without a gradient, and stay so in the training that follows.
    """
    for module in network.modules():
        if type(module).__name__ in LAYERS and not hasattr(module, "base_layer"):
            module.training = True
            module.train = _unchanged(module)  # type: ignore[method-assign]


def _unchanged(module: nn.Module) -> Any:
    """A `train` that leaves the mode as it is."""

    def train(mode: bool = True) -> nn.Module:
        return module

    return train
