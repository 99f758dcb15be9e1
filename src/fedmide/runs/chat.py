"""A chat with a site's tuned model. Each question is put into the run's prompt, and its answer appears piece by piece.

The model was trained on single questions, so it does not see earlier questions or answers.
Nothing is written, and no record is read.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from fedmide.data.prompts import prompt_hash
from fedmide.data.records import Record
from fedmide.data.tokens import Encoder, encoder
from fedmide.errors import ModelError
from fedmide.journal.folder import RunFolder
from fedmide.model.generation import MAX_NEW_TOKENS
from fedmide.model.interface import Adapter
from fedmide.model.pretrained.hf import read_peft
from fedmide.model.pretrained.locate import fingerprint, locate
from fedmide.progress import Tell, quiet
from fedmide.runs.resident import Resident, open_model

Voice = Literal["personalized", "aggregated", "base"]
"""The model that answers: the client's tuned one, the one with the common adapter, or the base without training."""


OTHERS: tuple[Voice, ...] = ("aggregated", "base")
"""The voices that belong to no client."""


@dataclass(frozen=True)
class Chat:
    """A loaded model with one adapter per voice. The client's voice is the first."""

    resident: Resident
    encode: Encoder
    voices: dict[Voice, Adapter]
    max_new_tokens: int

    def answer(self, voice: Voice, question: str, context: str = "", on_text: Callable[[str], None] = quiet) -> str:
        """The voice's answer to a question; `on_text` is called with each piece of it as soon as it is generated.

        Raises `DataError` if question and context leave no room for an answer below the configured cutoff.
        """
        example = self.encode.encode(Record(question, "", context=context))
        longest = self.max_new_tokens
        if (positions := self.resident.model.num_positions) is not None:
            longest = min(longest, positions - example.prompt_length)
        return self.resident.stream(self.voices[voice], example, longest, on_text)


def begin(
    folder: RunFolder,
    client: str,
    beside: Sequence[Voice] = (),
    max_new_tokens: int = 0,
    tell: Tell = quiet,
) -> Chat:
    """A chat with the client's model and with the voices in `beside`.

    `max_new_tokens`: the most tokens of an answer. 0 stands for the limit of the run's responses, which is 256 if the
    configuration sets none. Raises `RunFolderError` if the run does not have a wanted adapter yet. Raises `ModelError`
    if the base model or the prompt is not that of the run.
    """
    paths = {"personalized": folder.tuned(client), "aggregated": folder.tuned() if "aggregated" in beside else None}
    config, manifest = folder.config, folder.read_manifest()
    base = locate(config.model.name, progress=tell)
    if fingerprint(base) != manifest["model"]["fingerprint"]:
        raise ModelError(
            f"{base}: not the model that {folder.path} was trained on",
            f"Put the files of that {config.model.name} back, or start a new run with this model",
        )
    tell(f"loading {config.model.name}")
    resident = open_model(config, base, tell=tell)
    encode = encoder(resident.model.tokenizer, config.model, config.prompt)
    if prompt_hash(encode.template, str(resident.model.tokenizer.chat_template or "")) != manifest["prompt"]:
        raise ModelError(
            f"prompt.template = {config.prompt.template!r}: not the template that {folder.path} was trained with",
            "Put that template back, or start a new run with this one",
        )
    adapters = {name: read_peft(path, resident.model.shapes) for name, path in paths.items() if path is not None}
    found = {**adapters, "base": resident.fresh(config.seed)}
    wanted: tuple[Voice, ...] = ("personalized", *beside)
    voices: dict[Voice, Adapter] = {voice: found[voice] for voice in wanted}
    return Chat(resident, encode, voices, max_new_tokens or config.generation.max_new_tokens or MAX_NEW_TOKENS)
