"""The configuration: the method's defaults, refusals, overrides, and the way to TOML and back."""

import math
import re
import tomllib
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from fedmide.config import Config, apply_overrides, load, parse, read_toml, to_toml
from fedmide.config.config import METHOD_TABLES, PRESETS, VARIANTS
from fedmide.config.knobs import agreed, fingerprint, knobs
from fedmide.config.sections import MethodName
from fedmide.errors import ConfigError
from tests.needs import ROOT, SHARED

EXAMPLES = ROOT / "examples"

DEFAULTS: dict[str, dict[str, Any]] = {
    "8 clients": {"data.source": "published", "data.clients": 0},  # all of them
    "participation 1.0": {"federation.participation": 1.0},
    "20 rounds": {"federation.rounds": 20},
    "1 local epoch": {"training.epochs": 1, "training.max_steps": 0},
    "batch 32": {"training.batch_size": 32},
    "AdamW lr 2e-4": {"training.learning_rate": 2e-4, "personalization.learning_rate": 2e-4},
    "decaying linearly to 0": {"training.schedule": "linear"},
    "weight decay 0": {"training.weight_decay": 0.0},
    "gradient norm clipped at 1.0": {"training.max_grad_norm": 1.0},
    "cutoff 512 tokens": {"model.cutoff": 512},
    "LoRA r 8": {"lora.r": 8},
    "alpha 16": {"lora.alpha": 16.0},
    "0.05": {"lora.dropout": 0.05},
    "q_proj and v_proj": {"lora.targets": ["q_proj", "v_proj"], "lora.blocks": "all"},
    "loss on prompt and response": {"training.positions": "all", "scoring.positions": "all"},
    "Alpaca prompt": {"prompt.template": "alpaca"},
    "10 personalization epochs": {"personalization.epochs": 10},
    "optimizer state fresh in each round": {},  # no setting: `training.train` makes a new optimizer
    # the stages
    "W rounds (default 1)": {"warmup.rounds": 1},
    "`warmup.reset = true`": {"warmup.reset": True},
    "enrolls those with score < 1.0": {"enrollment.threshold": 1.0, "enrollment.enabled": True},
    "`otsu-256` (compatible, default)": {"enrollment.rule": "otsu-256"},
    "Ours train at once": {"enrollment.timing": "same_round"},
    "(default: all of": {"personalization.records": "all"},
}


def value_of(config: Config, name: str) -> Any:
    value: Any = config
    for part in name.split("."):
        value = getattr(value, part)
    return value


def nested(name: str, value: Any) -> dict[str, Any]:
    """The values of a file that sets one setting."""
    for part in reversed(name.split(".")):
        value = {part: value}
    return dict(value)


# --- defaults and descriptions


@pytest.mark.parametrize("phrase", DEFAULTS)
def test_the_defaults_are_the_methods(phrase: str) -> None:
    for name, expected in DEFAULTS[phrase].items():
        assert value_of(Config(), name) == expected


@pytest.mark.needs("method")
@pytest.mark.parametrize("phrase", DEFAULTS)
def test_the_specification_has_this_value(phrase: str) -> None:
    british = " ".join((SHARED / "method.md").read_text(encoding="utf-8").split())
    assert phrase in british.replace("personalisation", "personalization").replace("optimiser", "optimizer")


def test_every_setting_and_every_section_has_its_meaning() -> None:
    described = dict(knobs())
    assert len(described) > 50
    for name, meaning in described.items():
        assert len(meaning.split()) >= 1, name
        assert meaning.endswith((".", "loss.")), f"{name}: {meaning}"
    sections = [field.annotation for field in Config.model_fields.values()]
    assert all(section.__doc__ for section in sections if isinstance(section, type) and issubclass(section, BaseModel))


def test_knobs_are_all_leaves_by_their_dotted_names() -> None:
    def leaves(values: dict[str, Any], prefix: str = "") -> list[str]:
        found = []
        for name, value in values.items():
            found += leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else [f"{prefix}{name}"]
        return found

    assert [name for name, _ in knobs()] == leaves(Config().model_dump())


def test_a_configuration_can_not_be_changed() -> None:
    with pytest.raises(ValidationError):
        Config().training.epochs = 3  # type: ignore[misc]


# --- what is refused


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("training.learning_rat", "training.learning_rate"),
        ("training.learning-rate", "training.learning_rate"),
        ("learning_rate", "training.learning_rate"),
        ("batch_size", "training.batch_size"),
        ("enrolment", "enrollment"),
        ("scoring.position", "scoring.positions"),
        ("federation.num_rounds", "federation.rounds"),
        ("threads", "runtime.threads"),
        ("seeds", "seed"),
        ("data.fields.instructions", "data.fields.instruction"),
        ("lora.str", "lora.r"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_right_one(key: str, nearest: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(nested(key, 1), "here.toml")
    assert caught.value.problems == (f"here.toml: unknown key '{key}' (did you mean '{nearest}'?)",)


@pytest.mark.parametrize("key", ["federation.strategy", "training.strict", "strong", "lora.list[str]"])
def test_an_unknown_key_is_named_whole(key: str) -> None:
    with pytest.raises(ConfigError, match=rf"^configuration: unknown key '{re.escape(key)}'"):
        parse(nested(key, 1))


def test_a_key_like_no_other_is_refused_without_a_suggestion() -> None:
    with pytest.raises(ConfigError, match=r"^configuration: unknown key 'zzz'$"):
        parse({"zzz": 1})


def test_all_problems_are_reported_at_once_with_their_places() -> None:
    values = {
        "seed": -1,
        "training": {"epochs": 0, "learning_rat": 1e-3, "schedule": "cosine"},
        "federation": {"participation": 1.5},
        "model": 5,
        "colour": "red",
    }
    with pytest.raises(ConfigError) as caught:
        parse(values, "run.toml")
    problems = caught.value.problems
    assert len(problems) == 7
    assert all(problem.startswith("run.toml: ") for problem in problems)
    assert "run.toml: seed = -1: input should be greater than or equal to 0" in problems
    assert "run.toml: training.epochs = 0: input should be greater than or equal to 1" in problems
    assert "run.toml: training.schedule = 'cosine': input should be 'linear' or 'constant'" in problems
    assert "run.toml: federation.participation = 1.5: input should be less than or equal to 1" in problems


NAN, INF = math.nan, math.inf
RANGES: dict[str, tuple[list[Any], list[Any]]] = {
    "seed": ([0, 2**60], [-1, 1.0, True, "1"]),
    "data.source": (["published", "files", "table", "medical"], ["Published", "", 1]),
    "data.clients": ([0, 8], [-1, 0.5]),
    "data.max_records": ([0, 1], [-1]),
    "data.validation_fraction": ([0.0, 0.99, 0], [1.0, -0.01, NAN, "0.1"]),
    "data.seed": ([-1, 0, 3], [-2]),
    "data.pieces": ([1, 5], [0]),
    "data.noisy_clients": ([0, 3], [-1]),
    "personalization.max_steps": ([0, 6], [-1]),
    "data.test_fraction": ([0.0, 0.99], [1.0, 1, -0.01, NAN]),
    "model.dtype": (["auto", "float32", "bfloat16", "float16"], ["float64"]),
    "model.quantization": (["none", "int8", "nf4"], ["fp4", True]),
    "model.device": (["auto", "cpu", "cuda", "mps"], ["gpu"]),
    "model.cutoff": ([8, 4096], [7, 0]),
    "prompt.overflow": (["refuse", "cut"], ["drop"]),
    "lora.r": ([1, 64], [0, -1, 8.0]),
    "lora.alpha": ([0.5, 16], [0.0, -1.0, INF, NAN]),
    "lora.dropout": ([0.0, 0.5], [1.0, -0.1, NAN]),
    "lora.targets": (["all-linear", ["q_proj"]], ["", [], [1], 3]),
    "lora.blocks": (["all", "top:1", "top:12"], ["top:0", "top:", "top:01", "bottom:2", "all ", ""]),
    "training.epochs": ([1], [0, -1, 1.5]),
    "training.max_steps": ([0, 5], [-1]),
    "training.batch_size": ([1], [0]),
    "training.learning_rate": ([1e-9, 1], [0.0, -1e-3, INF, NAN, "2e-4"]),
    "training.weight_decay": ([0.0, 0.1], [-0.1, INF, NAN]),
    "training.max_grad_norm": ([1.0], [0.0, INF, NAN]),
    "training.positions": (["all", "response"], ["prompt"]),
    "training.tokens_per_batch": ([16], [15]),
    "training.checkpointing": ([True, False], [1, "true"]),
    "federation.rounds": ([0, 1], [-1]),
    "federation.participation": ([0.001, 1.0, 1], [0.0, 1.01, NAN, -0.5]),
    "warmup.rounds": ([0, 2], [-1]),
    "warmup.reset": ([True, False], [1, "true"]),
    "scoring.tokens_per_batch": ([16], [15]),
    "enrollment.rule": (["otsu-256", "otsu-exact", "median"], ["otsu"]),
    "enrollment.threshold": ([0.95], [0.0, -1.0, NAN, INF]),
    "enrollment.choice": (["score", "random"], ["reversed"]),
    "enrollment.timing": (["same_round", "next_round"], ["later"]),
    "personalization.epochs": ([0, 1], [-1]),
    "personalization.start": (["aggregated", "own"], ["fresh"]),
    "personalization.records": (["all", "personal-first", "personal", "shared"], ["none"]),
    "generation.max_new_tokens": ([0, 80], [-1]),
    "generation.batch_size": ([1], [0]),
    "evaluation.choices": ([0, 2], [1, -1]),
    "evaluation.bootstrap": ([100], [99]),
    "runtime.threads": ([0, 2], [-1]),
}


@pytest.mark.parametrize("name", RANGES)
def test_a_value_is_taken_within_its_range_and_refused_beyond(name: str) -> None:
    good, bad = RANGES[name]
    for value in good:
        assert value_of(parse(nested(name, value)), name) == value
    for value in bad:
        with pytest.raises(ConfigError, match=name.split(".", maxsplit=1)[0]):
            parse(nested(name, value))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("seed = \n[training]\n", "not readable as TOML: .*line 1"),
        ("[training]\nepochs = 1\nepochs = 2\n", "not readable as TOML: .*line 3"),
    ],
)
def test_a_broken_file_is_refused_with_its_place(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "broken.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=f"broken\\.toml: {told}"):
        load(path)


def test_a_file_that_is_not_there_not_text_or_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.toml: no such file"):
        read_toml(tmp_path / "none.toml")
    with pytest.raises(ConfigError, match="not readable as TOML"):
        read_toml(tmp_path)
    (tmp_path / "latin.toml").write_bytes(b'[data]\npath = "caf\xe9"\n')
    with pytest.raises(ConfigError, match=r"latin\.toml: not readable as TOML"):
        read_toml(tmp_path / "latin.toml")


def test_a_problem_in_a_file_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text("[training]\nepoch = 3\n")
    with pytest.raises(
        ConfigError, match=r"run\.toml: unknown key 'training\.epoch' \(did you mean 'training\.epochs'"
    ):
        load(path)


# --- overrides


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("seed=3", {"seed": 3}),
        ("training.learning_rate=1e-3", {"training": {"learning_rate": 1e-3}}),
        (" training.epochs = 3 ", {"training": {"epochs": 3}}),
        ("warmup.reset=false", {"warmup": {"reset": False}}),
        ('lora.targets=["q_proj", "k_proj"]', {"lora": {"targets": ["q_proj", "k_proj"]}}),
        ("lora.targets=all-linear", {"lora": {"targets": "all-linear"}}),
        ("data.path=here/it is/a=b.json", {"data": {"path": "here/it is/a=b.json"}}),
        ('data.path="2024"', {"data": {"path": "2024"}}),
        ("data.path=8", {"data": {"path": "8"}}),
        ("data.fields.client=1", {"data": {"fields": {"client": "1"}}}),
        ("model.name=2024-11-24", {"model": {"name": "2024-11-24"}}),
        ("data.path=", {"data": {"path": ""}}),
        ("data.fields.client=site", {"data": {"fields": {"client": "site"}}}),
        ('data.path="open', {"data": {"path": '"open'}}),
    ],
)
def test_an_override_is_toml_where_it_is_and_text_else(override: str, expected: dict[str, Any]) -> None:
    assert apply_overrides({}, [override]) == expected
    parse(expected)


def test_overrides_go_over_the_file_in_order_and_leave_it_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text("seed = 1\n[training]\nepochs = 2\nbatch_size = 4\n")
    before = read_toml(path)
    values = apply_overrides(before, ["training.epochs=3", "training.epochs=5", "lora.r=2"])
    assert values == {"seed": 1, "training": {"epochs": 5, "batch_size": 4}, "lora": {"r": 2}}
    assert before == read_toml(path)
    config = load(path, ["training.epochs=3"])
    assert (config.seed, config.training.epochs, config.training.batch_size) == (1, 3, 4)


def test_all_wrong_overrides_are_reported_at_once() -> None:
    wrong = ["seed", "=3", "training.=3", "seed.deep=3", "training.epochs.deep=3"]
    with pytest.raises(ConfigError) as caught:
        apply_overrides({"seed": 1, "training": {"epochs": 2}}, ["lora.r=2", *wrong])
    assert caught.value.problems == tuple(f"--set {text!r}: expected section.key=value" for text in wrong)
    assert "--set training.learning_rate=1e-3" in caught.value.remedy


def test_an_override_is_checked_like_a_file(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text("")
    with pytest.raises(ConfigError, match=r"unknown key 'training\.epoch'"):
        load(path, ["training.epoch=3"])
    with pytest.raises(ConfigError, match=r"lora\.r = 'many': input should be a valid integer"):
        load(path, ["lora.r=many"])
    path.write_text("data.path = 2024")
    with pytest.raises(ConfigError, match=r"data\.path = 2024: input should be a valid string"):
        load(path)


# --- the learning rate of the tuning


@pytest.mark.parametrize(
    ("text", "overrides", "expected"),
    [
        ("", [], 2e-4),
        ("[training]\nlearning_rate = 1e-3", [], 1e-3),
        ("", ["training.learning_rate=1e-3"], 1e-3),
        ("[personalization]\nepochs = 3", ["training.learning_rate=1e-3"], 1e-3),
        ("[training]\nlearning_rate = 1e-3", ["training.learning_rate=5e-4"], 5e-4),
        ("[training]\nlearning_rate = 1e-3", ["personalization.learning_rate=5e-4"], 5e-4),
        ("[personalization]\nlearning_rate = 2e-4", ["training.learning_rate=1e-3"], 2e-4),
        ("[training]\nepochs = 3", [], 2e-4),
    ],
)
def test_the_tuning_has_the_learning_rate_of_the_training_by_default(
    tmp_path: Path, text: str, overrides: list[str], expected: float
) -> None:
    path = tmp_path / "run.toml"
    path.write_text(text)
    config = load(path, overrides)
    assert config.personalization.learning_rate == expected
    (tmp_path / "resolved.toml").write_text(to_toml(config), encoding="utf-8")
    assert load(tmp_path / "resolved.toml") == config


def test_a_broken_section_is_reported_and_not_inherited_from() -> None:
    with pytest.raises(ConfigError, match="training = 5"):
        parse({"training": 5})
    with pytest.raises(ConfigError, match="personalization = 5"):
        parse({"training": {"learning_rate": 1e-3}, "personalization": 5})


# --- there and back

positive = st.floats(1e-12, 1e6)
some_values = st.fixed_dictionaries(
    {},
    optional={
        "seed": st.integers(0, 2**62),
        "data.source": st.sampled_from(["published", "files", "table", "medical"]),
        "data.path": st.text(max_size=20),
        "data.fields.client": st.text(max_size=5),
        "data.test_fraction": st.floats(0.0, 0.99),
        "lora.targets": st.text(min_size=1, max_size=5) | st.lists(st.text(max_size=5), min_size=1, max_size=3),
        "lora.alpha": positive,
        "training.learning_rate": positive,
        "personalization.learning_rate": positive,
        "personalization.epochs": st.integers(0, 100),
        "federation.participation": st.floats(1e-6, 1.0),
        "warmup.reset": st.booleans(),
        "enrollment.rule": st.sampled_from(["otsu-256", "otsu-exact", "median"]),
    },
)


def config_of(values: dict[str, Any]) -> Config:
    result: dict[str, Any] = {}
    for name, value in values.items():
        *sections, leaf = name.split(".")
        target = result
        for section in sections:
            target = target.setdefault(section, {})
        target[leaf] = value
    return parse(result)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("config") / "config.toml"


@given(some_values)
def test_the_resolved_configuration_is_read_back_equal(file: Path, values: dict[str, Any]) -> None:
    config = config_of(values)
    file.write_bytes(to_toml(config).encode())
    again = load(file)
    assert again == config
    assert (fingerprint(again), to_toml(again)) == (fingerprint(config), to_toml(config))
    for name, value in values.items():
        assert value_of(again, name) == value


def test_the_resolved_configuration_holds_every_knob() -> None:
    for method in get_args(MethodName):
        written = tomllib.loads(to_toml(parse({"method": method})))
        for name, _ in knobs():
            section = name.split(".")[0]
            assert (value_in(written, name) is not None) is (method in METHOD_TABLES.get(section, (method,)))


def value_in(values: Any, name: str) -> Any:
    for part in name.split("."):
        values = values.get(part) if isinstance(values, dict) else None
    return values


@given(some_values, some_values)
def test_different_configurations_have_different_fingerprints(one: dict[str, Any], other: dict[str, Any]) -> None:
    first, second = config_of(one), config_of(other)
    assert (fingerprint(first) == fingerprint(second)) is (first == second)
    assert len(fingerprint(first)) == 16


def test_a_value_written_as_a_whole_number_is_the_same_configuration() -> None:
    whole, point = parse({"lora": {"alpha": 16}}), parse({"lora": {"alpha": 16.0}})
    assert whole == point
    assert fingerprint(whole) == fingerprint(point) == fingerprint(Config())


def test_a_file_with_variants_for_a_comparison_is_a_runs_configuration_too(tmp_path: Path) -> None:
    path = tmp_path / "compare.toml"
    path.write_text('seed = 2\n[variants.near]\nmethod = "fedprox"\n')
    assert load(path) == Config(seed=2)


def test_parties_agree_on_every_knob_but_those_of_their_own_machine() -> None:
    used = {name for name, _ in knobs() if name.partition(".")[0] not in METHOD_TABLES}
    left = used - set(agreed(Config()))
    assert "fedprox.mu" in agreed(parse({"method": "fedprox"})), "the tables of the method that is chosen too"
    assert {name.partition(".")[0] for name in left} == {"data", "runtime", "replies", "model", "prompt"}
    assert {name for name in left if name.startswith(("model.", "prompt."))} == {
        "model.name",
        "model.device",
        "prompt.template",
    }
    assert agreed(parse({"lora": {"r": 4}}))["lora.r"] == "4"
    assert agreed(parse({"data": {"path": "/here"}})) == agreed(Config())


# --- the natural threshold


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, 1.0),
        ({"scoring": {"kind": "ratio"}}, 1.0),
        ({"scoring": {"kind": "relative-gap"}}, 0.0),
        ({"scoring": {"kind": "relative-gap"}, "enrollment": {"enabled": True}}, 0.0),
        ({"scoring": {"kind": "relative-gap"}, "enrollment": {"threshold": -0.1}}, -0.1),
    ],
)
def test_enrollment_compares_with_the_scores_natural_threshold_unless_given_one(
    tmp_path: Path, values: dict[str, Any], expected: float
) -> None:
    config = parse(values)
    assert config.enrollment.threshold == expected
    (tmp_path / "resolved.toml").write_text(to_toml(config), encoding="utf-8")
    assert load(tmp_path / "resolved.toml") == config


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"enrollment": {"threshold": 0.0}}, "threshold 0.0 is not positive"),
        ({"scoring": {"kind": "relative-gap"}, "enrollment": {"rule": "otsu-log"}}, "a gap has no logarithm"),
        ({"scoring": {"kind": "gap"}}, "scoring.kind = 'gap'"),
        ({"warmup": {"folds": 3}}, "warmup.folds = 3"),
        ({"personalization": {"interpolation": []}}, "personalization.interpolation"),
        ({"personalization": {"interpolation": [-0.5]}}, "personalization.interpolation.0 = -0.5"),
        ({"enrollment": {"softness": -1.0}}, "enrollment.softness = -1.0"),
        ({"enrollment": {"softness": 0.1, "split": "random"}}, "split 'random' sets aside"),
        ({"enrollment": {"softness": 0.1, "choice": "random"}}, "choice 'random' sets aside"),
        ({"preset": "best"}, "preset = 'best'"),
        ({"preset": 3}, "preset = 3"),
    ],
)
def test_settings_that_do_not_fit_are_refused(values: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem.replace(".", r"\.")):
        parse(values)


# --- presets


def test_the_original_preset_is_the_published_method_and_the_default() -> None:
    assert parse({"preset": "original"}) == parse({})
    config = parse({})
    assert (config.warmup.folds, config.warmup.max_steps, config.warmup.reset) == (1, 0, True)
    assert (config.scoring.kind, config.scoring.without_own, config.scoring.positions) == ("ratio", False, "all")
    assert (config.enrollment.rule, config.enrollment.softness) == ("otsu-256", 0.0)
    assert (config.personalization.personal_weight, config.personalization.interpolation) == (1.0, [1.0])


@pytest.mark.parametrize("example", ["compare.toml", "compare-medical.toml"])
def test_the_recommended_preset_is_the_variant_that_was_measured(example: str) -> None:
    assert read_toml(EXAMPLES / example)[VARIANTS]["personal-first-own"] == PRESETS["recommended"]


def test_the_recommended_preset_keeps_the_settings_of_the_user() -> None:
    config = parse({"preset": "recommended", "scoring": {"positions": "all"}})
    assert (config.scoring.positions, config.warmup.reset) == ("all", False)
    assert config.personalization.interpolation == [0.0, 0.25, 0.5, 0.75, 1.0]
    other = parse({"preset": "recommended", "method": "fedavg-ft"})
    assert other.personalization.interpolation == [1.0], "fedmide's alone"


def test_a_site_keeps_its_own_adapter_where_it_is_needed_and_no_other() -> None:
    assert not parse({}).keeps_own
    assert parse({"preset": "recommended"}).keeps_own
    assert parse({"scoring": {"without_own": True}}).keeps_own
    needless = {"personalization": {"start": "own", "records": "personal-first"}, "scoring": {"without_own": True}}
    assert parse({"method": "fedavg-ft", **needless}).personalization.records == "all"
    assert [parse({"method": name, **needless}).keeps_own for name in ("fedmide", "fedavg-ft")] == [True, True]
    assert [parse({"method": name, **needless}).keeps_own for name in ("fedavg", "ditto", "local")] == [False] * 3
    assert not parse({"method": "fedavg-ft", "scoring": {"without_own": True}}).keeps_own


def test_a_preset_sets_only_settings_that_the_user_does_not(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tables = {"warmup": {"folds": 2, "reset": False}, "scoring": {"kind": "relative-gap"}}
    monkeypatch.setattr("fedmide.config.config.PRESETS", {"original": tables})
    config = parse({"preset": "original", "warmup": {"reset": True}})
    assert (config.warmup.folds, config.warmup.reset, config.enrollment.threshold) == (2, True, 0.0)
    (tmp_path / "resolved.toml").write_text(to_toml(config), encoding="utf-8")
    monkeypatch.setattr("fedmide.config.config.PRESETS", {"original": {"warmup": {"rounds": 7, "max_steps": 9}}})
    assert load(tmp_path / "resolved.toml") == config  # every setting is written, so the preset fills in none
    with pytest.raises(ConfigError, match="warmup = 5"):
        parse({"preset": "original", "warmup": 5})


def test_a_preset_is_fedmides_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedmide.config.config.PRESETS", {"original": {"personalization": {"epochs": 7}}})
    assert parse({"preset": "original", "method": "fedavg-ft"}).personalization.epochs == 10
