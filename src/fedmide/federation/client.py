"""What a site does with a task: score, enroll, train, measure, reply. Pure: state and model in, reply and state out.

The method, as one round runs on a site:

    receive the aggregated adapter
    score the personal records with it against what the own adapter made of them; enroll those that score < 1
    train on the shared set
    measure the records that stay personal under the new own adapter
    reply with the adapter and the number of records it was trained on

Any other method trains on all records; how, and what it replies, is the method's own (`methods`).
"""

from dataclasses import replace

from fedmide import methods
from fedmide.errors import MessageError
from fedmide.federation.client_state import ClientState, Memory
from fedmide.federation.fedmide_rounds import _federated_round, _warm_up
from fedmide.federation.local_training import _kept, _num_seen, _reply, _training_metrics, _unless_run_off, _visit
from fedmide.federation.messages import ClientReply, ClientTask
from fedmide.federation.personalization import _personalize
from fedmide.model.interface import LocalModel


def handle(task: ClientTask, state: ClientState, model: LocalModel) -> tuple[ClientReply, ClientState]:
    """The reply to a task and the state after it.

    Handling a round again starts from the state before that round, so it is done once however often it is asked for.
    """
    if (task.federation, task.client) != (state.federation, state.name):
        raise MessageError(f"a task for {task.client!r} of {task.federation!r} came to {state.name!r}")
    state = state.before(task.round)
    if task.round >= state.config.federation.rounds:
        return _personalize(task, state, model)
    if state.config.method != "fedmide":
        return _plain_round(task, state, model)
    if task.round < 0:
        return _warm_up(task, state, model)
    return _federated_round(task, state, model)


def _plain_round(task: ClientTask, state: ClientState, model: LocalModel) -> tuple[ClientReply, ClientState]:
    """A round of a method that trains on all records."""
    if not state.training or not task.train:
        return _reply(task, None, 0, {}), state
    trained = methods.of(state.config).local(_visit(task, state), model)
    kept = _kept(task, state, trained.work)
    if trained.memory:
        # of the round in any case: that a memory of an earlier one is the last would be taken for a loss
        kept = (*state.memory[-1:], Memory(task.round, _unless_run_off(trained.memory, state)))
    num_records = _num_seen(state, dict.fromkeys(state.training, 1.0), trained.work)
    metrics = _training_metrics(trained.work, num_records, trained.beside)
    reply = ClientReply(task.federation, task.client, task.round, None, 0, metrics)
    if trained.travels:
        reply = replace(reply, adapter=trained.travels, num_records=num_records)
    return reply, replace(state, memory=kept)
