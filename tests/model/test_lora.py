"""The layers that get an adapter, adapters copied in and out bit for bit, and saved adapters read by PEFT."""

import json
import re
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from fedmide.config.sections import LoraConfig, ModelConfig
from fedmide.data.tokens import Example
from fedmide.errors import ModelError
from fedmide.model import adapters, scoring
from fedmide.model import lora as model
from fedmide.model.interface import Adapter
from fedmide.model.lora import LoraModel
from fedmide.model.pretrained.hf import peft_files
from fedmide.model.pretrained.locate import locate

FLOAT32 = ModelConfig(name="tiny-random", dtype="float32", device="cpu")

pytestmark = pytest.mark.usefixtures("one_thread")

GATED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LINEAR: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text"), GATED),
    "gpt_neox": ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),
    "gpt2": ("c_attn", "c_proj", "c_fc", "c_proj"),  # one c_proj in the attention, one in the MLP
}
TWO: Mapping[str, list[str]] = {
    **{shape: ["q_proj", "v_proj"] for shape in ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text")},
    "gpt_neox": ["query_key_value", "dense_4h_to_h"],
    "gpt2": ["c_attn", "mlp.c_proj"],
}


def open_tiny(folder: Path, **lora: Any) -> LoraModel:
    return model.load(folder, FLOAT32, LoraConfig(**lora))


def noisy(lora: LoraModel, seed: int = 1, scale: float = 0.3) -> Adapter:
    """An adapter without zero arrays."""
    draw = np.random.default_rng(seed)
    return {name: (scale * draw.normal(size=shape)).astype(np.float32) for name, shape in lora.shapes.items()}


def logits(network: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = network(input_ids=ids).logits
    return found


IDS = torch.arange(3, 33)[None]


# --- which layers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", ["all", "top:1"])
def test_adapters_are_in_the_named_layers_of_the_chosen_blocks(
    shape_folder: Path, shape_model: LoraModel, blocks: str
) -> None:
    shape = shape_folder.name
    chosen = range(3) if blocks == "all" else range(3 - int(blocks[-1]), 3)
    for targets, leaves in (("all-linear", LINEAR[shape]), (TWO[shape], [name.split(".")[-1] for name in TWO[shape]])):
        if (targets, blocks) == ("all-linear", "all"):
            lora = shape_model
        else:
            lora = open_tiny(shape_folder, targets=targets, blocks=blocks)
        adapted = [name for name, module in lora.network.named_modules() if hasattr(module, "lora_A")]
        found = sorted((int(re.findall(r"\.(\d+)\.", name)[0]), name.rsplit(".", 1)[-1]) for name in adapted)
        assert found == sorted((block, leaf) for block in chosen for leaf in leaves)
        assert not hasattr(lora.network.get_output_embeddings(), "lora_A")
        assert sorted({name.split(".lora_")[0] for name in lora.shapes}) == sorted(adapted)
        assert len(lora.shapes) == 2 * len(adapted)
        for name, (rows, columns) in lora.shapes.items():
            assert (rows if ".lora_A." in name else columns) == 8
        assert len(lora.parameters()) == len(lora.shapes)


def test_target_may_be_a_single_name(tiny_folder: Path) -> None:
    assert open_tiny(tiny_folder, targets="q_proj").shapes == open_tiny(tiny_folder, targets=["q_proj"]).shapes
    assert open_tiny(tiny_folder, targets="all-linear").shapes == open_tiny(tiny_folder, targets=["all-linear"]).shapes


@pytest.mark.parametrize(
    "targets", [["q_proj", "query", "proj"], ["query", "attn.q_proj"], ["lm_head", "embed_tokens"]]
)
def test_targets_that_match_nothing_are_all_named(tiny_folder: Path, targets: list[str]) -> None:
    with pytest.raises(ModelError) as caught:
        open_tiny(tiny_folder, targets=targets)
    unknown = [target for target in targets if target != "q_proj"]
    assert caught.value.problems == tuple(
        f"lora.targets: {target!r} matches no linear layer in the chosen blocks" for target in unknown
    )
    assert caught.value.remedy == "This model has down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"


def test_more_blocks_than_there_are(tiny_folder: Path) -> None:
    assert len(open_tiny(tiny_folder, blocks="top:4").shapes) == len(open_tiny(tiny_folder).shapes) == 16
    with pytest.raises(ModelError, match=re.escape("lora.blocks = 'top:5': the model has 4 blocks")):
        open_tiny(tiny_folder, blocks="top:5")


def test_only_the_adapter_is_trainable(shape_model: LoraModel) -> None:
    lora = shape_model
    assert {name for name, each in lora.network.named_parameters() if each.requires_grad} == {
        name.replace("_A.", "_A.default.").replace("_B.", "_B.default.") for name in lora.shapes
    }


# --- adapters in and out ---------------------------------------------------------------------------------------


def test_fresh_adapter_changes_nothing(shape_folder: Path, shape_model: LoraModel) -> None:
    lora = shape_model
    lora.network.eval()
    base = AutoModelForCausalLM.from_pretrained(shape_folder)
    lora.put(adapters.fresh(lora.shapes, seed=3))
    assert torch.equal(logits(lora.network, IDS), logits(base, IDS))
    lora.put(noisy(lora))
    assert not torch.allclose(logits(lora.network, IDS), logits(base, IDS), atol=0.01)


def test_put_and_take_are_exact(shape_model: LoraModel) -> None:
    lora = shape_model
    adapter = noisy(lora)
    for array in adapter.values():
        array.setflags(write=False)
    lora.put(adapter)
    taken = lora.take()
    lora.put(adapters.fresh(lora.shapes, seed=0))  # `take` returned a copy
    assert taken.keys() == adapter.keys()
    assert all(np.array_equal(taken[name], adapter[name]) for name in adapter)
    assert {array.dtype for array in taken.values()} == {np.dtype(np.float32)}


def test_put_refuses_an_adapter_that_does_not_fit_and_changes_nothing(tiny_folder: Path) -> None:
    lora = open_tiny(tiny_folder)
    before = lora.take()
    first, second, third, *_ = adapter = dict(noisy(lora))
    adapter[first] = adapter[first][:, :3]
    adapter[second] = adapter[second].astype(np.float64)
    del adapter[third]
    adapter["other"] = np.zeros(1, np.float32)
    with pytest.raises(ModelError) as caught:
        lora.put(adapter)
    assert [problem.split(": ", 1)[0] for problem in caught.value.problems] == ["adapter"] * 4
    for words in ("1 arrays missing", "1 arrays unknown", "(8, 3), expected (8, 64)", "float64, expected float32"):
        assert words in str(caught.value)
    assert all(np.array_equal(before[name], array) for name, array in lora.take().items())


def test_put_accepts_values_that_are_not_finite(tiny_folder: Path) -> None:
    """A client whose training diverged is still measured: its NLLs are not finite, and count as such."""
    lora = open_tiny(tiny_folder)
    adapter = {name: np.full_like(array, np.nan) for name, array in noisy(lora).items()}
    lora.put(adapter)
    assert all(np.isnan(array).all() for array in lora.take().values())


# --- the saved adapter -----------------------------------------------------------------------------------------


def write_folder(folder: Path, files: Mapping[str, bytes]) -> Path:
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def loaded_by_peft(base: Path, folder: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # warnings of PEFT itself
        return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()


def test_peft_loads_a_saved_adapter(shape_folder: Path, tmp_path: Path) -> None:
    lora = open_tiny(shape_folder, targets="all-linear", blocks="top:2", r=4, alpha=12.0)
    adapter = noisy(lora)
    lora.put(adapter)
    folder = write_folder(tmp_path / "adapter", peft_files(adapter, lora.lora))
    assert torch.equal(logits(loaded_by_peft(shape_folder, folder), IDS), logits(lora.network, IDS))


def test_saved_files_repeat_and_contain_no_folder(tiny_folder: Path) -> None:
    names = ["v_proj", "q_proj", "up_proj"]
    one, two = open_tiny(tiny_folder, targets=names), open_tiny(tiny_folder, targets=names[::-1])
    adapter = noisy(one)
    files = peft_files(adapter, one.lora)
    assert files == peft_files(dict(reversed(adapter.items())), two.lora)
    written = json.loads(files["adapter_config.json"])
    assert written["base_model_name_or_path"] == "tiny-random"
    assert written["target_modules"] == sorted(names)
    assert (written["inference_mode"], written["lora_dropout"], written["r"]) == (True, 0.05, 8)
    assert str(tiny_folder.parent) not in files["adapter_config.json"].decode()
    assert adapters.decode(files["adapter_model.safetensors"]).keys() == adapter.keys()


# --- loading ---------------------------------------------------------------------------------------------------


def refused(folder: Path) -> str:
    with pytest.raises(ModelError) as caught:
        open_tiny(folder)
    return str(caught.value)


def test_pickled_weights_are_not_loaded(tiny_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert "can't be loaded" in refused(folder)


def test_missing_weights_are_an_error(tiny_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.2.mlp.up_proj.weight"], weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert "2 weights missing, first 'model.layers.2.mlp.up_proj.weight'" in refused(folder)


@pytest.mark.parametrize("damaged", ["model.safetensors", "config.json", "tokenizer.json"])
def test_damaged_files_are_a_plain_error(tiny_folder: Path, tmp_path: Path, damaged: str) -> None:
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    whole = (folder / damaged).read_bytes()
    (folder / damaged).write_bytes(whole[: len(whole) // 2])
    assert "can't be loaded" in refused(folder)


def test_missing_device(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ModelError, match="no such device"):
        model.load(tiny_folder, ModelConfig(device="cuda"), LoraConfig())


def test_checkpointing_is_refused_if_the_model_does_not_support_it(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LlamaForCausalLM, "supports_gradient_checkpointing", False)
    with pytest.raises(ModelError, match=r"training\.checkpointing: the modules of tiny-random do not support it"):
        model.load(tiny_folder, FLOAT32, LoraConfig(), checkpointing=True)


def test_bfloat16_base_under_a_float32_adapter(
    shape_folder: Path, shape_model: LoraModel, random_examples: Any
) -> None:
    examples: tuple[Example, ...] = random_examples(12, shortest=20)
    exact = shape_model
    rough = model.load(shape_folder, ModelConfig(dtype="bfloat16", device="cpu"), LoraConfig(targets="all-linear"))
    assert {each.dtype for each in rough.network.parameters() if not each.requires_grad} == {torch.bfloat16}
    assert {each.dtype for each in rough.parameters().values()} == {torch.float32}
    adapter = noisy(exact, scale=0.1)
    exact.put(adapter)
    rough.put(adapter)
    one, two = (scoring.nll(each, examples, "all", 256) for each in (exact, rough))
    differences = [abs(left.mean - right.mean) for left, right in zip(one, two, strict=True)]
    assert 0 < max(differences) < 0.1


# --- the real model --------------------------------------------------------------------------------------------


@pytest.mark.model
def test_smollm2_adapter_loads_in_peft(tmp_path: Path) -> None:
    folder = locate("smollm2-135m")
    lora = model.load(folder, ModelConfig(dtype="float32", device="cpu"), LoraConfig())
    adapter = noisy(lora, scale=0.05)
    lora.put(adapter)
    written = write_folder(tmp_path / "adapter", peft_files(adapter, lora.lora))
    assert torch.equal(logits(loaded_by_peft(folder, written), IDS), logits(lora.network, IDS))
