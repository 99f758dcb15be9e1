"""Chats with a run's models: streamed text equals generated text, and each voice uses its own adapter."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from fedmide import cli
from fedmide.cli import record_view
from fedmide.config.sections import LoraConfig, ModelConfig
from fedmide.data.records import Record, RecordId
from fedmide.data.tokens import Example
from fedmide.errors import DataError, ModelError, RunFolderError, UsageError
from fedmide.journal.creation import reopen
from fedmide.journal.folder import RunFolder
from fedmide.model import adapters, generation, lora
from fedmide.model.pretrained import hf
from fedmide.runs import chat

pytestmark = pytest.mark.usefixtures("one_thread")


def streamed(loaded: lora.LoraModel, example: Example, max_new_tokens: int) -> tuple[list[str], str]:
    pieces: list[str] = []
    text = generation.stream(loaded, example, max_new_tokens, pieces.append)
    return pieces, text


def test_streamed_text_equals_generated_text(
    shape_model: lora.LoraModel, random_examples: Callable[..., tuple[Example, ...]]
) -> None:
    draw = np.random.default_rng(0)
    shape_model.put({n: draw.normal(0, 0.2, shape).astype(np.float32) for n, shape in shape_model.shapes.items()})
    examples = random_examples(6, shortest=4, longest=24)
    expected = generation.generate(shape_model, examples, 12, 3)
    found = [streamed(shape_model, example, 12) for example in examples]
    assert tuple(text for _, text in found) == expected
    assert tuple("".join(pieces) for pieces, _ in found) == expected
    assert max(len(pieces) for pieces, _ in found) > 3 and all(piece for pieces, _ in found for piece in pieces)


class Scripted:
    """A model that generates these tokens for any prompt."""

    def __init__(self, tokenizer: Any, said: list[int]) -> None:
        self.tokenizer, self.said = tokenizer, said

    def continuations(self, ids: torch.Tensor, mask: torch.Tensor, most: int, on_text: Callable[[int], None]) -> None:
        for token in self.said[:most]:
            on_text(token)


@pytest.mark.parametrize(
    ("text", "lost", "pieces"),
    [
        ("  a b \n", (), ["a", " b"]),  # a blank is passed on once something follows it
        ("né", (), ["n", "é"]),  # two bytes are one letter
        ("n\N{GRINNING FACE}!", (), ["n", "\N{GRINNING FACE}", "!"]),
        ("n€", (3,), ["n", "\N{REPLACEMENT CHARACTER}"]),  # the rest of the letter never comes
        ("néx", (2,), ["n", "\N{REPLACEMENT CHARACTER}x"]),
        ("", (), []),
    ],
)
def test_half_a_character_is_not_passed_on(
    tiny_folder: Path, text: str, lost: tuple[int, ...], pieces: list[str]
) -> None:
    tokenizer = hf.load_tokenizer(tiny_folder)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(ids) == len(text.encode())  # a token is a byte
    scripted: Any = Scripted(tokenizer, [each for place, each in enumerate(ids) if place not in lost])
    example = Example(RecordId("x"), np.array([1, 2], np.int64), 1)
    assert streamed(scripted, example, 99) == (pieces, "".join(pieces))


@pytest.fixture(scope="module")
def run_path(tmp_path_factory: pytest.TempPathFactory, finished_run: Callable[..., Path]) -> Path:
    return finished_run(tmp_path_factory.mktemp("talked"))


@pytest.fixture
def folder(run_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    monkeypatch.setenv("FEDMIDE_CACHE", str(tiny_folder.parent))
    return reopen(run_path)


def test_a_client_answers_its_test_records_as_in_the_predictions(folder: RunFolder) -> None:
    records = (folder.path.parent / "input" / "data" / "a" / "test.jsonl").read_text().splitlines()
    begun = chat.begin(folder, "a")
    assert list(begun.voices) == ["personalized"]
    for line, prediction in zip(map(json.loads, records), folder.read_predictions("a"), strict=True):
        pieces: list[str] = []
        said = begun.answer("personalized", line["instruction"], line["context"], pieces.append)
        assert said == "".join(pieces) == prediction["prediction"]


def test_each_voice_is_its_own_adapters(folder: RunFolder, tiny_folder: Path) -> None:
    begun = chat.begin(folder, "b", ["base", "aggregated"], max_new_tokens=8)
    said = {voice: begun.answer(voice, "Name liver") for voice in begun.voices}
    assert list(said) == ["personalized", "base", "aggregated"] and len(set(said.values())) == 3
    loaded = lora.load(tiny_folder, ModelConfig(dtype="float32", device="cpu"), LoraConfig(r=2))
    example = begun.encode.encode(Record("Name liver", ""))
    expected = {
        "personalized": hf.read_peft(folder.personal_adapter("b"), loaded.shapes),
        "base": adapters.fresh(loaded.shapes, folder.config.seed),
        "aggregated": hf.read_peft(folder.adapter, loaded.shapes),
    }
    for voice, adapter in expected.items():
        loaded.put(adapter)
        assert {voice: said[voice]} == {voice: generation.generate(loaded, [example], 8, 1)[0]}  # type: ignore[index]
    begun.answer("personalized", "Name heart")
    # the question in between is not remembered
    assert begun.answer("personalized", "Name liver") == said["personalized"]


def test_the_context_is_part_of_the_prompt(folder: RunFolder) -> None:
    begun = chat.begin(folder, "a")
    bare, full = (begun.encode.encode(Record("Name", "", context=context)) for context in ("", "site"))
    assert len(full.ids) > len(bare.ids)
    with pytest.raises(DataError, match="leaves no room below the cutoff of 64"):
        begun.answer("personalized", "Name", "very " * 40)


def test_a_chat_that_is_impossible_is_refused_with_the_reason(
    folder: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RunFolderError, match=r"there is no site 'c'\. Known: a, b"):
        chat.begin(folder, "c")
    copy = reopen(shutil.copytree(folder.path, tmp_path / "copy"))
    copy.update_manifest(prompt="another")
    with pytest.raises(ModelError, match=r"not the template that .*copy was trained with"):
        chat.begin(copy, "a")
    copy.update_manifest(model={**folder.read_manifest()["model"], "fingerprint": "another"})
    with pytest.raises(ModelError, match=r"not the model that .*copy was trained on"):
        chat.begin(copy, "a")
    shutil.rmtree(copy.personal_adapter("a"))
    with pytest.raises(RunFolderError, match=r"no adapter of site a yet\. First: fedmide personalize"):
        chat.begin(copy, "a")


@pytest.mark.parametrize("method", ["feddpa-f", "fedalt"])
def test_two_adapters_and_routers_stream_too(
    finished_run: Callable[..., Path], tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    monkeypatch.setenv("FEDMIDE_CACHE", str(tiny_folder.parent))
    folder = reopen(finished_run(tmp_path, [f"method={method}", "federation.rounds=1"]))
    line = json.loads((tmp_path / "input" / "data" / "a" / "test.jsonl").read_text().splitlines()[1])
    said = chat.begin(folder, "a").answer("personalized", line["instruction"], line["context"])
    assert said == folder.read_predictions("a")[1]["prediction"]


# --- the command


@pytest.fixture
def command(folder: RunFolder) -> Callable[..., Any]:
    """Runs the command as if it were typed, with `typed` on stdin."""

    def run(*args: str, typed: str = "") -> Any:
        return CliRunner().invoke(cli.app, ["chat", str(folder.path), *args], input=typed)

    return run


def test_questions_are_answered_until_the_end(folder: RunFolder, command: Callable[..., Any]) -> None:
    begun = chat.begin(folder, "a", ["base"])
    expected = [record_view.harmless(begun.answer(voice, "Name liver")) for voice in begun.voices]
    typed = command("--client", "a", "--with", "base", typed="\nName liver\n/quit\nName heart\n")
    assert typed.exit_code == 0
    assert typed.stdout == f"[personalized] {expected[0]}\n[base] {expected[1]}\n"
    both = command("--client", "a", "--with", "both", "--ask", "Name liver", "--json")
    assert list(json.loads(both.stdout)["answers"]) == ["personalized", "aggregated", "base"]
    again = command("--client", "a", typed=f"{'very ' * 40}\nName liver")
    assert again.stdout == f"{expected[0]}\n" and "leaves no room below the cutoff of 64" in again.stderr


def test_one_question_is_answered_and_control_characters_are_escaped(
    folder: RunFolder, command: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "about.txt").write_text("site a")
    begun = chat.begin(folder, "a")
    with_context = begun.answer("personalized", "Name liver", "site a")
    assert with_context != begun.answer("personalized", "Name liver")
    asked = ("--client", "a", "--ask", "Name liver", "--context", str(tmp_path / "about.txt"))
    assert command(*asked).stdout == f"{record_view.harmless(with_context)}\n"
    found = json.loads(command(*asked, "--json").stdout)
    assert found == {"client": "a", "answers": {"personalized": with_context}}
    monkeypatch.setattr(chat.Chat, "answer", lambda self, voice, question, context, on_text: on_text("a\x1b[31m"))
    assert command(*asked).stdout == "a\\x1b[31m\n"


def test_a_wrong_question_is_refused(command: Callable[..., Any], tmp_path: Path) -> None:
    assert "--json needs --ask" in str(command("--client", "a", "--json").exception)
    (tmp_path / "picture").write_bytes(b"\xff\xfe")
    told = command("--client", "a", "--context", str(tmp_path / "picture"))
    assert isinstance(told.exception, UsageError) and "not a text in UTF-8" in str(told.exception)
    too_long = command("--client", "a", "--ask", "very " * 40)
    assert isinstance(too_long.exception, DataError)
