"""Exports: transformers and PEFT load from them the same model as the run's, and no half-written export is left."""

import json
import shutil
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedmide.config import parse
from fedmide.errors import ModelError, RunFolderError, UsageError
from fedmide.journal.creation import reopen
from fedmide.journal.folder import RunFolder
from fedmide.model.pretrained import hf
from fedmide.model.pretrained.llama import convert_gguf
from fedmide.runs import export as exports
from fedmide.runs.export import compare, export, serving

IDS = torch.arange(40).reshape(2, 20)


@pytest.fixture(scope="module")
def run_path(tmp_path_factory: pytest.TempPathFactory, finished_run: Callable[..., Path]) -> Path:
    return finished_run(tmp_path_factory.mktemp("exported"), ["federation.rounds=1", "lora.r=12"])


@pytest.fixture
def folder(run_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    monkeypatch.setenv("FEDMIDE_CACHE", str(tiny_folder.parent))
    return reopen(run_path)


def scores(network: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.inference_mode():
        values: torch.Tensor = network.eval()(input_ids=ids).logits.float()
    return values


def adapted(tiny_folder: Path, adapter: Path) -> torch.Tensor:
    base = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT uses names that transformers will change
        network = PeftModel.from_pretrained(base, adapter)
    return scores(network)


@pytest.mark.parametrize("client", ["", "b"])
def test_a_merged_model_is_base_and_adapter(client: str, folder: RunFolder, tiny_folder: Path, tmp_path: Path) -> None:
    written = export(folder, tmp_path / "out", client, merge=True)
    adapter = folder.personal_adapter(client) if client else folder.adapter
    expected = adapted(tiny_folder, adapter)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert found.dtype == torch.float32 and torch.allclose(scores(found), expected, atol=1e-4)
    base = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    assert not torch.allclose(scores(base), expected, atol=1e-2), "the adapter says something"
    assert written.parity is not None and written.parity.divergence < 1e-6 and written.parity.same_choice == 1.0
    ours, theirs = (AutoTokenizer.from_pretrained(path) for path in (tmp_path / "out", tiny_folder))
    assert ours("Which organ?").input_ids == theirs("Which organ?").input_ids
    assert ours.chat_template == theirs.chat_template and ours.eos_token_id == theirs.eos_token_id


def test_bfloat16_is_rounded_once_and_reports_its_difference(
    folder: RunFolder, tiny_folder: Path, tmp_path: Path
) -> None:
    written = export(folder, tmp_path / "out", merge=True, dtype="bfloat16")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert found.dtype == torch.bfloat16
    assert written.parity is not None and 0.0 < written.parity.divergence < 0.01
    merged = AutoModelForCausalLM.from_pretrained(export(folder, tmp_path / "whole", merge=True).path, dtype="auto")
    for name, weight in merged.state_dict().items():
        assert torch.equal(found.state_dict()[name], weight.to(torch.bfloat16)), name


def test_a_merged_model_is_written_as_gguf_too(folder: RunFolder, tmp_path: Path) -> None:
    written = export(folder, tmp_path / "out", "a", merge=True, gguf=True)
    assert written.gguf == tmp_path / "out" / "model.gguf"
    (tmp_path / "read").mkdir()
    convert_gguf(written.gguf, tmp_path / "read")
    ours, theirs = (AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype="auto") for name in ("out", "read"))
    assert torch.equal(scores(ours), scores(theirs))
    assert serving(folder, written)[-1] == f"llama-server --model {written.gguf}"
    assert not any("convert_hf_to_gguf" in command for command in serving(folder, written))
    with pytest.raises(UsageError, match="--gguf writes a merged model"):
        export(folder, tmp_path / "other", gguf=True)
    assert not (tmp_path / "other").exists()


def test_a_peft_folder_is_the_runs_own(folder: RunFolder, tiny_folder: Path, tmp_path: Path) -> None:
    written = export(folder, tmp_path / "out", "a")
    assert written.parity is None
    assert torch.equal(adapted(tiny_folder, tmp_path / "out"), adapted(tiny_folder, folder.personal_adapter("a")))


def test_a_wrong_merge_is_refused_and_leaves_nothing(
    folder: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forgets(network: Any, out: Path, dtype: torch.dtype) -> None:
        network.unload().to(dtype).save_pretrained(out)  # the base alone

    monkeypatch.setattr(exports, "save_merged", forgets)
    with pytest.raises(ModelError, match="the merged model does not predict what base and adapter predict: "):
        export(folder, tmp_path / "out", merge=True)
    assert list(tmp_path.iterdir()) == []


def test_a_quantized_base_is_refused(
    folder: RunFolder, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_base = hf.load_base

    def quantised(*given: Any) -> Any:
        base, tokenizer = load_base(*given)
        base.config.quantization_config = {"quant_method": "bitsandbytes"}
        return base, tokenizer

    monkeypatch.setattr(hf, "load_base", quantised)
    with pytest.raises(ModelError, match="nothing can be merged into a quantized model"):
        export(folder, tmp_path / "out", merge=True)
    in_four_bits = replace(folder, config=parse({"model": {"quantization": "nf4"}}))
    with pytest.raises(ModelError, match="trained over a base in nf4, into which it can't be merged"):
        export(in_four_bits, tmp_path / "out", merge=True)
    assert not (tmp_path / "out").exists()


def test_an_export_that_is_impossible_is_refused_with_the_reason(folder: RunFolder, tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match=r"there is no site 'c'\. Known: a, b"):
        export(folder, tmp_path / "out", "c")
    (tmp_path / "taken").mkdir()
    with pytest.raises(RunFolderError, match="taken exists already"):
        export(folder, tmp_path / "taken")
    copy = shutil.copytree(folder.path, tmp_path / "copy")
    shutil.rmtree(copy / "clients" / "a" / "adapter")
    with pytest.raises(RunFolderError, match=r"no adapter of site a yet\. First: fedmide personalize"):
        export(reopen(copy), tmp_path / "out", "a")


def test_the_card_describes_the_model_and_holds_no_text_of_a_record(folder: RunFolder, tmp_path: Path) -> None:
    export(folder, tmp_path / "out", "a", merge=True)
    card = (tmp_path / "out" / "README.md").read_text()
    data = folder.read_manifest()["data"]
    for part in (
        "# tiny-random, tuned by fedmide for site a",
        data["a"]["fingerprint"],
        "LoRA rank 12",
        "same first choice at 100.0 %",
        "| a | 3 | ",
        "must not decide on a patient",
    ):
        assert part in card
    assert data["b"]["fingerprint"] not in card and "| b |" not in card
    for line in (folder.path.parent / "input" / "data" / "a" / "training.jsonl").read_text().splitlines():
        assert json.loads(line)["instruction"] not in card


def test_the_commands_serve_every_client(folder: RunFolder, tiny_folder: Path, tmp_path: Path) -> None:
    (adapters,) = serving(folder, export(folder, tmp_path / "out"))
    assert f"vllm serve {tiny_folder} --enable-lora --max-lora-rank 16 --lora-modules" in adapters
    assert f"common={folder.adapter}" in adapters and f"b={folder.personal_adapter('b')}" in adapters
    assert len(serving(folder, export(folder, tmp_path / "merged", merge=True))) == 4


def test_parity_by_hand() -> None:
    first = torch.log(torch.tensor([[[0.5, 0.25, 0.25], [0.5, 0.25, 0.25]]]))
    second = torch.log(torch.tensor([[[0.5, 0.25, 0.25], [0.25, 0.5, 0.25]]]))
    found = compare(first, second)
    assert found.same_choice == 0.5 and found.largest_logit_difference == pytest.approx(0.6931, abs=1e-4)
    assert found.divergence == pytest.approx((0.25 * 0.6931) / 2, abs=1e-4)
