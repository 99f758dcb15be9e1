"""The meaning and the remedy of each error: the page that ships with the package, with a section per class."""

from pathlib import Path

PAGE = Path(__file__).with_name("explanations.md")


def sections(page: str) -> dict[str, str]:
    """Each section of a page in Markdown, heading included, by its heading.

    >>> sections("# Errors\\n\\n## ConfigError\\n\\nOne.\\n\\n## DataError\\n\\nTwo.\\n")
    {'ConfigError': '## ConfigError\\n\\nOne.\\n', 'DataError': '## DataError\\n\\nTwo.\\n'}
    """
    texts = page.split("\n## ")[1:]
    return {text.split("\n", 1)[0]: f"## {text.rstrip()}\n" for text in texts}


def explanation(name: str) -> str:
    """The section of the page about an error; "" if there is none. The name may be in upper or lower case.

    >>> explanation("configerror").split("\\n")[0]
    '## ConfigError'
    """
    found = {heading.lower(): text for heading, text in sections(PAGE.read_text("utf-8")).items()}
    return found.get(name.lower(), "")
