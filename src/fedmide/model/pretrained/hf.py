"""Models in the formats of transformers and PEFT: read them, add LoRA layers, merge adapters, write them."""

import json
import logging
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from peft import PeftModel
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedmide.config.sections import LoraConfig, Quantization
from fedmide.errors import ModelError, first_line
from fedmide.model import adapters, quantization
from fedmide.model.interface import Adapter

OURS = "ours.safetensors"
"""The file in a PEFT folder with the arrays that PEFT does not read."""


def peft_files(adapter: Adapter, lora: peft.LoraConfig) -> dict[str, bytes]:
    """The files of a PEFT folder, which `PeftModel.from_pretrained` loads. Equal adapters give equal bytes.

    PEFT reads only factors, so changes to base weights become factors.
    `ours.safetensors` has the original arrays, if their rank is not that of the layers or if some are not factors.
    """
    scale = float(lora.lora_alpha) / lora.r
    factors = adapters.as_factors(adapter, scale)
    ranks = {layer: len(adapters.factors(factors, layer)[0]) for layer in adapters.layers(factors)}
    files = {
        "adapter_config.json": _peft_json(lora, ranks, scale).encode(),
        "adapter_model.safetensors": adapters.encode(factors),
    }
    as_it_is = factors.keys() == adapter.keys() and set(ranks.values()) <= {lora.r}
    return files if as_it_is else {**files, OURS: adapters.encode(adapter)}


def read_peft(folder: Path, shapes: adapters.Shapes) -> Adapter:
    """The adapter in a folder that `peft_files` made. `shapes` are those of the layers that it is for."""
    if (folder / OURS).exists():
        return adapters.read(folder / OURS)
    return adapters.read(folder / "adapter_model.safetensors", shapes)


def _peft_json(lora: peft.LoraConfig, ranks: Mapping[str, int], scale: float) -> str:
    """The configuration as PEFT writes it, but with sorted sets: equal configurations give equal bytes."""
    values = {**lora.to_dict(), "inference_mode": True, "peft_version": peft.__version__}
    if not set(ranks.values()) <= {lora.r}:
        own = {layer.removeprefix("base_model.model."): rank for layer, rank in ranks.items()}
        values |= {"rank_pattern": own, "alpha_pattern": {layer: scale * rank for layer, rank in own.items()}}
    values.pop("runtime_config", None)
    return json.dumps(values, indent=2, sort_keys=True, default=sorted) + "\n"


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in a model's folder; raises `ModelError`."""
    _silence_libraries()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise ModelError(f"{folder}: the tokenizer can't be loaded: {first_line(error)}") from None


def adapted(folder: Path, adapter: Path) -> PeftModel:
    """The model in a folder, in float32, under the adapter in a PEFT folder; raises `ModelError`."""
    base, _ = load_base(folder, "none", torch.float32, torch.device("cpu"))
    if getattr(base.config, "quantization_config", None) is not None:
        raise ModelError(f"{folder}: nothing can be merged into a quantized model", "Export without --merge")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's hints about tied weights and merging do not concern us
        network: PeftModel = PeftModel.from_pretrained(base, adapter)
    return network.eval()


def save_merged(network: PeftModel, folder: Path, dtype: torch.dtype) -> None:
    """Merges the adapter into the weights, with sums in float32, and writes them as a transformers folder.

    The network can't be used afterwards.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged: Any = network.merge_and_unload()
        merged.to(dtype).save_pretrained(folder)


def logits(network: Any, ids: Tensor) -> Tensor:
    """The network's logits for token ids (B, T), float32 (B, T, V)."""
    with torch.inference_mode():
        scores: Tensor = network(input_ids=ids).logits
        return scores.float()


def load_merged(folder: Path) -> Any:
    """The model in a folder, in the number type of its weights."""
    dtype = torch.bfloat16 if _is_bfloat16(folder) else torch.float32
    return load_base(folder, "none", dtype, torch.device("cpu"))[0].eval()


def _is_bfloat16(folder: Path) -> bool:
    values: dict[str, Any] = json.loads((folder / "config.json").read_text("utf-8"))
    return values.get("dtype") == "bfloat16"


def _silence_libraries() -> None:
    """Switches off libraries' messages that are not about this model, and the tokenizers' own threads within ours."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    # PEFT imports bitsandbytes if it is installed, and bitsandbytes warns at each product whose input it casts
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def load_base(
    folder: Path, kind: Quantization, dtype: torch.dtype, device: torch.device
) -> tuple[transformers.PreTrainedModel, Any]:
    """The frozen base and its tokenizer. Only a quantized base is on the device already."""
    _silence_libraries()
    how: dict[str, Any] = {}
    if kind != "none":
        config = transformers.BitsAndBytesConfig(**quantization.settings(kind, dtype))
        how = {"quantization_config": config, "device_map": {"": device}}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            only_here = {"local_files_only": True, "trust_remote_code": False}
            loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, use_safetensors=True, output_loading_info=True, **only_here, **how
            )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        raise ModelError(f"{folder}: the model can't be loaded: {first_line(error)}") from None
    base, loading = loaded
    if missing := sorted(loading["missing_keys"]):  # transformers would use random ones
        raise ModelError(f"{folder}: {len(missing)} weights missing, first {missing[0]!r}")
    base.requires_grad_(False)
    # plain greedy decoding: the folder's own settings, such as a repetition penalty, are dropped
    base.generation_config = transformers.GenerationConfig()
    return base, load_tokenizer(folder)


def checkpoint(base: transformers.PreTrainedModel, name: str) -> None:
    """Makes the modules recompute their activations in the backward pass of training; raises `ModelError`."""
    if not base.supports_gradient_checkpointing:
        raise ModelError(
            f"training.checkpointing: the modules of {name} do not support it", "Set training.checkpointing = false"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # later versions of transformers have another name for it
        base.gradient_checkpointing_enable({"use_reentrant": False})  # the reentrant way needs inputs with a gradient


def under_lora(base: transformers.PreTrainedModel, name: str, lora: LoraConfig) -> tuple[PeftModel, peft.LoraConfig]:
    """The base under LoRA layers, and PEFT's configuration of them. `name`: the base's name in an adapter's files."""
    config = _lora_config(base, name, lora)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's hints about tied weights and merging do not concern us
        network: PeftModel = peft.get_peft_model(base, config)
    config.base_model_name_or_path = name  # PEFT puts the folder of this machine there
    return network, config


def _lora_config(base: transformers.PreTrainedModel, name: str, lora: LoraConfig) -> peft.LoraConfig:
    """PEFT's configuration; raises `ModelError`. Layers are matched here first, for clearer messages than PEFT's."""
    blocks, problems = _blocks(base, lora.blocks)
    targets = [lora.targets] if isinstance(lora.targets, str) else list(lora.targets)
    names = list(_linear_names(base, blocks))
    present = sorted({name.rsplit(".", 1)[-1] for name in names})
    wanted = present if targets == ["all-linear"] else targets
    unmatched = [target for target in wanted if not any(f".{name}".endswith(f".{target}") for name in names)]
    problems += [f"lora.targets: {target!r} matches no linear layer in the chosen blocks" for target in unmatched]
    if not wanted:
        problems.append("lora.targets: the chosen blocks have no linear layer")
    if problems:
        raise ModelError(problems, f"This model has {', '.join(present) or 'none'}")
    return peft.LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # PEFT types it as int and takes any number
        lora_dropout=lora.dropout,
        target_modules=wanted,
        layers_to_transform=None if blocks is None else blocks,
        bias="none",
        task_type="CAUSAL_LM",
        base_model_name_or_path=name,
    )


def _blocks(base: transformers.PreTrainedModel, blocks: str) -> tuple[list[int] | None, list[str]]:
    """The indices of the blocks that get an adapter (None: all), and the problems of `lora.blocks`."""
    if blocks == "all":
        return None, []
    wanted, present = int(blocks.removeprefix("top:")), int(base.config.get_text_config().num_hidden_layers)
    if wanted > present:
        return None, [f"lora.blocks = {blocks!r}: the model has {present} blocks"]
    return list(range(present - wanted, present)), []


def _linear_names(base: transformers.PreTrainedModel, blocks: Iterable[int] | None) -> Iterator[str]:
    """Full names of the linear layers inside the chosen blocks. The output layer is outside all blocks."""
    numbers = None if blocks is None else {str(block) for block in blocks}
    for name, module in base.named_modules():
        inside = [part for part in name.split(".") if part.isdigit()]
        if isinstance(module, nn.Linear | Conv1D) and inside and (numbers is None or inside[0] in numbers):
            yield name
