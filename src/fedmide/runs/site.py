"""A site at work: its records, its folder, and its answers to messages.

An answer holds only what `messages` has a field for. After an error the server gets one word from a closed list. The
details go to `tell`, which is the site's own log.

Answers are stored. If a task arrives again, the site sends the same answer without work: a message that is delivered
twice trains once. A task of an earlier round than the last one is refused, so finished work is never undone.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from fedmide import methods
from fedmide.atomic import write_file, write_folder
from fedmide.data.records import RecordId
from fedmide.errors import MessageError, RunFolderError, UserError
from fedmide.federation.client import handle
from fedmide.federation.client_state import ClientState, has_trained, is_lost, keeps_method_state
from fedmide.federation.codec import decode_reply, decode_request, encode_facts, encode_reply, encode_trouble
from fedmide.federation.ledger import before, standing
from fedmide.federation.messages import ClientReply, ClientTask, Facts, Hello, Trouble, TroubleCode
from fedmide.journal.folder import RunFolder
from fedmide.model.adapters import is_finite, shapes
from fedmide.model.pretrained.hf import peft_files
from fedmide.progress import Tell, quiet
from fedmide.runs.inputs import Inputs

EVERYONE = "(all clients)"
"""The client that holds all records if a method trains in one place; no client's folder can have this name."""


_DIGEST_BYTES = 32


def client_state(folder: RunFolder, inputs: Inputs, name: str, federation: str, next_round: int) -> ClientState:
    """A client's state before a round, made from its records and from what it stored."""
    owners = inputs.examples if name == EVERYONE else {name: inputs.examples[name]}
    training = {
        RecordId(example.id if owner == name else f"{owner}/{example.id}"): example
        for owner, examples in owners.items()
        for example in examples.training
    }
    return ClientState(
        name,
        federation,
        folder.config,
        training,
        [example for examples in owners.values() for example in examples.validation],
        before(folder.read_ledger(name), next_round),
        folder.read_method_state(name, next_round),
    )


def keep(folder: RunFolder, inputs: Inputs, state: ClientState) -> None:
    """Stores a client's state: the result of its rounds or, once there is one, its tuned adapter."""
    if state.adapter is None:
        folder.save_site(state)
    else:
        folder.save_personal_adapter(state.name, peft_files(state.adapter, inputs.resident.model.lora))


@dataclass(frozen=True)
class Site:
    """One client with its records and a loaded model. `open_folder` opens the folder of a federation, by its name."""

    name: str
    inputs: Inputs
    open_folder: Callable[[str], RunFolder]
    tell: Tell = quiet

    def answer(self, frame: bytes) -> bytes:
        """The answer to a frame, as a frame. An error of any kind becomes an answer too: nothing is raised."""
        try:
            return self._answer(frame)
        except Exception as error:  # noqa: BLE001 - the text of any error may come from a patient's record
            self.tell(f"{type(error).__name__}: {error}")
            return self._trouble(_code(error))

    def _answer(self, frame: bytes) -> bytes:
        request = decode_request(frame)
        if isinstance(request, Hello):
            return encode_facts(self._facts(request))
        if not self._belongs_to(request.federation):
            self.tell(
                f"refused a task of federation {request.federation}: this site belongs to {self.inputs.federation}"
            )
            return self._trouble("federation")
        return self._once(request, frame)

    def _belongs_to(self, federation: str) -> bool:
        return federation.partition("-")[0] == self.inputs.federation

    def _trouble(self, code: TroubleCode) -> bytes:
        return encode_trouble(Trouble(self.name, code))

    def _facts(self, hello: Hello) -> Facts:
        facts = self.inputs.facts(self.name)
        if not self._belongs_to(hello.federation):
            return facts
        shared, personal = self._set_sizes(hello)
        return replace(facts, shared=shared, personal=personal)

    def _set_sizes(self, hello: Hello) -> tuple[int, int]:
        ledger = before(self.open_folder(hello.federation).read_ledger(self.name), hello.round)
        now = standing(ledger, [example.id for example in self.inputs.examples[self.name].training])
        return len(now.shared), len(now.personal)

    def _once(self, task: ClientTask, frame: bytes) -> bytes:
        """The answer to a task: the stored one if this task was answered before."""
        folder = self.open_folder(task.federation)
        kept, digest = _kept_path(folder, self.name), hashlib.sha256(frame).digest()
        earlier = kept.read_bytes() if kept.exists() else b""
        if earlier[:_DIGEST_BYTES] == digest:
            self.tell(f"round {task.round}: answered before, the same answer is sent again")
            return earlier[_DIGEST_BYTES:]
        last = decode_reply(earlier[_DIGEST_BYTES:]) if earlier else None
        if self._last_round(folder, last) > task.round:
            self.tell(f"round {task.round}: refused, because a later round is done already")
            return self._trouble("round")
        state = client_state(folder, self.inputs, self.name, task.federation, task.round)
        _check_method_state(folder, state, last, task.round)
        reply, after = handle(task, state, self.inputs.resident)
        answer = encode_reply(reply)
        if after.adapter is not None and folder.is_site:
            self._keep_aggregated(folder, task)
        keep(folder, self.inputs, after)
        write_file(kept, digest + answer)
        self.tell(f"round {task.round}: done")
        return answer

    def _keep_aggregated(self, folder: RunFolder, task: ClientTask) -> None:
        """Stores the common adapter, which the tuned one is measured against, if the method sends all of it."""
        if shapes(task.adapter) == shapes(self.inputs.fresh_adapter()):
            write_folder(folder.adapter, peft_files(task.adapter, self.inputs.resident.model.lora))

    def _last_round(self, folder: RunFolder, last: ClientReply | None) -> int:
        """The latest round that this site has worked on, by its stored answer and by its ledger."""
        rounds = [entry.round for entry in folder.read_ledger(self.name)]
        return max([*rounds, *([] if last is None else [last.round])], default=-(2**31))


def _check_method_state(folder: RunFolder, state: ClientState, last: ClientReply | None, next_round: int) -> None:
    """Refuses to continue if the method's state of the last answered round is needed but missing."""
    if (
        last is None
        or last.round >= next_round
        or not has_trained(last.metrics)
        or not keeps_method_state(state.config)
    ):
        return
    if last.adapter is not None and not is_finite(last.adapter) and not methods.of(state.config).remembers:
        return  # a local adapter that diverged was not stored
    if is_lost(state.method_state, last.round):
        raise RunFolderError(
            f"{folder.site(state.name)}: the method state of round {last.round} is missing",
            "Restore the file from a backup; without it this site can't continue the federation",
        )


def _code(error: Exception) -> TroubleCode:
    """The one word about an error that leaves the site."""
    if isinstance(error, MessageError):
        return "message"
    if isinstance(error, RunFolderError):
        return "disk" if error.is_disk else "ledger"
    return "site" if isinstance(error, UserError) else "failed"


def _kept_path(folder: RunFolder, name: str) -> Path:
    return folder.site(name) / "answer.bin"
