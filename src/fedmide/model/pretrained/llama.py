"""Llama models as files that transformers loads: converted from GGUF, or tiny and random for tests.

This module uses neither torch nor transformers. A converted model equals that of transformers' own GGUF reading bit for
bit: a test compares weights, token ids and logits. There is one exception, white space before digits, which
transformers' reading gets wrong. That reading also takes 20 s at each start, and its model can't be saved.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from fedmide.seeds import stream

Tensors = Mapping[str, NDArray[np.float32]]


Metadata = Mapping[str, Any]


CONTROL_TOKEN = 3  # in GGUF's tokenizer.ggml.token_type


DIGITS_APART = frozenset({"smollm"})  # values of GGUF's tokenizer.ggml.pre whose tokenizers split off each digit


GGUF_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""The parts of weights' names in GGUF, and the same parts in transformers."""


_TINY_CONFIG = {
    "vocab_size": 260,
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": 257,
    "pad_token_id": 256,
}


_TINY_SPECIAL_TOKENS = ("<|pad|>", "<|eos|>", "<|user|>", "<|assistant|>")


_TINY_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|eos|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def convert_gguf(gguf_file: Path, folder: Path) -> None:
    """Fills a folder with configuration, tokenizer and float32 weights of the byte-level-BPE Llama in a GGUF file.

    A dequantized weight is scale times integer plus offset. No 16-bit type holds it exactly, so weights are float32.
    """
    from gguf import GGUFReader

    reader = GGUFReader(gguf_file)
    metadata = {key: field.contents() for key, field in reader.fields.items()}
    tensors = {_weight_name(tensor.name): _weight(tensor, metadata) for tensor in reader.tensors}
    config = _gguf_config(metadata, tied="lm_head.weight" not in tensors)
    _write_model(folder, config, tensors)
    _write_tokenizer(folder, _gguf_tokenizer(metadata), _gguf_tokenizer_config(metadata))


def write_tiny_random(folder: Path) -> None:
    """Fills a folder with a random Llama of 0.3 million parameters, and a tokenizer with one token per byte."""
    shapes = _tiny_shapes(_TINY_CONFIG)
    _write_model(folder, _TINY_CONFIG, {name: _random(name, shape) for name, shape in shapes.items()})
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = [AddedToken(token, special=True, normalized=False) for token in _TINY_SPECIAL_TOKENS]
    settings = {
        "eos_token": "<|eos|>",
        "pad_token": "<|pad|>",
        "model_max_length": _TINY_CONFIG["max_position_embeddings"],
        "chat_template": _TINY_CHAT_TEMPLATE,
    }
    _write_tokenizer(folder, _byte_level(alphabet, [], specials), settings)


def undo_rotary_permutation(weight: NDArray[np.float32], num_heads: int) -> NDArray[np.float32]:
    """The projection (rows, columns) in transformers' order: per head, GGUF's even rows, then its odd rows.

    >>> undo_rotary_permutation(np.arange(8, dtype=np.float32)[:, None], num_heads=2).ravel().tolist()
    [0.0, 2.0, 1.0, 3.0, 4.0, 6.0, 5.0, 7.0]
    """
    rows, columns = weight.shape
    return weight.reshape(num_heads, rows // num_heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _weight_name(gguf_name: str) -> str:
    """`blk.3.attn_q.weight` is `model.layers.3.self_attn.q_proj.weight`."""
    *block, part, _ = gguf_name.split(".")
    prefix = f"model.layers.{block[1]}." if block else ""
    return f"{prefix}{GGUF_NAMES[part]}.weight"


def _weight(tensor: Any, metadata: Metadata) -> NDArray[np.float32]:
    from gguf.quants import dequantize

    weight = dequantize(tensor.data, tensor.tensor_type)
    if ".attn_q." in tensor.name:
        weight = undo_rotary_permutation(weight, metadata["llama.attention.head_count"])
    elif ".attn_k." in tensor.name:
        weight = undo_rotary_permutation(weight, metadata["llama.attention.head_count_kv"])
    return np.ascontiguousarray(weight, dtype=np.float32)


def _gguf_config(metadata: Metadata, tied: bool) -> dict[str, Any]:
    return {
        "vocab_size": metadata["llama.vocab_size"],
        "hidden_size": metadata["llama.embedding_length"],
        "intermediate_size": metadata["llama.feed_forward_length"],
        "num_hidden_layers": metadata["llama.block_count"],
        "num_attention_heads": metadata["llama.attention.head_count"],
        "num_key_value_heads": metadata["llama.attention.head_count_kv"],
        "head_dim": metadata["llama.rope.dimension_count"],
        "max_position_embeddings": metadata["llama.context_length"],
        "rms_norm_eps": metadata["llama.attention.layer_norm_rms_epsilon"],
        "rope_parameters": {"rope_type": "default", "rope_theta": metadata["llama.rope.freq_base"]},
        "tie_word_embeddings": tied,
        "bos_token_id": metadata["tokenizer.ggml.bos_token_id"],
        "eos_token_id": metadata["tokenizer.ggml.eos_token_id"],
        "pad_token_id": metadata["tokenizer.ggml.padding_token_id"],
    }


def _gguf_tokenizer(metadata: Metadata) -> Tokenizer:
    """The tokenizer that the model was trained with, which adds no BOS.

    `tokenizer.ggml.pre` names the steps before BPE; transformers' GGUF reading ignores it. SmolLM2 splits off each
    digit. Its vocabulary has only single digits, so digits give the same tokens either way. But white space before a
    digit is then merged as in training: the two line ends in "\\n\\n1." are one token, not two.
    """
    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [
        (left, right) for left, right in (merge.split(" ") for merge in metadata.get("tokenizer.ggml.merges", []))
    ]
    specials = [
        AddedToken(token, special=True, normalized=False)
        for token, kind in zip(tokens, metadata["tokenizer.ggml.token_type"], strict=True)
        if kind == CONTROL_TOKEN
    ]
    return _byte_level(tokens, merges, specials, metadata.get("tokenizer.ggml.pre") in DIGITS_APART)


def _gguf_tokenizer_config(metadata: Metadata) -> dict[str, Any]:
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    tokens = metadata["tokenizer.ggml.tokens"]
    return {
        **{key: tokens[metadata[f"tokenizer.ggml.{name}_token_id"]] for key, name in names.items()},
        "model_max_length": metadata["llama.context_length"],
        "chat_template": metadata["tokenizer.chat_template"],
    }


def _byte_level(
    tokens: Sequence[str], merges: list[tuple[str, str]], specials: list[AddedToken], digits_apart: bool = False
) -> Tokenizer:
    """A byte-level BPE tokenizer that adds nothing before or after a text."""
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, words]) if digits_apart else words
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(specials)
    return tokenizer


def _tiny_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shape of every weight, (rows, columns) or (rows,)."""
    hidden, inner, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    layer = {
        "input_layernorm": (hidden,),
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "post_attention_layernorm": (hidden,),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    outside = {
        "model.embed_tokens": (vocabulary, hidden),
        "model.norm": (hidden,),
        "lm_head": (vocabulary, hidden),
    }
    layers = {f"model.layers.{i}.{name}": layer[name] for i in range(config["num_hidden_layers"]) for name in layer}
    return {f"{name}.weight": shape for name, shape in {**outside, **layers}.items()}


def _random(name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Ones for a norm, else uniform with variance 1 / columns, so that the spread of logits is about 1."""
    if len(shape) == 1:
        return np.ones(shape, dtype=np.float32)
    bound = np.sqrt(3.0 / shape[1])
    return stream(0, f"tiny-random {name}").uniform(-bound, bound, shape).astype(np.float32)


def _write_model(folder: Path, config: Mapping[str, Any], tensors: Tensors) -> None:
    fixed = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "dtype": "float32",
    }
    _write_json(folder / "config.json", {**fixed, **config})
    ends = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    _write_json(folder / "generation_config.json", ends)
    save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
    # safetensors makes the file readable for the owner only, but several users may share a cache
    shutil.copymode(folder / "config.json", folder / "model.safetensors")


def _write_tokenizer(folder: Path, tokenizer: Tokenizer, settings: Mapping[str, Any]) -> None:
    tokenizer.save(str(folder / "tokenizer.json"))
    fixed = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    _write_json(folder / "tokenizer_config.json", {**fixed, **settings})


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
