"""What each error means and what to do about it: the page that ships with the package, in sections by class."""

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
    """What the page says of an error, whatever the case of its name; "" where it says nothing.

    >>> explanation("configerror").split("\\n")[0]
    '## ConfigError'
    """
    found = {heading.lower(): text for heading, text in sections(PAGE.read_text("utf-8")).items()}
    return found.get(name.lower(), "")
