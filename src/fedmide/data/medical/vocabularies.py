"""ICD-10-CM and a radiology dictionary, read into small frozen facts: codes, imaging terms, differentials."""

import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree


@dataclass(frozen=True, slots=True)
class Code:
    """An ICD-10-CM code without subdivisions, and terms that are coded with it."""

    code: str
    description: str
    inclusion_terms: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ImagingTerm:
    """A pathology with its definition (may be empty) and its findings by modality."""

    name: str
    definition: str
    findings: tuple[tuple[str, tuple[str, ...]], ...]


@dataclass(frozen=True, slots=True)
class Differential:
    """An imaging presentation and its possible diagnoses."""

    presentation: str
    modality: str
    region: str
    diagnoses: tuple[str, ...]


def read_codes(path: Path) -> tuple[Code, ...]:
    """The codes without subdivisions, in the classification's order, from its tabular XML."""
    codes = []
    for _, node in ElementTree.iterparse(path):
        if node.tag == "diag":
            if node.find("diag") is None:
                codes.append(_code(node))
            # The whole tree is so large that garbage collection would take longer than reading it.
            node.clear()
    return tuple(codes)


def read_imaging(concepts: Path, findings: Path) -> tuple[ImagingTerm, ...]:
    """The pathologies by name, with their findings by modality."""
    pathologies = [entry for entry in _entries(concepts) if entry.get("concept_type") == "pathology"]
    definitions = {_field(entry, "name"): _field(entry, "definition") for entry in pathologies}
    # Dictionaries instead of sets keep the order of the file.
    seen: dict[str, dict[str, dict[str, None]]] = defaultdict(lambda: defaultdict(dict))
    for entry in _entries(findings):
        seen[_field(entry, "pathology_name")][_field(entry, "modality")][_field(entry, "name")] = None
    names = sorted((definitions.keys() | seen.keys()) - {""})
    return tuple(ImagingTerm(name, definitions.get(name, ""), _by_modality(seen[name])) for name in names)


def read_differentials(path: Path) -> tuple[Differential, ...]:
    """The imaging presentations, sorted, with their differential diagnoses."""
    found = [_differential(entry) for entry in _entries(path)]
    return tuple(sorted(found, key=lambda entry: (entry.presentation, entry.region, entry.modality)))


def _code(node: ElementTree.Element) -> Code:
    group = node.find("inclusionTerm")
    terms = () if group is None else tuple(_plain(note.text or "") for note in group.iter("note"))
    return Code(node.findtext("name", ""), _plain(node.findtext("desc", "")), terms)


def _by_modality(findings: Mapping[str, Mapping[str, None]]) -> tuple[tuple[str, tuple[str, ...]], ...]:
    return tuple((modality, tuple(names)) for modality, names in sorted(findings.items()) if modality)


def _differential(entry: Mapping[str, Any]) -> Differential:
    # A few entries give a diagnosis as an object, with its likelihood. All others give its name.
    given = entry.get("differentials") or ()
    names = (_field(item, "name") if isinstance(item, dict) else _plain(item) for item in given)
    return Differential(
        presentation=_field(entry, "presentation").strip('"'),
        modality=_field(entry, "modality"),
        region=_field(entry, "body_region"),
        diagnoses=tuple(dict.fromkeys(names)),
    )


def _entries(path: Path) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    return entries


def _field(entry: Mapping[str, Any], name: str) -> str:
    return _plain(entry.get(name) or "")


def _plain(text: str) -> str:
    return " ".join(text.split())
