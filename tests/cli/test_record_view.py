"""Records as the model sees them: every token is in one piece, and pieces say what training counts."""

from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fedmide.cli.record_view import Seen, harmless, render, see
from fedmide.config import Config, apply_overrides, parse
from fedmide.data.records import Record
from fedmide.data.tokens import encoder
from fedmide.model.pretrained.hf import load_tokenizer

RECORD = Record("Which organ?", "The liver, on the right.")


@pytest.fixture(scope="session")
def tokenizer(tiny_folder: Path) -> Any:
    return load_tokenizer(tiny_folder)


def config(*overrides: str) -> Config:
    return parse(apply_overrides({"prompt": {"template": "plain"}}, overrides))


def one(tokenizer: Any, settings: Config, record: Record = RECORD) -> Seen:
    (seen,) = see(tokenizer, settings, [("a, training record 1", record)])
    return seen


@pytest.mark.parametrize("positions", ["all", "response"])
def test_pieces_are_what_training_counts(tokenizer: Any, positions: str) -> None:
    settings = config(f"training.positions={positions}")
    example = encoder(tokenizer, settings.model, settings.prompt).encode(RECORD)
    seen = one(tokenizer, settings)
    assert sum(piece.num_tokens for piece in seen.pieces) == len(example.ids)
    assert sum(piece.num_tokens for piece in seen.pieces if piece.loss) == example.num_predicted(
        settings.training.positions
    )
    assert sum(piece.num_tokens for piece in seen.pieces if piece.kind == "prompt") == example.prompt_length
    assert "".join(piece.text for piece in seen.pieces if piece.kind == "prompt").endswith("Which organ?\nAnswer:\n")
    assert seen.pieces[-1].text.startswith("The liver, on the right.") and seen.pieces[-1].loss
    assert [(piece.kind, piece.loss) for piece in seen.pieces] == (
        [("prompt", False), ("prompt", True), ("response", True)]
        if positions == "all"
        else [("prompt", False), ("response", True)]
    )


def test_the_cut_end_of_a_response_is_shown(tokenizer: Any) -> None:
    whole = one(tokenizer, config())
    length = sum(piece.num_tokens for piece in whole.pieces)
    seen = one(tokenizer, config(f"model.cutoff={length - 5}"))
    assert (seen.pieces[-1].kind, seen.pieces[-1].num_tokens, seen.pieces[-1].loss) == ("cut", 5, False)
    kept = "".join(piece.text for piece in seen.pieces)
    assert kept == "".join(piece.text for piece in whole.pieces)


def test_a_shortened_prompt_and_a_refused_record_are_marked(tokenizer: Any) -> None:
    long = Record("x" * 100, "The liver.")
    shortened = one(tokenizer, config("model.cutoff=60", "prompt.overflow=cut"), long)
    full = len(encoder(tokenizer, config().model, config().prompt).prompt_ids(long))
    prompt = sum(piece.num_tokens for piece in shortened.pieces if piece.kind == "prompt")
    assert shortened.cut_prompt_tokens == full - prompt > 0
    refused = one(tokenizer, config("model.cutoff=60"), long)
    assert refused.pieces == () and "leaves no room" in refused.problem
    assert "refused: a prompt of" in shown(refused) and "shortened by" in shown(shortened)


def shown(seen: Seen) -> str:
    console = Console(width=120, force_terminal=True, color_system="truecolor")
    with console.capture() as capture:
        console.print(render(seen))
    return capture.get()


def test_colors_and_words_distinguish_tokens_with_loss(tokenizer: Any) -> None:
    text = shown(one(tokenizer, config("training.positions=response")))
    assert "no loss]" in text and "tokens, loss]" in text
    assert "\x1b[1;32mThe liver" in text and "\x1b[2mQuestion: Which organ?" in text


def test_no_record_can_steer_the_terminal(tokenizer: Any) -> None:
    text = shown(one(tokenizer, config(), Record("\x1b[2J[bold red]Which\u202e?", "A\rB\x07")))
    assert "\x1b[2J" not in text and "\\x1b[2J[bold red]Which\\u202e?" in text and "A\\rB\\x07" in text
    assert harmless("é\n\t𝛼") == "é\n\t𝛼"
