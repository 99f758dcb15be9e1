"""The command line as a user sees it: results on stdout, everything else on stderr, mistakes as one paragraph."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fedmide import __version__, cli
from fedmide.config import loading, sections
from fedmide.flower import server_folder, site_folder
from fedmide.runs import measuring, opening, stages
from tests.needs import PUBLISHED, ROOT

CONFIG = str(ROOT / "examples" / "tiny.toml")


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The one JSON object on stdout."""
        values = json.loads(self.out, parse_constant=pytest.fail)
        assert isinstance(values, dict)
        return values

    @property
    def refusal(self) -> str:
        """The one paragraph of a refused command."""
        assert self.code == 2, self.err
        assert "Traceback" not in self.err
        lines = [line for line in self.err.splitlines() if not line.startswith(PROGRESS)]
        assert lines[0].startswith("fedmide: "), self.err
        assert " --help" in lines[0] if len(lines) == 1 else lines[1:] == [f"More: {self.explained}"], self.err
        return lines[0].removeprefix("fedmide: ")

    @property
    def explained(self) -> str:
        """The command that explains a mistake."""
        found = re.findall(r"^More: (fedmide explain \w+Error)$", self.err, re.MULTILINE)
        assert len(found) == 1, self.err
        return found[0]


PROGRESS = ("fedmide: reading the records", "fedmide: loading ", "fedmide: the run is in", "fedmide: resuming")


@pytest.fixture
def fedmide(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """The command, run in this process."""

    def run(*args: str | Path) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["fedmide", *(str(arg) for arg in args)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        code = ended.value.code
        return Outcome(0 if code is None else int(code), captured.out, captured.err)

    return run


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


# --- help, version, mistakes on the command line


def test_help_names_every_command(fedmide: Callable[..., Outcome]) -> None:
    for args in (["--help"], []):
        shown = fedmide(*args)
        assert shown.code == (0 if args else 2) and shown.err == ""
        verbs = ("demo", "run", "train", "personalize", "generate", "evaluate", "identify", "split", "methods", "data")
        for verb in (*verbs, "compare", "sweep", "report", "watch"):
            assert f" {verb} " in shown.out
    assert fedmide("data").code == 2 and " check " in fedmide("data").out


def test_the_methods_are_listed(fedmide: Callable[..., Outcome]) -> None:
    shown, listed = fedmide("methods"), fedmide("methods", "--json")
    assert (shown.code, listed.code) == (0, 0)
    found = listed.json
    assert list(found) == list(typing.get_args(sections.MethodName))
    assert all(name in shown.out and each["summary"] and each["source"] for name, each in found.items())


def test_a_table_of_another_method_is_one_clear_message(fedmide: Callable[..., Outcome], small_input: Any) -> None:
    refused = fedmide("run", str(small_input.config), "--set", "method=fedavg", "--set", "fedprox.mu=1.0")
    assert refused.code == 2
    assert "method 'fedavg' has no use for this table" in refused.err


def test_the_version_is_printed(fedmide: Callable[..., Outcome]) -> None:
    assert fedmide("--version") == Outcome(0, f"fedmide {__version__}\n", "")


@pytest.mark.parametrize(
    ("args", "problem"),
    [
        (["run", "--nonsense"], "No such option '--nonsense'. See fedmide run --help"),
        (["fly"], "No such command 'fly'. See fedmide --help"),
        (["personalize"], "Missing argument 'PATH'. See fedmide personalize --help"),
        (
            ["split", "x.json", "--rule", "best"],
            "is not one of 'otsu-256', 'otsu-exact', 'otsu-log', 'lower-quartile', 'median', 'upper-quartile', "
            "'natural'. See fedmide split --help",
        ),
        (["data", "build", "x", "--clients", "0"], "0 is not in the range x>=1. See fedmide data build --help"),
        (["run"], "nothing to run. Give a configuration (TOML) or --resume RUN. fedmide demo runs without either"),
        (["train"], "nothing to run. Give a configuration"),
        (["run", "--runtime", "flower"], "--runtime flower needs --server"),
        (
            ["run", "--runtime", "flower", "--server", "S", "--resume", "R", "--set", "seed=1"],
            "with --runtime flower, the run in R is resumed unchanged. Remove CONFIG, --set and --out",
        ),
        (["run", "--set", "seed=1"], "nothing to run"),
        (["run", "--resume", "R", "--set", "seed=1"], "--set can't change a run that has begun"),
        (["run", "--resume", "R", "--out", "O"], "--out O can't be given for the run in R"),
        (["run", ".", "--out", "O"], "--out O can't be given for the run in ."),
        (["run", ".", "--resume", "R"], ". and --resume R are both run folders"),
        (["run", "."], ". is not a run folder: it has no config.toml. Start a run with fedmide run CONFIG"),
        (["evaluate", "R"], "R is not a run folder: it is not a folder"),
        (["export", "R", "O"], "R is not a run folder: it is not a folder"),
        (["watch", "R"], "R is not a run folder: it is not a folder"),
        (["report", "R"], "R is not a run folder: it is not a folder"),
        (["report"], "Missing argument 'PATHS...'. See fedmide report --help"),
        (["run", "--resume", "R"], "R is not a run folder: it is not a folder"),
        (["run", "none.toml"], "none.toml: no such file. Give a configuration (TOML); fedmide demo runs without one"),
        (["split", "none.json"], "none.json: not readable: No such file or directory"),
        (["data", "check", "none"], "none: no such folder"),
        (["compare", "none.toml", "--methods", "local"], "none.toml: no such file"),
        (["compare", CONFIG, "--methods", "best"], "'best' is not a method and not a variant. See `fedmide methods`"),
        (["compare", CONFIG, "--methods", ""], "--methods '': expected names, each once"),
        (["compare", CONFIG, "--methods", "local", "--seeds", "0,x"], "--seeds '0,x': 'x' is not a valid number"),
        (["compare", CONFIG, "--methods", "local", "--seeds", ""], "--seeds: expected numbers"),
        (
            ["compare", CONFIG, "--methods", "local", "--learning-rates", "0"],
            "--learning-rates '0': '0' is not a valid number",
        ),
        (["sweep", CONFIG], "Missing option '--knob'. See fedmide sweep --help"),
        (["sweep", CONFIG, "--knob", "lora.r"], "--knob 'lora.r': expected KNOB=VALUE,VALUE"),
        (["sweep", CONFIG, "--knob", "lora.x=1,2"], "unknown key 'lora.x'"),
        (["data", "show", "none"], "none: no such folder"),
        (["data", "show", "none.toml"], "none.toml: no such file"),
        (
            ["data", "partition", "none.jsonl", "new", "--clients", "2"],
            "none.jsonl: not readable: No such file or directory. Give one file of records: .json, .jsonl or .parquet",
        ),
    ],
)
def test_a_mistaken_command_is_one_paragraph(
    args: list[str], problem: str, fedmide: Callable[..., Outcome], here: Path
) -> None:
    plain, as_json = fedmide(*args), fedmide(*args, "--json")
    assert problem in plain.refusal and plain.out == ""
    assert as_json.refusal == plain.refusal == as_json.json["error"]
    assert as_json.json["problems"]
    assert f" {as_json.json['more']}\n" in plain.err or problem.endswith("--help")
    assert list(here.iterdir()) == []


def test_the_scenarios_of_the_command_line_are_those_of_the_sources() -> None:
    from fedmide.studies.known_sites import SCENARIOS

    assert typing.get_args(cli.studies.WhichScenario) == (*SCENARIOS, "both")


def test_the_rules_of_the_command_line_are_those_of_the_configuration() -> None:
    assert typing.get_args(cli.results.Rule) == typing.get_args(sections.ThresholdRule)


# --- mistakes in a configuration


@pytest.mark.parametrize(
    ("overrides", "problems"),
    [
        (["federation.round=3"], ["unknown key 'federation.round' (did you mean 'federation.rounds'?)"]),
        (["federatoin.rounds=3"], ["unknown key 'federatoin' (did you mean 'federation'?)"]),
        (
            ["seed=-1", "training.batch_size=0", "federation.participation=2", 'scoring.positions="some"'],
            ["seed = -1: ", "training.batch_size = 0", "federation.participation = 2", "scoring.positions = 'some'"],
        ),
        (["lora.blocks=none"], ["lora.blocks = 'none'"]),
        (["seed"], ["--set 'seed': expected section.key=value"]),
        (["seed.deep=1", "=1"], ["--set 'seed.deep=1': expected section.key=value", "--set '=1': expected"]),
    ],
)
def test_every_mistake_in_a_configuration_is_reported_at_once(
    overrides: list[str], problems: list[str], fedmide: Callable[..., Outcome], small_input: Any, here: Path
) -> None:
    told = fedmide("run", small_input.config, *(word for each in overrides for word in ("--set", each))).refusal
    for problem in problems:
        assert problem in told
    assert told.startswith(f"{len(problems)} problems: ") == (len(problems) > 1)
    assert list(here.iterdir()) == []


def test_a_broken_configuration_is_reported_with_its_place(fedmide: Callable[..., Outcome], here: Path) -> None:
    Path("c.toml").write_text("seed = \n")
    assert "c.toml: not readable as TOML: Invalid value (at line 1" in fedmide("run", "c.toml").refusal


# --- mistakes in the input


def break_json(given: Any) -> None:
    (given.data / "a" / "training.jsonl").write_text('{"instruction": "x", "response": "y"}\n{"instruction": \n')


def leave_out_a_field(given: Any) -> None:
    (given.data / "b" / "test.jsonl").write_text('{"instruction": "x"}\n{"instruction": 3, "response": ""}\n')


def empty_a_file(given: Any) -> None:
    (given.data / "a" / "test.jsonl").write_text("")


def repeat_a_client(given: Any) -> None:
    (given.data / "A.json").write_text('[{"instruction": "x", "response": "y"}]')


def lose_the_data(given: Any) -> None:
    given.data.rename(given.folder / "elsewhere")


def nothing(given: Any) -> None:
    """Leaves the input as it is."""


@pytest.mark.parametrize(
    ("spoil", "overrides", "problems"),
    [
        (break_json, [], ["a/training.jsonl:2: broken JSON"]),
        (
            leave_out_a_field,
            [],
            [
                "b/test.jsonl:1: field 'response' is missing, expected text",
                "b/test.jsonl:2: field 'instruction' is int, expected text",
                "b/test.jsonl:2: field 'response' is empty, expected text",
            ],
        ),
        (empty_a_file, [], ["a/test.jsonl: no records, expected at least one"]),
        (repeat_a_client, [], ["duplicate site name, whatever its case: A, a"]),
        (
            lose_the_data,
            ["prompt.template=alpac"],
            ["no such folder", "prompt.template = 'alpac'", "(did you mean 'alpaca'?)"],
        ),
        (nothing, ["data.path="], ["data.path is empty"]),
        (
            nothing,
            ["model.name=tiny-randm"],
            ["model.name = 'tiny-randm': not a known model", "(did you mean 'tiny-random'?)"],
        ),
        (
            nothing,
            ["model.name={input}"],
            ["input: no config.json", "input: no model.safetensors", "input: no tokenizer"],
        ),
        (nothing, ["lora.targets=nowhere"], ["lora.targets: 'nowhere' matches no linear layer", "This model has "]),
        (nothing, ["lora.blocks=top:99"], ["lora.blocks = 'top:99': the model has "]),
        (
            nothing,
            ["model.cutoff=14"],
            [
                "site 'a', training, record 1: a prompt of ",
                "leaves no room below the cutoff of 14",
                "Raise model.cutoff",
            ],
        ),
    ],
)
def test_bad_input_is_one_paragraph_with_all_of_it_and_nothing_is_written(
    spoil: Callable[[Any], None],
    overrides: list[str],
    problems: list[str],
    fedmide: Callable[..., Outcome],
    small_input: Any,
    here: Path,
) -> None:
    spoil(small_input)
    before = small_input.hashes()
    settings = [each.format(input=small_input.folder) for each in overrides]
    told = fedmide("run", small_input.config, *(word for each in settings for word in ("--set", each))).refusal
    for problem in problems:
        assert problem in told
    assert list(here.iterdir()) == []
    assert small_input.hashes() == before


def test_no_message_contains_the_text_of_a_record(
    fedmide: Callable[..., Outcome], small_input: Any, here: Path
) -> None:
    secret = "xylophone"
    (small_input.data / "a" / "training.jsonl").write_text(
        f'{{"instruction": "{secret}", "response": 7}}\n{{"instruction": "{secret}" "response": "{secret}"}}\n'
    )
    told = fedmide("run", small_input.config, "--json")
    assert told.code == 2 and secret not in told.out + told.err


def test_without_room_on_disk_no_run_starts(
    fedmide: Callable[..., Outcome], small_input: Any, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedmide.atomic.DISK_RESERVE_BYTES", 10**18)
    assert "no room on disk: 1000000000000 MB needed" in fedmide("run", small_input.config).refusal
    assert list(here.iterdir()) == []


# --- runs


@pytest.fixture(scope="module")
def finished(
    tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory, small_input_at: Callable[[Path], Any], one_thread: None
) -> Iterator[tuple[Any, Path]]:
    """An input and the folder of its finished run, which tests may only read."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDMIDE_CACHE", str(tiny_folder.parent))
        given = small_input_at(folder / "input")
        with opening.start(loading.load(given.config, QUICK), folder / "run") as run:
            for stage in (stages.train, stages.personalize, stages.generate, stages.evaluate):
                stage(run)
        yield given, folder / "run"


QUICK = ["federation.rounds=1", "personalization.epochs=1"]


def test_a_run_prints_its_progress_then_a_table_and_its_folder(
    fedmide: Callable[..., Outcome], small_input: Any, here: Path
) -> None:
    settings = [word for each in QUICK for word in ("--set", each)]
    first = fedmide("run", small_input.config, *settings)
    assert first.code == 0
    for part in ("site", "base", "aggregated", "personalized", "worst", "evaluated: runs/small-001\n"):
        assert part in first.out
    assert first.err.splitlines()[:4] == [
        "fedmide: reading the records",
        "fedmide: loading tiny-random",
        "fedmide: the run is in runs/small-001",
        "fedmide: rounds: 4 site rounds",
    ]
    for line in ("rounds: 4/4 site rounds", "personalization: 2/2 sites", "evaluation: 6/6 adapters"):
        assert f"fedmide: {line}, " in first.err
    second = fedmide("train", small_input.config, *settings, "--json")
    assert second.json["run"] == "runs/small-002" and second.json["status"] == "trained"
    assert list(second.json["seconds"]) == ["trained"]
    for verb, status in (("personalize", "personalized"), ("generate", "generated"), ("evaluate", "evaluated")):
        assert fedmide(verb, "runs/small-002", "--json").json["status"] == status
    one, two = (json.loads(Path(f"runs/small-00{number}/metrics.json").read_text()) for number in (1, 2))
    assert one == two


def test_a_finished_run_is_shown_again(
    fedmide: Callable[..., Outcome], finished: tuple[Any, Path], small_input: Any
) -> None:
    path = finished[1]
    metrics = json.loads((path / "metrics.json").read_text())
    for args in (["run", "--resume", path], ["run", path], ["evaluate", path]):
        shown = fedmide(*args, "--json").json
        assert {key: shown[key] for key in metrics} == metrics
        assert shown["run"] == str(path) and shown["status"] == "evaluated"


def test_methods_are_compared_and_a_setting_is_varied(
    fedmide: Callable[..., Outcome], small_input: Any, here: Path
) -> None:
    fast = ["--set", "generation.enabled=false", "--set", "evaluation.choices=0", "--set", "personalization.epochs=1"]
    given = str(small_input.config), "--seeds", "0", *fast
    compared = fedmide("compare", *given, "--methods", "local,fedavg-ft")
    assert compared.code == 0, compared.err
    assert "Difference to fedavg-ft" in compared.out and "comparisons/small/comparison.html" in compared.out
    assert "run 2 of 2, about" in compared.err
    again = fedmide("compare", *given, "--methods", "local,fedavg-ft", "--json")
    assert again.err == ""
    assert again.json["differences"]["fedavg-ft"].keys() == {"base", "local"}
    swept = fedmide("sweep", *given, "--methods", "local", "--knob", "data.noisy_clients=0,2")
    assert swept.code == 0, swept.err
    assert "sweeps/small/data.noisy_clients/sweep.svg" in swept.out
    assert (here / "sweeps/small/data.noisy_clients/sweep.svg").is_file()


@pytest.fixture
def medqa(here: Path) -> Path:
    """Six questions in the format of MedQA."""
    options = {"A": "heart", "B": "liver", "C": "lung", "D": "skin"}
    rows = [{"question": f"{n}?", "options": options, "answer_idx": "ABCD"[n % 4]} for n in range(6)]
    (here / "medqa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return here / "medqa.jsonl"


def test_public_questions_are_asked_once_and_stay_in_the_metrics(
    fedmide: Callable[..., Outcome], small_input: Any, medqa: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = [word for each in QUICK for word in ("--set", each)]
    assert fedmide("train", small_input.config, *settings, "--out", "R").code == 0
    first = fedmide("evaluate", "R", "--choice", f"medqa:{medqa}", "--json").json["questions"]["medqa"]
    assert first["base"]["num_records"] == first["aggregated"]["num_records"] == 6
    assert "over_clients" not in first
    assert fedmide("personalize", "R").code == 0
    shown = fedmide("evaluate", "R", "--choice", f"medqa:{medqa}")
    assert "medqa" in shown.out and "worst" in shown.out
    second = json.loads(Path("R/metrics.json").read_text())["questions"]["medqa"]
    assert {key: second[key] for key in first} == first
    assert set(second["personalized"]) == {"a", "b"}
    with monkeypatch.context() as patch:
        patch.setattr(measuring, "score_questions", lambda *args: pytest.fail("they were asked before"))
        assert fedmide("evaluate", "R", "--json").json["questions"]["medqa"] == second
        assert fedmide("evaluate", "R", "--choice", f"medqa:{medqa}", "--json").json["questions"]["medqa"] == second
    fewer = fedmide("evaluate", "R", "--choice", f"medqa:{medqa}", "--max-questions", 4, "--json").json
    assert fewer["questions"]["medqa"]["base"]["num_records"] == 4
    assert fewer["questions"]["medqa"]["protocol"]["questions"] != second["protocol"]["questions"]


def test_public_questions_are_drawn_by_the_seed_of_the_data(
    fedmide: Callable[..., Outcome], small_input: Any, medqa: Path
) -> None:
    def asked(seed: int) -> Any:
        settings = [word for each in (*QUICK, "data.seed=7", f"seed={seed}") for word in ("--set", each)]
        assert fedmide("train", small_input.config, *settings, "--out", f"run-{seed}").code == 0
        choice = ("--choice", f"medqa:{medqa}", "--max-questions", 3)
        return fedmide("evaluate", f"run-{seed}", *choice, "--json").json["questions"]["medqa"]["protocol"]["questions"]

    assert asked(0) == asked(1) == asked(2)


@pytest.mark.parametrize(
    ("choices", "told"),
    [
        (["mmlu:x.json"], "--choice 'mmlu:x.json': expected SET:PATH. The sets are medqa, medmcqa, pubmedqa, careqa"),
        (["medqa"], "--choice 'medqa': expected SET:PATH"),
        (["medqa:no.json"], "no.json: no such file or folder"),
        (["careqa:medqa.jsonl"], "30 problems: medqa.jsonl:1: field 'op1' is missing"),
        (["medqa:medqa.jsonl", "medqa:medqa.jsonl"], "--choice names medqa twice"),
    ],
)
def test_a_mistaken_choice_is_one_paragraph(
    fedmide: Callable[..., Outcome], finished: tuple[Any, Path], medqa: Path, choices: list[str], told: str
) -> None:
    assert "there are no questions" in fedmide("evaluate", finished[1], "--max-questions", 3).refusal
    given = [word for each in choices for word in ("--choice", each)]
    assert told in fedmide("evaluate", finished[1], *given).refusal


def test_a_stage_out_of_order_is_refused(fedmide: Callable[..., Outcome], small_input: Any, here: Path) -> None:
    settings = [word for each in ("federation.rounds=0", "warmup.rounds=0") for word in ("--set", each)]
    assert fedmide("train", small_input.config, *settings, "--out", "R").code == 0
    assert fedmide("generate", "R").refusal.endswith("First: fedmide personalize R")
    Path("R/adapter").rename("elsewhere")
    for verb in ("personalize", "generate", "evaluate"):
        assert fedmide(verb, "R", "--json").json["error"].endswith("First: fedmide train --resume R")


def test_generation_that_is_not_wanted_is_refused(
    fedmide: Callable[..., Outcome], small_input: Any, here: Path
) -> None:
    settings = ["federation.rounds=0", "warmup.rounds=0", "generation.enabled=false"]
    overrides = [word for each in settings for word in ("--set", each)]
    assert fedmide("train", small_input.config, *overrides, "--out", "R").code == 0
    assert "generation.enabled is false in this run" in fedmide("generate", "R").refusal


def test_a_folder_that_is_taken_is_refused(fedmide: Callable[..., Outcome], finished: tuple[Any, Path]) -> None:
    given, path = finished
    settings = [word for each in QUICK for word in ("--set", each)]
    same = fedmide("run", given.config, *settings, "--out", path)
    assert same.refusal == (
        f"{path} exists already. To resume it: fedmide run --resume {path}. "
        f"A run over Flower: fedmide flower resume SERVER {path}"
    )
    other = fedmide("run", given.config, *settings, "--set", "seed=9", "--out", path)
    assert other.refusal.startswith(f"seed is 3 in {path} and 9 here. {path} belongs to another configuration")
    resumed = fedmide("run", given.config, "--resume", path, "--json")
    assert [problem.split(" is ")[0] for problem in resumed.json["problems"]] == [
        "federation.rounds",
        "personalization.epochs",
    ]
    assert "exists already and holds something else" in fedmide("run", given.config, "--out", given.folder).refusal


def test_changed_data_is_refused(fedmide: Callable[..., Outcome], small_input: Any, here: Path) -> None:
    settings = [word for each in ("federation.rounds=0", "warmup.rounds=0") for word in ("--set", each)]
    assert fedmide("train", small_input.config, *settings, "--out", "R").code == 0
    file = small_input.data / "b" / "test.jsonl"
    file.write_text(file.read_text().replace("Find", "Seek"))
    told = fedmide("run", "--resume", "R").refusal
    assert told == (
        "R: the records of site 'b' are not those that the run began with. Undo the change, or start a new run"
    )


def test_a_run_that_another_process_works_on_is_refused(
    fedmide: Callable[..., Outcome], finished: tuple[Any, Path], small_input: Any
) -> None:
    with opening.resume(finished[1]):
        assert "another process works on this run" in fedmide("run", "--resume", finished[1]).refusal


def test_a_full_disk_is_reported_and_the_run_resumes(
    fedmide: Callable[..., Outcome], small_input: Any, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = [word for each in QUICK for word in ("--set", each)]
    calls = iter(range(100))

    def full(descriptor: int) -> None:
        if next(calls) > 20:
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        told = fedmide("run", small_input.config, *settings, "--out", "R")
    assert told.code == 2 and "no room on disk. Free some space and give the command again" in told.err
    assert "Traceback" not in told.err
    assert fedmide("run", "--resume", "R", "--json").json["status"] == "evaluated"


def test_an_interrupt_is_reported(
    fedmide: Callable[..., Outcome], small_input: Any, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(stages, "train", interrupt)
    told = fedmide("run", small_input.config, "--out", "R")
    assert told.code == 130
    assert told.err.endswith("\nfedmide: stopped; to resume a run that has begun: fedmide run --resume RUN\n")


@pytest.mark.parametrize(
    ("command", "way"),
    [
        ("flower run S", "to resume a run that has begun: fedmide flower resume SERVER RUN"),
        ("flower resume S R", "to resume a run that has begun: fedmide flower resume SERVER RUN"),
        ("flower stop S", "to resume a run that has begun: fedmide flower resume SERVER RUN"),
        ("flower site evaluate S", "give the command again; finished work is kept"),
    ],
)
def test_an_interrupt_of_a_deployed_run_is_reported_with_its_own_remedy(
    command: str, way: str, fedmide: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(server_folder.ServerFolder, "read", interrupt)
    monkeypatch.setattr(site_folder.SiteFolder, "read", interrupt)
    told = fedmide(*command.split())
    assert (told.code, told.err) == (130, f"\nfedmide: stopped; {way}\n")


def test_a_file_that_the_system_refuses_is_reported(
    fedmide: Callable[..., Outcome], small_input: Any, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "some/file")

    monkeypatch.setattr(opening, "start", refuse)
    assert fedmide("run", small_input.config).refusal == "some/file: Permission denied"


def test_a_fault_of_ours_keeps_its_traceback(
    fedmide: Callable[..., Outcome], small_input: Any, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(opening, "start", fail)
    with pytest.raises(ZeroDivisionError):
        fedmide("run", small_input.config)


# --- progress


def test_a_log_gets_a_line_of_progress_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedmide import terminal

    clock = iter([0.0, 5.0, 12.0, 15.0, 60.0, 60.0])
    monkeypatch.setattr(terminal, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    with terminal.bars("rounds", 6, "site rounds") as advance:
        for number, units in enumerate((1, 1, 1, 3)):
            advance(units, f"site {number}")
    with terminal.bars("generation", 0, "clients"):
        pass
    assert capsys.readouterr().err.splitlines() == [
        "fedmide: rounds: 6 site rounds",
        "fedmide: rounds: 2/6 site rounds, 10.0/min, 0:00:24 left, site 1",
        "fedmide: rounds: 6/6 site rounds, 6.0/min, 0:00:00 left, site 3",
        "fedmide: generation: nothing left to do",
    ]


def test_a_terminal_shows_a_bar(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from fedmide import terminal

    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")
    with terminal.bars("rounds", 2, "site rounds") as advance:
        advance(1, "round-001, site a")
        advance(1, "round-001, site b")
    shown = capsys.readouterr()
    assert "2/2" in shown.err and "round-001, site b" in shown.err and shown.out == ""


def test_without_test_records_there_is_no_table(fedmide: Callable[..., Outcome], small_input: Any, here: Path) -> None:
    for client in "ab":
        (small_input.data / client / "test.jsonl").unlink()
    settings = ["data.test_fraction=0", "federation.rounds=0", "warmup.rounds=0", "personalization.epochs=0"]
    shown = fedmide("run", small_input.config, *(word for each in settings for word in ("--set", each)))
    assert shown.out == "no test records, so no results\nevaluated: runs/small-001\n"


# --- split


@pytest.mark.needs("published")
def test_published_scores_are_split_as_published(fedmide: Callable[..., Outcome], here: Path) -> None:
    scores = PUBLISHED / "8" / "local1" / "8" / "local_training_0.json"
    found = fedmide("split", scores, "--json", "--out", "sets").json
    assert found["threshold"] == pytest.approx(1.081713, abs=1e-6)
    assert {key: value for key, value in found.items() if key != "threshold"} == {
        "shared": 160,
        "personal": 140,
        "rule": "otsu-256",
    }
    for ours, theirs in (("shared", "global1"), ("personal", "remain1")):
        written = json.loads(Path(f"sets/{ours}.json").read_text())
        published = json.loads((PUBLISHED / "8" / theirs / "8" / "local_training_0.json").read_text())
        assert sorted(map(question, written)) == sorted(map(question, published))
    assert fedmide("split", scores).out == "160 shared, 140 personal, threshold 1.081713 (otsu-256)\n"


def question(record: dict[str, str]) -> tuple[str, str]:
    return record["instruction"], record["response"]


def test_other_rules_split_otherwise(fedmide: Callable[..., Outcome], here: Path) -> None:
    Path("scores.jsonl").write_text("".join(f'{{"score": {score}}}\n' for score in (1.0, 1.1, 1.2, 9.0)))
    median = fedmide("split", "scores.jsonl", "--rule", "median", "--json").json
    otsu = fedmide("split", "scores.jsonl", "--rule", "otsu-exact", "--json").json
    assert (median["shared"], otsu["shared"]) == (2, 3)
    Path("same.jsonl").write_text('{"score": 1.0}\n{"score": 1.0}\n')
    assert fedmide("split", "same.jsonl").out == "2 shared, 0 personal, threshold none (otsu-256)\n"
    assert fedmide("split", "same.jsonl", "--json").json["threshold"] is None
    Path("failed.jsonl").write_text("".join(f'{{"score": {score}}}\n' for score in (1.0, 1.1, "NaN", 9.0)))
    told = fedmide("split", "failed.jsonl", "--rule", "otsu-exact")
    assert told.out.startswith("2 shared, 2 personal") and told.err.startswith(
        "fedmide: scores that are not finite: 1;"
    )


# --- data


def test_data_are_checked(fedmide: Callable[..., Outcome], small_input: Any, here: Path) -> None:
    found = fedmide("data", "check", small_input.data, "--json").json
    assert [client["name"] for client in found["clients"]] == ["a", "b"]
    assert [client["training"]["records"] for client in found["clients"]] == [10, 10]
    assert found["leaks"] == []
    shown = fedmide("data", "check", small_input.data)
    assert shown.code == 0 and "no held-out record occurs in training" in shown.out
    (small_input.data / "b" / "test.jsonl").write_bytes((small_input.data / "a" / "training.jsonl").read_bytes())
    assert "share their text with training records of site a" in fedmide("data", "check", small_input.data).out
    break_json(small_input)
    leave_out_a_field(small_input)
    told = fedmide("data", "check", small_input.data).refusal
    assert "4 problems: " in told and "a/training.jsonl:2: broken JSON" in told and "b/test.jsonl:2: " in told


def test_fields_of_other_names_are_read(fedmide: Callable[..., Outcome], here: Path) -> None:
    rows = [{"q": f"why {number}", "a": "so", "who": "xy"[number % 2]} for number in range(12)]
    Path("table.json").write_text(json.dumps(rows))
    names = ["data.fields.instruction=q", "data.fields.response=a", "data.fields.client=who"]
    found = fedmide("data", "check", "table.json", *(word for name in names for word in ("--set", name)), "--json")
    assert [client["name"] for client in found.json["clients"]] == ["x", "y"]


def test_medical_sites_are_built_and_checked(fedmide: Callable[..., Outcome], here: Path) -> None:
    sizes = ["--clients", "2", "--training", "6", "--validation", "2", "--test", "3"]
    built = fedmide("data", "build", "sites", *sizes, "--json").json
    assert built["folder"] == "sites" and len(built["clients"]) == 2
    assert sorted(path.name for path in Path("sites").iterdir() if path.is_dir()) == sorted(built["clients"])
    checked = fedmide("data", "check", "sites", "--json").json
    assert [client["training"]["records"] for client in checked["clients"]] == [6, 6]


# --- in a process of its own


def test_one_file_is_divided_into_sites(fedmide: Callable[..., Outcome], here: Path) -> None:
    rows = [{"q": f"Question {n}?", "response": f"answer {n}", "category": "xyz"[n % 3]} for n in range(60)]
    (here / "all.json").write_text(json.dumps(rows))
    words = ("data", "partition", "all.json", "--set", "data.fields.instruction=q")
    shown = fedmide(*words, "out", "--by", "dirichlet:0.5:category", "--clients", 3)
    assert shown.code == 0 and "3 sites in out; figure of their differences: out/partition.svg" in shown.out
    assert "no held-out record occurs in training" in fedmide("data", "check", "out").out
    told = fedmide(*words, "by-field", "--by", "field:category", "--test-fraction", 0, "--json").json
    assert told["clients"] == {f"site-{n}": {"training": 18, "validation": 2} for n in (1, 2, 3)}
    assert sorted(told["values"].values(), key=str) == [{"x": 20}, {"y": 20}, {"z": 20}]
    assert "out: expected a new or an empty folder" in fedmide(*words, "out", "--clients", 3).refusal
    assert "--clients is missing, which --by iid needs" in fedmide(*words, "new").refusal
    assert "--by 'halves' is not a rule" in fedmide(*words, "new", "--by", "halves").refusal
    assert "expected at least 90" in fedmide(*words, "new", "--clients", 30).refusal
    too_much = fedmide(*words, "new", "--clients", 3, "--test-fraction", 0.6, "--validation-fraction", 0.4)
    assert "less than a tenth" in too_much.refusal
    assert "field 'instruction' is missing" in fedmide("data", "partition", "all.json", "new", "--clients", 3).refusal
    assert not Path("new").exists()


def test_identification_is_shown_and_written(
    fedmide: Callable[..., Outcome], here: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    monkeypatch.setenv("FEDMIDE_CACHE", str(tiny_folder.parent))
    settings = ["model.name=tiny-random", "prompt.template=plain", "evaluation.bootstrap=100", "lora.blocks=all"]
    overrides = [word for each in settings for word in ("--set", each)]
    sizes = ("--clients", 2, "--records", 4, "--scenario", "own-labels")
    shown = fedmide("identify", *sizes, *overrides, "--out", "found.json")
    assert shown.code == 0, shown.err
    for part in ("own-labels: AUROC", "relative_gap", "as judged", "site-1", "mean"):
        assert part in shown.out
    assert "own-style" not in shown.out
    written = json.loads(Path("found.json").read_text())
    assert written["scenarios"]["own-labels"]["protocol"]["clients"] == 2
    assert "found.json exists already" in fedmide("identify", "--out", "found.json").refusal


def test_help_and_what_needs_no_model_load_no_heavy_library(tmp_path: Path, small_input: Any) -> None:
    scores = tmp_path / "scores.jsonl"
    scores.write_text('{"score": 1.0}\n{"score": 2.0}\n')
    program = """
import sys
from fedmide import cli
def heavy(*names):
    assert not (found := set(names) & set(sys.modules)), found
heavy("torch", "transformers", "peft", "numpy", "pydantic", "rich.table")
for args in sys.argv[1:]:
    sys.argv = ["fedmide", *args.removeprefix("?").split("|")]
    try:
        cli.main()
    except SystemExit as ended:
        assert bool(ended.code) == args.startswith("?"), ended.code
    if args == "--help":
        heavy("torch", "transformers", "peft", "numpy", "pydantic")
heavy("torch", "transformers", "peft")
"""
    commands = ["--help", f"split|{scores}|--json", f"data|check|{small_input.data}", "?evaluate|nothing"]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program, *commands], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_installed_command_keeps_stdout_for_one_json_object(small_input: Any, here: Path) -> None:
    command = [str(Path(sys.executable).with_name("fedmide")), "run", str(small_input.config), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["status"] == "evaluated"
    assert all(line.startswith("fedmide: ") for line in done.stderr.splitlines())
    again = subprocess.run([*command, "--out", "runs/small-001"], capture_output=True, text=True, check=False)
    assert again.returncode == 2 and len(again.stderr.splitlines()) == 2
    assert json.loads(again.stdout)["problems"] == ["runs/small-001 exists already"]


# --- report


def test_a_report_is_written_and_its_path_printed(
    fedmide: Callable[..., Outcome], finished: tuple[Any, Path], here: Path
) -> None:
    run = finished[1]
    told = fedmide("report", run, "--out", "page.html")
    assert told == Outcome(0, "page.html\n", "") and "fedmide report" in (here / "page.html").read_text()
    as_json = fedmide("report", run, "--with-records", "--out", "texts.html", "--json").json
    assert as_json == {"report": "texts.html", "bytes": (here / "texts.html").stat().st_size}
    assert "Private to the sites" in (here / "texts.html").read_text()


def test_runs_are_compared(fedmide: Callable[..., Outcome], finished: tuple[Any, Path], here: Path) -> None:
    shutil.copytree(finished[1], here / "again")
    assert fedmide("report", finished[1], "again").out == "comparison.html\n"
    assert "again" in (here / "comparison.html").read_text()
    assert "goes with one run" in fedmide("report", finished[1], "again", "--with-records").refusal
    assert "can't be compared with itself" in fedmide("report", "again", "again").refusal


# --- looking at records


def test_records_are_shown_as_the_model_sees_them(
    fedmide: Callable[..., Outcome], small_input: Any, here: Path
) -> None:
    shown = fedmide("data", "show", small_input.config, "--client", "b", "--count", "1")
    assert shown.code == 0 and shown.out.startswith("b, training record 1\n[prompt, 1 tokens, no loss]\n")
    found = fedmide("data", "show", small_input.config, "--part", "test", "--count", "2", "--json").json
    assert [each["title"] for each in found["records"]] == [f"{c}, test record {n}" for c in "ab" for n in (1, 2)]
    assert (
        "--client c: no such site. Known: a, b" in fedmide("data", "show", small_input.config, "--client", "c").refusal
    )


def test_records_are_shown_in_the_split_that_trains(
    fedmide: Callable[..., Outcome], small_input: Any, here: Path
) -> None:
    def shown(*overrides: str) -> list[Any]:
        settings = [word for each in overrides for word in ("--set", each)]
        found = fedmide("data", "show", small_input.config, "--count", 9, "--json", *settings).json
        return [each["pieces"] for each in found["records"]]

    assert shown("data.seed=7", "seed=0") == shown("data.seed=7", "seed=1") == shown("seed=7")
    assert shown("data.seed=7") != shown()


def test_a_check_warns_of_a_possible_identifier_of_a_person(
    fedmide: Callable[..., Outcome], small_input: Any, here: Path
) -> None:
    path = small_input.data / "a" / "training.jsonl"
    lines = path.read_text().splitlines()
    line = json.dumps({**json.loads(lines[0]), "response": "write to jane@clinic.org"})
    path.write_text("\n".join([line, *lines[1:]]) + "\n")
    told = fedmide("data", "check", small_input.data).out
    assert "warning: 1 training records of site a seem to hold an e-mail address\n" in told
    assert "categories of site a: anatomy 100%\n" in told and "jane" not in told
    assert told.rstrip().endswith("does not make records anonymous")


def test_a_run_is_watched(fedmide: Callable[..., Outcome], finished: tuple[Any, Path], here: Path) -> None:
    shown = fedmide("watch", finished[1], "--once")
    assert shown.code == 0 and shown.out.startswith("run: evaluated, ")
    found = fedmide("watch", finished[1], "--json").json
    assert (found["rounds_done"], found["rounds"], found["personalized"]) == (2, 2, 2)


def test_a_model_is_exported(fedmide: Callable[..., Outcome], finished: tuple[Any, Path], here: Path) -> None:
    told = fedmide("export", finished[1], "model", "--client", "a", "--merge")
    assert told.code == 0 and told.err == ""
    assert told.out.startswith("against the adapter: largest logit difference ") and "written: model\n" in told.out
    found = fedmide("export", finished[1], "adapter", "--json").json
    assert found["folder"] == "adapter" and found["parity"] is None and len(found["commands"]) == 1
