"""Greedy decoding, until the end-of-sequence token. Special tokens are removed.

Responses are generated in batches, padded on the left and masked, or one at a time as a stream.
Both give the same text.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from fedmide.data.tokens import Example
from fedmide.model.lora import LoraModel

MAX_NEW_TOKENS = 256


UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""The character that a tokenizer returns for bytes that do not form a character yet."""


def default_max_new_tokens(examples: Sequence[Example]) -> int:
    """The 99th percentile of the examples' response lengths in tokens, at most 256; 256 without examples."""
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

    Prompts of similar length are decoded together, to need little padding. If memory is full, batches become smaller.
    """
    texts: dict[int, str] = {}
    order = sorted(range(len(examples)), key=lambda row: -examples[row].prompt_length)

    def decode(most: int) -> None:
        """Generates the responses that are still missing, at most `most` at a time."""
        left = [row for row in order if row not in texts]
        for start in range(0, len(left), most):
            rows = left[start : start + most]
            prompts = [examples[row].ids[: examples[row].prompt_length] for row in rows]
            texts.update(zip(rows, _decode(model, prompts, max_new_tokens), strict=True))
            progress(len(rows))

    model.generation_budget.within(batch_size, 1, decode)
    return tuple(texts[row] for row in range(len(examples)))


def stream(model: LoraModel, example: Example, max_new_tokens: int, on_text: Callable[[str], None]) -> str:
    """The model's own response to an example's prompt. `on_text` gets each piece as soon as it is final.

    The pieces together are the response. Two things are not final yet: blank space, which may turn out to be the end,
    and the bytes of a character that more tokens may complete.
    """
    ids = torch.from_numpy(example.ids[: example.prompt_length])[None]
    new_ids: list[int] = []
    passed_on = ""

    def pass_on(text: str) -> None:
        nonlocal passed_on
        if text != passed_on and text.startswith(passed_on):
            on_text(text.removeprefix(passed_on))
            passed_on = text

    def take(token: int) -> None:
        new_ids.append(token)
        pass_on(_text(model, new_ids).rstrip(UNFINISHED).rstrip())

    model.continuations(ids, torch.ones_like(ids), max_new_tokens, take)
    text = _text(model, new_ids)
    pass_on(text)
    return text


def _text(model: LoraModel, ids: Sequence[int]) -> str:
    """The text of tokens, without control tokens and without blank space around it."""
    text: str = model.tokenizer.decode(ids, skip_special_tokens=True)
    return text.strip()


def _decode(model: LoraModel, prompts: Sequence[np.ndarray], max_new_tokens: int) -> list[str]:
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), longest), model.tokenizer.eos_token_id, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.from_numpy(prompt)
        mask[row, longest - len(prompt) :] = 1
    new_ids = model.continuations(ids, mask, max_new_tokens)
    return [_text(model, row) for row in new_ids.tolist()]
