"""A base in 8 or 4 bits gives the same numbers and gradients as a plain one with its dequantized weights."""

import importlib.util
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant

from fedmide.config.sections import LoraConfig, ModelConfig, PromptConfig, TrainingConfig
from fedmide.data.batches import pad
from fedmide.data.records import Record
from fedmide.data.tokens import Example, encode_all, encoder
from fedmide.errors import ModelError
from fedmide.model import adapters, quantization, scoring, training
from fedmide.model import lora as model
from fedmide.model.interface import TrainingPlan, total
from fedmide.model.lora import LoraModel
from fedmide.model.pretrained.hf import peft_files
from fedmide.model.pretrained.locate import locate

pytestmark = pytest.mark.usefixtures("one_thread")

MakeExamples = Callable[..., tuple[Example, ...]]
KINDS = ("int8", "nf4")
EVERYWHERE = LoraConfig(targets="all-linear", dropout=0.0)


def opened(folder: Path, kind: str, lora: LoraConfig = EVERYWHERE, dtype: str = "float32") -> LoraModel:
    how: dict[str, Any] = {"quantization": kind, "dtype": dtype, "device": "cpu"}
    loaded = model.load(folder, ModelConfig(**how), lora)
    draw = np.random.default_rng(0)
    loaded.put({name: draw.normal(0, 0.1, shape).astype(np.float32) for name, shape in sorted(loaded.shapes.items())})
    return loaded


def stands_for(layer: Any) -> torch.Tensor:
    """The plain weight that a quantized layer computes with."""
    if type(layer).__name__ == "Linear8bitLt":
        codes, scales = layer.state.CB, layer.state.SCB
        return int8_vectorwise_dequant(
            layer.weight.CB if codes is None else codes, layer.weight.SCB if scales is None else scales
        )
    return dequantize_4bit(layer.weight, layer.weight.quant_state)


def quantized_layers(lora: LoraModel) -> dict[str, Any]:
    named = lora.network.named_modules()
    return {name: each for name, each in named if type(each).__module__.startswith("bitsandbytes")}


@pytest.fixture(scope="module", params=KINDS)
def pair(request: pytest.FixtureRequest, tiny_folder: Path, one_thread: None) -> tuple[LoraModel, LoraModel]:
    """The quantized tiny model, and a plain one with its dequantized weights."""
    quantized, twin = (opened(tiny_folder, kind) for kind in (request.param, "none"))
    layers = quantized_layers(quantized)
    assert len(layers) == 4 * 7
    for name, layer in layers.items():
        twin.network.get_submodule(name).weight.data.copy_(stands_for(layer))
    return quantized, twin


def gradient(lora: LoraModel, examples: tuple[Example, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Losses and the adapter's whole gradient, in the order of its arrays' names."""
    lora.prepare(training=True)
    losses, flat = lora.backpropagate(pad(examples, "all", tuple(range(len(examples)))), 0.1, 0)
    ends = np.cumsum([math.prod(shape) for shape in lora.shapes.values()])
    pieces = dict(zip(lora.shapes, np.split(flat.numpy(), ends[:-1]), strict=True))
    return losses.numpy(), np.concatenate([pieces[name] for name in sorted(pieces)])


def test_scores_and_gradients_are_those_of_the_dequantized_weights(
    pair: tuple[LoraModel, LoraModel], random_examples: MakeExamples
) -> None:
    quantized, twin = pair
    examples = random_examples(9)
    assert quantized.prefixes is None and twin.prefixes is not None
    for _ in range(2):  # scoring does not affect later training, nor training later scoring
        ours, theirs = (scoring.nll(each, examples, "all", 200) for each in pair)
        assert [each.mean for each in ours] == pytest.approx([each.mean for each in theirs], rel=1e-5)
        (losses, found), (their_losses, wanted) = (gradient(each, examples) for each in pair)
        assert losses == pytest.approx(their_losses, rel=1e-5)
        assert np.linalg.norm(found - wanted) < 1e-4 * np.linalg.norm(wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_it_differs_from_the_plain_model_but_little(
    tiny_folder: Path, random_examples: MakeExamples, kind: str
) -> None:
    examples = random_examples(9)
    ours, theirs = (total(scoring.nll(opened(tiny_folder, each), examples, "all", 200)).mean for each in (kind, "none"))
    assert 1e-6 < abs(ours - theirs) < 0.02 * theirs


def test_nothing_but_adapters_changes_in_training(
    pair: tuple[LoraModel, LoraModel], random_examples: MakeExamples
) -> None:
    lora, _ = pair
    before = {name: stands_for(layer) for name, layer in quantized_layers(lora).items()}
    assert {name for name, each in lora.network.named_parameters() if each.requires_grad} == {
        name.replace("_A.", "_A.default.").replace("_B.", "_B.default.") for name in lora.shapes
    }
    lora.put(adapters.fresh(lora.shapes, 0))
    plan = TrainingPlan(TrainingConfig(epochs=3, batch_size=8, learning_rate=1e-2), 0, 0, "a")
    epochs = list(training.train(lora, random_examples(16), plan))
    assert epochs[-1].loss.mean < epochs[0].loss.mean
    assert all(torch.equal(before[name], stands_for(layer)) for name, layer in quantized_layers(lora).items())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("kind", KINDS)
def test_adapters_stay_float32_and_are_copied_in_and_out_bit_for_bit(tiny_folder: Path, kind: str, dtype: str) -> None:
    lora = opened(tiny_folder, kind, LoraConfig(targets=["q_proj", "down_proj"], blocks="top:2"), dtype)
    assert lora.quantization == kind and opened(tiny_folder, "none").quantization == "none"
    assert {each.dtype for each in lora.parameters().values()} == {torch.float32}
    adapter = {name: array + 1 for name, array in lora.take().items()}
    lora.put(adapter)
    assert all(np.array_equal(adapter[name], array) for name, array in lora.take().items())
    assert adapters.decode(peft_files(adapter, lora.lora)["adapter_model.safetensors"]).keys() == adapter.keys()


@pytest.mark.parametrize("kind", KINDS)
def test_scores_do_not_depend_on_neighbors_or_padding(
    tiny_folder: Path, random_examples: MakeExamples, kind: str
) -> None:
    lora, examples = opened(tiny_folder, kind), random_examples(12)
    together, alone = (scoring.nll(lora, examples, "all", budget) for budget in (10**6, 1))
    assert [each.mean for each in together] == pytest.approx([each.mean for each in alone], rel=1e-5)


def test_without_the_library_it_is_refused_with_the_command_that_installs_it(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        quantization.importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else found(name)
    )
    with pytest.raises(ModelError, match=r"model\.quantization = 'nf4' needs bitsandbytes") as caught:
        opened(tiny_folder, "nf4")
    assert "pip install 'fedmide[quant]'" in caught.value.remedy
    opened(tiny_folder, "none")


@pytest.mark.model
def test_quantized_smollm2_is_near_the_plain_model() -> None:
    """Measured on 48 medical records in float32: 3.378 nats plain, 3.379 in 8 bits, 3.707 in 4."""
    folder = locate("smollm2-135m")
    records = [
        Record("Name the sign.", "The patient has a fever and a cough."),
        Record("Where is the heart?", "In the chest."),
    ]
    found = {}
    for kind in ("none", *KINDS):
        lora = opened(folder, kind, LoraConfig())
        lora.put(adapters.fresh(lora.shapes, 0))
        examples = encode_all(encoder(lora.tokenizer, ModelConfig(), PromptConfig()), records, "a")
        found[kind] = total(scoring.nll(lora, examples, "response", 1024)).mean
    assert abs(found["int8"] - found["none"]) < 0.05
    assert abs(found["nf4"] - found["none"]) < 0.6
