"""The Human Phenotype Ontology's files, read into small frozen facts: phenotypes and diseases.

Nothing is drawn or worded here: `tasks` and `sites` do that.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

PHENOTYPIC_ABNORMALITY, INHERITANCE, ONSET = "HP:0000118", "HP:0000005", "HP:0003674"


# The middle of the range that each HPO frequency term stands for.
FREQUENCY_TERMS = {
    "HP:0040280": 1.0,
    "HP:0040281": 0.9,
    "HP:0040282": 0.55,
    "HP:0040283": 0.17,
    "HP:0040284": 0.02,
    "HP:0040285": 0.0,
}


UNKNOWN_FREQUENCY = 0.5


# Columns of phenotype.hpoa.
QUALIFIER, PHENOTYPE, FREQUENCY, ASPECT = 2, 3, 7, 10


@dataclass(frozen=True, slots=True)
class Phenotype:
    """A phenotypic abnormality. `systems`: its top-level groups. `diseases`: the number of diseases that show it."""

    id: str
    name: str
    definition: str
    lay_names: tuple[str, ...]
    systems: tuple[str, ...]
    diseases: int


@dataclass(frozen=True, slots=True)
class Disease:
    """An OMIM disease. `findings`: names of phenotypes, the frequent ones first, of equals the specific ones."""

    id: str
    name: str
    findings: tuple[str, ...]
    inheritance: tuple[str, ...]
    onset: tuple[str, ...]
    genes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Term:
    name: str
    definition: str
    lay_names: tuple[str, ...]
    parents: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Annotations:
    """The rows of one disease. `frequencies`: phenotype id -> the highest frequency stated."""

    name: str
    frequencies: dict[str, float]
    inheritance: dict[str, None]
    course: dict[str, None]


def read(terms: Path, annotations: Path, genes: Path) -> tuple[tuple[Phenotype, ...], tuple[Disease, ...]]:
    """All phenotypes and all OMIM diseases, by id, from hp.obo, phenotype.hpoa and genes_to_phenotype.txt."""
    known = _read_terms(terms)
    rows = _read_annotations(annotations)
    counts = Counter(phenotype for disease in rows.values() for phenotype in disease.frequencies)
    return tuple(_phenotypes(known, counts)), tuple(_diseases(known, rows, counts, _read_genes(genes)))


def release(terms: Path) -> str:
    """The ontology's release, from hp.obo."""
    with terms.open(encoding="utf-8") as lines:
        return next((line.split()[1] for line in lines if line.startswith("data-version:")), "unknown")


def clean(text: str) -> str:
    r"""The text of an OBO string, without escapes and with single spaces.

    >>> clean(r'A caved-in (\"excavatum\")\n  chest.')
    'A caved-in ("excavatum") chest.'
    """
    unescaped = re.sub(r"\\(.)", lambda match: {"n": " ", "t": " "}.get(match[1], match[1]), text)
    return " ".join(unescaped.split())


@cache  # 140,000 annotations state some 4,000 different frequencies
def frequency(text: str) -> float:
    """The fraction of patients that an annotation states: as a ratio, a percentage, an HPO term or not at all.

    >>> frequency("3/4"), frequency("45%"), frequency("HP:0040281"), frequency("")
    (0.75, 0.45, 0.9, 0.5)
    """
    if text in FREQUENCY_TERMS:
        return FREQUENCY_TERMS[text]
    if ratio := re.fullmatch(r"(\d+)/([1-9]\d*)", text):
        return int(ratio[1]) / int(ratio[2])
    if percentage := re.fullmatch(r"(\d+(?:\.\d+)?)%", text):
        return float(percentage[1]) / 100
    return UNKNOWN_FREQUENCY


def _read_terms(path: Path) -> dict[str, _Term]:
    terms = {}
    for stanza in path.read_text(encoding="utf-8").split("\n\n"):
        if not stanza.lstrip().startswith("[Term]") or "is_obsolete: true" in stanza:
            continue
        values: dict[str, list[str]] = defaultdict(list)
        for line in stanza.splitlines():
            key, _, value = line.partition(": ")
            values[key].append(value)
        terms[values["id"][0]] = _Term(
            name=clean(values["name"][0]),
            definition=next((_quoted(value) for value in values["def"]), ""),
            lay_names=tuple(_quoted(value) for value in values["synonym"] if '" EXACT layperson ' in value),
            parents=tuple(value.split(" ")[0] for value in values["is_a"]),
        )
    return terms


def _quoted(value: str) -> str:
    match = re.match(r'"((?:[^"\\]|\\.)*)"', value)
    return clean(match[1]) if match else ""


def _phenotypes(terms: Mapping[str, _Term], counts: Mapping[str, int]) -> Iterator[Phenotype]:
    known: dict[str, frozenset[str]] = {}
    for identifier in sorted(terms):
        term = terms[identifier]
        groups = _groups(identifier, terms, known) - {identifier}
        if groups:
            names = tuple(sorted(terms[group].name for group in groups))
            count = counts.get(identifier, 0)
            yield Phenotype(identifier, term.name, term.definition, term.lay_names, names, count)


def _groups(identifier: str, terms: Mapping[str, _Term], known: dict[str, frozenset[str]]) -> frozenset[str]:
    """The children of "Phenotypic abnormality" above a term, or the term itself if it is one. `known` is a cache."""
    if identifier not in known:
        parents = terms[identifier].parents if identifier in terms else ()
        above = [_groups(parent, terms, known) for parent in parents]
        own = frozenset({identifier} if PHENOTYPIC_ABNORMALITY in parents else ())
        known[identifier] = own.union(*above)
    return known[identifier]


def _read_annotations(path: Path) -> dict[str, _Annotations]:
    """Disease -> its annotations. Only OMIM's, because ORPHA and DECIPHER list the same diseases again."""
    diseases: dict[str, _Annotations] = {}
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            if not line.startswith("OMIM:"):
                continue
            row = line.split("\t")
            disease = diseases.setdefault(row[0], _Annotations(row[1], {}, {}, {}))
            if row[ASPECT] == "P" and row[QUALIFIER] != "NOT":
                stated = max(frequency(row[FREQUENCY]), disease.frequencies.get(row[PHENOTYPE], 0.0))
                disease.frequencies[row[PHENOTYPE]] = stated
            elif row[ASPECT] in ("I", "C"):
                (disease.inheritance if row[ASPECT] == "I" else disease.course)[row[PHENOTYPE]] = None
    return diseases


def _read_genes(path: Path) -> dict[str, set[str]]:
    genes: dict[str, set[str]] = defaultdict(set)
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            _, symbol, *_, disease = line.rstrip("\n").split("\t")
            genes[disease].add(symbol)
    return genes


def _diseases(
    terms: Mapping[str, _Term],
    annotations: Mapping[str, _Annotations],
    counts: Mapping[str, int],
    genes: Mapping[str, set[str]],
) -> Iterator[Disease]:
    for identifier in sorted(annotations):
        rows = annotations[identifier]
        seen = [(-part, counts[phenotype], phenotype) for phenotype, part in rows.frequencies.items() if part > 0]
        yield Disease(
            id=identifier,
            # OMIM's "@" marks a place where a name must not be broken.
            name=clean(rows.name.replace("@", "")),
            findings=tuple(terms[phenotype].name for _, _, phenotype in sorted(seen) if phenotype in terms),
            inheritance=_names_below(INHERITANCE, rows.inheritance, terms, " inheritance"),
            onset=_names_below(ONSET, rows.course, terms, " onset"),
            genes=tuple(sorted(genes.get(identifier, ()))),
        )


def _names_below(root: str, identifiers: Iterable[str], terms: Mapping[str, _Term], ending: str) -> tuple[str, ...]:
    """The names of the terms below a root, by id. `ending` leaves out qualifiers such as "Sporadic"."""
    known = (identifier for identifier in sorted(identifiers) if identifier in terms)
    below = (identifier for identifier in known if _is_below(root, identifier, terms))
    return tuple(terms[identifier].name for identifier in below if terms[identifier].name.endswith(ending))


def _is_below(root: str, identifier: str, terms: Mapping[str, _Term]) -> bool:
    parents = terms[identifier].parents
    return root in parents or any(_is_below(root, parent, terms) for parent in parents)
