"""A site's work on a task: a pure function from task, state and model to reply and state.

A method that enrolls records has its rounds in `fedmide_rounds`. Any other one trains on all records, in its own way
(`Method.local`). The last stage of every method is in `personalization`.
"""

from dataclasses import replace

from fedmide import methods
from fedmide.errors import MessageError
from fedmide.federation.client_state import ClientState, MethodState
from fedmide.federation.fedmide_rounds import federated_round, warm_up
from fedmide.federation.local_training import (
    kept_method_state,
    num_seen,
    reply_of,
    training_metrics,
    unless_diverged,
    visit_of,
)
from fedmide.federation.messages import ClientReply, ClientTask
from fedmide.federation.personalization import personalize
from fedmide.model.interface import LocalModel


def handle(task: ClientTask, state: ClientState, model: LocalModel) -> tuple[ClientReply, ClientState]:
    """The reply to a task and the state after it.

    Handling a round again starts from the state before that round. So a repeated task gives the same reply and state.
    """
    if (task.federation, task.client) != (state.federation, state.name):
        raise MessageError(f"a task for {task.client!r} of {task.federation!r} came to {state.name!r}")
    state = state.before(task.round)
    if task.round >= state.config.federation.rounds:
        return personalize(task, state, model)
    if not methods.of(state.config).enrolls:
        return _plain_round(task, state, model)
    if task.round < 0:
        return warm_up(task, state, model)
    return federated_round(task, state, model)


def _plain_round(task: ClientTask, state: ClientState, model: LocalModel) -> tuple[ClientReply, ClientState]:
    """A round of a method that trains on all records."""
    if not state.training or not task.train:
        return reply_of(task, None, 0, {}), state
    trained = methods.of(state.config).local(visit_of(task, state), model)
    kept = kept_method_state(task, state, trained.work)
    if trained.method_state:
        # Filed under this round even if unchanged: resuming compares this number with the last trained round.
        # An older number would look like a lost method state.
        kept = (*state.method_state[-1:], MethodState(task.round, unless_diverged(trained.method_state, state)))
    num_records = num_seen(state, dict.fromkeys(state.training, 1.0), trained.work)
    metrics = training_metrics(trained.work, num_records, trained.beside)
    reply = ClientReply(task.federation, task.client, task.round, None, 0, metrics)
    if trained.travels:
        reply = replace(reply, adapter=trained.travels, num_records=num_records)
    return reply, replace(state, method_state=kept)
