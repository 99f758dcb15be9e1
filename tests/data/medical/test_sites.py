"""Sites made from medical packages: the knowledge read, the questions, the split, and the files written."""

import json
import os
import subprocess
import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import pytest

from fedmide.config.sections import FieldNames
from fedmide.data.check import check
from fedmide.data.files import read_folder
from fedmide.data.medical import knowledge, ontologies, tasks, vocabularies
from fedmide.data.medical import sites as medical
from fedmide.data.medical.knowledge import Knowledge
from fedmide.data.medical.tasks import Item
from fedmide.data.records import ClientData, Record, canonical_text
from fedmide.data.writing import FIELDS
from fedmide.errors import DataError, RunFolderError

SIZES = {"training": 48, "validation": 12, "test": 24}
PARTS = tuple(SIZES)


@pytest.fixture(scope="module")
def known() -> Knowledge:
    return knowledge.read()


@pytest.fixture(scope="module")
def sites(known: Knowledge) -> tuple[ClientData, ...]:
    """One client more than there are families, so that one family occurs twice."""
    return medical.assemble(known, seed=0, clients=9, sizes=SIZES)


@pytest.fixture(scope="module")
def asked(known: Knowledge) -> dict[str, list[Item]]:
    material = tasks.material(known)
    return {name: list(make(material)) for name, make in tasks.FAMILIES.items()}


def records_of(client: ClientData) -> tuple[Record, ...]:
    return client.training + client.validation + client.test


def is_common(record: Record) -> bool:
    return record.category.startswith("common-")


def response_to(items: list[Item], subject: str) -> str:
    (item,) = [item for item in items if item.subject == subject]
    return item.response


# Reading the packages


TERMS = r"""format-version: 1.2
data-version: hp/releases/2000-01-02

[Term]
id: HP:0000118
name: Phenotypic abnormality

[Term]
id: HP:1
name: Abnormality of the chest
is_a: HP:0000118 ! Phenotypic abnormality

[Term]
id: HP:2
name: Funnel chest
def: "A \"caved-in\"\n chest,  as seen." [https://example.org, PMID:1]
synonym: "Sunken chest" EXACT layperson []
synonym: "Pectus excavatum" EXACT []
synonym: "Chest" BROAD layperson []
is_a: HP:1 ! Abnormality of the chest

[Term]
id: HP:3
name: Gone
is_a: HP:1 ! Abnormality of the chest
is_obsolete: true

[Term]
id: HP:0000005
name: Mode of inheritance

[Term]
id: HP:4
name: Odd inheritance
is_a: HP:0000005 ! Mode of inheritance

[Term]
id: HP:5
name: Sporadic
is_a: HP:0000005 ! Mode of inheritance

[Term]
id: HP:6
name: Insidious onset

[Typedef]
id: has_part
name: has part
"""
ANNOTATIONS = (
    ("OMIM:1", "Chest disease", "", "HP:2", "r", "e", "", "1/4", "", "", "P", "b"),
    ("OMIM:1", "Chest disease", "", "HP:1", "r", "e", "", "3/4", "", "", "P", "b"),
    ("OMIM:1", "Chest disease", "", "HP:4", "r", "e", "", "", "", "", "I", "b"),
    ("OMIM:1", "Chest disease", "", "HP:5", "r", "e", "", "", "", "", "I", "b"),
    ("OMIM:1", "Chest disease", "", "HP:6", "r", "e", "", "", "", "", "C", "b"),
    ("OMIM:2", "6-@chest disease", "NOT", "HP:2", "r", "e", "", "", "", "", "P", "b"),
    ("OMIM:2", "6-@chest disease", "", "HP:1", "r", "e", "", "0/9", "", "", "P", "b"),
    ("ORPHA:3", "Chest disease", "", "HP:2", "r", "e", "", "", "", "", "P", "b"),
)
GENES = (("id", "symbol", "hpo", "name", "f", "disease"), ("1", "ABC1", "HP:2", "n", "-", "OMIM:1"))


def test_the_ontology_is_read_by_hand_made_files(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("hp.obo", "phenotype.hpoa", "genes.txt")]
    paths[0].write_text(TERMS, encoding="utf-8")
    for path, rows in zip(paths[1:], (ANNOTATIONS, GENES), strict=True):
        path.write_text("".join("\t".join(row) + "\n" for row in rows), encoding="utf-8")
    phenotypes, diseases = ontologies.read(*paths)
    assert ontologies.release(paths[0]) == "hp/releases/2000-01-02"
    # HP:1 is itself a top-level group, and counts for no disease in which 0 of 9 patients had it.
    assert phenotypes == (
        ontologies.Phenotype(
            "HP:2",
            "Funnel chest",
            'A "caved-in" chest, as seen.',
            ("Sunken chest",),
            ("Abnormality of the chest",),
            1,
        ),
    )
    assert diseases == (
        ontologies.Disease(
            "OMIM:1",
            "Chest disease",
            ("Abnormality of the chest", "Funnel chest"),
            ("Odd inheritance",),
            (),
            ("ABC1",),
        ),
        ontologies.Disease("OMIM:2", "6-chest disease", (), (), (), ()),
    )


def test_well_known_facts_are_found(known: Knowledge) -> None:
    hemoptysis = next(entry for entry in known.phenotypes if entry.id == "HP:0002105")
    assert hemoptysis.name == "Hemoptysis"
    assert hemoptysis.definition.startswith("Coughing up (expectoration) of blood")
    assert hemoptysis.lay_names == ("Coughing up blood",)
    assert hemoptysis.systems == ("Abnormality of the respiratory system",)
    marfan = next(entry for entry in known.diseases if entry.id == "OMIM:154700")
    assert (marfan.name, marfan.genes) == ("Marfan syndrome", ("FBN1",))
    assert marfan.inheritance == ("Autosomal dominant inheritance",)
    assert {"Ectopia lentis", "Arachnodactyly"} <= set(marfan.findings)
    stricture = next(entry for entry in known.codes if entry.code == "K22.2")
    assert stricture.description == "Esophageal obstruction"
    assert "Stricture of esophagus" in stricture.inclusion_terms
    assert "K22" not in {entry.code for entry in known.codes}


def test_diagnoses_given_as_objects_are_read_by_name(tmp_path: Path) -> None:
    path = tmp_path / "differentials.json"
    rows = [{"presentation": '"Target"', "differentials": ["A", {"name": "B", "likelihood": "rare"}, "A"]}]
    path.write_text(json.dumps(rows), encoding="utf-8")
    assert vocabularies.read_differentials(path) == (vocabularies.Differential("Target", "", "", ("A", "B")),)


def test_packages_that_are_missing_are_all_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knowledge, "FILES", {"a": ("one", "no_such_one", "x"), "b": ("two", "json", "no.file")})
    with pytest.raises(DataError) as caught:
        knowledge.locate()
    assert caught.value.problems == ("package one: found no x", "package two: found no no.file")


@pytest.mark.slow
def test_codes_equal_those_of_their_package(known: Knowledge) -> None:
    package = pytest.importorskip("simple_icd_10_cm")
    described = {entry.code: entry for entry in known.codes}
    nodes = [code for code in package.get_all_codes(with_dots=True) if package.is_category_or_subcategory(code)]
    # The package also makes codes with a seventh character. The classification only describes these.
    listed = {code for code in nodes if not package.is_extended_subcategory(code)}
    assert {code for code in listed if not listed & set(package.get_children(code))} == described.keys()
    for code in sorted(described):
        terms = tuple(" ".join(term.split()) for term in package.get_inclusion_term(code))
        assert terms == described[code].inclusion_terms
        assert " ".join(package.get_description(code).split()) == described[code].description


# Questions and answers


def test_known_questions_have_the_known_answers(asked: dict[str, list[Item]]) -> None:
    assert response_to(asked["disease-genes"], "Marfan syndrome") == "It is linked to variants in FBN1."
    assert response_to(asked["icd10-coding"], "Stricture of esophagus") == "K22.2, Esophageal obstruction."
    back = response_to(asked["icd10-coding"], "K22.2")
    assert back == "Esophageal obstruction, for example: Compression of esophagus."
    onset = response_to(asked["inheritance-onset"], "Huntington disease-like 1")
    assert onset.startswith("Autosomal dominant inheritance; ")
    marfan = [item for item in asked["diagnosis"] if item.response == "These findings fit Marfan syndrome."]
    assert [item.concept for item in marfan] == ["OMIM:154700"]
    aneurysm = response_to(asked["radiology"], "Abdominal Aortic Aneurysm (AAA)")
    assert aneurysm.startswith("A localized dilatation of the abdominal aorta exceeding 3 cm")
    mole = response_to(asked["radiology"], "Hydatidiform Mole (Complete) on ultrasound")
    assert "Snowstorm appearance" in mole


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Retinitis pigmentosa 12", "Retinitis pigmentosa 71"),
        ("Diamond-blackfan anemia 10", "Diamond-Blackfan anemia 3"),
        ("Ehlers-Danlos syndrome, classic type, 1", "Ehlers-Danlos syndrome, classic type, 2"),
        ("Pneumothorax (PTX)", "Pneumothorax"),
    ],
)
def test_types_of_one_disease_are_one_concept(one: str, other: str) -> None:
    assert tasks.plain_name(one) == tasks.plain_name(other)


def test_a_thing_that_two_vocabularies_name_is_one_concept(known: Knowledge) -> None:
    concepts = tasks.material(known).concepts
    assert concepts["pneumothorax"] == "HP:0002107"
    assert concepts["marfan syndrome"] == "OMIM:154700"
    assert concepts["gout"] == "HP:0001997"


def test_a_lay_wording_does_not_repeat_the_term(asked: dict[str, list[Item]]) -> None:
    for item in asked["lay-terms"]:
        wording = item.response.removeprefix("In plain words: ").removesuffix(".")
        assert wording.lower() != item.subject.lower()


# Making the sites


def test_every_part_has_exactly_the_size_asked_for(sites: tuple[ClientData, ...]) -> None:
    assert [client.name for client in sites] == [*tasks.FAMILIES, "phenotype-definitions-2"]
    for client in sites:
        assert {part: len(getattr(client, part)) for part in PARTS} == SIZES


def test_half_of_each_part_is_common_and_half_the_family_of_the_site(sites: tuple[ClientData, ...]) -> None:
    for client in sites:
        for part in PARTS:
            records = getattr(client, part)
            own = [record for record in records if not is_common(record)]
            assert {record.category for record in own} == {client.name.removesuffix("-2")}
            assert len(own) == len(records) / 2


def test_records_are_whole(sites: tuple[ClientData, ...]) -> None:
    for client in sites:
        records = records_of(client)
        assert len({(record.instruction, record.response) for record in records}) == len(records)
        assert len({record.id for record in records}) == len(records)
        for record in records:
            assert record.concept and record.id and record.category
            assert len(record.response.split()) >= 2 and len(record.response) <= 400
            assert record.response.endswith((".", "!", "?"))
            texts = (record.instruction, record.context, record.response)
            assert all(text == " ".join(text.split()) for text in texts)
            assert not any(mark in text for text in texts for mark in ("{", "}", "\\", "http", "PMID"))


def test_a_concept_is_in_one_part_over_all_sites(sites: tuple[ClientData, ...]) -> None:
    parts: defaultdict[str, set[str]] = defaultdict(set)
    for client in sites:
        for part in PARTS:
            for record in getattr(client, part):
                parts[record.concept].add(part)
    assert {len(found) for found in parts.values()} == {1}
    assert all(found == {medical.part_of(concept, seed=0)} for concept, found in parts.items())
    assert check(sites).leaks == ()


def test_common_concepts_are_known_to_many_sites_and_own_ones_to_one(sites: tuple[ClientData, ...]) -> None:
    holders: defaultdict[str, set[str]] = defaultdict(set)
    wordings: defaultdict[tuple[str, str], set[str]] = defaultdict(set)
    for client in sites:
        for record in client.training:
            holders[record.concept].add(client.name)
            wordings[record.concept, record.category].add(record.instruction)
    common = {record.concept for client in sites for record in client.training if is_common(record)}
    assert len(common) == SIZES["training"] // 2
    assert sum(len(holders[concept]) for concept in common) / len(common) > 4
    assert all(len(names) == 1 for concept, names in holders.items() if concept not in common)
    assert any(len(questions) > 1 for questions in wordings.values())


def test_a_seed_gives_the_same_sites_whatever_their_number(known: Knowledge, sites: tuple[ClientData, ...]) -> None:
    assert medical.assemble(known, seed=0, clients=3, sizes=SIZES) == sites[:3]


def test_another_seed_gives_other_sites(known: Knowledge, sites: tuple[ClientData, ...]) -> None:
    other = medical.assemble(known, seed=1, clients=9, sizes=SIZES)
    for one, another in zip(sites, other, strict=True):
        texts = {canonical_text(record) for record in one.training}
        assert len(texts & {canonical_text(record) for record in another.training}) < len(texts) / 4


def test_odd_and_empty_parts(known: Knowledge) -> None:
    sizes = {"training": 3, "validation": 0, "test": 1}
    (client,) = medical.assemble(known, seed=0, clients=1, sizes=sizes)
    assert [len(getattr(client, part)) for part in PARTS] == [3, 0, 1]
    assert sum(is_common(record) for record in client.training) == 1
    assert not is_common(client.test[0])


def test_every_shortage_is_named(known: Knowledge) -> None:
    few = replace(known, codes=known.codes[:500])
    with pytest.raises(DataError) as caught:
        medical.assemble(few, seed=0, clients=7, sizes={**SIZES, "validation": 60, "test": 100})
    assert len(caught.value.problems) == 2
    assert "site icd10-coding:" in caught.value.problems[0] and "expected 60" in caught.value.problems[0]


def test_sizes_out_of_range_are_all_named() -> None:
    with pytest.raises(DataError) as caught:
        medical.build(0, clients=0, training=0, validation=-1)
    assert [problem.split(" ")[0] for problem in caught.value.problems] == ["clients", "training", "validation"]


def test_build_assembles_what_it_reads(
    known: Knowledge, sites: tuple[ClientData, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(knowledge, "read", lambda: known)
    assert medical.build(0, clients=2) == sites[:2]


@pytest.mark.slow
def test_sites_do_not_depend_on_the_order_of_sets() -> None:
    program = "from fedmide.data.medical.sites import build; print(hash_of(build(0, 8, 6, 2, 2)))"
    program = "import hashlib; hash_of = lambda found: hashlib.sha256(repr(found).encode()).hexdigest()\n" + program
    digests = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": seed},
            check=True,
            capture_output=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(digests) == 1


# Writing the sites


def test_written_sites_are_read_back(sites: tuple[ClientData, ...], tmp_path: Path) -> None:
    folder = tmp_path / "new" / "sites"
    assert medical.write(sites, folder) == tuple(folder / client.name for client in sites)
    for client in sites:
        for part in PARTS:
            text = (folder / client.name / f"{part}.jsonl").read_text(encoding="utf-8")
            rows = [json.loads(line) for line in text.splitlines()]
            records = getattr(client, part)
            assert [list(row) for row in rows] == [list(FIELDS)] * len(records)
            assert [replace(Record(**row), id=record.id) for row, record in zip(rows, records, strict=True)] == list(
                records
            )
    assert {path.name for path in folder.iterdir()} == {*(client.name for client in sites), "SOURCES.md"}


def test_the_source_for_files_reads_what_is_written(sites: tuple[ClientData, ...], tmp_path: Path) -> None:
    medical.write(sites, tmp_path)
    found = {parts.name: parts for parts in read_folder(tmp_path, FieldNames())}
    assert found.keys() == {client.name for client in sites}
    for client in sites:
        read = found[client.name].training
        assert [canonical_text(record) for record in read] == [canonical_text(record) for record in client.training]


def test_letters_beyond_ascii_stay_readable(tmp_path: Path) -> None:
    client = ClientData("site", (Record("What is Ménière disease?", "An inner-ear disease."),))
    (folder,) = medical.write([client], tmp_path)
    assert "Ménière" in (folder / "training.jsonl").read_text(encoding="utf-8")


def test_sources_are_acknowledged_with_their_versions(tmp_path: Path) -> None:
    medical.write((), tmp_path)
    text = (tmp_path / "SOURCES.md").read_text(encoding="utf-8")
    for source in knowledge.sources():
        assert f"| {source.package} | {source.version} |" in text
    assert "Human Phenotype Ontology hp/releases/20" in text


def test_a_folder_that_is_in_use_is_refused_and_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "mine.txt"
    file.write_text("keep", encoding="utf-8")
    for place in (tmp_path, file):
        with pytest.raises(RunFolderError, match="new or an empty folder"):
            medical.write((), place)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"] and file.read_text(encoding="utf-8") == "keep"


def test_a_folder_below_a_file_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(RunFolderError, match="can't be written"):
        medical.write((), tmp_path / "file" / "sites")


def test_names_that_would_leave_the_folder_are_refused(tmp_path: Path) -> None:
    names = ("../out", "fine", "", ".hidden", "fine")
    with pytest.raises(DataError) as caught:
        medical.write([ClientData(name, ()) for name in names], tmp_path / "sites")
    assert len(caught.value.problems) == 4
    assert not (tmp_path / "sites").exists()
