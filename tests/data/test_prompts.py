"""Prompts hold a record's text unchanged, and template files are checked completely."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmide.data.prompts import ALPACA, PLAIN, Template, chat_messages, load_template, prompt_hash, render, resolve
from fedmide.data.records import Record
from fedmide.errors import ConfigError

FENCED = Template("fenced", "[{instruction}|{context}]", "[{instruction}]")


def write(folder: Path, text: str) -> Path:
    path = folder / "mine.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_alpaca_by_hand() -> None:
    assert render(ALPACA, Record("Name the organ.", "The liver.", context="Jaundice")) == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n"
        "\n"
        "### Instruction:\n"
        "Name the organ.\n"
        "\n"
        "### Input:\n"
        "Jaundice\n"
        "\n"
        "### Response:\n"
    )
    assert render(ALPACA, Record("Name the organ.", "The liver.")) == (
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n"
        "\n"
        "### Instruction:\n"
        "Name the organ.\n"
        "\n"
        "### Response:\n"
    )


pieces = st.lists(
    st.sampled_from(["{instruction}", "{context}", "{", "}", "{}", "{0}", "\\1", "\\g<1>", "%s", "x"])
).map("".join)


def test_plain_by_hand() -> None:
    assert render(PLAIN, Record("Name the organ.", "The liver.")) == "Question: Name the organ.\nAnswer:\n"
    with_context = render(PLAIN, Record("Name the organ.", "The liver.", context="Jaundice"))
    assert with_context == "Jaundice\n\nQuestion: Name the organ.\nAnswer:\n"
    assert resolve("plain") == PLAIN


@given(instruction=pieces | st.text(), context=(pieces | st.text()).filter(bool))
def test_record_text_is_never_read_as_template(instruction: str, context: str) -> None:
    assert render(FENCED, Record(instruction, "r", context=context)) == f"[{instruction}|{context}]"
    assert render(FENCED, Record(instruction, "r")) == f"[{instruction}]"


@given(response=st.text(), instruction=st.text(), context=st.text())
def test_response_is_not_in_the_prompt(response: str, instruction: str, context: str) -> None:
    other = Record(instruction, response + "!", context=context)
    assert render(ALPACA, Record(instruction, response, context=context)) == render(ALPACA, other)


def test_chat_is_one_user_message() -> None:
    assert chat_messages(Record("Q", "A")) == [{"role": "user", "content": "Q"}]
    assert chat_messages(Record("Q", "A", context="C")) == [{"role": "user", "content": "Q\n\nC"}]


def test_template_file(tmp_path: Path) -> None:
    path = write(tmp_path, "with_context = 'Q {instruction} C {context} A '\nwithout_context = 'Q {instruction} A '")
    assert load_template(path) == Template("mine", "Q {instruction} C {context} A ", "Q {instruction} A ")
    assert resolve(str(path)) == load_template(path)


def test_all_problems_of_a_template_file_at_once(tmp_path: Path) -> None:
    path = write(tmp_path, "with_context = '{context} {input}'\nwithout_context = '{context}'\nname = 'x'")
    with pytest.raises(ConfigError) as caught:
        load_template(path)
    assert caught.value.problems == (
        f"{path}: unknown key 'name'",
        f"{path}: 'with_context' lacks {{instruction}}",
        f"{path}: 'without_context' lacks {{instruction}}",
        f"{path}: 'without_context' has {{context}}, which is empty there",
    )


def test_missing_and_mistyped_texts(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_template(write(tmp_path, "with_context = 3"))
    assert [problem.split(": ")[1] for problem in caught.value.problems] == [
        "'with_context' is int, expected a string",
        "'without_context' is missing",
    ]


def test_names() -> None:
    assert resolve("alpaca") is ALPACA
    assert resolve("chat") == "chat"
    with pytest.raises(ConfigError, match="did you mean 'alpaca'"):
        resolve("alpacca")
    with pytest.raises(ConfigError, match=r"neither a known template nor a file\. Give"):
        resolve("nowhere/mine.toml")


def test_hash_follows_the_texts_alone() -> None:
    renamed = Template("other", ALPACA.with_context, ALPACA.without_context)
    assert prompt_hash(renamed) == prompt_hash(ALPACA)
    hashes = {
        prompt_hash(FENCED),
        prompt_hash(ALPACA),
        prompt_hash("chat"),
        prompt_hash("chat", "{{ messages }}"),
    }
    assert len(hashes) == 4
    assert all(len(value) == 16 for value in hashes)
