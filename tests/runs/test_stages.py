"""A run from its records to its metrics, and each stage on its own."""

import json
import shutil
import subprocess
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from fedmide import atomic, progress
from fedmide.config import Config, load
from fedmide.errors import RunFolderError, UserError
from fedmide.journal import creation
from fedmide.journal.folder import RunFolder
from fedmide.journal.manifest import changed
from fedmide.model import adapters
from fedmide.runs import inputs, opening, stages
from fedmide.runs.resident import Resident

STAGES = (stages.train, stages.personalize, stages.generate, stages.evaluate)
CLIENTS = ("a", "b")
ALL = {"warmup", "train", "personalize"}


def whole_run(config: Config, path: Path) -> Path:
    with opening.start(config, path) as run:
        for stage in STAGES:
            stage(run)
    return path


Lasting = Callable[[Path], dict[str, Any]]
Refusal = Callable[[Path, Callable[[opening.Run], object]], str]


@dataclass
class Shown:
    """A progress that records its calls."""

    totals: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    signs_of_life: list[str] = field(default_factory=list)

    def __call__(self, stage: str, total: int, unit: str) -> AbstractContextManager[progress.Advance]:
        self.totals[stage] = total
        return nullcontext(lambda units, note: (self.notes if units else self.signs_of_life).append(note))


@pytest.fixture(scope="module")
def reference(
    tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory, small_input_at: Callable[[Path], Any], one_thread: None
) -> Iterator[tuple[Any, Path]]:
    """An input and the folder of its uninterrupted run; tests only read them."""
    folder = tmp_path_factory.mktemp("reference")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDMIDE_CACHE", str(tiny_folder.parent))
        given = small_input_at(folder / "input")
        before = given.hashes()
        run = whole_run(load(given.config), folder / "run")
        assert given.hashes() == before, "input is never written to"
        yield given, run


@pytest.fixture
def copied(reference: tuple[Any, Path], tmp_path: Path) -> Path:
    """A copy of the finished run's folder."""
    return Path(shutil.copytree(reference[1], tmp_path / "copy"))


# --- the folder


def test_a_whole_run_leaves_the_files_of_the_contract_and_no_other(
    reference: tuple[Any, Path], lasting: Lasting
) -> None:
    peft = ("adapter_config.json", "adapter_model.safetensors")
    expected = {".lock", "config.toml", "manifest.json", "events.jsonl", "metrics.json", "report.html"}
    expected |= {f"adapter/{name}" for name in peft}
    for number in ("warmup-000", "round-000", "round-001"):
        expected |= {f"server/{number}/{name}" for name in ("adapter.safetensors", "state.json")}
    for client in CLIENTS:
        site = f"clients/{client}"
        expected |= {f"predictions/{client}.jsonl", f"{site}/ledger.jsonl", f"{site}/personalization.json"}
        expected |= {f"{site}/adapter/{name}" for name in peft}
        expected |= {f"{site}/evaluation-{stage}.json" for stage in ("base", "aggregated", "personalized")}
    assert {name for name, content in lasting(reference[1]).items() if content is not None} == expected


def test_the_last_aggregated_adapter_is_that_of_the_last_round(reference: tuple[Any, Path]) -> None:
    last = reference[1] / "server" / "round-001" / "adapter.safetensors"
    assert (reference[1] / "adapter" / "adapter_model.safetensors").read_bytes() == last.read_bytes()


def test_events_name_each_client_in_each_round(reference: tuple[Any, Path]) -> None:
    events = creation.reopen(reference[1]).events()
    order = [("warmup", -1), ("train", 0), ("train", 1), ("personalize", 2)]
    assert [(event["stage"], event["round"], event["client"]) for event in events] == [
        (stage, number, client) for stage, number in order for client in CLIENTS
    ]
    for event in events:
        assert event["bytes_up"] > 0 and event["bytes_down"] > 0 and event["seconds"] > 0
        assert event["metrics"] and all(set(metric) == {"sum", "count"} for metric in event["metrics"].values())
        assert event["refused"] == ""
    for event in events[:6]:
        assert event["metrics"]["shared"]["sum"] + event["metrics"]["personal"]["sum"] == 9
        assert event["bytes_up"] > 5000, "an adapter went up"
    assert all(event["bytes_up"] < 1000 for event in events[6:]), "tuned adapters stay at the sites"


def test_both_sets_have_records(reference: tuple[Any, Path]) -> None:
    """Both sets have records; with only one, the runs of these tests would prove little."""
    sets = [each["sets"] for each in metrics_of(reference[1])["clients"].values()]
    assert all(each["shared"] and each["personal"] for each in sets)
    assert all(each["shared"] + each["personal"] == 9 for each in sets)


def test_the_manifest_names_versions_inputs_and_times(reference: tuple[Any, Path]) -> None:
    manifest = creation.reopen(reference[1]).read_manifest()
    assert manifest["status"] == "evaluated"
    assert list(manifest["seconds"]) == ["trained", "personalized", "generated", "evaluated"]
    for stage, kinds in manifest["model_seconds"].items():
        assert 0 < sum(kinds.values()) < manifest["seconds"][stage]
    assert {kind for kind, each in manifest["model_seconds"]["trained"].items() if each} == {"scoring", "training"}
    assert "generation" in manifest["model_seconds"]["generated"]
    assert manifest["started"] <= manifest["updated"]
    assert manifest["seed"] == 3 and manifest["threads"] == 1 and manifest["device"] == "cpu"
    assert manifest["model"]["name"] == "tiny-random" and manifest["model"]["dtype"] == "float32"
    assert {"torch", "transformers", "peft"} <= set(manifest["versions"])
    for client in CLIENTS:
        sizes = {part: manifest["data"][client][part] for part in ("training", "validation", "test", "truncated")}
        assert sizes == {"training": 9, "validation": 1, "test": 3, "truncated": 0}


@pytest.mark.needs("git")
def test_the_manifest_names_the_commit_of_this_checkout(reference: tuple[Any, Path]) -> None:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    assert creation.reopen(reference[1]).read_manifest()["commit"].removesuffix("-dirty") == commit


def test_predictions_come_with_their_references(reference: tuple[Any, Path]) -> None:
    for client in CLIENTS:
        lines = [
            json.loads(line) for line in (reference[1] / "predictions" / f"{client}.jsonl").read_text().splitlines()
        ]
        test = [json.loads(line) for line in (reference[0].data / client / "test.jsonl").read_text().splitlines()]
        assert [line["reference"] for line in lines] == [record["response"] for record in test]
        assert all(set(line) == {"record_id", "instruction", "reference", "prediction"} for line in lines)


def metrics_of(path: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((path / "metrics.json").read_text())
    return values


# --- the same again


def test_the_runs_own_configuration_repeats_it_byte_for_byte(
    reference: tuple[Any, Path], tmp_path: Path, lasting: Lasting
) -> None:
    again = whole_run(load(reference[1] / "config.toml"), tmp_path / "again")
    assert lasting(again) == lasting(reference[1])


def test_another_seed_gives_another_run(reference: tuple[Any, Path], tmp_path: Path, lasting: Lasting) -> None:
    config = load(reference[0].config, ["seed=4", "federation.rounds=1"])
    with opening.start(config, tmp_path / "other") as run:
        stages.train(run)
    ours, theirs = lasting(tmp_path / "other"), lasting(reference[1])
    for name in ("server/warmup-000/adapter.safetensors", "server/round-000/adapter.safetensors"):
        assert ours[name] != theirs[name]
    assert all(ours[f"clients/{client}/ledger.jsonl"] != theirs[f"clients/{client}/ledger.jsonl"] for client in CLIENTS)


def test_each_stage_on_its_own_gives_the_same_bytes(
    reference: tuple[Any, Path], tmp_path: Path, lasting: Lasting
) -> None:
    path = tmp_path / "steps"
    with opening.start(load(reference[0].config), path):
        pass
    status = []
    for stage in STAGES:
        with opening.resume(path) as run:
            stage(run)
        status.append(creation.reopen(path).read_manifest()["status"])
    assert status == ["trained", "personalized", "generated", "evaluated"]
    assert lasting(path) == lasting(reference[1])


def test_a_finished_run_stays_as_it_is(copied: Path, lasting: Lasting) -> None:
    before, times = lasting(copied), {path: path.stat().st_mtime_ns for path in copied.rglob("*") if path.is_file()}
    shown = Shown()
    with opening.resume(copied) as run:
        for stage in STAGES:
            stage(run, shown)
            assert run.folder.read_manifest()["status"] == "evaluated"
    assert lasting(copied) == before
    assert {name: shown.totals[name] for name in ("rounds", "personalization", "generation")} == {
        "rounds": 0,
        "personalization": 0,
        "generation": 0,
    }
    rewritten = {path.name for path, time in times.items() if path.stat().st_mtime_ns != time}
    assert rewritten <= {"manifest.json", "metrics.json", "events.jsonl", "report.html", ".lock"}


# --- out of order


@pytest.fixture
def refusal(lasting: Lasting) -> Refusal:
    """Returns the text of a stage's refusal, and checks that it left the folder unchanged."""

    def refused(path: Path, stage: Callable[[opening.Run], object]) -> str:
        with opening.resume(path) as run, pytest.raises(RunFolderError) as error:
            before = lasting(path)
            stage(run)
        assert lasting(path) == before
        return str(error.value)

    return refused


def test_a_stage_that_comes_too_early_is_refused_with_the_one_to_do_first(copied: Path, refusal: Refusal) -> None:
    shutil.rmtree(copied / "predictions")
    for client in CLIENTS:
        (copied / "clients" / client / "personalization.json").unlink()
    assert f"First: fedmide personalize {copied}" in refusal(copied, stages.generate)
    shutil.rmtree(copied / "adapter")
    for stage in STAGES[1:]:
        assert f"the rounds are not finished. First: fedmide train --resume {copied}" in refusal(copied, stage)
    shutil.rmtree(copied / "server" / "round-001")
    for stage in STAGES[1:]:
        assert "the rounds are not finished" in refusal(copied, stage)


def test_half_a_personalization_is_not_evaluated(copied: Path, refusal: Refusal) -> None:
    (copied / "clients" / "b" / "personalization.json").unlink()
    shutil.rmtree(copied / "predictions")
    for stage in (stages.generate, stages.evaluate):
        found = refusal(copied, stage)
        assert "sites not yet personalized: b" in found and f"First: fedmide personalize {copied}" in found


def test_a_run_can_be_evaluated_before_it_is_personalized(reference: tuple[Any, Path], copied: Path) -> None:
    for client in CLIENTS:
        (copied / "clients" / client / "personalization.json").unlink()
    shutil.rmtree(copied / "predictions")
    with opening.resume(copied) as run:
        metrics = stages.evaluate(run)
    assert set(metrics["over_clients"]) == {"base", "aggregated"}
    for name, client in metrics["clients"].items():
        earlier = metrics_of(reference[1])["clients"][name]
        assert client["generation"] is None
        assert atomic.without_nan(client["stages"]) == {
            stage: earlier["stages"][stage] for stage in ("base", "aggregated")
        }


# --- what changes between begin and resume


def test_changed_records_are_refused_by_client(small_input: Any, tmp_path: Path) -> None:
    config = load(small_input.config)
    path = tmp_path / "run"
    with opening.start(config, path):
        pass
    for client in "ab":
        file = small_input.data / client / "training.jsonl"
        file.write_text(file.read_text().replace("liver", "gland"))
    with pytest.raises(RunFolderError) as error, opening.resume(path):
        pass
    assert error.value.problems == tuple(
        f"{path}: the records of site '{client}' are not those that the run began with" for client in "ab"
    )
    shutil.rmtree(small_input.data / "b")
    shutil.copytree(small_input.data / "a", small_input.data / "c")
    with pytest.raises(RunFolderError) as error, opening.resume(path):
        pass
    assert len(error.value.problems) == 3


def test_a_changed_model_prompt_or_configuration_is_refused(
    small_input: Any, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    shutil.copytree(tiny_folder, cache / tiny_folder.name)
    monkeypatch.setenv("FEDMIDE_CACHE", str(cache))
    path = tmp_path / "run"
    with opening.start(load(small_input.config), path):
        pass
    tokenizer = cache / tiny_folder.name / "tokenizer.json"
    tokenizer.write_bytes(tokenizer.read_bytes() + b"\n")
    (small_input.folder / "plain.toml").write_text(
        'with_context = "{instruction}{context}"\nwithout_context = "{instruction}"'
    )
    toml = path / "config.toml"
    toml.write_text(toml.read_text().replace("learning_rate = 0.01", "learning_rate = 0.02"))
    with pytest.raises(RunFolderError) as error, opening.resume(path):
        pass
    found = [problem.removeprefix(f"{path}: ") for problem in error.value.problems]
    assert found[:2] == [
        "config.toml is not what the run began with",
        "the prompt's template is not what the run began with",
    ]
    assert found[2].startswith("the model's fingerprint was ") and len(found) == 3


def test_a_configuration_that_another_version_read_differently_is_reported(small_input: Any, tmp_path: Path) -> None:
    with opening.start(load(small_input.config), tmp_path / "run") as run:
        present = run.inputs.manifest
    earlier = {**present, "config": "0" * 16, "fedmide": "0.0.1", "commit": "abc"}
    (problem,) = changed(earlier, present)
    told = (
        "config.toml is not what the run began with, or fedmide 0.0.1, commit abc, which began it, had other settings"
    )
    assert problem.startswith(f"{told} than {present['fedmide']}, ")
    assert not list(changed({**earlier, "config": present["config"]}, present))


# --- all problems at once, nothing written


def test_all_problems_of_records_prompt_and_model_folder_are_reported_at_once(small_input: Any, tmp_path: Path) -> None:
    (small_input.data / "a" / "training.jsonl").write_text('{"instruction": "x"\n{"instruction": "x", "response": 7}\n')
    (small_input.data / "b" / "test.jsonl").write_text("")
    (tmp_path / "model").mkdir()
    (small_input.folder / "plain.toml").write_text("with_context = 'no'")
    config = load(small_input.config, [f"model.name={tmp_path / 'model'}"])
    with pytest.raises(UserError) as error, opening.start(config, tmp_path / "run"):
        pass
    text = str(error.value)
    for expected in (
        "a/training.jsonl:1: broken JSON",
        "a/training.jsonl:2: field 'response' is int, expected text",
        "b/test.jsonl: no records",
        "'with_context' lacks {instruction}",
        "'without_context' is missing",
        "model: no config.json",
        "model: no model.safetensors",
        "model: no tokenizer files",
    ):
        assert expected in text
    assert not (tmp_path / "run").exists()


def test_records_longer_than_the_cutoff_are_all_named(small_input: Any, tmp_path: Path) -> None:
    long = json.dumps({"instruction": "Why? " * 30, "response": "so"}) + "\n"
    for client, part in (("a", "training"), ("b", "test")):
        file = small_input.data / client / f"{part}.jsonl"
        file.write_text(file.read_text() + long)
    config = load(small_input.config, ["data.validation_fraction=0"])
    with pytest.raises(UserError) as error, opening.start(config, tmp_path / "run"):
        pass
    assert [problem.split(":")[0] for problem in error.value.problems] == [
        "site 'a', training, record 11",
        "site 'b', test, record 4",
    ]
    assert "Raise model.cutoff" in str(error.value) and str(error.value).count("Raise") == 1
    assert not (tmp_path / "run").exists()
    with opening.start(load(small_input.config, ["prompt.overflow=cut"]), tmp_path / "run") as run:
        truncated = {name: each["truncated"] for name, each in run.folder.read_manifest()["data"].items()}
    assert truncated == {"a": 1, "b": 1}


def test_adapters_that_match_no_layer_are_refused(small_input: Any, tmp_path: Path) -> None:
    for targets, found in (('["nowhere", "never"]', 2), ('"nowhere"', 1)):
        config = load(small_input.config, [f"lora.targets={targets}"])
        with (
            pytest.raises(UserError, match="matches no linear layer") as error,
            opening.start(config, tmp_path / "run"),
        ):
            pass
        assert len(error.value.problems) == found and "q_proj" in error.value.remedy
    assert not (tmp_path / "run").exists()


def test_a_path_that_is_taken_is_refused_before_anything_is_read(
    reference: tuple[Any, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opening, "read", lambda *args: pytest.fail("read"))
    with pytest.raises(RunFolderError, match="exists already"), opening.start(load(reference[0].config), reference[1]):
        pass


# --- two processes in one folder


def test_a_second_process_is_refused_while_a_run_is_worked_on(
    reference: tuple[Any, Path], copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opening.resume(copied):
        monkeypatch.setattr(opening, "read", lambda *args: pytest.fail("read"))
        with pytest.raises(RunFolderError, match="another process works on this run"), opening.resume(copied):
            pass


def test_a_new_run_is_locked_from_the_start(small_input: Any, tmp_path: Path) -> None:
    with (
        opening.start(load(small_input.config), tmp_path / "run") as run,
        pytest.raises(RunFolderError, match="another process"),
        creation.locked(run.folder.path),
    ):
        pass
    with creation.locked(tmp_path / "run"):
        pass


# --- unusual but valid configurations


@pytest.mark.parametrize(
    ("overrides", "stages_seen"),
    [
        (["warmup.rounds=0", "federation.rounds=1"], {"train", "personalize"}),
        (["federation.rounds=0", "generation.enabled=false"], {"warmup", "personalize"}),
        (["warmup.reset=false", "federation.participation=0.4", "personalization.epochs=0"], ALL),
        (["data.test_fraction=0", "data.validation_fraction=0", "data.max_test_records=1", "federation.rounds=1"], ALL),
    ],
)
def test_a_run_ends_well_with(overrides: list[str], stages_seen: set[str], small_input: Any, tmp_path: Path) -> None:
    path = whole_run(load(small_input.config, overrides), tmp_path / "run")
    assert {event["stage"] for event in creation.reopen(path).events()} == stages_seen
    is_generated = "generation.enabled=false" not in overrides
    assert (path / "predictions").exists() == is_generated
    expected = {"base", "aggregated", "personalized"} | ({"generation"} if is_generated else set())
    assert set(metrics_of(path)["over_clients"]) == expected


def test_a_client_without_test_records_is_reported_and_left_out(small_input: Any, tmp_path: Path) -> None:
    (small_input.data / "b" / "test.jsonl").unlink()
    path = whole_run(load(small_input.config, ["data.test_fraction=0", "federation.rounds=0"]), tmp_path / "run")
    metrics = metrics_of(path)
    assert metrics["clients"]["b"]["stages"]["base"]["response_nll"] is None
    assert metrics["clients"]["b"]["generation"] is None
    assert metrics["over_clients"]["personalized"]["response_nll"]["num_clients"] == 1
    assert (path / "predictions" / "b.jsonl").read_text() == ""


# --- progress


def test_a_report_that_fails_does_not_end_the_run(
    small_input: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(folder: RunFolder) -> Path:
        raise ZeroDivisionError("a text of a record")

    monkeypatch.setattr(stages.report, "write", fails)
    said: list[str] = []
    with opening.start(load(small_input.config), tmp_path / "run", said.append) as run:
        for stage in STAGES:
            stage(run)
    assert creation.reopen(tmp_path / "run").read_manifest()["status"] == "evaluated"
    assert not (tmp_path / "run" / "report.html").exists()
    assert said[-1] == f"no report could be written (ZeroDivisionError); to see why: fedmide report {tmp_path / 'run'}"


def test_progress_counts_the_work_that_is_left(small_input: Any, tmp_path: Path) -> None:
    shown, said = Shown(), []
    with opening.start(load(small_input.config), tmp_path / "run", said.append) as run:
        for stage in STAGES:
            stage(run, shown)
    assert shown.totals == {"rounds": 6, "personalization": 2, "generation": 2, "evaluation": 6}
    assert len(shown.notes) == sum(shown.totals.values())
    assert shown.notes[0].startswith("warmup-000, site a, loss ") and shown.notes[5].startswith("round-001, site b")
    assert shown.notes[6] == "site a" and shown.notes[-1] == "site b, personalized"
    assert shown.signs_of_life[0].endswith(" tokens trained") and len(shown.signs_of_life) > len(shown.notes)
    report = tmp_path / "run" / "report.html"
    assert said[:3] == ["reading the records", "loading tiny-random", f"the run is in {tmp_path / 'run'}"]
    assert said[3:] == [f"the report is in {report}"]


def test_a_model_that_is_made_first_is_reported(
    small_input: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedmide.runs import inputs

    def locate(name: str, progress: Callable[[str], None]) -> Path:
        progress("downloading something, once")
        raise UserError("no more")

    monkeypatch.setattr(inputs, "locate", locate)
    said: list[str] = []
    with pytest.raises(UserError), opening.start(load(small_input.config), tmp_path / "run", said.append):
        pass
    assert said[-1] == "downloading something, once"


def test_the_silent_progress_takes_anything() -> None:
    with progress.silent("rounds", 3, "clients") as advance:
        advance(1, "a")


# --- trouble during a run


def test_a_federation_that_diverges_continues_and_reports_it(
    small_input: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Adapters that are not finite are refused in each round, and no tuning of a client is kept."""
    train = Resident.train

    def diverge(resident: Resident, *args: Any) -> Iterator[Any]:
        for epoch in train(resident, *args):
            yield replace(epoch, adapter={name: array * float("nan") for name, array in epoch.adapter.items()})

    monkeypatch.setattr(Resident, "train", diverge)
    said: list[str] = []
    with opening.start(load(small_input.config), tmp_path / "run", said.append) as run:
        for stage in STAGES:
            stage(run)
        metrics = metrics_of(tmp_path / "run")
        assert metrics["federation"]["refused_replies"] == 6 and metrics["federation"]["rounds_without_aggregate"] == 3
        aggregated, fresh = stages._trained(run).adapter, run.inputs.fresh_adapter()
    assert all((aggregated[name] == fresh[name]).all() for name in fresh)
    refusals = [line for line in said if "its reply does not count" in line]
    assert len(refusals) == 6 and refusals[0].startswith("warmup-000, site a: its reply does not count: ")
    assert "holds a value that is not finite" in refusals[0]
    assert sum("no adapter counts" in line for line in said) == 3
    assert [line for line in said if "its tuning" in line] == [
        f"site {client}: no epoch of its tuning can be used, so it keeps the common adapter" for client in CLIENTS
    ]
    for client in metrics["clients"].values():
        assert client["stages"]["personalized"] == client["stages"]["aggregated"]
    with opening.resume(tmp_path / "run"):
        pass


def test_one_client_that_diverges_leaves_the_round_to_the_others(
    small_input: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedmide.federation.runtimes import inprocess

    encode_reply = inprocess.encode_reply

    def broken(reply: Any) -> bytes:
        if reply.client == "b" and reply.adapter is not None:
            reply = replace(reply, adapter={name: array[:1] for name, array in reply.adapter.items()})
        return encode_reply(reply)

    monkeypatch.setattr(inprocess, "encode_reply", broken)
    said: list[str] = []
    with opening.start(load(small_input.config), tmp_path / "run", said.append) as run:
        stages.train(run)
    assert [line.split(":")[0] for line in said if "does not count" in line] == [
        f"{name}, site b" for name in ("warmup-000", "round-000", "round-001")
    ]
    assert not any("nobody" in line for line in said)
    with opening.resume(tmp_path / "run") as run:  # its ledger is its own, even if its replies did not count
        stages.personalize(run)


def test_texts_with_line_separators_go_through_all_stages(small_input: Any, tmp_path: Path) -> None:
    """U+2028 and similar characters do not end a line in JSON Lines."""
    file = small_input.data / "a" / "test.jsonl"
    odd = json.dumps({"instruction": "One\u2028two\u0085three", "response": "a\u2029b\x0cc"}, ensure_ascii=False)
    file.write_text(file.read_text() + odd + "\n", "utf-8")
    path = whole_run(load(small_input.config, ["federation.rounds=1"]), tmp_path / "run")
    lines = [json.loads(line) for line in (path / "predictions" / "a.jsonl").read_text("utf-8").split("\n") if line]
    assert lines[-1]["instruction"] == "One\u2028two\u0085three" and lines[-1]["reference"] == "a\u2029b\x0cc"
    assert metrics_of(path)["clients"]["a"]["generation"]["num_records"] == 4


def test_more_tokens_than_the_model_reads_are_refused_and_generation_stays_below(
    small_input: Any, tmp_path: Path
) -> None:
    with (
        pytest.raises(UserError, match=r"model\.cutoff = 4096: tiny-random reads at most 2048 tokens"),
        opening.start(load(small_input.config, ["model.cutoff=4096"]), tmp_path / "run"),
    ):
        pass
    assert not (tmp_path / "run").exists()
    asked: list[int] = []
    with opening.start(load(small_input.config, ["generation.max_new_tokens=9999"]), tmp_path / "run") as run:
        run.inputs.resident.generate = lambda adapter, examples, longest: asked.append(longest) or ("",) * len(examples)  # type: ignore[method-assign,func-returns-value]
        stages.train(run)
        stages.personalize(run)
        stages.generate(run)
    prompts = [max(example.prompt_length for example in site.test) for site in run.inputs.examples.values()]
    assert asked == [2048 - longest for longest in prompts]


# --- resuming


@pytest.mark.parametrize("lost", ["file", "lines", "folder"])
def test_a_lost_ledger_is_refused_and_never_taken_for_an_empty_one(copied: Path, lost: str) -> None:
    ledger = copied / "clients" / "a" / "ledger.jsonl"
    if lost == "file":
        ledger.unlink()
    elif lost == "lines":
        ledger.write_text("".join(ledger.read_text().splitlines(keepends=True)[:9]))
    else:
        shutil.rmtree(copied / "clients")
    left = "the ledger is not the one that its last round left"
    with pytest.raises(RunFolderError, match=left) as error, opening.resume(copied):
        pass
    assert len(error.value.problems) == (2 if lost == "folder" else 1)


def test_a_run_resumes_with_the_threads_it_began_with(
    small_input: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from fedmide.runs import resident

    wanted: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", wanted.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: wanted[-1])
    monkeypatch.setattr(resident, "available_cores", lambda: 2)
    monkeypatch.setattr(resident, "free_threads", lambda tell: 3)
    with opening.start(load(small_input.config, ["runtime.threads=0"]), tmp_path / "run"):
        pass
    monkeypatch.setattr(resident, "free_threads", lambda tell: 64)
    with opening.resume(tmp_path / "run"):
        pass
    assert [number for number in wanted if number != 1] == [
        3,
        3,
        3,
        3,
    ]  # each worker takes one, then all are shared again


def test_other_versions_are_reported_and_another_device_is_refused(copied: Path) -> None:
    manifest = json.loads((copied / "manifest.json").read_text())
    manifest["versions"]["peft"] = "0.0.1"
    (copied / "manifest.json").write_text(json.dumps(manifest))
    said: list[str] = []
    with opening.resume(copied, tell=said.append):
        pass
    assert any(line.startswith("peft was 0.0.1 when the run began") for line in said)
    (copied / "manifest.json").write_text(json.dumps({**manifest, "device": "cuda"}))
    was = "the device was cuda when the run began and is cpu now"
    with pytest.raises(RunFolderError, match=was), opening.resume(copied):
        pass


def test_the_commits_that_a_run_is_resumed_with_are_noted(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = json.loads((copied / "manifest.json").read_text())["commit"]
    said: list[str] = []
    for commit in (first, "later", "later", "latest"):
        monkeypatch.setattr(inputs, "_commit", lambda commit=commit: commit)
        with opening.resume(copied, tell=said.append) as run:
            pass
    assert run.folder.commits == (str(first), "later", "latest")
    assert [line for line in said if line.startswith("fedmide was")] == [
        f"fedmide was 0.1.0, commit {first} when the run began and is 0.1.0, commit {commit} now: "
        "from here on the bytes of results may differ"
        for commit in ("later", "later", "latest")
    ]


def test_events_stay_in_the_clients_order_when_a_run_is_resumed(
    small_input: Any, tmp_path: Path, lasting: Lasting
) -> None:
    """Clients are in natural order (10 after 9), but file names are not."""
    for name in ("9", "10"):
        shutil.copytree(small_input.data / "a", small_input.data / name)
    for name in ("a", "b"):
        shutil.rmtree(small_input.data / name)
    path = whole_run(load(small_input.config, ["federation.rounds=1"]), tmp_path / "run")
    before = lasting(path)
    assert [event["client"] for event in creation.reopen(path).events()] == ["9", "10"] * 3
    (path / "events.jsonl").unlink()
    with opening.resume(path) as run:
        stages.evaluate(run)
    assert lasting(path) == before


# --- uses of a finished run


def test_the_runs_adapters_load_with_peft_and_give_the_same_likelihoods(reference: tuple[Any, Path]) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from fedmide.model.pretrained.locate import locate

    with opening.resume(reference[1]) as run:
        examples = run.inputs.examples["a"].test
        folders = {"aggregated": run.folder.adapter, **{name: run.folder.personal_adapter(name) for name in CLIENTS}}
        for name, folder in folders.items():
            adapter = adapters.read(folder / "adapter_model.safetensors", run.inputs.resident.model.shapes)
            ours = run.inputs.resident.nll(adapter, examples, "all")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # PEFT's own
                theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(locate("tiny-random")), folder)
            for example, nll in zip(examples, ours, strict=True):
                ids = torch.from_numpy(example.ids)[None]
                with torch.no_grad():
                    loss = float(theirs(input_ids=ids, labels=ids).loss)
                assert nll.mean == pytest.approx(loss, rel=1e-5), name


def test_test_records_decide_nothing(reference: tuple[Any, Path], tmp_path: Path) -> None:
    """With other test records, all adapters and ledgers stay the same, including the tuned adapters."""
    data = Path(shutil.copytree(reference[0].data, tmp_path / "data"))
    for client in CLIENTS:
        (data / client / "test.jsonl").write_text('{"instruction": "Else?", "response": "quite"}\n')
    config = load(reference[0].config, [f"data.path={data}"])
    with opening.start(config, tmp_path / "run") as run:
        stages.train(run)
        stages.personalize(run)
    kept = [
        f"clients/{client}/{file}"
        for client in CLIENTS
        for file in ("ledger.jsonl", "adapter/adapter_model.safetensors")
    ]
    for name in ["adapter/adapter_model.safetensors", *kept]:
        assert (tmp_path / "run" / name).read_bytes() == (reference[1] / name).read_bytes()


def test_one_base_model_whatever_the_number_of_clients(
    small_input: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedmide.runs import resident

    loads: list[Path] = []
    load_model = resident.load

    def load_counted(folder: Path, *rest: Any, **named: Any) -> Any:
        loads.append(folder)
        return load_model(folder, *rest, **named)

    monkeypatch.setattr(resident, "load", load_counted)
    whole_run(load(small_input.config, ["federation.rounds=1"]), tmp_path / "run")
    assert len(loads) == 1
