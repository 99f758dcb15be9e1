"""A client's personalised model, asked in words: the run's own prompt around a question, the answer as it comes.

Every question stands alone, because that is the form that the model was trained in: what was said before is not shown
to it. Nothing is written, and no record is read.
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
from fedmide.progress import Tell
from fedmide.runs.resident import Resident, open_model

Voice = Literal["personalised", "aggregated", "base"]
"""Whose answer it is: the client's own model's, the common one's, or that of the model before any training."""


OTHERS: tuple[Voice, ...] = ("aggregated", "base")
"""The voices that are no client's own."""


@dataclass(frozen=True)
class Chat:
    """A loaded model with an adapter for each voice, the client's first."""

    resident: Resident
    encode: Encoder
    voices: dict[Voice, Adapter]
    max_new_tokens: int

    def answer(
        self, voice: Voice, question: str, context: str = "", hear: Callable[[str], None] = lambda piece: None
    ) -> str:
        """What the voice answers; `hear` is told each piece of it as it comes.

        Raises `DataError` where question and context are longer than the model's cutoff.
        """
        example = self.encode.encode(Record(question, "", context=context))
        longest = self.max_new_tokens
        if (positions := self.resident.model.num_positions) is not None:
            longest = min(longest, positions - example.prompt_length)
        return self.resident.stream(self.voices[voice], example, longest, hear)


def begin(
    folder: RunFolder,
    client: str,
    beside: Sequence[Voice] = (),
    max_new_tokens: int = 0,
    tell: Tell = lambda line: None,
) -> Chat:
    """The client's model ready to answer, and others beside it; an answer has at most so many tokens.

    0: as many as the run's own responses, 256 where its configuration leaves that open. Raises `RunFolderError` where
    the run has no such adapter yet, `ModelError` where base model or prompt are not what the run was made with.
    """
    paths = {"personalised": folder.tuned(client), "aggregated": folder.tuned() if "aggregated" in beside else None}
    config, manifest = folder.config, folder.read_manifest()
    base = locate(config.model.name, progress=tell)
    if fingerprint(base) != manifest["model"]["fingerprint"]:
        raise ModelError(f"{base}: not the model that {folder.path} was trained on", "Bring that one back")
    tell(f"loading {config.model.name}")
    resident = open_model(config, base, tell=tell)
    encode = encoder(resident.model.tokenizer, config.model, config.prompt)
    if prompt_hash(encode.template, str(resident.model.tokenizer.chat_template or "")) != manifest["prompt"]:
        raise ModelError(
            f"prompt.template = {config.prompt.template!r}: not the template that {folder.path} was trained with",
            "Bring that one back",
        )
    adapters = {name: read_peft(path, resident.model.shapes) for name, path in paths.items() if path is not None}
    found = {**adapters, "base": resident.fresh(config.seed)}
    wanted: tuple[Voice, ...] = ("personalised", *beside)
    voices: dict[Voice, Adapter] = {voice: found[voice] for voice in wanted}
    return Chat(resident, encode, voices, max_new_tokens or config.generation.max_new_tokens or MAX_NEW_TOKENS)
