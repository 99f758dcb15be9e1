"""The frozen base model under LoRA layers: loaded, trained, scored, asked.

`interface` and `adapters` import no torch: they are all that the federation sees of a model.
"""
