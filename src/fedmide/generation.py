"""Batched greedy decoding: padded on the left and masked, stopped at the end of sequence, special tokens removed."""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from fedmide.model import LoraModel
from fedmide.tokens import Example

MAX_NEW_TOKENS = 256


def default_max_new_tokens(examples: Sequence[Example]) -> int:
    """The 99th percentile of the examples' response lengths in tokens, at most 256."""
    lengths = [len(example.ids) - example.prompt_length for example in examples]
    return min(MAX_NEW_TOKENS, int(np.ceil(np.percentile(lengths, 99)))) if lengths else MAX_NEW_TOKENS


def generate(
    model: LoraModel,
    examples: Sequence[Example],
    max_new_tokens: int,
    batch_size: int,
    progress: Callable[[int], None] = lambda num_records: None,
) -> tuple[str, ...]:
    """The model's own response to each example's prompt, in the examples' order.

    Prompts of like length are decoded together, so that little is padded.
    """
    texts = [""] * len(examples)
    order = sorted(range(len(examples)), key=lambda row: -examples[row].prompt_length)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        prompts = [examples[row].ids[: examples[row].prompt_length] for row in rows]
        for row, text in zip(rows, _decode(model, prompts, max_new_tokens), strict=True):
            texts[row] = text
        progress(len(rows))
    return tuple(texts)


def _decode(model: LoraModel, prompts: Sequence[np.ndarray], max_new_tokens: int) -> list[str]:
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), longest), model.tokenizer.eos_token_id, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.from_numpy(prompt)
        mask[row, longest - len(prompt) :] = 1
    new_ids = model.continuations(ids, mask, max_new_tokens)
    return [text.strip() for text in model.tokenizer.batch_decode(new_ids, skip_special_tokens=True)]
