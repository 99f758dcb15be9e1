"""Questions and answers made from medical facts, one function per family of tasks.

The wording of a question is drawn elsewhere. An item that would make a poor record is left out here: a long answer, a
wording that repeats the term, a broken definition. A concept is the subject of an item: an HPO or OMIM id, an ICD-10-CM
category, or an imaging term. Vocabularies that name the same thing share its concept.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

from fedmide.data.medical import wordings
from fedmide.data.medical.knowledge import Knowledge
from fedmide.data.medical.ontologies import Disease, Phenotype
from fedmide.data.medical.vocabularies import Code, Differential, ImagingTerm

MAX_RESPONSE_CHARACTERS = 400


MAX_SUBJECT_CHARACTERS = 100


# Sites have in common the phenotypes that most diseases show, at most this many.
COMMON_PHENOTYPES = 600


MODALITIES = {
    "CT": "CT",
    "MRI": "MRI",
    "US": "ultrasound",
    "XR": "radiography",
    "NM": "nuclear medicine",
    "PET": "PET",
    "Mammography": "mammography",
}


@dataclass(frozen=True, slots=True)
class Item:
    """One possible record: its family (`category`), its subject, the wordings to choose from, and the answer."""

    category: str
    concept: str
    questions: tuple[str, ...]
    subject: str
    response: str
    context: str = ""


@dataclass(frozen=True, slots=True)
class Material:
    """Knowledge, sorted for use.

    `concepts`: plain name -> concept. `common`: the phenotypes that sites have in common. `rest`: other phenotypes.
    Phenotypes that no disease shows are in neither: most of them only fill a scheme, such as one term per bone.
    """

    knowledge: Knowledge
    concepts: Mapping[str, str]
    common: tuple[Phenotype, ...]
    rest: tuple[Phenotype, ...]


def material(knowledge: Knowledge) -> Material:
    """The knowledge with its concepts named and its most common phenotypes set apart."""
    candidates = [entry for entry in knowledge.phenotypes if _is_fit_for_all(entry)]
    ranked = sorted(candidates, key=lambda entry: (-entry.diseases, entry.id))
    common = tuple(ranked[:COMMON_PHENOTYPES])
    taken = {entry.id for entry in common}
    rest = tuple(entry for entry in knowledge.phenotypes if entry.diseases and entry.id not in taken)
    return Material(knowledge, _concepts(knowledge), common, rest)


def plain_name(name: str) -> str:
    """The name that two vocabularies, or two types of one disease, have in common.

    >>> plain_name("Retinitis pigmentosa 12"), plain_name("Charcot-Marie-Tooth disease, axonal, type 2K")
    ('retinitis pigmentosa', 'charcot-marie-tooth disease axonal')
    >>> plain_name("Abdominal Aortic Aneurysm (AAA)")
    'abdominal aortic aneurysm'
    """
    lowered = re.sub(r"\([^)]*\)", " ", name.lower())
    untyped = re.sub(r"[, ]+(type |group )?(\d+[a-z]{0,2}|[ivx]+[a-z]?)\s*$", "", lowered)
    return " ".join(untyped.replace(",", " ").split())


def common_items(given: Material) -> Iterator[Item]:
    """Definitions, lay wordings and systems of the phenotypes that sites have in common, three items per phenotype."""
    yield from definitions(given.common, "common-definitions")
    yield from lay_terms(given.common, "common-lay-terms")
    for entry in given.common:
        yield Item("common-systems", entry.id, wordings.SYSTEM, entry.name, system_answer(entry.systems))


def system_answer(systems: Sequence[str]) -> str:
    """The answer that names these systems."""
    return f"It belongs to: {'; '.join(systems)}."


def systems_of(answer: str) -> list[str]:
    """The systems that an answer of `system_answer` names.

    >>> systems_of(system_answer(["Abnormality of the eye", "Growth abnormality"]))
    ['Abnormality of the eye', 'Growth abnormality']
    """
    return answer.removeprefix("It belongs to: ").removesuffix(".").split("; ")


def definitions(phenotypes: Iterable[Phenotype], category: str = "phenotype-definitions") -> Iterator[Item]:
    """The phenotypes' definitions."""
    for entry in phenotypes:
        if _is_defined(entry):
            yield Item(category, entry.id, wordings.DEFINITION, entry.name, _sentence(entry.definition))


def lay_terms(phenotypes: Iterable[Phenotype], category: str = "lay-terms") -> Iterator[Item]:
    """The phenotypes in everyday words, if these differ from the term."""
    for entry in phenotypes:
        if plain := _lay_wordings(entry):
            yield Item(category, entry.id, wordings.LAY_TERM, entry.name, f"In plain words: {'; '.join(plain)}.")


def disease_phenotypes(given: Material) -> Iterator[Item]:
    """The five foremost findings of a disease."""
    for disease, concept in _diseases(given):
        if len(disease.findings) >= 3:
            response = f"{'; '.join(disease.findings[:5])}."
            yield Item("disease-phenotypes", concept, wordings.FINDINGS, disease.name, response)


def diagnosis(given: Material) -> Iterator[Item]:
    """The disease with two findings in the question and up to four more in the context."""
    for disease, concept in _diseases(given):
        if len(disease.findings) >= 4:
            subject = " and ".join(disease.findings[:2])
            context = f"Further findings: {'; '.join(disease.findings[2:6])}."
            response = f"These findings fit {disease.name}."
            yield Item("diagnosis", concept, wordings.DIAGNOSIS, subject, response, context)


def inheritance_onset(given: Material) -> Iterator[Item]:
    """Inheritance and onset of a disease, if both are known and neither varies much."""
    for disease, concept in _diseases(given):
        if len(disease.inheritance) in (1, 2) and len(disease.onset) in (1, 2):
            response = f"{' or '.join(disease.inheritance)}; {' or '.join(disease.onset).lower()}."
            yield Item("inheritance-onset", concept, wordings.INHERITANCE, disease.name, response)


def disease_genes(given: Material) -> Iterator[Item]:
    """The genes of a disease, if there are at most three."""
    for disease, concept in _diseases(given):
        if 1 <= len(disease.genes) <= 3:
            response = f"It is linked to variants in {' or '.join(disease.genes)}."
            yield Item("disease-genes", concept, wordings.GENES, disease.name, response)


def icd10_coding(given: Material) -> Iterator[Item]:
    """Code and title for a diagnosis in words other than the title, and the diagnosis for a code."""
    for entry in given.knowledge.codes:
        concept = f"ICD10:{entry.code[:3]}"
        terms = [term for term in entry.inclusion_terms if _is_telling(term, entry)]
        for term in terms:
            yield Item("icd10-coding", concept, wordings.CODING, term, f"{entry.code}, {entry.description}.")
        if terms:
            response = f"{entry.description}, for example: {terms[0]}."
            yield Item("icd10-coding", concept, wordings.DECODING, entry.code, response)


def radiology(given: Material) -> Iterator[Item]:
    """Definitions and findings of imaging terms, and differential diagnoses."""
    for term in given.knowledge.imaging:
        yield from _imaging(term, given.concepts[plain_name(term.name)])
    for entry in given.knowledge.differentials:
        names = _distinct(entry.diagnoses)
        if len(names) >= 2:
            concept = given.concepts[plain_name(entry.presentation)]
            response = f"{'; '.join(names[:6])}."
            yield Item("radiology", concept, wordings.IMAGING_DIFFERENTIAL, _presentation(entry), response)


FAMILIES: Mapping[str, Callable[[Material], Iterator[Item]]] = {
    "phenotype-definitions": lambda given: definitions(given.rest),
    "lay-terms": lambda given: lay_terms(given.rest),
    "disease-phenotypes": disease_phenotypes,
    "diagnosis": diagnosis,
    "inheritance-onset": inheritance_onset,
    "disease-genes": disease_genes,
    "icd10-coding": icd10_coding,
    "radiology": radiology,
}


def by_concept(items: Iterable[Item], without: Iterable[str] = ()) -> dict[str, list[Item]]:
    """Concept -> its items that are short enough, without the concepts in `without`."""
    left_out = frozenset(without)
    grouped: dict[str, list[Item]] = {}
    for item in items:
        short = len(item.response) <= MAX_RESPONSE_CHARACTERS and len(item.subject) <= MAX_SUBJECT_CHARACTERS
        if short and len(item.context) <= MAX_RESPONSE_CHARACTERS and item.concept not in left_out:
            grouped.setdefault(item.concept, []).append(item)
    return grouped


def _concepts(knowledge: Knowledge) -> dict[str, str]:
    """Plain name -> concept. If several vocabularies have a name, it is the phenotype's, or else the disease's."""
    phenotypes = ((entry.name, entry.id) for entry in knowledge.phenotypes)
    diseases = ((entry.name, entry.id) for entry in knowledge.diseases)
    pathologies = (entry.name for entry in knowledge.imaging)
    presentations = (entry.presentation for entry in knowledge.differentials)
    imaging = ((name, f"RAD:{plain_name(name)}") for name in chain(pathologies, presentations))
    concepts: dict[str, str] = {}
    for name, concept in chain(phenotypes, diseases, imaging):
        concepts.setdefault(plain_name(name), concept)
    return concepts


def _diseases(given: Material) -> Iterator[tuple[Disease, str]]:
    """The diseases with a good name, with their concepts."""
    for disease in given.knowledge.diseases:
        if _is_well_named(disease):
            yield disease, given.concepts[plain_name(disease.name)]


def _is_well_named(disease: Disease) -> bool:
    """True if the name is current and complete. Some names are in capitals, doubtful, outdated or cut short."""
    name = disease.name
    cut = name.endswith((" and", " of", " or", " with"))
    return not (name.isupper() or "?" in name or cut or "mental retardation" in name.lower())


def _imaging(term: ImagingTerm, concept: str) -> Iterator[Item]:
    if term.definition:
        yield Item("radiology", concept, wordings.IMAGING_DEFINITION, term.name, _sentence(term.definition))
    for modality, given in term.findings:
        names = _distinct(given)
        if modality in MODALITIES and len(names) >= 2:
            subject = f"{term.name} on {MODALITIES[modality]}"
            yield Item("radiology", concept, wordings.IMAGING_FINDINGS, subject, f"{'; '.join(names[:5])}.")


def _distinct(names: Iterable[str]) -> list[str]:
    """The names without those that differ from an earlier one only in case."""
    first: dict[str, str] = {}
    for name in names:
        first.setdefault(name.casefold(), name)
    return list(first.values())


def _presentation(entry: Differential) -> str:
    modality = MODALITIES.get(entry.modality, entry.modality)
    return f"{entry.presentation} ({entry.region.lower()}, {modality})"


def _is_fit_for_all(entry: Phenotype) -> bool:
    return _is_defined(entry) and bool(_lay_wordings(entry)) and len(entry.systems) <= 2


def _is_defined(entry: Phenotype) -> bool:
    """True if the definition is a complete text of its own. Some begin in the middle of a word or cite papers."""
    text = entry.definition
    cites = any(mark in text for mark in ("PMID", "http", "["))
    return len(text.split()) >= 5 and not text[0].islower() and not cites and len(text) < MAX_RESPONSE_CHARACTERS


def _lay_wordings(entry: Phenotype) -> list[str]:
    """Up to two lay names with words that the term itself does not have."""
    # Of names that differ only in plurals or order, the first is kept.
    names = {_words(name): name for name in reversed(entry.lay_names)}
    telling = [name for words, name in reversed(names.items()) if not words <= _words(entry.name)]
    return telling[:2]


def _is_telling(term: str, entry: Code) -> bool:
    vague = any(word in term for word in ("NOS", "NEC", "nspecified"))
    return not vague and len(term) <= 90 and not _words(term) <= _words(entry.description)


def _words(text: str) -> frozenset[str]:
    """The words of a text without case and plural, to compare two wordings."""
    return frozenset(word.removesuffix("s") for word in re.findall(r"[a-z0-9]+", text.lower()))


def _sentence(text: str) -> str:
    return text if text.endswith((".", "!", "?")) else f"{text}."
