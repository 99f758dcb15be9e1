"""Use your own base model: a folder in the format of transformers. Takes seconds, downloads nothing."""

# %% Any causal language model with safetensors weights works. This one is random and tiny, made by the package.
import tempfile
from pathlib import Path

import fedmide
from fedmide.config import load
from fedmide.model.pretrained.llama import write_tiny_random

work = Path(tempfile.mkdtemp())
model = work / "model"
model.mkdir()
write_tiny_random(model)
print(sorted(path.name for path in model.iterdir()))

# %% A small run with this model. `lora.targets` names linear layers of your model; "all-linear" stands for all of them.
# Start this file in the repository's root.
changes = [f"model.name={model}", 'lora.targets=["q_proj", "v_proj", "down_proj"]', "lora.blocks=all", "lora.r=4"]
config = load(Path("examples/tiny.toml"), [*changes, "generation.enabled=false"])
results = fedmide.run(config, out=work / "run", quiet=True)
trained = results.metrics["method"]["trained_parameters"]
print(f"{trained} values trained over weights in {results.manifest['model']['dtype']}")

# %% The tuned adapters are PEFT folders. PEFT loads them over the same model without this package.
from peft import LoraConfig, PeftModel  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

client = results.clients()[0]["client"]
base = AutoModelForCausalLM.from_pretrained(model)
tuned = PeftModel.from_pretrained(base, results.path / "clients" / client / "adapter")
settings = tuned.peft_config["default"]
assert isinstance(settings, LoraConfig)
print(f"{client}'s adapter: rank {settings.r}, on {', '.join(sorted(settings.target_modules or ()))}")
