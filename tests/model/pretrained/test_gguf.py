"""A GGUF file contains the original model, by two ways of reading it. Other models are refused."""

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedmide.errors import ModelError
from fedmide.model.pretrained import gguf
from fedmide.model.pretrained.gguf import redo_rotary_permutation, write_gguf
from fedmide.model.pretrained.llama import convert_gguf, undo_rotary_permutation
from fedmide.model.pretrained.locate import locate

IDS = torch.arange(40).reshape(2, 20)
CLINICAL = "Dose: 12.5 mg\n\n1. naïve, 糖尿病"


def logits(network: Any) -> torch.Tensor:
    with torch.inference_mode():
        values: torch.Tensor = network.eval()(input_ids=IDS).logits.float()
    return values


def read_by_transformers(path: Path) -> tuple[Any, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own deprecations do not concern us
        network = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
        return network, AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_our_reading_gives_the_same_model(tiny_folder: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=dtype)
    merged = shutil.copytree(tiny_folder, tmp_path / "merged")
    base.save_pretrained(merged)
    write_gguf(merged, tmp_path / "model.gguf")
    (tmp_path / "read").mkdir()
    convert_gguf(tmp_path / "model.gguf", tmp_path / "read")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "read", dtype=torch.float32)
    assert torch.equal(logits(found), logits(base.float()))
    ours, theirs = (AutoTokenizer.from_pretrained(path) for path in (tmp_path / "read", tiny_folder))
    assert ours(CLINICAL).input_ids == theirs(CLINICAL).input_ids
    assert ours.chat_template == theirs.chat_template
    assert (ours.eos_token, ours.pad_token) == (theirs.eos_token, theirs.pad_token)


@pytest.mark.model
@pytest.mark.slow
def test_transformers_reads_the_same_real_model(tmp_path: Path) -> None:
    folder = locate("smollm2-135m")
    write_gguf(folder, tmp_path / "model.gguf")
    network, tokenizer = read_by_transformers(tmp_path / "model.gguf")
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert torch.allclose(logits(network), logits(base), atol=1e-5)
    text = "Which organ makes bile? naïve, 糖尿病"  # without digits, which that reading does not split
    assert tokenizer(text).input_ids == AutoTokenizer.from_pretrained(folder)(text).input_ids


def test_the_permutation_is_undone_by_the_reading() -> None:
    weight = torch.arange(48.0).reshape(12, 4)
    redone = redo_rotary_permutation(weight, 3).numpy()
    assert (undo_rotary_permutation(redone, 3) == weight.numpy()).all()
    assert not (redone == weight.numpy()).all()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"model_type": "mistral"}, "a model of type mistral"),
        ({"attention_bias": True}, "without biases"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "rotary embedding of type llama3"),
        ({"vocab_size": 300}, "the model has 300 tokens, but its tokenizer has 260"),
    ],
)
def test_a_model_of_another_form_is_refused(
    tiny_folder: Path, tmp_path: Path, change: dict[str, Any], reason: str
) -> None:
    other = shutil.copytree(tiny_folder, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ModelError, match=reason):
        write_gguf(other, tmp_path / "model.gguf")
    assert not (tmp_path / "model.gguf").exists()


def test_a_tokenizer_of_another_form_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    other = shutil.copytree(tiny_folder, tmp_path / "other")
    described = json.loads((other / "tokenizer.json").read_text())
    described["pre_tokenizer"] = {"type": "Whitespace"}
    (other / "tokenizer.json").write_text(json.dumps(described))
    assert Tokenizer.from_file(str(other / "tokenizer.json")).get_vocab_size() == 260
    with pytest.raises(ModelError, match="only byte-level BPE"):
        write_gguf(other, tmp_path / "model.gguf")


def test_a_file_that_differs_from_its_model_is_refused(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf, "redo_rotary_permutation", lambda weight, num_heads: weight)
    with pytest.raises(ModelError, match="after reading it back, 8 weights differ"):
        write_gguf(tiny_folder, tmp_path / "model.gguf")
