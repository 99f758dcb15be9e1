"""Finds sentences that readers stumble over; `python -m tools.language [FILE ...]` prints each with its place.

The rules are those of CONTRIBUTING.md, as far as a program can check them. Python files are read for docstrings,
comments and texts; Markdown files for their prose, without code. Without arguments it reads the whole repository.
"""

import ast
import io
import re
import sys
import tokenize
import tomllib
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

MOST_WORDS = 30
"""The most words of a sentence; the aim is 25."""

QUESTION = re.compile(r"(What|How|Whether|Which|Where|Why|Who|Whom|Whose|When)\b")
"""First words of a docstring that promise a question and give no noun."""

UNITS = (
    "nats? tokens? records? files? steps? rounds? clients? sites? columns? rows? lines? folders? figures? values? "
    "bytes MB masks? objects?"
)
PER = "token client site second round record block run step seed core week day line value method pass batch minute"

IDIOMS: dict[str, str] = {
    r"\b(?:go|goes|going|gone|went) on\b": "resume or continue",
    r"\b(?:run|runs|ran|running) off\b": "diverge",
    r"\bmend(?:s|ed|ing)?\b": "fix",
    r"\bso many\b": "this many, at most, the number of",
    r"\bbesides?\b": "in addition to, next to, with",
    r"\banew\b": "again",
    r"\bwho(?:m)?ever\b": "name who",
    r"\b(?:tell|tells|told|telling)\b": "print, report, name, distinguish",
    r"\bhears? (?:of|about|what|it|one)\b": "receive, be notified",
    r"\bmakes? of\b": "name the thing",
    r"\b(?:parted|unparted)\b": "split",
    r"\bfor the eyes of\b": "only for",
    r"\b(?:that|what|which) is to be\b": "name the thing",
    r"(?<!there )(?<!where )\bis no (?!longer\b)": "is not a",
    rf"\b(?:{UNITS.replace(' ', '|')}) an? (?:{PER.replace(' ', '|')})\b": "per",
}
"""Words that readers stumble over, and what to write instead."""

BRITISH = re.compile(
    r"\b\w*(?:"
    r"personalis|optimis|initialis|normalis|summaris|organis|recognis|serialis|quantis|minimis|maximis|generalis|"
    r"tokenis|randomis|utilis|visualis|standardis|synchronis|parallelis|specialis|finalis|prioritis|memoris|"
    r"behaviour|colour|neighbour|favour|labelled(?!by)|labelling|modelling|cancelled|travelled|travelling|analyse[sd]?\b|"
    r"catalogue|artefact|judgement|licence|defence|grey\b|centre"
    r")\w*",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Finding:
    """One stumbling place: the line where it begins, what is wrong, and the words."""

    line: int
    problem: str
    words: str


def texts_of_python(source: str) -> Iterator[tuple[int, str]]:
    """Docstrings, texts with a blank in them, and comments, each with its first line.

    >>> list(texts_of_python('x = "two words"  # why'))
    [(1, 'two words'), (1, 'why')]
    """
    yield from sorted((*_literals(source), *_comments(source)))


def _literals(source: str) -> Iterator[tuple[int, str]]:
    joined: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.JoinedStr):
            joined.update(id(part) for part in node.values)
            parts = [part.value if isinstance(part, ast.Constant) else "X" for part in node.values]
            text = "".join(map(str, parts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in joined:
            text = node.value
        else:
            continue
        if " " in text.strip() and not _is_code(text):
            yield node.lineno, text


def _is_code(text: str) -> bool:
    r"""True for several lines of Python or TOML.

    >>> _is_code("import x\nx.close()"), _is_code("seed = 3\n[data]"), _is_code("Two lines\nof prose.")
    (True, True, False)
    """
    for read in (ast.parse, tomllib.loads):
        with suppress(SyntaxError, ValueError):
            read(text)
            return text.strip().count("\n") > 0
    return False


def _comments(source: str) -> Iterator[tuple[int, str]]:
    """Comments; lines of them below each other are one text."""
    lines: list[str] = []
    first = last = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT:
            continue
        row, text = token.start[0], token.string.lstrip("# ")
        if lines and row == last + 1 and token.line.lstrip().startswith("#"):
            lines.append(text)
        else:
            if lines:
                yield first, "\n".join(lines)
            lines, first = [text], row
        last = row
    if lines:
        yield first, "\n".join(lines)


def docstrings(source: str) -> Iterator[tuple[int, str]]:
    """Every text that stands alone as a statement: of modules, classes, functions and, below them, of names.

    >>> list(docstrings('x = 1\\n"The first."'))
    [(2, 'The first.')]
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.lineno, node.value.value


def names_of_tests(source: str) -> Iterator[tuple[int, str]]:
    """The names of test functions as words.

    >>> list(names_of_tests("def test_one_and_one(): ..."))
    [(1, 'one and one')]
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            yield node.lineno, node.name.removeprefix("test_").replace("_", " ")


def prose_of_markdown(text: str) -> Iterator[tuple[int, str, bool]]:
    """The lines of prose, each with its number, and whether it is of a paragraph or list (not a heading or table).

    Code, links' targets and code spans are left out.

    >>> list(prose_of_markdown("# A\\n```\\ncode\\n```\\nSee [it](b.md).\\n"))
    [(1, 'A', False), (5, 'See it.', True)]
    """
    fenced = included = False
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith(("```", "~~~")):
            fenced = not fenced
            continue
        included = line.startswith(":::") or (included and bool(line.strip()))  # a module's page, and its options
        if included:
            continue
        plain = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", re.sub(r"`[^`]*`", "CODE", line)).strip()
        if fenced or not plain or set(plain) <= set("|-: "):
            continue
        in_table, heading = plain.startswith("|"), plain.startswith("#")
        yield number, plain.lstrip("#> ").strip(), not (in_table or heading)


def sentences(text: str) -> list[str]:
    """The sentences of a text. A blank line, an item of a list and a semicolon end one too.

    >>> sentences("One (two). Three; four, e.g. five.")
    ['One (two).', 'Three', 'four, e.g. five.']
    """
    blocks = re.split(r"\n\s*\n|\n\s*[-*|] |\n\s*\d+\. |\n {4,}|;\s|:\s*\n", text)
    parts = [re.split(r"(?<=[.!?])[)\"'*]*\s+(?=[A-Z0-9`*(\[\"])", " ".join(block.split())) for block in blocks]
    return [part.strip() for block in parts for part in block if part.strip()]


def num_words(sentence: str) -> int:
    """Words with a letter in them.

    >>> num_words("Two words - 3 + 4")
    2
    """
    return sum(any(letter.isalpha() for letter in word) for word in sentence.split())


def wording(text: str, line: int) -> Iterator[Finding]:
    """Idioms and British spellings of a text that begins at a line."""
    flat = re.sub(r"``?[^`]*``?", "CODE", text)
    for pattern, better in IDIOMS.items():
        for found in re.finditer(pattern, flat, re.IGNORECASE):
            yield Finding(line + flat.count("\n", 0, found.start()), f"write {better}", found[0])
    for found in BRITISH.finditer(flat):
        yield Finding(line + flat.count("\n", 0, found.start()), "spell it as Americans do", found[0])


def length(text: str, line: int) -> Iterator[Finding]:
    """Sentences with more than `MOST_WORDS` words."""
    for sentence in sentences(text):
        if num_words(sentence) > MOST_WORDS:
            yield Finding(line, f"{num_words(sentence)} words in a sentence", sentence[:60])


def of_python(source: str) -> Iterator[Finding]:
    """Stumbling places of a Python file."""
    for line, text in docstrings(source):
        if found := QUESTION.match(text.strip()):
            yield Finding(line, "a docstring begins with a noun or a verb", found[0])
    for line, text in names_of_tests(source):
        if found := QUESTION.match(text.capitalize()):
            yield Finding(line, "a test's name begins with a noun or a verb", found[0])
        yield from wording(text, line)
    for line, text in texts_of_python(source):
        yield from wording(text, line)
        yield from length(text, line)


def of_markdown(text: str, wrapped: bool = True) -> Iterator[Finding]:
    """Stumbling places of a Markdown file. `wrapped`: each line of a paragraph must be one sentence."""
    for number, line, is_paragraph in prose_of_markdown(text):
        yield from wording(line, number)
        for cell in line.strip("|").split("|"):
            yield from length(cell, number)
        if wrapped and is_paragraph:
            yield from _wrapping(line, number)


def _wrapping(line: str, number: int) -> Iterator[Finding]:
    text = re.sub(r"^(?:[-*] |\d+\. )", "", line)
    if len(re.split(r"(?<=[a-z0-9)`\"][.!?])\s+(?=[A-Z`\[])", text)) > 1:
        yield Finding(number, "one sentence per line", text[:60])
    if not re.search(r"[.!?:;,)*\"|]$", text) and not re.match(r"[-*] |\d+\. |!|<", line):
        yield Finding(number, "a line ends where its sentence ends", text[-40:])


def of_file(path: Path) -> list[Finding]:
    """Stumbling places of a file, by line. Pages that are generated keep the lines of their sources."""
    text = path.read_text("utf-8")
    if path.suffix == ".md":
        found = of_markdown(text, wrapped=path.name not in GENERATED)
    elif path.suffix == ".py":
        found = of_python(text)
    else:
        found = wording(text, 1)
    return sorted(set(found), key=lambda each: (each.line, each.problem))


OTHERS = (
    *("pyproject.toml", "mkdocs.yml", "CITATION.cff", "Makefile", ".ci/*", "examples/*.toml", "docs/*.svg"),
    *("src/fedmide/cli/presets/*.toml", "src/fedmide/runs/*.j2", "src/fedmide/report/page/report*"),
)
"""Files that are neither Python nor Markdown: their words are checked, not their sentences."""


GENERATED = ("cli.md", "configuration.md", "errors.md")


def files() -> Iterator[Path]:
    """The files whose language is checked: all but the test of this module, which quotes slips."""
    yield from sorted(ROOT.glob("*.md"))
    yield from sorted((ROOT / "docs").rglob("*.md"))
    yield from sorted(path for pattern in OTHERS for path in ROOT.glob(pattern))
    for folder in ("src", "examples", "tools", "bench", "tests"):
        yield from sorted(path for path in (ROOT / folder).rglob("*.py") if path.name != "test_language.py")


def main(names: Iterable[str] = ()) -> int:
    """Prints what was found; 1 if there was any."""
    found = False
    for path in [Path(name) for name in names] or files():
        for each in of_file(path):
            found = True
            sys.stdout.write(f"{path}:{each.line}: {each.problem}: {each.words}\n")
    return int(found)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
