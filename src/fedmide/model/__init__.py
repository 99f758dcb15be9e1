"""The frozen base model under LoRA layers: load it, train it, score records, generate text.

`interface` and `adapters` import no torch. They are the only part of a model that the federation sees.
"""
