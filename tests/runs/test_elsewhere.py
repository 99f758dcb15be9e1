"""A run whose sites are elsewhere, from its stages to their folders. Here the sites are threads without a transport."""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from fedmide.cli import flower
from fedmide.config import apply_overrides, load, parse, read_toml, to_toml
from fedmide.errors import RunFolderError
from fedmide.federation.runtimes.link import Answered
from fedmide.flower.remote_runs import remote
from fedmide.flower.site_folder import SiteFolder
from fedmide.runs import opening, stages
from fedmide.runs.site import Site


@dataclass
class Sites:
    """Sites, each a node with a folder of its own; `bend` changes their answers."""

    sites: dict[int, Site]
    bend: Callable[[int, bytes], bytes] = lambda node, frame: frame
    trained: list[int] = field(default_factory=list)

    def nodes(self) -> list[int]:
        return list(self.sites)

    def ask(self, frames: Iterable[tuple[int, bytes]], seconds: float) -> Iterator[Answered]:
        for node, frame in frames:
            yield Answered(node, self.bend(node, self.sites[node].answer(frame)))


OWN = ("personalization.start=own",)
"""Settings with which sites keep the adapters that they sent, and tune them."""


@pytest.fixture
def elsewhere(request: pytest.FixtureRequest, small_input: Any, tmp_path: Path) -> Sites:
    found = {}
    for node, name in enumerate("ab", 1):
        folder = tmp_path / f"site-{name}"
        SiteFolder(folder, name, "127.0.0.1:1").write()
        own = folder / "data" / name
        own.parent.mkdir()
        (small_input.data / name).rename(own)
        values = apply_overrides(
            read_toml(small_input.config), [f"data.path={own.parent}", *getattr(request, "param", ())]
        )
        (folder / "site.toml").write_text(to_toml(parse(values)))
        found[node] = SiteFolder.read(folder).site(lambda message: None)
    return Sites(found)


def run_over(opened: opening.Run, sites: Sites) -> None:
    run = remote(opened, lambda: sites, {1: "a", 2: "b"})
    stages.train(run)
    stages.personalize(run)


@pytest.mark.parametrize(("elsewhere", "overrides"), [((), ()), (OWN, OWN)], indirect=["elsewhere"])
def test_sites_with_paths_of_their_own_end_with_the_bytes_of_one_process(
    elsewhere: Sites, overrides: tuple[str, ...], small_input: Any, tmp_path: Path
) -> None:
    config = load(small_input.config, overrides)  # the server's: it holds no records, only the sites do
    with opening.start(config, tmp_path / "run", elsewhere=("a", "b")) as opened:
        run_over(opened, elsewhere)
        federation = opened.federation
    for name in "ab":
        (tmp_path / f"site-{name}" / "data" / name).rename(small_input.data / name)
    with opening.start(config, tmp_path / "one") as opened:
        stages.train(opened)
        stages.personalize(opened)
    adapter = "adapter/adapter_model.safetensors"
    assert (tmp_path / "run" / adapter).read_bytes() == (tmp_path / "one" / adapter).read_bytes()
    for name in "ab":
        kept = tmp_path / f"site-{name}" / "runs" / federation / "clients" / name
        expected = tmp_path / "one" / "clients" / name
        memories = [path.relative_to(expected) for path in expected.glob("memory/*")]
        assert len(memories) == (2 if overrides else 0)
        for file in ("ledger.jsonl", adapter, *memories):
            assert (kept / file).read_bytes() == (expected / file).read_bytes()
        here = [path.name for path in (tmp_path / "run" / "clients" / name).iterdir()]
        assert here == ["personalization.json"], "nothing else of a site is at the server"


def test_a_site_measures_what_one_process_would(elsewhere: Sites, small_input: Any, tmp_path: Path) -> None:
    folder = SiteFolder.read(tmp_path / "site-a")
    with (
        pytest.raises(RunFolderError, match="site a has no tuned adapter there yet"),
        folder.personalized(None, lambda message: None),
    ):
        pass
    config = load(small_input.config)
    with opening.start(config, tmp_path / "run", elsewhere=("a", "b")) as opened:
        run_over(opened, elsewhere)
    at_server = sorted(path for path in (tmp_path / "run").rglob("*") if path.is_file())
    with folder.personalized(None, lambda message: None) as own:
        stages.generate(own)
        measured = stages.evaluate(own)
    assert own.folder.path == folder.path / "runs" / opened.federation
    assert sorted(path for path in (tmp_path / "run").rglob("*") if path.is_file()) == at_server
    for name in "ab":
        (tmp_path / f"site-{name}" / "data" / name).rename(small_input.data / name)
    with opening.start(config, tmp_path / "one") as one:
        for stage in (stages.train, stages.personalize, stages.generate):
            stage(one)
        expected = stages.evaluate(one)
    assert measured["clients"] == {"a": expected["clients"]["a"]}
    assert set(measured["clients"]["a"]["stages"]) == {"base", "aggregated", "personalized"}
    for file in ("adapter/adapter_config.json", "adapter/adapter_model.safetensors", "predictions/a.jsonl"):
        assert (own.folder.path / file).read_bytes() == (tmp_path / "one" / file).read_bytes()
    assert json.loads((own.folder.path / "metrics.json").read_text())["clients"] == measured["clients"]
    assert "Personalization" in (own.folder.path / "report.html").read_text()


@pytest.mark.parametrize("elsewhere", [("method=scaffold",)], indirect=True)
def test_if_no_adapter_travels_whole_a_site_measures_its_own_and_the_base_model(
    elsewhere: Sites, small_input: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with opening.start(load(small_input.config, ["method=scaffold"]), tmp_path / "run", elsewhere=("a", "b")) as opened:
        run_over(opened, elsewhere)
    flower.site_evaluate(tmp_path / "site-b", as_json=True)
    metrics = json.loads(capsys.readouterr().out)
    assert set(metrics["clients"]["b"]["stages"]) == {"base", "personalized"}
    flower.site_evaluate(tmp_path / "site-b")
    assert "evaluated: " in capsys.readouterr().out
    assert "tuned adapters" in (Path(metrics["run"]) / "report.html").read_text()


def test_a_site_measures_the_chosen_run_with_its_own_settings_only(
    elsewhere: Sites, small_input: Any, tmp_path: Path
) -> None:
    folder, runs = SiteFolder.read(tmp_path / "site-a"), []
    for number in range(2):
        with opening.start(load(small_input.config), tmp_path / f"{number}", elsewhere=("a", "b")) as opened:
            run_over(opened, elsewhere)
        runs.append(folder.path / "runs" / opened.federation)
        (manifest := runs[-1] / "manifest.json").write_text(
            json.dumps({**json.loads(manifest.read_text()), "started": f"2026-01-0{number + 1}"})
        )
    for wanted, found in ((None, runs[1]), (runs[0], runs[0]), (runs[1], runs[1])):
        with folder.personalized(wanted, lambda message: None) as run:
            assert run.folder.path == found
    with pytest.raises(RunFolderError, match="has no tuned adapter there"), folder.personalized(tmp_path, print):
        pass
    values = apply_overrides(read_toml(folder.path / "site.toml"), ["lora.alpha=3"])
    (folder.path / "site.toml").write_text(to_toml(parse(values)))
    with (
        pytest.raises(RunFolderError, match="settings, base model or prompt have changed since"),
        folder.personalized(None, lambda message: None),
    ):
        pass


def test_two_runs_of_one_configuration_are_two_federations(elsewhere: Sites, small_input: Any, tmp_path: Path) -> None:
    names = []
    for number in range(2):
        with opening.start(load(small_input.config), tmp_path / f"{number}", elsewhere=("a", "b")) as opened:
            stages.train(remote(opened, lambda: elsewhere))
            names.append(opened.federation)
    assert len(set(names)) == 2
    assert {path.name for path in (tmp_path / "site-a" / "runs").iterdir()} == set(names)
    assert len({name.partition("-")[0] for name in names}) == 1


def test_a_sites_folder_of_a_run_can_not_be_resumed(elsewhere: Sites, small_input: Any, tmp_path: Path) -> None:
    with opening.start(load(small_input.config), tmp_path / "run", elsewhere=("a", "b")) as opened:
        stages.train(remote(opened, lambda: elsewhere))
    kept = tmp_path / "site-a" / "runs" / opened.federation
    ledger = (kept / "clients" / "a" / "ledger.jsonl").read_bytes()
    with (
        pytest.raises(RunFolderError, match=r"is site a's folder of a federation.* fedmide flower resume SERVER RUN"),
        opening.resume(kept) as wrong,
    ):
        stages.train(wrong)
    assert (kept / "clients" / "a" / "ledger.jsonl").read_bytes() == ledger


def test_too_few_replies_stop_the_run_before_the_round_counts_and_it_resumes_later(
    elsewhere: Sites, small_input: Any, tmp_path: Path
) -> None:
    config = load(small_input.config, ["replies.quorum=0.6", "replies.deadline_seconds=1"])
    broken = replace(elsewhere, bend=lambda node, frame: frame[:-9] if node == 2 and len(frame) > 5000 else frame)
    with (
        pytest.raises(RunFolderError, match="1 of 2 replies count, 2 are needed: its answer can't be read"),
        opening.start(config, tmp_path / "run", elsewhere=("a", "b")) as opened,
    ):
        run_over(opened, broken)
    assert not (tmp_path / "run" / "server").exists()
    with opening.resume(tmp_path / "run", elsewhere=("a", "b")) as opened:
        run_over(opened, elsewhere)
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["status"] == "personalized"


def test_a_site_that_lost_its_ledger_is_refused(elsewhere: Sites, small_input: Any, tmp_path: Path) -> None:
    told: list[str] = []
    config = load(small_input.config, ["replies.quorum=0.5", "replies.deadline_seconds=1"])
    with opening.start(config, tmp_path / "run", elsewhere=("a", "b")) as opened:
        stages.train(remote(opened, lambda: elsewhere))
        ledger = tmp_path / "site-b" / "runs" / opened.federation / "clients" / "b" / "ledger.jsonl"
    ledger.unlink()
    with (
        pytest.raises(RunFolderError, match=r"site b is not personalized: .*ledger"),
        opening.resume(tmp_path / "run", elsewhere=("a", "b"), tell=told.append) as opened,
    ):
        stages.personalize(remote(opened, lambda: elsewhere))
    assert any("site b is refused: its ledger is not the one that its last round left" in line for line in told)


def test_a_site_whose_records_have_changed_is_refused_with_the_reason_in_its_log(
    elsewhere: Sites, small_input: Any, tmp_path: Path
) -> None:
    said: list[str] = []
    folder = SiteFolder.read(tmp_path / "site-b")
    records = folder.path / "data" / "b" / "test.jsonl"
    config = load(small_input.config, ["replies.quorum=0.5", "replies.deadline_seconds=1"])
    with opening.start(config, tmp_path / "run", elsewhere=("a", "b")) as opened:
        stages.train(remote(opened, lambda: elsewhere))
    kept = records.read_text()
    records.write_text(kept.splitlines()[0] + "\n")
    elsewhere.sites[2] = folder.site(said.append)
    with (
        pytest.raises(RunFolderError, match=r"site b is not personalized: its ledger can't be used"),
        opening.resume(tmp_path / "run", elsewhere=("a", "b")) as opened,
    ):
        stages.personalize(remote(opened, lambda: elsewhere))
    assert any("the records of site 'b' are not those that the run began with" in line for line in said)
    records.write_text(kept)
    (folder.path / "data").rename(folder.path / "moved")
    site_toml = folder.path / "site.toml"
    values = apply_overrides(read_toml(site_toml), [f"data.path={folder.path / 'moved'}", "runtime.prefix_cache_mb=1"])
    site_toml.write_text(to_toml(parse(values)))
    elsewhere.sites[2] = folder.site(said.append)
    with opening.resume(tmp_path / "run", elsewhere=("a", "b")) as opened:
        stages.personalize(remote(opened, lambda: elsewhere))


@pytest.mark.parametrize("elsewhere", [OWN], indirect=True)
def test_a_site_that_lost_its_local_adapter_does_not_tune_the_common_one_instead(
    elsewhere: Sites, small_input: Any, tmp_path: Path
) -> None:
    config = load(small_input.config, [*OWN, "replies.quorum=0.5", "replies.deadline_seconds=1"])
    with opening.start(config, tmp_path / "run", elsewhere=("a", "b")) as opened:
        stages.train(remote(opened, lambda: elsewhere))
        last = tmp_path / "site-b" / "runs" / opened.federation / "clients" / "b" / "memory" / "001.safetensors"
    kept = last.read_bytes()
    last.unlink()
    with (
        pytest.raises(RunFolderError, match=r"site b is not personalized: its ledger can't be used"),
        opening.resume(tmp_path / "run", elsewhere=("a", "b")) as opened,
    ):
        stages.personalize(remote(opened, lambda: elsewhere))
    last.write_bytes(kept)
    with opening.resume(tmp_path / "run", elsewhere=("a", "b")) as opened:
        stages.personalize(remote(opened, lambda: elsewhere))
