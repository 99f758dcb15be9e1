"""The hand-written passes give the numbers, gradients and dropout of transformers and PEFT."""

import copy
import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft.tuners.lora import Linear as LoraLinear
from transformers import AutoConfig, AutoModelForCausalLM

from fedmide.config.sections import LoraConfig, ModelConfig, Positions
from fedmide.data.batches import Batch, batches, pad
from fedmide.data.tokens import Example
from fedmide.model import lora as model
from fedmide.model.decoder import attention, passes
from fedmide.model.decoder.attention import Attended
from fedmide.model.decoder.parts import Dropout
from fedmide.model.decoder.products import Product
from fedmide.model.interface import Adapter
from fedmide.model.lora import LoraModel
from fedmide.model.pretrained.locate import locate
from fedmide.model.workers import Workers

pytestmark = pytest.mark.usefixtures("one_thread")

MakeExamples = Callable[..., tuple[Example, ...]]
FLOAT32 = ModelConfig(dtype="float32", device="cpu")
PLACES = [
    LoraConfig(dropout=0.0),
    LoraConfig(dropout=0.0, targets="all-linear"),
    LoraConfig(dropout=0.0, targets="all-linear", r=3, alpha=5.0, blocks="top:2"),
    LoraConfig(dropout=0.0, targets=["k_proj", "up_proj"], r=40, blocks="top:1"),
    LoraConfig(dropout=0.0, targets=["down_proj", "o_proj"]),
]


def adapter_for(lora: LoraModel, spread: float = 0.2) -> Adapter:
    draw = np.random.default_rng(0)
    return {name: draw.normal(0, spread, shape).astype(np.float32) for name, shape in lora.shapes.items()}


def ready(folder: Path, lora: LoraConfig, how: ModelConfig = FLOAT32, prefix_bytes: int = 0) -> LoraModel:
    loaded = model.load(folder, how, lora, prefix_bytes)
    loaded.put(adapter_for(loaded))
    return loaded


def one_batch(examples: tuple[Example, ...], positions: Positions = "response") -> Batch:
    return pad(examples, positions, tuple(range(len(examples))))


def by_modules(lora: LoraModel, batch: Batch, scale: float) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Losses and gradients by the modules of transformers and PEFT."""
    losses = lora.token_nll(torch.from_numpy(batch.ids), torch.from_numpy(batch.predicts))
    parameters = lora.parameters()
    found = torch.autograd.grad(losses.sum() * scale, list(parameters.values()))
    return losses.detach().numpy(), {name: each.numpy() for name, each in zip(parameters, found, strict=True)}


def written_out(lora: LoraModel, batch: Batch, scale: float, seed: int = 0) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    lora.prepare(training=True)
    losses, flat = lora.backpropagate(batch, scale, seed)
    found = {}
    for name, shape in lora.shapes.items():
        values, flat = flat.tensor_split([math.prod(shape)])
        found[name] = values.view(shape).numpy()
    return losses.numpy(), found


ROUNDING = 1e-4
"""The largest relative difference allowed between gradients, for float32 sums in another order.

The largest seen is 4e-5 with AVX2, and under 2e-5 with AVX-512."""


def far(one: dict[str, np.ndarray], two: dict[str, np.ndarray]) -> float:
    """The largest relative distance over all tensors."""
    assert one.keys() == two.keys()
    return max(float(np.linalg.norm(one[name] - two[name]) / np.linalg.norm(two[name])) for name in two)


@pytest.mark.parametrize("place", PLACES, ids=lambda place: f"{place.targets}-{place.blocks}-{place.r}")
@pytest.mark.parametrize("positions", ["all", "response"])
def test_losses_and_gradients_are_those_of_the_modules(
    tiny_folder: Path, random_examples: MakeExamples, place: LoraConfig, positions: Positions
) -> None:
    lora = ready(tiny_folder, place)
    assert lora.prefixes is not None
    for batch in batches(random_examples(9), positions, 150, 10**6):
        theirs, their_gradients = by_modules(lora, batch, 0.1)
        ours, our_gradients = written_out(lora, batch, 0.1)
        assert ours == pytest.approx(theirs, rel=1e-5)
        assert far(our_gradients, their_gradients) < ROUNDING
        lora.prepare(training=False)
        assert lora.nll(batch).numpy() == pytest.approx(theirs, rel=1e-5)


@pytest.mark.model
def test_losses_and_gradients_of_the_real_model_are_those_of_the_modules(random_examples: MakeExamples) -> None:
    lora = ready(locate("smollm2-135m"), LoraConfig(dropout=0.0, targets="all-linear", blocks="top:3"))
    batch = one_batch(random_examples(5, longest=50), "all")
    theirs, their_gradients = by_modules(lora, batch, 0.1)
    ours, our_gradients = written_out(lora, batch, 0.1)
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert far(our_gradients, their_gradients) < ROUNDING


@pytest.mark.parametrize(("heads", "pairs"), [(4, 4), (4, 1), (8, 2)])
def test_any_grouping_of_heads(
    tiny_folder: Path, random_examples: MakeExamples, tmp_path: Path, heads: int, pairs: int
) -> None:
    config = AutoConfig.from_pretrained(tiny_folder)
    config.update({"num_attention_heads": heads, "num_key_value_heads": pairs, "head_dim": 10, "num_hidden_layers": 2})
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((tiny_folder / name).read_bytes())
    lora = ready(tmp_path, LoraConfig(dropout=0.0, targets="all-linear"))
    batch = one_batch(random_examples(5, longest=30), "all")
    theirs, their_gradients = by_modules(lora, batch, 1.0)
    ours, our_gradients = written_out(lora, batch, 1.0)
    assert ours == pytest.approx(theirs, rel=1e-5) and far(our_gradients, their_gradients) < ROUNDING


@pytest.mark.parametrize(("queries", "scores"), [(7, 1), (16, 700), (128, 2**19)])
def test_attention_in_pieces_is_the_same(
    tiny_folder: Path, random_examples: MakeExamples, monkeypatch: pytest.MonkeyPatch, queries: int, scores: int
) -> None:
    lora = ready(tiny_folder, PLACES[1])
    batch = one_batch(random_examples(7, shortest=20, longest=50))
    theirs, their_gradients = by_modules(lora, batch, 1.0)
    monkeypatch.setattr(attention, "QUERIES", queries)
    monkeypatch.setattr(attention, "SCORES", scores)
    ours, our_gradients = written_out(lora, batch, 1.0)
    assert ours == pytest.approx(theirs, rel=1e-5) and far(our_gradients, their_gradients) < ROUNDING


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_parallel_workers_change_no_bit(tiny_folder: Path, random_examples: MakeExamples, dropout: float) -> None:
    """Losses, gradients, dropout and kept states below the adapters, in the batches' order."""
    place = LoraConfig(dropout=dropout, targets="all-linear", blocks="top:2")
    lora = ready(tiny_folder, place, prefix_bytes=2000)
    lora.prepare(training=True)
    parts = list(batches(random_examples(40), "response", 60, unpadded=60))
    with alone_or_together(3) as (alone, together):
        for one, two in zip(alone.each(lora.nll, parts), together.each(lora.nll, parts), strict=True):
            assert torch.equal(one, two)
        made = [each.each(lambda part: lora.backpropagate(part, 0.5, 7), parts) for each in (alone, together)]
        for one, two in zip(*made, strict=True):
            assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])
    assert lora.prefixes is not None and 0 < lora.prefixes.num_bytes <= 2000


def test_a_worker_computes_on_one_thread() -> None:
    """For any number of threads elsewhere. The number is read after products that several threads would share."""
    earlier = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with alone_or_together(2) as (_, together):
            product = torch.ones(256, 256)

            def work(_: int) -> int:
                (product @ product).exp().sum()
                return torch.get_num_threads()

            assert list(together.each(work, range(4))) == [1] * 4
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(earlier)


@contextmanager
def alone_or_together(number: int) -> Iterator[tuple[Workers, Workers]]:
    together = Workers(number)
    try:
        yield Workers(0), together
    finally:
        together.close()


def test_the_passes_follow_the_adapter_that_is_put_in(tiny_folder: Path, random_examples: MakeExamples) -> None:
    lora = ready(tiny_folder, PLACES[1])
    batch = one_batch(random_examples(4))
    first = written_out(lora, batch, 1.0)[0]
    lora.put({name: array * 0 for name, array in adapter_for(lora).items()})
    lora.prepare(training=False)
    plain = lora.nll(batch).numpy()
    assert np.abs(plain - first).max() > 0.1
    assert plain == pytest.approx(by_modules(lora, batch, 1.0)[0], rel=1e-5)


def test_long_texts_go_through_the_modules(
    tiny_folder: Path, random_examples: MakeExamples, monkeypatch: pytest.MonkeyPatch
) -> None:
    lora = ready(tiny_folder, PLACES[1])
    batch = one_batch(random_examples(4, shortest=30, longest=30))
    short = written_out(lora, batch, 1.0)
    monkeypatch.setattr(attention, "MAX_LENGTH", 29)
    monkeypatch.setattr(passes, "hidden", None)
    long = written_out(lora, batch, 1.0)
    assert long[0] == pytest.approx(short[0], rel=1e-5) and far(long[1], short[1]) < ROUNDING
    assert lora.nll(batch).numpy() == pytest.approx(short[0], rel=1e-5)


def test_other_shapes_go_through_their_modules(shape_model: LoraModel) -> None:
    kind = shape_model.network.get_base_model().config
    plain = kind.model_type in ("llama", "mistral") and getattr(kind, "sliding_window", None) is None
    assert (shape_model.prefixes is not None) == plain


def test_the_model_itself_works_as_before_and_shares_its_weights(tiny_folder: Path) -> None:
    lora = ready(tiny_folder, PLACES[1])
    base = AutoModelForCausalLM.from_pretrained(tiny_folder)
    ids = torch.arange(30)[None]
    lora.put({name: array * 0 for name, array in adapter_for(lora).items()})
    with torch.no_grad():
        assert torch.equal(lora.network(input_ids=ids).logits, base(input_ids=ids).logits)
    assert lora.prefixes is not None
    fused = lora.prefixes.decoder.blocks[0].query_key_value.weight
    query = lora.network.get_base_model().model.layers[0].self_attn.q_proj.base_layer.weight
    assert query.untyped_storage().data_ptr() == fused.untyped_storage().data_ptr()


# --- dropout


@contextmanager
def given_masks(lora: LoraModel, masks: Iterator[torch.Tensor], boost: float) -> Iterator[None]:
    """PEFT's modules with these dropout masks, in the order in which the modules run."""

    class Given(torch.nn.Module):
        def forward(self, given: torch.Tensor) -> torch.Tensor:
            return given * next(masks).view(given.shape) * boost

    layers = [module for module in lora.network.modules() if isinstance(module, LoraLinear)]
    own = [layer.lora_dropout["default"] for layer in layers]
    for layer in layers:
        layer.lora_dropout["default"] = Given()
    try:
        yield
    finally:
        for layer, each in zip(layers, own, strict=True):
            layer.lora_dropout["default"] = each


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"]])
def test_dropout_equals_that_of_peft_with_the_same_masks(
    tiny_folder: Path, random_examples: MakeExamples, targets: str | list[str]
) -> None:
    lora = ready(tiny_folder, LoraConfig(dropout=0.3, targets=targets))
    batch = one_batch(random_examples(5))
    ours, our_gradients = written_out(lora, batch, 1.0, seed=7)
    assert lora.dropout is not None
    again = lora.dropout.seeded(7)
    inputs = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
    wanted = []  # for each adapter: its input, and the width of that
    for name, shape in lora.shapes.items():
        if "lora_A" in name:
            block, layer = name.split(".layers.")[1].split(".")[0], name.split(".")[-3]
            wanted.append((block + inputs.get(layer, layer), shape[1]))
    inside = torch.arange(batch.ids.shape[1]) < torch.tensor(batch.lengths)[:, None]

    def padded(columns: int) -> torch.Tensor:
        mask = torch.zeros(*batch.ids.shape, columns, dtype=torch.bool)
        mask[inside] = again.draw(sum(batch.lengths), columns, torch.float32).bool()
        return mask

    drawn = {which: padded(columns) for which, columns in dict(wanted).items()}
    masks = iter([drawn[which] for which, _ in wanted])
    with given_masks(lora, masks, 1 / (1 - again.rate)):
        theirs, their_gradients = by_modules(lora, batch, 1.0)
    assert next(masks, None) is None
    assert ours == pytest.approx(theirs, rel=1e-5) and far(our_gradients, their_gradients) < ROUNDING
    other, _ = written_out(lora, batch, 1.0, seed=8)
    assert np.abs(other - ours).max() > 1e-3
    assert written_out(lora, batch, 1.0, seed=7)[0].tobytes() == ours.tobytes()


@pytest.mark.parametrize("rate", [0.05, 0.3, 0.9])
def test_dropout_keeps_its_share(rate: float) -> None:
    masks = Dropout(rate, torch.device("cpu"), 3)
    first, second = (masks.draw(500, 333, torch.float32).bool() for _ in range(2))
    kept = first.double().mean().item()
    assert abs(kept - (1 - rate)) < 5 * (rate * (1 - rate) / first.numel()) ** 0.5
    assert abs(masks.rate - rate) < 2**-16
    assert not torch.equal(first, second)
    assert Dropout(1 - 1e-9, torch.device("cpu")).rate < 1
    assert (first ^ second).double().mean().item() == pytest.approx(2 * rate * (1 - rate), abs=0.01)


# --- checkpointing


class Counted:
    """The largest number of bytes that traces take at one time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = self.most = 0
        forward = passes._forward

        def counting(*given: Any) -> Any:
            states, trace = forward(*given)
            size = sum(each.nbytes for each in tensors(trace))
            self.now += size
            self.most = max(self.most, self.now)
            weakref.finalize(trace, self.forget, size)
            return states, trace

        monkeypatch.setattr(passes, "_forward", counting)

    def forget(self, size: int) -> None:
        self.now -= size


def tensors(kept: Any) -> Iterator[torch.Tensor]:
    """The tensors that a trace keeps in addition to its block's weights."""
    if isinstance(kept, torch.Tensor):
        yield kept
    elif isinstance(kept, tuple):
        yield from (each for part in kept for each in tensors(part))
    elif isinstance(kept, passes.Trace | Product | Attended):
        yield from (each for field in fields(kept) for each in tensors(getattr(kept, field.name)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rate", [0.0, 0.3])
@pytest.mark.parametrize("blocks", ["all", "top:3"])
def test_checkpointing_gives_the_same_bits_and_keeps_less(
    tiny_folder: Path,
    random_examples: MakeExamples,
    monkeypatch: pytest.MonkeyPatch,
    dtype: Any,
    rate: float,
    blocks: str,
) -> None:
    place = LoraConfig(dropout=rate, targets="all-linear", blocks=blocks)
    lora = ready(tiny_folder, place, ModelConfig(dtype=dtype, device="cpu"))
    batch, found, most = one_batch(random_examples(7)), {}, {}
    for checkpointing in (False, True):
        how = replace(lora, checkpointing=checkpointing)
        counted = Counted(monkeypatch)
        found[checkpointing] = written_out(how, batch, 0.3, seed=11)
        most[checkpointing] = counted.most
        assert counted.now == 0
    assert found[True][0].tobytes() == found[False][0].tobytes()
    assert all(array.tobytes() == found[False][1][name].tobytes() for name, array in found[True][1].items())
    assert most[True] * (4 if blocks == "all" else 3) == pytest.approx(most[False])


@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_checkpointing_of_modules_gives_the_same_numbers(
    shape_folder: Path, random_examples: MakeExamples, rate: float
) -> None:
    batch = one_batch(random_examples(5), "all")
    place = LoraConfig(dropout=rate, targets="all-linear")
    found, kept = {}, {}
    for checkpointing in (False, True):
        lora = model.load(shape_folder, FLOAT32, place, 0, checkpointing)
        draw = np.random.default_rng(0)
        lora.put({name: draw.normal(0, 0.2, lora.shapes[name]).astype(np.float32) for name in sorted(lora.shapes)})
        how = replace(lora, prefixes=None)
        size = 0

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal size
            size += tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            found[checkpointing] = written_out(how, batch, 0.3, 11)
        kept[checkpointing] = size
    assert found[True][0] == pytest.approx(found[False][0], rel=1e-6)
    assert far(found[True][1], found[False][1]) < 1e-5
    assert kept[True] < 0.5 * kept[False]


# --- the blocks below the adapters


def test_below_the_adapters_nothing_depends_on_neighbors(tiny_folder: Path, random_examples: MakeExamples) -> None:
    """Kept or not, alone or with other texts: bit for bit."""
    place = LoraConfig(dropout=0.0, targets="all-linear", blocks="top:2")
    lora, small = (ready(tiny_folder, place, prefix_bytes=size) for size in (10**9, 5000))
    assert lora.prefixes is not None and small.prefixes is not None
    examples = random_examples(12)
    together = lora.prefixes.states(one_batch(examples), lora.device)
    batch = one_batch(examples)
    for row, states in enumerate(together.split(batch.lengths)):
        alone = small.prefixes.states(one_batch((examples[batch.rows[row]],)), small.device)
        assert torch.equal(states, alone)
    assert torch.equal(lora.prefixes.states(batch, lora.device), together)
    tokens, width = sum(batch.lengths), together.shape[1]
    assert lora.prefixes.num_bytes == 4 * tokens * width
    assert 0 < small.prefixes.num_bytes <= 5000


def test_kept_states_give_the_losses_and_gradients_of_the_whole_model(
    tiny_folder: Path, random_examples: MakeExamples
) -> None:
    place = LoraConfig(dropout=0.0, targets="all-linear", blocks="top:2")
    kept, plain = ready(tiny_folder, place, prefix_bytes=10**9), ready(tiny_folder, place)
    batch = one_batch(random_examples(6))
    theirs, their_gradients = by_modules(plain, batch, 1.0)
    for _ in range(2):  # computed, then kept
        ours, our_gradients = written_out(kept, batch, 1.0)
        assert ours == pytest.approx(theirs, rel=1e-5) and far(our_gradients, their_gradients) < ROUNDING


# --- bfloat16


def test_in_bfloat16_the_passes_are_as_near_to_float32_as_the_modules(
    tiny_folder: Path, random_examples: MakeExamples
) -> None:
    """The reference is float32 over the same weights, already rounded."""
    place = LoraConfig(dropout=0.0, targets="all-linear")
    rough = ready(tiny_folder, place, ModelConfig(dtype="bfloat16", device="cpu"))
    exact = copy.deepcopy(rough.network).float()
    truth = ready(tiny_folder, place)
    truth.network.load_state_dict(exact.state_dict())
    batch = one_batch(random_examples(16, seed=1), "all")
    losses, true_gradients = by_modules(truth, batch, 1.0)
    theirs, their_gradients = by_modules(rough, batch, 1.0)
    ours, our_gradients = written_out(rough, batch, 1.0)
    assert np.sqrt(np.mean((ours - losses) ** 2)) < 1.2 * np.sqrt(np.mean((theirs - losses) ** 2))
    assert abs(ours.sum() - losses.sum()) < 0.005 * losses.sum()
    apart = {name: np.linalg.norm(true_gradients[name]) for name in true_gradients}
    ours_off, theirs_off = (
        np.mean([np.linalg.norm(found[name] - true_gradients[name]) / apart[name] for name in apart])
        for found in (our_gradients, their_gradients)
    )
    assert ours_off < 1.3 * theirs_off and ours_off < 0.2


@pytest.mark.parametrize("by_hand", [True, False])
def test_tokens_count_by_their_weights(tiny_folder: Path, random_examples: MakeExamples, by_hand: bool) -> None:
    """In the passes, and in the modules for texts that are too long for the passes."""
    lora = ready(tiny_folder, PLACES[1])
    batch = one_batch(random_examples(5, longest=30), "all")
    counts = np.random.default_rng(1).uniform(0, 2, int(batch.predicts.sum())).astype(np.float32)
    losses = lora.token_nll(torch.from_numpy(batch.ids), torch.from_numpy(batch.predicts))
    parameters = lora.parameters()
    wanted = (losses * torch.from_numpy(counts)).sum() * 0.1
    theirs = torch.cat([each.reshape(-1) for each in torch.autograd.grad(wanted, [parameters[n] for n in lora.shapes])])
    lora.prepare(training=True)
    if by_hand:
        told, ours = lora.backpropagate(batch, 0.1, 0, counts)
    else:
        told, ours = lora._through_modules(batch, 0.1, 0, torch.from_numpy(counts))
    assert told.numpy() == pytest.approx(losses.detach().numpy(), rel=1e-5)
    assert float((ours - theirs).norm() / theirs.norm()) < 2e-5
