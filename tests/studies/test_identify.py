"""The identification bench runs the method as it is, and compares with the truth only afterwards."""

from pathlib import Path
from typing import Any

import pytest

from fedmide.cli.shared import preset
from fedmide.config import Config, apply_overrides, load, parse
from fedmide.config.knobs import for_method
from fedmide.data.records import Record, client_data
from fedmide.errors import ConfigError
from fedmide.studies import identify
from fedmide.studies.known_sites import KnownSites

pytestmark = pytest.mark.usefixtures("one_thread")

ORGANS = ("liver", "heart", "kidney", "lung", "skin", "brain")
SIZES = identify.Sizes(clients=2, records=6)


def known_sites(turned: bool = False) -> KnownSites:
    """Two sites; `turned`: the other half of the same records is said to be personal."""
    clients, personal = [], {}
    for site in "ab":
        plain = [Record(f"Say {organ}.", f"It is the {organ}.") for organ in ORGANS]
        own = [Record(f"Name {organ}.", f"{organ.upper()} {site * 4}") for organ in ORGANS]
        client = client_data(site, [*plain, *own])
        clients.append(client)
        half = client.training[:6] if turned else client.training[6:]
        personal[site] = frozenset(record.id for record in half)
    return KnownSites(tuple(clients), personal)


@pytest.fixture
def config(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    monkeypatch.setenv("FEDMIDE_CACHE", str(tiny_folder.parent))
    monkeypatch.setattr(identify, "build", lambda *args: known_sites())
    settings = {
        "model": {"name": "tiny-random", "dtype": "float32", "cutoff": 256},
        "training": {"batch_size": 4, "learning_rate": 1e-2},
        "federation": {"rounds": 2},
        "prompt": {"template": "plain"},
        "lora": {"targets": "all-linear"},
        "evaluation": {"bootstrap": 100},
        "runtime": {"threads": 1},
    }
    return parse(settings)


def test_the_method_sees_no_truth(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    first = identify.identify(config, "own-style", SIZES)
    monkeypatch.setattr(identify, "build", lambda *args: known_sites(turned=True))
    turned = identify.identify(config, "own-style", SIZES)
    for name in "ab":
        one, other = first["clients"][name], turned["clients"][name]
        for moment in ("after_warmup", "after_rounds"):
            assert one[moment]["personal"]["number"] == other[moment]["personal"]["number"]
            for positions, rivals in one[moment]["rivals"].items():
                for rival, figures in rivals.items():
                    assert figures["auroc"] == pytest.approx(1 - other[moment]["rivals"][positions][rival]["auroc"])
        assert one["enrolled"]["number"] == other["enrolled"]["number"]


@pytest.mark.parametrize("positions", ["all", "response"])
def test_the_score_in_the_ledger_is_the_rival_of_its_name(config: Config, positions: str) -> None:
    """The witness sees the same adapters as the sites: its ratio ranks as the ledger's score does."""
    given = parse(apply_overrides(for_method(config.model_dump(), config.method), [f"scoring.positions={positions}"]))
    figures = identify.identify(given, "own-style", SIZES)
    assert figures["protocol"]["scoring_positions"] == positions
    for client in figures["clients"].values():
        before = client["after_warmup"]
        assert before["method"] == before["rivals"][positions]["ratio"]
        assert before["method"]["num_records"] == 12


def test_the_last_rounds_adapters_and_sets_are_seen(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def spy(sites: dict[str, Any], *rest: Any) -> dict[str, Any]:
        seen.update(sites)
        return {}

    monkeypatch.setattr(identify, "summarize", spy)
    identify.identify(config, "own-style", SIZES)
    for site in seen.values():
        assert site.rounds.personal <= site.warmup.personal
        assert set(site.warmup.nlls) == {"all", "response"}
        for positions in ("all", "response"):
            assert site.warmup.nlls[positions].keys() == site.rounds.nlls[positions].keys()
            pairs = [site.warmup.nlls[positions], site.rounds.nlls[positions]]
            assert all(one[0].sum != two[0].sum for one, two in zip(*(pair.values() for pair in pairs), strict=True))
        assert len(site.warmup.scores) == 12


@pytest.mark.parametrize("override", ["warmup.rounds=0", "federation.rounds=0"])
def test_without_a_split_there_is_nothing_to_measure(config: Config, override: str) -> None:
    with pytest.raises(ConfigError, match="split in the first round after a warm-up"):
        identify.identify(
            parse(apply_overrides(for_method(config.model_dump(), config.method), [override])), "own-style", SIZES
        )


def test_another_method_is_named_whatever_its_rounds(config: Config) -> None:
    values = apply_overrides(for_method(config.model_dump(), "fedavg"), ["warmup.rounds=1"])
    with pytest.raises(ConfigError, match=r"method = 'fedavg': only fedmide .* Set method = \"fedmide\""):
        identify.identify(parse(values), "own-style", SIZES)


def test_the_preset_is_a_configuration() -> None:
    assert load(preset("identify")).warmup.rounds == 1
