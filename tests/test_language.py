"""The rules of CONTRIBUTING.md for prose, as far as a program can check them, hold in the whole repository."""

from pathlib import Path

import pytest

from tests.needs import ROOT
from tools.language import files, of_file, of_markdown, of_python


@pytest.mark.parametrize("path", tuple(files()), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_sentence_makes_readers_stumble(path: Path) -> None:
    assert [f"{each.line}: {each.problem}: {each.words}" for each in of_file(path)] == []


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ('def f():\n    """What it gives."""\n', "a docstring begins with a noun or a verb"),
        ('x = 1\n"""Whether it is."""\n', "a docstring begins with a noun or a verb"),
        ('x = f"the run {1} goes on with it"\n', "write resume or continue"),
        ("x = 1  # a file that nobody mends\n", "write fix"),
        ("def test_who_is_there(): ...\n", "a test's name begins with a noun or a verb"),
        ("def test_a_run_goes_on(): ...\n", "write resume or continue"),
        ("# nats a token, measured\n", "write per"),
        ('"""The personalised adapter."""\n', "spell it as Americans do"),
        (f'"""{"word " * 31}."""\n', "31 words in a sentence"),
    ],
)
def test_a_slip_in_code_is_found(source: str, problem: str) -> None:
    assert [each.problem for each in of_python(source)] == [problem]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("One sentence. Another one.", "one sentence per line"),
        ("A line that stops in\nthe middle.", "a line ends where its sentence ends"),
        ("| it is told | a |", "write print, report, name, distinguish"),
    ],
)
def test_a_slip_in_a_document_is_found(text: str, problem: str) -> None:
    assert [each.problem for each in of_markdown(text)] == [problem]


def test_code_and_names_in_documents_are_left_alone() -> None:
    assert list(of_markdown("Use `personalised`.\n\n```\nwhat it tells\n```\n")) == []
