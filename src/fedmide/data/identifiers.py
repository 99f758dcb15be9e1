"""Patterns that often mean a person: e-mail addresses, phone numbers, record numbers, dates of birth.

A match is a warning, never a promise. A name, a rare disease or a place can identify a person too, and matches nothing
here. A match may be harmless. Only the kinds that occur are reported, never the text that matched.
"""

import re

_DAY = r"(?:\d{1,4}[./-]\d{1,2}[./-]\d{2,4}"


_MONTH = r"(?:jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)[a-z]*\.?"


_DATE = rf"{_DAY}|\d{{1,2}}(?:st|nd|rd|th)?\s+{_MONTH},?\s+\d{{4}}|{_MONTH}\s+\d{{1,2}}(?:st|nd|rd|th)?,?\s+\d{{4}})"


_NUMBERED = (
    r"mrn|nhs|ssn|(?:medical\s+record|hospital|patient|record|case|insurance|accession|admission)\s+(?:id|no|number)"
)


_RECORD_NUMBER = (
    rf"\b(?:{_NUMBERED})\b\.?\s*(?:no\.?|number)?\s*[:#=]?\s*[a-z]{{0,3}}-?\d[\d -]{{3,}}"
    r"|\b\d{3}-\d{2}-\d{4}\b"
)


_BIRTH = r"\b(?:d\.?o\.?b\b\.?|born|birth\s?da(?:te|y)|date\s+of\s+birth)[\s:,=]*(?:(?:is|was|on)\s+)*" + _DATE


PATTERNS: dict[str, re.Pattern[str]] = {
    "e-mail address": re.compile(r"(?<![\w.+-])[\w.+-]{1,64}@[\w-]+(?:\.[\w-]+)+"),
    "record number": re.compile(_RECORD_NUMBER, re.IGNORECASE),
    "date of birth": re.compile(_BIRTH, re.IGNORECASE),
}
"""The pattern of each kind. `_has_phone` finds phone numbers."""


PHONE = "phone number"


KINDS = (*PATTERNS, PHONE)


_GROUPS = re.compile(r"(?<![\w./-])(?:\+\d{1,3}[ .-]?)?(?:\(\d{2,5}\)|\d{2,5})(?:[ .-]?\d{2,8}){1,4}(?![\w/-])")


_ISO_DATE = re.compile(r"\d{4}-\d{2}-\d{2}|\d{1,2}\.\d{1,2}\.\d{4}")


def kinds(text: str) -> frozenset[str]:
    """The kinds of identifiers that the text seems to hold.

    >>> sorted(kinds("Call (555) 123-4567 or write to j.doe@clinic.org; MRN: 00123456, born 3 May 1961."))
    ['date of birth', 'e-mail address', 'phone number', 'record number']
    >>> sorted(kinds("BP 120/80, pulse 72, HP:0001250, 2020-01-31, ICD J45.909, 12 to 24 mg"))
    []
    """
    found = {kind for kind, pattern in PATTERNS.items() if pattern.search(text)}
    return frozenset(found | {PHONE} if _has_phone(text) else found)


def _has_phone(text: str) -> bool:
    """True if groups of digits look like a phone number: with + or brackets, or ten or eleven digits in groups."""
    for match in _GROUPS.finditer(text):
        written = match[0]
        digits = sum(character.isdigit() for character in written)
        marked = written.startswith("+") or "(" in written
        grouped = re.search(r"\d[ .-]\d", written) is not None
        if not _ISO_DATE.search(written) and ((marked and 9 <= digits <= 15) or (grouped and digits in (10, 11))):
            return True
    return False
