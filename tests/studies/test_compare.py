import json
from pathlib import Path
from typing import Any

import pytest

from fedmide import progress
from fedmide.config import read_toml
from fedmide.errors import RunFolderError, UsageError
from fedmide.evaluation.measure import Measured
from fedmide.runs import opening, stages
from fedmide.studies import compare

NAMES = ["fedmide", "fedavg-ft", "fedavg", "local", "frozen"]
RATES = (1e-2, 1e-3)


def values_of(config: Path) -> dict[str, Any]:
    values = read_toml(config)
    values["personalization"] = {"epochs": 1}
    values["enrollment"] = {"rule": "median"}  # leaves nobody without shared records, who would not train
    values["data"]["validation_fraction"] = 0.3
    values["evaluation"]["choices"] = 0
    values["generation"] = {"enabled": False}
    values["variants"] = {"frozen": {"enrollment": {"enabled": False}}}
    return values


@pytest.fixture(scope="module")
def compared(
    tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path, small_input_at: Any, one_thread: None
) -> tuple[Path, dict[str, Any], list[str]]:
    """The folder, the figures and what was said of a comparison of five entrants, two rates and two seeds."""
    folder = tmp_path_factory.mktemp("compared")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDMIDE_CACHE", str(tiny_folder.parent))
        values = values_of(small_input_at(folder / "input").config)
        said: list[str] = []
        plan = compare.planned(values, NAMES, [0, 1], folder / "out", RATES)
        return folder / "out", compare.run(plan, said.append), said


def test_every_run_is_there_and_reported(compared: tuple[Path, dict[str, Any], list[str]]) -> None:
    out, figures, said = compared
    runs = {str(each.parent.relative_to(out / "runs")) for each in out.glob("runs/*/*/config.toml")}
    rates = {name: each["rate"] for name, each in figures["learning_rates"].items()}
    expected = {f"{name}/rate-{rate!r}-seed-0" for name in NAMES for rate in RATES}
    assert runs == expected | {f"{name}/rate-{rates[name]!r}-seed-1" for name in NAMES}
    assert any("run 15 of 15" in each for each in said)
    assert list(figures["methods"]) == ["base", *NAMES]


def test_comparison_json_has_the_four_figures_of_every_metric(
    compared: tuple[Path, dict[str, Any], list[str]],
) -> None:
    out, figures, _ = compared
    read = json.loads((out / "comparison.json").read_text())
    assert read["methods"].keys() == figures["methods"].keys()
    for method, rows in read["methods"].items():
        for metric, row in rows.items():
            assert row.keys() == {"mean", "low", "high", "seeds"}, metric
            assert row["low"] <= row["mean"] <= row["high"], metric
            assert row["seeds"] == (1 if method == "base" else 2)


def test_all_had_the_same_steps(compared: tuple[Path, dict[str, Any], list[str]]) -> None:
    out, figures, _ = compared
    steps = {name: figures["methods"][name]["steps_per_client"] for name in NAMES}
    assert {each["low"] for each in steps.values()} | {each["high"] for each in steps.values()} == {8.0}
    # counted again, from each client's own figures of each round
    for name in NAMES:
        folder = out / figures["runs"][name]["1"]
        events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
        by_client = dict.fromkeys(("a", "b"), 0.0)
        for event in events:
            by_client[event["client"]] += event["metrics"].get("steps", {"sum": 0})["sum"]
        assert by_client == {"a": 8.0, "b": 8.0}


def test_all_had_the_same_records(compared: tuple[Path, dict[str, Any], list[str]]) -> None:
    out, _, _ = compared
    manifests = [json.loads(path.read_text()) for path in out.glob("runs/*/*/manifest.json")]
    assert len(manifests) == 15
    assert all(each["data"] == manifests[0]["data"] for each in manifests)


def test_rates_are_chosen_without_test_records(compared: tuple[Path, dict[str, Any], list[str]]) -> None:
    out, figures, _ = compared
    for name, each in figures["learning_rates"].items():
        tried = {row["rate"]: row["validation_nll"] for row in each["tried"]}
        assert tried.keys() == set(RATES)
        assert each["rate"] == min(tried, key=lambda rate: tried[rate])
        for rate in RATES:
            folder = out / "runs" / name / f"rate-{rate!r}-seed-0"
            assert (folder / "metrics.json").exists() == (rate == each["rate"])
            assert bool(list(folder.glob("clients/*/evaluation-*.json"))) == (rate == each["rate"])


def test_figures_are_those_of_the_runs(compared: tuple[Path, dict[str, Any], list[str]]) -> None:
    out, figures, _ = compared
    for seed in (0, 1):
        metrics = json.loads((out / figures["runs"]["local"][str(seed)] / "metrics.json").read_text())
        expected = metrics["over_clients"]["personalized"]["response_nll"]
        assert figures["by_seed"]["local"]["response_nll"][seed] == pytest.approx(expected["mean"])
        assert figures["by_seed"]["local"]["response_nll_worst"][seed] == pytest.approx(expected["worst"])


def test_runs_are_what_they_are_alone(compared: tuple[Path, dict[str, Any], list[str]], lasting: Any) -> None:
    """A model that has served other runs changes nothing."""
    out, figures, _ = compared
    folder = out / figures["runs"]["frozen"]["1"]
    from fedmide.config import load

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDMIDE_CACHE", _cache(folder))
        with opening.start(load(folder / "config.toml"), out.parent / "alone") as run:
            stages.train(run)
            stages.personalize(run)
    kept, alone = lasting(folder), lasting(out.parent / "alone")
    same = [name for name in alone if name.startswith(("adapter", "server", "clients"))]
    assert same
    assert {name: kept[name] for name in same} == {name: alone[name] for name in same}


def _cache(folder: Path) -> str:
    from fedmide.model.pretrained.locate import locate

    return str(locate("tiny-random", folder.parents[3] / "models").parent)


def test_a_stopped_comparison_resumes_and_ends_the_same(
    compared: tuple[Path, dict[str, Any], list[str]], tmp_path: Path, tiny_folder: Path, monkeypatch: Any
) -> None:
    out, figures, _ = compared
    monkeypatch.setenv("FEDMIDE_CACHE", str(tiny_folder.parent))
    values = values_of(out.parent / "input" / "small.toml")
    plan = compare.planned(values, ["fedmide", "local"], [0, 1], tmp_path / "out")

    whole = stages.personalize
    calls = 0

    def stopped(run: opening.Run, progress: progress.Progress = progress.silent) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        whole(run, progress)

    monkeypatch.setattr(stages, "personalize", stopped)
    with pytest.raises(KeyboardInterrupt):
        compare.run(plan)
    first = (tmp_path / "out/runs/fedmide/rate-0.01-seed-0/manifest.json").stat().st_mtime_ns
    ended = compare.run(plan)
    assert (tmp_path / "out/runs/fedmide/rate-0.01-seed-0/manifest.json").stat().st_mtime_ns == first
    assert calls == 5
    rate = figures["learning_rates"]["fedmide"]["rate"]
    if rate == 1e-2:
        assert ended["by_seed"]["fedmide"]["response_nll"] == figures["by_seed"]["fedmide"]["response_nll"]
    said: list[str] = []
    assert compare.run(plan, said.append)["methods"] == ended["methods"]
    assert said == []


def test_validation_alone_measures_no_test_record_and_may_be_followed_by_a_comparison(
    compared: tuple[Path, dict[str, Any], list[str]], tmp_path: Path, tiny_folder: Path, monkeypatch: Any
) -> None:
    monkeypatch.setenv("FEDMIDE_CACHE", str(tiny_folder.parent))
    values = values_of(compared[0].parent / "input" / "small.toml")
    figures = compare.run(compare.planned(values, ["local", "fedavg"], [0, 1], tmp_path, validation_only=True))
    assert not list(tmp_path.rglob("evaluation-*.json"))
    assert not list(tmp_path.rglob("predictions.jsonl"))
    assert not (tmp_path / "comparison.json").exists()
    assert json.loads((tmp_path / "validation.json").read_text()) == figures
    for seed in (0, 1):
        folder = tmp_path / "runs" / "local" / f"rate-0.01-seed-{seed}"
        clients = json.loads((folder / "validation.json").read_text()).values()
        nlls = [each["sum"] / each["num_tokens"] for each in clients]
        assert figures["by_seed"]["local"]["validation_nll"][seed] == pytest.approx(sum(nlls) / len(nlls))
        assert figures["by_seed"]["local"]["validation_nll_worst"][seed] == max(nlls)
    table = (tmp_path / "validation.md").read_text()
    assert all(f"{nll:.4f}" in table for nll in figures["by_seed"]["local"]["validation_nll"])
    before = {path: path.read_bytes() for path in tmp_path.rglob("adapter_model.safetensors")}
    compare.run(compare.planned(values, ["local", "fedavg"], [0, 1], tmp_path))
    assert (tmp_path / "comparison.json").exists()
    assert {path: path.read_bytes() for path in before} == before


def test_runs_that_differ_in_their_tuning_share_their_rounds(
    compared: tuple[Path, dict[str, Any], list[str]],
    tmp_path: Path,
    tiny_folder: Path,
    monkeypatch: Any,
    lasting: Any,
) -> None:
    monkeypatch.setenv("FEDMIDE_CACHE", str(tiny_folder.parent))
    values = values_of(compared[0].parent / "input" / "small.toml")
    values["variants"] = {"half": {"personalization": {"interpolation": [0.5]}}, "frozen": values["variants"]["frozen"]}
    said: list[str] = []
    names = ["fedmide", "frozen", "half"]
    compare.run(compare.planned(values, names, [0], tmp_path / "shared", validation_only=True), said.append)
    runs = {name: tmp_path / "shared" / "runs" / name / "rate-0.01-seed-0" for name in names}
    assert [each for each in said if "the rounds are those of" in each] == [
        f"the rounds are those of {runs['fedmide']}"
    ]
    compare.run(compare.planned(values, ["half"], [0], tmp_path / "alone", validation_only=True), said.append)
    alone = tmp_path / "alone" / "runs" / "half" / "rate-0.01-seed-0"
    assert lasting(runs["half"]) == lasting(alone)
    assert (alone / "validation.json").read_bytes() == (runs["half"] / "validation.json").read_bytes()
    figures = [json.loads((path / "manifest.json").read_text())["seconds"]["trained"] for path in runs.values()]
    assert figures[0] <= figures[2] < figures[0] + 1, "what the rounds took counts for both"
    # a resumed comparison finds the rounds of complete runs too
    values["variants"]["quarter"] = {"personalization": {"interpolation": [0.25]}}
    more = compare.planned(values, [*names, "quarter"], [0], tmp_path / "shared", validation_only=True)
    said.clear()
    compare.run(more, said.append)
    assert f"the rounds are those of {runs['fedmide']}" in said
    # but one whose sites must have kept their own adapters has rounds of its own
    values["variants"]["own"] = {"personalization": {"start": "own"}}
    said.clear()
    compare.run(compare.planned(values, [*names, "own"], [0], tmp_path / "shared", validation_only=True), said.append)
    assert not any("the rounds are those of" in each for each in said)


def test_test_records_change_no_choice(
    compared: tuple[Path, dict[str, Any], list[str]],
    tmp_path: Path,
    small_input_at: Any,
    tiny_folder: Path,
    monkeypatch: Any,
) -> None:
    """With other test records the rates tried have the same validation figures, to the bit."""
    _out, figures, _ = compared
    monkeypatch.setenv("FEDMIDE_CACHE", str(tiny_folder.parent))
    given = small_input_at(tmp_path / "input")
    for path in given.data.glob("*/test.jsonl"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps({**line, "response": "zzz zzz"}) + "\n" for line in lines))
    plan = compare.planned(values_of(given.config), ["fedavg-ft"], [0], tmp_path / "out", RATES)
    assert compare.run(plan)["learning_rates"]["fedavg-ft"] == figures["learning_rates"]["fedavg-ft"]


def test_runs_on_other_records_are_refused(
    compared: tuple[Path, dict[str, Any], list[str]],
    tmp_path: Path,
    small_input_at: Any,
    tiny_folder: Path,
    monkeypatch: Any,
) -> None:
    monkeypatch.setenv("FEDMIDE_CACHE", str(tiny_folder.parent))
    given = small_input_at(tmp_path / "input")
    values = values_of(given.config)
    compare.run(compare.planned(values, ["local"], [0], tmp_path / "out"))
    path = given.data / "a" / "training.jsonl"
    path.write_text(path.read_text().replace("Name", "Say"))
    with pytest.raises(RunFolderError, match="its data is not that of"):
        compare.run(compare.planned(values, ["local", "fedavg"], [0], tmp_path / "out"))


@pytest.mark.parametrize(
    ("seeds", "rates", "expected"),
    [([], (), "--seeds"), ([0, 0], (), "--seeds"), ([0], (1e-3, 1e-3), "--learning-rates")],
)
def test_numbers_are_given_once(small_input: Any, seeds: list[int], rates: tuple[float, ...], expected: str) -> None:
    with pytest.raises(UsageError, match=expected):
        compare.planned(values_of(small_input.config), ["local"], seeds, Path("out"), rates)


def test_measured_records_stay_in_the_run_folders(compared: tuple[Path, dict[str, Any], list[str]]) -> None:
    """The comparison's own files hold no record's id, and no list as long as a client's test records but of clients."""
    out, figures, _ = compared
    folder = out / figures["runs"]["local"]["0"]
    measured = Measured.from_dict(json.loads((folder / "clients/a/evaluation-personalized.json").read_text()))
    for name in ("comparison.json", "comparison.md", "comparison.html"):
        text = (out / name).read_text()
        assert not any(each in text for each in measured.record_ids)
        assert not any(repr(each) in text for each in measured.nll_sums)


def test_the_baseline_of_differences_is_one_of_the_compared_methods(small_input: Any) -> None:
    values, names = values_of(small_input.config), ["local", "fedmide"]
    assert compare.planned(values, names, [0], Path("out")).against == ("fedmide",)
    with pytest.raises(UsageError, match="--against: fedavgft is not one of the compared methods"):
        compare.planned(values, names, [0], Path("out"), against=["local", "fedavgft"])
