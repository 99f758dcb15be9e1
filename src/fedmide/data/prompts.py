"""Records as prompts. Templates are plain data, filled in one pass, so braces in a record's text stay unchanged.

A prompt ends where the response begins. The tokenizer's own chat template needs a tokenizer. This module only gives the
messages that go into it.
"""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fedmide.config import read_toml
from fedmide.data.records import Record
from fedmide.errors import ConfigError, did_you_mean

Chat = Literal["chat"]


_PLACEHOLDER = re.compile(r"\{(instruction|context)\}")


_PLACEHOLDERS = {
    "with_context": frozenset({"instruction", "context"}),
    "without_context": frozenset({"instruction"}),
}


@dataclass(frozen=True, slots=True)
class Template:
    """The texts around a record, with `{instruction}` and `{context}` in place of the record's own."""

    name: str
    with_context: str
    without_context: str


ALPACA = Template(
    name="alpaca",
    with_context=(
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{instruction}\n\n### Input:\n{context}\n\n### Response:\n"
    ),
    without_context=(
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{instruction}\n\n### Response:\n"
    ),
)
"""The wording of Stanford Alpaca, which the published method uses."""


PLAIN = Template(
    name="plain",
    with_context="{context}\n\nQuestion: {instruction}\nAnswer:\n",
    without_context="Question: {instruction}\nAnswer:\n",
)
"""Just enough words to separate a question from its answer: a third of Alpaca's tokens on short records."""


NAMED = {template.name: template for template in (ALPACA, PLAIN)}


def render(template: Template, record: Record) -> str:
    """The prompt's text, up to the beginning of the response.

    >>> plain = Template("plain", "{context}: {instruction} ", "{instruction} ")
    >>> render(plain, Record("Which organ?", "The liver.", context="Jaundice {context}"))
    'Jaundice {context}: Which organ? '
    >>> render(plain, Record("Which organ?", "The liver."))
    'Which organ? '
    """
    text = template.with_context if record.context else template.without_context
    values = {"instruction": record.instruction, "context": record.context}
    return _PLACEHOLDER.sub(lambda found: values[found[1]], text)


def chat_messages(record: Record) -> list[dict[str, str]]:
    """The conversation for a chat template: one message, the context after the instruction.

    >>> chat_messages(Record("Which organ?", "The liver.", context="Jaundice"))
    [{'role': 'user', 'content': 'Which organ?\\n\\nJaundice'}]
    """
    content = f"{record.instruction}\n\n{record.context}" if record.context else record.instruction
    return [{"role": "user", "content": content}]


def resolve(name: str) -> Template | Chat:
    """The template that a configuration names: `alpaca`, `plain`, `chat` (the tokenizer's own), or a TOML file."""
    if name == "chat":
        return "chat"
    if name in NAMED:
        return NAMED[name]
    path = Path(name).expanduser()
    if path.is_file():
        return load_template(path)
    raise ConfigError(
        f"prompt.template = {name!r}: neither a known template nor a file{did_you_mean(name, [*NAMED, 'chat'])}",
        "Give alpaca, plain, chat, or a TOML file with with_context and without_context",
    )


def load_template(path: Path) -> Template:
    """The template in a TOML file with `with_context` and `without_context`. It has the file's name."""
    values = read_toml(path)
    unknown = [f"{path}: unknown key '{key}'" for key in values if key not in _PLACEHOLDERS]
    problems = unknown + [f"{path}: {problem}" for key in _PLACEHOLDERS for problem in _problems(key, values)]
    if problems:
        raise ConfigError(
            problems,
            "with_context needs {instruction} and {context}; without_context needs {instruction} alone",
        )
    return Template(path.stem, values["with_context"], values["without_context"])


def prompt_hash(prompt: Template | Chat, chat_template: str = "") -> str:
    """A short hash of a prompt's texts, independent of its name; for `chat`, of the tokenizer's own template.

    >>> prompt_hash(ALPACA) == prompt_hash(Template("mine", ALPACA.with_context, ALPACA.without_context))
    True
    """
    texts = ("chat", chat_template) if prompt == "chat" else (prompt.with_context, prompt.without_context)
    return hashlib.sha256("\x1f".join(texts).encode()).hexdigest()[:16]


def _problems(key: str, values: dict[str, Any]) -> list[str]:
    """The problems of one of the two texts."""
    if key not in values:
        return [f"'{key}' is missing"]
    text = values[key]
    if not isinstance(text, str):
        return [f"'{key}' is {type(text).__name__}, expected a string"]
    expected, found = _PLACEHOLDERS[key], frozenset(_PLACEHOLDER.findall(text))
    missing = [f"'{key}' lacks {{{name}}}" for name in sorted(expected - found)]
    return missing + [f"'{key}' has {{{name}}}, which is empty there" for name in sorted(found - expected)]
