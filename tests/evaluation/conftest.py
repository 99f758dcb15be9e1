"""The tiny model under an adapter, and the plain transformers model that says the same."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from fedmide.config import Config
from fedmide.config.sections import ModelConfig, RuntimeConfig
from fedmide.model.interface import Adapter
from fedmide.runs.resident import Resident, open_model


@pytest.fixture(scope="module")
def resident(tiny_folder: Path) -> Resident:
    tiny = ModelConfig(name="tiny-random", dtype="float32", device="cpu")
    return open_model(Config(seed=4, model=tiny, runtime=RuntimeConfig(threads=1)), tiny_folder)


@pytest.fixture(scope="module")
def adapter(resident: Resident) -> Adapter:
    draw = np.random.default_rng(0)
    return {name: draw.normal(0, 0.2, shape).astype(np.float32) for name, shape in resident.model.shapes.items()}


@pytest.fixture(scope="module")
def merged(tiny_folder: Path, adapter: Adapter) -> Any:
    """A plain model with W + alpha / r * B A for its weights."""
    network = AutoModelForCausalLM.from_pretrained(tiny_folder).eval()
    weights = dict(network.named_parameters())
    with torch.no_grad():
        for name, array in adapter.items():
            if ".lora_A." in name:
                update = torch.tensor(adapter[name.replace("lora_A", "lora_B")]) @ torch.tensor(array)
                weights[name.removeprefix("base_model.model.").replace(".lora_A", "")] += 16.0 / 8 * update
    return network
