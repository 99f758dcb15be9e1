"""Responses decoded in batches equal plain greedy decoding of each prompt alone."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from fedmide.config.sections import LoraConfig, ModelConfig
from fedmide.data.records import RecordId
from fedmide.data.tokens import Example
from fedmide.model import adapters, generation
from fedmide.model import lora as model
from fedmide.model.lora import LoraModel

pytestmark = pytest.mark.usefixtures("one_thread")

EOS = 257
MakeExamples = Callable[..., tuple[Example, ...]]


def opened(folder: Path, **lora: Any) -> LoraModel:
    loaded = model.load(folder, ModelConfig(dtype="float32", device="cpu"), LoraConfig(**lora))
    loaded.put(adapters.fresh(loaded.shapes, seed=0))
    return loaded


def alone(network: Any, tokenizer: Any, example: Example, max_new_tokens: int) -> tuple[str, list[int]]:
    """The greedy continuation of one prompt by transformers, without padding: its text and its ids."""
    ids = torch.from_numpy(example.ids[: example.prompt_length])[None]
    greedy = GenerationConfig(max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=EOS, pad_token_id=256)
    with torch.no_grad():
        output = network.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=greedy)
    new = output[0, ids.shape[1] :].tolist()
    return tokenizer.decode(new, skip_special_tokens=True).strip(), new


def test_batched_equals_one_at_a_time(
    shape_folder: Path, shape_model: LoraModel, random_examples: MakeExamples
) -> None:
    lora, examples = shape_model, random_examples(5, shortest=4, longest=24)
    assert len({example.prompt_length for example in examples}) > 3  # different lengths need padding
    base = AutoModelForCausalLM.from_pretrained(shape_folder).eval()
    lora.put(adapters.fresh(lora.shapes, seed=0))
    expected = [alone(base, lora.tokenizer, example, 8) for example in examples]
    assert len({text for text, _ in expected}) > 3
    for batch_size in (2, 5):
        assert generation.generate(lora, examples, 8, batch_size) == tuple(text for text, _ in expected)


@pytest.fixture(scope="module")
def stopping_folder(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with an output layer that often gives the end of sequence and other control tokens."""
    folder = shutil.copytree(tiny_folder, tmp_path_factory.mktemp("stopping") / "model")
    network = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        network.lm_head.weight[EOS:260] *= 2.0
    network.save_pretrained(folder)
    return folder


def test_stops_at_the_end_and_removes_special_tokens(stopping_folder: Path, random_examples: MakeExamples) -> None:
    lora, examples = opened(stopping_folder), random_examples(12, longest=12)
    expected = [alone(lora.network, lora.tokenizer, example, 16) for example in examples]
    lengths = [len(ids) for _, ids in expected]
    assert min(lengths) < 8 < max(lengths) == 16  # some stop and some do not
    assert any(set(ids[:-1]) & {258, 259} for _, ids in expected)  # some contain other control tokens
    texts = generation.generate(lora, examples, 16, batch_size=8)
    assert texts == tuple(text for text, _ in expected)
    assert not any("<|" in text and "|>" in text for text in texts)


def test_order_is_the_callers(tiny_folder: Path, random_examples: MakeExamples) -> None:
    lora, examples = opened(tiny_folder), random_examples(10)
    forwards = generation.generate(lora, examples, 6, batch_size=3)
    assert generation.generate(lora, examples[::-1], 6, batch_size=4) == forwards[::-1]


def test_the_reference_response_does_not_matter(tiny_folder: Path, random_examples: MakeExamples) -> None:
    lora, examples = opened(tiny_folder), random_examples(4, shortest=8)
    silent = [replace(example, ids=example.ids[: example.prompt_length]) for example in examples]
    assert generation.generate(lora, silent, 6, 4) == generation.generate(lora, examples, 6, 4)


def test_the_adapter_changes_responses(tiny_folder: Path, random_examples: MakeExamples) -> None:
    lora, examples = opened(tiny_folder), random_examples(6, shortest=8)
    before = generation.generate(lora, examples, 8, 4)
    draw = np.random.default_rng(0)
    lora.put({name: draw.normal(0, 0.3, shape).astype(np.float32) for name, shape in lora.shapes.items()})
    after = generation.generate(lora, examples, 8, 4)
    assert after != before
    lora.network.train()  # generation switches dropout off
    assert generation.generate(lora, examples, 8, 4) == after


def test_generation_settings_of_a_checkpoint_do_not_change_greedy_decoding(
    tiny_folder: Path, tmp_path: Path, random_examples: MakeExamples
) -> None:
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    wishes = {"do_sample": True, "temperature": 0.6, "repetition_penalty": 9.0, "no_repeat_ngram_size": 1}
    (folder / "generation_config.json").write_text(json.dumps({**wishes, "eos_token_id": [65, 66]}))
    examples = random_examples(6, shortest=8)
    expected = generation.generate(opened(tiny_folder), examples, 16, 4)
    assert generation.generate(opened(folder), examples, 16, 4) == expected


def test_nothing_to_generate(tiny_folder: Path) -> None:
    assert generation.generate(opened(tiny_folder), [], 8, 4) == ()


def test_records_are_reported_as_they_are_done(tiny_folder: Path, random_examples: MakeExamples) -> None:
    told: list[int] = []
    generation.generate(opened(tiny_folder), random_examples(7), 2, 3, told.append)
    assert told == [3, 3, 1]


def test_longest_response_by_default() -> None:
    def examples(*responses: int) -> list[Example]:
        return [Example(RecordId("x"), np.zeros(5 + length, np.int64), 5) for length in responses]

    assert generation.default_max_new_tokens(examples(3)) == 3
    assert generation.default_max_new_tokens(examples(*range(1, 102))) == 100  # the 99th percentile of 1 .. 101
    assert generation.default_max_new_tokens(examples(*[10] * 50, 11)) == 11  # rounded up
    assert generation.default_max_new_tokens(examples(300, 400)) == 256
    assert generation.default_max_new_tokens([]) == 256
