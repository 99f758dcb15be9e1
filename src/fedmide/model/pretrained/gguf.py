"""A merged Llama-shaped model as one GGUF file, for llama.cpp and programs built on it.

`llama.convert_gguf` reads each written file back. Its reading is tested against that of transformers.
The result must be the original model: every weight to the bit, every token, the same ids for the same texts.
"""

import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from tokenizers import Tokenizer

from fedmide.errors import ModelError
from fedmide.model.pretrained.llama import CONTROL_TOKEN, GGUF_NAMES, convert_gguf

NORMAL_TOKEN = 1  # in GGUF's tokenizer.ggml.token_type


TEXTS = ("Dose: 12.5 mg, twice daily", "\n\n1. naïve\r\n 2. 糖尿病 👩🏽‍⚕️", "<|im_start|>I'm <|eos|><|endoftext|>")
"""Texts on which both tokenizers are compared: digits after white space, several scripts, control tokens."""


def write_gguf(folder: Path, path: Path) -> None:
    """Writes the transformers folder of a merged model as a GGUF file, and checks the file by reading it back.

    Raises `ModelError` if the model or its tokenizer has another form, or if the file differs from the model.
    """
    config = json.loads((folder / "config.json").read_text("utf-8"))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    described, ids = json.loads(tokenizer.to_str()), tokenizer.get_vocab()
    if problems := list(_problems(config, described, len(ids))):
        raise ModelError(problems, "Export without --gguf")
    weights = load_file(folder / "model.safetensors")
    writer = gguf.GGUFWriter(path, "llama")
    try:
        writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16 if _is_bfloat16(weights) else gguf.LlamaFileType.ALL_F32)
        _write_shape(writer, config)
        _write_tokenizer(writer, described, ids, _tokenizer_settings(folder))
        for name, weight in weights.items():
            _write_weight(writer, name, weight, config)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()
    _check(path, weights, tokenizer)


def redo_rotary_permutation(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """The projection (rows, columns) in GGUF's order: per head, the rows of its two halves alternate.

    >>> redo_rotary_permutation(torch.arange(8.0)[:, None], num_heads=2).ravel().tolist()
    [0.0, 2.0, 1.0, 3.0, 4.0, 6.0, 5.0, 7.0]
    """
    rows, columns = weight.shape
    return weight.reshape(num_heads, 2, rows // num_heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _problems(config: Mapping[str, Any], described: Mapping[str, Any], num_tokens: int) -> Iterator[str]:
    """The reasons why the model can't be written so that reading gives the same model."""
    if config["model_type"] != "llama" or config.get("attention_bias") or config.get("mlp_bias"):
        yield f"a model of type {config['model_type']} can't be written as GGUF, only Llama models without biases"
    elif config["rope_parameters"]["rope_type"] != "default":
        yield f"rotary embedding of type {config['rope_parameters']['rope_type']} can't be written as GGUF"
    if described["model"]["type"] != "BPE" or _splitting(described) is None:
        yield "the tokenizer can't be written as GGUF, only byte-level BPE like that of GPT-2 or SmolLM"
    elif num_tokens != config["vocab_size"]:
        yield f"the model has {config['vocab_size']} tokens, but its tokenizer has {num_tokens}"


def _tokenizer_settings(folder: Path) -> dict[str, Any]:
    """A tokenizer's special tokens and its chat template, which transformers keeps in a file of its own."""
    settings: dict[str, Any] = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    template = folder / "chat_template.jinja"
    return {**settings, "chat_template": template.read_text("utf-8")} if template.exists() else settings


def _splitting(described: Mapping[str, Any]) -> str | None:
    """Llama.cpp's name for the way in which a tokenizer splits a text before BPE; None if it is another way."""
    steps = described["pre_tokenizer"] or {}
    parts = steps.get("pretokenizers", [steps])
    kinds = [part.get("type") for part in parts]
    if kinds[-1:] != ["ByteLevel"] or parts[-1].get("add_prefix_space") or described["normalizer"] is not None:
        return None
    if kinds == ["ByteLevel"]:
        return "gpt-2"
    return "smollm" if kinds == ["Digits", "ByteLevel"] and parts[0]["individual_digits"] else None


def _write_shape(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    heads = config["num_attention_heads"]
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(_key_value_heads(config))
    writer.add_rope_dimension_count(config.get("head_dim") or config["hidden_size"] // heads)
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])


def _write_tokenizer(
    writer: gguf.GGUFWriter, described: Mapping[str, Any], ids: Mapping[str, int], settings: Mapping[str, Any]
) -> None:
    special = {each["id"] for each in described["added_tokens"] if each["special"]}
    tokens = sorted(ids, key=lambda token: ids[token])
    merges = [each if isinstance(each, str) else " ".join(each) for each in described["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    splitting = _splitting(described)
    assert splitting is not None  # `_problems` refuses other tokenizers
    writer.add_tokenizer_pre(splitting)
    writer.add_token_list(tokens)
    writer.add_token_types([CONTROL_TOKEN if number in special else NORMAL_TOKEN for number in range(len(tokens))])
    if merges:  # GGUF has no empty arrays
        writer.add_token_merges(merges)
    end = ids[settings["eos_token"]]
    writer.add_eos_token_id(end)
    for name, add in (
        ("bos_token", writer.add_bos_token_id),
        ("unk_token", writer.add_unk_token_id),
        ("pad_token", writer.add_pad_token_id),
    ):
        token = settings.get(name)  # without one, the end token: `convert_gguf` reads all of them
        add(end if token is None else ids[token])
    writer.add_add_bos_token(False)
    if template := settings.get("chat_template"):
        writer.add_chat_template(template)


def _write_weight(writer: gguf.GGUFWriter, name: str, weight: torch.Tensor, config: Mapping[str, Any]) -> None:
    """Adds one weight to the file: matrices in their own type, norms in float32, as llama.cpp requires."""
    if ".q_proj." in name:
        weight = redo_rotary_permutation(weight, config["num_attention_heads"])
    elif ".k_proj." in name:
        weight = redo_rotary_permutation(weight, _key_value_heads(config))
    own = _gguf_name(name)
    if weight.dtype == torch.bfloat16 and weight.dim() > 1:
        bits = weight.contiguous().view(torch.uint8).numpy()
        writer.add_tensor(own, bits, raw_dtype=gguf.GGMLQuantizationType.BF16)
    else:
        writer.add_tensor(own, weight.float().contiguous().numpy())


def _key_value_heads(config: Mapping[str, Any]) -> int:
    """The number of heads for keys and values: the number for queries, if the configuration has no other."""
    return int(config.get("num_key_value_heads") or config["num_attention_heads"])


def _gguf_name(name: str) -> str:
    """`model.layers.3.self_attn.q_proj.weight` is `blk.3.attn_q.weight`."""
    part = name.removesuffix(".weight")
    block = ""
    if part.startswith("model.layers."):
        number, part = part.removeprefix("model.layers.").split(".", 1)
        block = f"blk.{number}."
    return f"{block}{next(own for own, theirs in GGUF_NAMES.items() if theirs == part)}.weight"


def _is_bfloat16(weights: Mapping[str, torch.Tensor]) -> bool:
    return any(weight.dtype == torch.bfloat16 for weight in weights.values())


def _check(path: Path, weights: Mapping[str, torch.Tensor], tokenizer: Tokenizer) -> None:
    """Reads the file back; raises `ModelError` if it differs from the model."""
    with tempfile.TemporaryDirectory() as folder:
        convert_gguf(path, Path(folder))
        read = load_file(Path(folder) / "model.safetensors")
        theirs = Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
    names = sorted(weights.keys() ^ read.keys())
    names += [name for name in weights.keys() & read.keys() if not _equal(weights[name], read[name])]
    if names:
        raise ModelError(
            f"{path}: after reading it back, {len(names)} weights differ, first {names[0]!r}", "Export without --gguf"
        )
    same_texts = all(tokenizer.encode(text).ids == theirs.encode(text).ids for text in TEXTS)
    if tokenizer.get_vocab() != theirs.get_vocab() or not same_texts:
        raise ModelError(f"{path}: after reading it back, the tokenizer differs", "Export without --gguf")


def _equal(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    first: NDArray[np.float32] = ours.float().numpy()
    return bool(np.array_equal(first, theirs.float().numpy()))
