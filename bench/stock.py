"""The same round as a user would write it with Trainer and PEFT, one client after the other, as the original does.

PEFT layers are built again for each client and round, and records are tokenized again each round. Batches are padded on
the left to a multiple of 8. The perplexity of each record is computed alone. Adapters travel through files.
"""

import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from safetensors.torch import load_file, save_file

from fedmide.config import Config
from fedmide.data.prompts import ALPACA, render
from fedmide.data.records import Record

MICRO_BATCH, ACCUMULATION = 4, 8
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Stock:
    """A base model and the steps of a round with it."""

    def __init__(self, folder: Path, config: Config, dtype: torch.dtype) -> None:
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        self.config, self.dtype = config, dtype
        self.base = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        self.tokenizer.padding_side = "left"
        self.aggregated: dict[str, torch.Tensor] = {}

    def round(self, clients: Mapping[str, Sequence[Record]]) -> dict[str, torch.Tensor]:
        """Scores the personal half, trains on the other half, scores again; gives the mean of the adapters."""
        with tempfile.TemporaryDirectory() as folder:
            common = Path(folder) / "aggregated.safetensors"
            save_file(self.aggregated, common)
            for name, records in clients.items():
                half = len(records) // 2
                network = self.network(load_file(common))
                self.nlls(network, records[:half])
                self.train(network, records[half:], Path(folder))
                self.nlls(network, records[:half])
                state = peft.get_peft_model_state_dict(network)
                save_file(
                    {key: value.contiguous() for key, value in state.items()}, Path(folder) / f"{name}.safetensors"
                )
                self.base = network.unload()
            states = [load_file(Path(folder) / f"{name}.safetensors") for name in clients]
        self.aggregated = {key: torch.stack([state[key] for state in states]).mean(dim=0) for key in states[0]}
        return self.aggregated

    def nlls(self, network: Any, records: Sequence[Record]) -> list[float]:
        """Mean NLL of each record's response, one at a time."""
        network.eval()
        found = []
        with torch.no_grad():
            for record in records:
                row = self.tokenized(record)
                batch = {key: torch.tensor([row[key]]) for key in ("input_ids", "attention_mask", "labels")}
                found.append(float(network(**batch).loss))
        return found

    def train(self, network: Any, records: Sequence[Record], folder: Path) -> float:
        """Trains for the configured epochs, and returns the training loss."""
        settings = self.config.training
        arguments = transformers.TrainingArguments(
            output_dir=str(folder / "trainer"),
            per_device_train_batch_size=MICRO_BATCH,
            gradient_accumulation_steps=ACCUMULATION,
            num_train_epochs=settings.epochs,
            learning_rate=settings.learning_rate,
            max_grad_norm=settings.max_grad_norm,
            weight_decay=settings.weight_decay,
            use_cpu=True,
            save_strategy="no",
            report_to=[],
            logging_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        collate = transformers.DataCollatorForSeq2Seq(self.tokenizer, pad_to_multiple_of=8, return_tensors="pt")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer = transformers.Trainer(
                model=network,
                args=arguments,
                train_dataset=[self.tokenized(record) for record in records],
                data_collator=collate,
            )
            trainer.remove_callback(transformers.PrinterCallback)
            return float(trainer.train().training_loss)

    def tokenized(self, record: Record) -> dict[str, list[int]]:
        """A record in the form that the Trainer takes: labels on the response and the end of sequence."""
        prompt = self.tokenizer(render(ALPACA, record))["input_ids"]
        answer = [*self.tokenizer(record.response)["input_ids"], self.tokenizer.eos_token_id]
        ids = (prompt + answer)[: self.config.model.cutoff]
        labels = [-100] * min(len(prompt), len(ids)) + ids[len(prompt) :]
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}

    def network(self, state: Mapping[str, torch.Tensor]) -> Any:
        """The base with new LoRA layers that hold these arrays, by PEFT's names; without any, PEFT's random ones."""
        lora, top = self.config.lora, self.config.lora.blocks.removeprefix("top:")
        blocks = self.base.config.num_hidden_layers
        config = peft.LoraConfig(
            r=lora.r,
            lora_alpha=int(lora.alpha),
            lora_dropout=lora.dropout,
            target_modules=LINEAR if lora.targets == "all-linear" else lora.targets,
            layers_to_transform=None if top == "all" else list(range(blocks - int(top), blocks)),
            task_type="CAUSAL_LM",
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            network = peft.get_peft_model(self.base, config)
        if state:
            peft.set_peft_model_state_dict(network, dict(state))
        return network

    def generate(self, network: Any, record: Record, most: int) -> int:
        """Generates greedily from a record's prompt, and returns the number of new tokens."""
        network.eval()
        ids = torch.tensor([self.tokenizer(render(ALPACA, record))["input_ids"]])
        with torch.inference_mode():
            output = network.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=most,
                pad_token_id=self.tokenizer.eos_token_id,
            )
        return int(output.shape[1] - ids.shape[1])
