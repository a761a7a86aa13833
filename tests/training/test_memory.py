"""Training steps within a limit of memory: the same losses and gradients, and what is held is what the plan says."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AlbertConfig, AlbertForMaskedLM, AutoModelForCausalLM, Gemma2Config, GPTNeoXConfig

import weft
from weft.rewrite import blocks, choices, step_memory
from weft.rewrite.errors import OptionError
from weft.rewrite.memory_plan import MemoryPlan
from weft.rewrite.rates import Rates

from ..models import (
    VOCABULARY,
    Block,
    Inputs,
    RootLoop,
    assert_identical,
    assert_same,
    batch,
    llama,
    outcome,
    quickly,
    twin,
    with_lora,
)
from .held import INPUTS, adapted, held_bytes, step
from .runs import loop

TINY: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 61,
}


RATES = Rates(copy=4e10, product=1e11, host=0.0, call=2e-6)


@pytest.fixture(autouse=True, scope="module")
def _a_device_of_one_speed() -> Iterator[None]:
    """Those of an idle core: how fast a busy one happens to be decides what is worth computing again, and is no test's matter."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(blocks, "measured_rates", lambda device, dtype: RATES)
        yield


def _from(config: Any) -> Any:
    torch.manual_seed(0)
    model = with_lora(AutoModelForCausalLM.from_config(config))
    model.enable_input_require_grads()
    return model


MODELS: dict[str, Callable[[], Any]] = {
    "llama": adapted,
    "neox": lambda: _from(GPTNeoXConfig(**TINY, max_position_embeddings=64)),
    "gemma": lambda: _from(Gemma2Config(**TINY, num_key_value_heads=2, head_dim=8, pad_token_id=0)),
}


def plan_of(model: Any) -> MemoryPlan:
    """The plan of the last step."""
    found = model.rewrite_report.memory
    assert isinstance(found, MemoryPlan)
    return found


def saved_bytes(model: Any) -> dict[str, int]:
    """What the plan says that each block keeps."""
    return {b.path: b.saved_bytes for b in plan_of(model).blocks}


def planned(memory: str | int, model: Any = None, **options: Any) -> tuple[Any, Any]:
    """A model within ``memory``, and its untouched twin."""
    model = adapted() if model is None else model
    plain = twin(model)
    return quickly(model, memory=memory, **options), plain


ALIKE: dict[str, Any] = {"example_inputs": batch(2, 6, padded=True)}
"""For tests of something else than a step that is captured anew since it has padding, as ``INPUTS`` do and examples do not:
capturing a block takes longer than all else."""


@pytest.fixture(scope="module")
def roomy() -> tuple[Any, Any]:
    """A model that saves all, for tests that leave it as it is."""
    return planned("1TB")


@pytest.fixture(scope="module")
def thrifty() -> tuple[Any, Any]:
    """A model that saves as little as possible, for tests that leave it as it is."""
    return planned("min")


# what is computed, and what is held -----------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", sorted(MODELS))
def test_a_smaller_limit_holds_less_and_computes_the_same(kind: str) -> None:
    model, plain = planned("24GB", MODELS[kind]())
    wanted, found = step(plain), list[int]()
    assert_same(step(model), wanted)
    full = plan_of(model).predicted
    assert plan_of(model).limit == 24 * 10**9 and plan_of(model).extra_seconds == 0 and plan_of(model).fits
    for share in (1.0, 0.9, 0.75, 0.0):
        model.rewrite_report.steps.limit = int(full * share)
        assert_same(step(model), wanted)
        held = held_bytes(model)
        assert held == saved_bytes(model)
        assert plan_of(model).fits == (share > 0) == (plan_of(model).predicted <= full * share)
        found.append(sum(held.values()))
    assert all(after < before for before, after in pairwise(found))


@pytest.mark.parametrize("memory", ["min", 1, 10**12, "1 TiB"])
def test_every_way_to_say_a_limit(memory: str | int) -> None:
    model, plain = planned(memory, adapted(2), **ALIKE)
    assert_same(step(model), step(plain))
    limits = {"min": None, "1 TiB": 2**40}
    assert plan_of(model).limit == limits.get(str(memory), memory)
    assert plan_of(model).fits == (memory != 1)
    assert held_bytes(model) == saved_bytes(model)


def test_all_is_saved_only_where_it_fits(roomy: tuple[Any, Any], thrifty: tuple[Any, Any]) -> None:
    wide, narrow = held_bytes(roomy[0]), held_bytes(thrifty[0])
    assert wide == saved_bytes(roomy[0]) and narrow == saved_bytes(thrifty[0])
    *others, last = wide
    assert all(8 * narrow[path] < wide[path] for path in others)
    assert wide[last] > narrow[last] > max(narrow[path] for path in others), (
        "as much as leaves room for the head beside it"
    )


def test_the_head_counts_where_the_first_block_is_given_what_needs_no_gradient(thrifty: tuple[Any, Any]) -> None:
    model, plain = planned("min", with_lora(llama(num_hidden_layers=3)), **ALIKE)
    for _ in range(2):
        assert_same(step(model), step(plain))
        step(thrifty[0])
    ours, other = plan_of(model), plan_of(thrifty[0])
    assert ours.working == other.working and ours.blocks[-1].saved_bytes == other.blocks[-1].saved_bytes


def test_logits_that_nobody_computes_take_no_memory() -> None:
    model, _ = planned("min", adapted(2, vocab_size=4096), **ALIKE)
    step(model)
    logits = INPUTS["input_ids"].numel() * 4096 * 4
    head = plan_of(model).working - plan_of(model).blocks[-1].saved_bytes
    assert logits <= head <= 1.25 * logits, "those of the loss, which are computed in one part here"


def test_lengths_that_come_later_are_planned_at_their_sizes(roomy: tuple[Any, Any]) -> None:
    model, plain = roomy
    sizes = []
    for length in (10, 20, 40):
        assert_same(step(model, batch(2, length)), step(plain, batch(2, length)))
        held = held_bytes(model, batch(2, length))
        assert held == saved_bytes(model)
        sizes.append(sum(held.values()))
    assert sizes[1] == 2 * sizes[0] and sizes[2] == 4 * sizes[0]


def test_dropout_draws_the_same_numbers_whatever_is_saved() -> None:
    model = with_lora(llama(num_hidden_layers=3), lora_dropout=0.3)
    model.enable_input_require_grads()
    model, plain = planned("min", model, **ALIKE)
    assert_same(step(model, seed=7), step(plain, seed=7))
    assert not torch.equal(step(model, seed=7)["loss"], step(model, seed=8)["loss"])
    assert held_bytes(model) == saved_bytes(model)


def test_all_parameters_trained() -> None:
    model, plain = planned("min", llama(num_hidden_layers=3).train(), **ALIKE)
    assert_same(step(model), step(plain))
    assert held_bytes(model) == saved_bytes(model)


def test_blocks_in_the_graph_of_the_root() -> None:
    model, plain = planned("min", RootLoop(layers=3))
    assert_same(outcome(model, batch()), outcome(plain, batch()))
    *others, last = plan_of(model).blocks
    assert len(others) == 2 and all(b.extra_seconds > 0 for b in others) and last.extra_seconds == 0


class Normalizing(Block):
    """Normalizes a weight of its own in place before it uses it."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.qkv.weight.div_(self.qkv.weight.norm(dim=1, keepdim=True))
        return super().forward(x)


def normalizing() -> Any:
    """A model of such blocks."""
    model = RootLoop(layers=3)
    model.blocks = nn.ModuleList(Normalizing(16) for _ in range(3))
    return model


@pytest.mark.parametrize("memory", ["min", "1TB"])
def test_blocks_that_overwrite_a_weight(memory: str) -> None:
    """What reads it is not computed again from what it is by then; and running the examples leaves it as it was."""
    model, plain = planned(memory, normalizing())
    assert_identical(*(m.state_dict() for m in (model, plain)))
    for seed in range(3):
        assert_same(outcome(model, batch(seed=seed)), outcome(plain, batch(seed=seed)))
        assert_same(*(m.state_dict() for m in (model, plain)))
    assert len(plan_of(model).blocks) == 3
    assert any(b.extra_seconds > 0 for b in plan_of(model).blocks) == (memory == "min")


def test_a_model_without_blocks_has_no_plan() -> None:
    model, plain = planned("min", llama(num_hidden_layers=1).train(), **ALIKE)
    assert_same(step(model), step(plain))
    assert model.rewrite_report.memory is None


# steps as people run them -------------------------------------------------------------------------------------------------
def test_training_follows_the_same_losses() -> None:
    model, plain = planned("min")
    batches = [batch(2, 8 + i, seed=i) for i in range(5)]
    assert loop(model, batches) == pytest.approx(loop(plain, batches), rel=1e-4)


def test_before_the_first_step_the_state_of_the_optimizer_is_expected() -> None:
    model, _ = planned("1TB", **ALIKE)
    trained = [p for p in model.parameters() if p.requires_grad]
    size = 4 * sum(p.numel() for p in trained)
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    resident = []
    for _ in range(3):
        model(**INPUTS).loss.backward()
        resident.append(plan_of(model).resident)
        optimizer.step()
    assert resident[0] == resident[1] + 2 * size == resident[2] + 2 * size


def test_what_a_step_took_beyond_its_limit_is_counted_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """But not what an evaluation between two steps took, which is far more."""
    model, plain = planned("24GB", **ALIKE)
    wanted, peak = step(plain), [0]
    monkeypatch.setattr(step_memory, "peak_bytes", lambda device: peak[0])
    step(model)
    limit = model.rewrite_report.steps.limit = int(plan_of(model).predicted * 0.9)
    step(model)
    planned_for = plan_of(model)
    assert planned_for.fits
    peak[0] = limit + limit // 50
    assert_same(step(model), wanted)
    learned = plan_of(model)
    assert planned_for.measured == peak[0]
    assert learned.working - planned_for.working == peak[0] - planned_for.predicted
    assert learned.fits and sum(saved_bytes(model).values()) < sum(b.saved_bytes for b in planned_for.blocks)
    peak[0] = 3 * limit
    step(model)
    assert plan_of(model).working == learned.working


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """With what arguments options were chosen."""
    calls, chosen = list[Any](), choices.options_within
    monkeypatch.setattr(choices, "options_within", lambda *args: calls.append(args) or chosen(*args))
    return calls


@pytest.mark.parametrize(("first_is_alike", "times"), [(True, 1), (False, 2)])
def test_blocks_that_cost_what_they_were_taken_to_are_chosen_for_once(
    first_is_alike: bool, times: int, asked: list[Any]
) -> None:
    model, plain = planned("min", adapted(4) if first_is_alike else with_lora(llama(num_hidden_layers=4)))
    assert_same(step(model), step(plain))
    assert len(asked) == times and len(plan_of(model).blocks) == 4
    other = batch(2, 10)
    assert_same(step(model, other), step(plain, other))
    _, *held = held_bytes(model, other).items()
    assert held == list(saved_bytes(model).items())[1:], "the first one's input is there in any case"


def test_little_more_room_changes_no_choice(asked: list[Any]) -> None:
    """Choosing takes the host longer than a block."""
    model, _ = planned("24GB", **ALIKE)
    step(model)
    steps = model.rewrite_report.steps
    limit = steps.limit = int(plan_of(model).predicted * 0.9)
    step(model)
    asked.clear()
    room = limit - plan_of(model).resident - plan_of(model).working
    for more in (0, room // 64, -(room // 64), 0):
        steps.limit = limit + more
        step(model)
        assert plan_of(model).fits
    assert not asked
    steps.limit = limit + room // 4
    step(model)
    assert asked


def test_gradients_accumulate(thrifty: tuple[Any, Any]) -> None:
    gradients = []
    for model in thrifty:
        for seed in range(3):
            model(**batch(2, 12, seed=seed)).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        model.zero_grad()
    assert_same(*gradients)


def test_two_forwards_before_one_backward(thrifty: tuple[Any, Any]) -> None:
    gradients = []
    for model in thrifty:
        chosen, rejected = (model(**batch(2, length, seed=length)).loss for length in (12, 15))
        nn.functional.softplus(chosen - rejected).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        model.zero_grad()
    assert_same(*gradients)
    assert len(plan_of(thrifty[0]).blocks) == 3


def test_evaluation_in_between_changes_no_plan(thrifty: tuple[Any, Any]) -> None:
    model, plain = thrifty
    wanted = step(plain)
    assert_same(step(model), wanted)
    before = plan_of(model)
    for each in (model, plain):
        each.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(**INPUTS).logits, plain(**INPUTS).logits, rtol=1e-4, atol=1e-4)
    for each in (model, plain):
        each.train()
    assert plan_of(model) is before
    assert_same(step(model), wanted)


def test_a_forward_that_fails_leaves_the_next_plan_whole() -> None:
    model, plain = planned("24GB", **ALIKE)
    step(model)
    half = model.rewrite_report.steps.limit = int(plan_of(model).predicted * 0.75)
    step(model)
    wanted, inputs = [b.choice for b in plan_of(model).blocks], batch(3, 24, seed=5, padded=True)
    model.rewrite_report.steps._passes.clear()
    norm = model.get_submodule("base_model.model.model.layers.1.post_attention_layernorm")
    weight, norm.weight = norm.weight, nn.Parameter(torch.ones(7), requires_grad=False)
    with pytest.raises(RuntimeError):
        model(**inputs)
    norm.weight = weight
    for _ in range(2):
        assert_same(step(model, inputs), step(plain, inputs))
        assert [b.choice for b in plan_of(model).blocks] == wanted
        assert plan_of(model).predicted <= half


# the switch of transformers ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("when", ["before", "after"])
def test_checkpointing_of_the_model_is_obeyed(when: str, reentrant: bool, thrifty: tuple[Any, Any]) -> None:
    model, plain = adapted(), thrifty[1]
    enable = partial(model.gradient_checkpointing_enable, {"use_reentrant": reentrant})
    if when == "before":
        enable()
    original = None if when == "after" else model.base_model.model.model.layers[0]._gradient_checkpointing_func
    quickly(model, memory="1TB", **ALIKE)
    if when == "after":
        enable()
        original = model.base_model.model.model.layers[0]._gradient_checkpointing_func
    assert_same(step(model), step(plain))
    held = held_bytes(model)
    assert held == saved_bytes(model) and max(held.values()) <= max(list(held_bytes(thrifty[0]).values())[:-1])
    model.gradient_checkpointing_disable()
    assert {b.choice for b in _after_step(model).blocks} == {"saves all"}
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_same(step(model), step(plain))
    weft.undo(model)
    layers = model.base_model.model.model.layers
    assert all(type(m._gradient_checkpointing_func) is type(original) for m in layers)
    assert_identical(step(model), _checkpointed(plain, reentrant))


def _after_step(model: Any) -> MemoryPlan:
    step(model)
    return plan_of(model)


def _checkpointed(model: Any, reentrant: bool) -> dict[str, Tensor]:
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    try:
        return step(model)
    finally:
        model.gradient_checkpointing_disable()


@pytest.mark.parametrize("reentrant", [True, False])
def test_blocks_that_somebody_else_checkpoints(reentrant: bool) -> None:
    """Checkpointing put around a block by hand: computed again from outside, with the same numbers."""
    model = with_lora(llama(num_hidden_layers=3, use_cache=False), lora_dropout=0.2)
    model.enable_input_require_grads()
    model, plain = planned("1TB", model, **ALIKE)
    for layer in (m for each in (model, plain) for m in each.base_model.model.model.layers):
        layer.forward = partial(_again, layer.forward, reentrant)
    for seed in range(2):
        assert_same(step(model, seed=seed), step(plain, seed=seed))


def _again(forward: Callable[..., Tensor], reentrant: bool, x: Tensor, **kwargs: Any) -> Any:
    return checkpoint(partial(forward, **kwargs), x, use_reentrant=reentrant)


# wrong arguments, copies, models of other shapes -----------------------------------------------------------------------------
@pytest.mark.parametrize("memory", ["much", "24 bananas", "", -1, 0, 1.5, True, [], "max"])
def test_a_wrong_limit_is_refused_and_leaves_the_model(memory: Any, roomy: tuple[Any, Any]) -> None:
    model = roomy[1]
    before = {name: vars(m).copy() for name, m in model.named_modules()}
    with pytest.raises(OptionError, match="memory"):
        weft.optimize(model, memory=memory)
    assert {name: vars(m) for name, m in model.named_modules()} == before
    assert not hasattr(model, "rewrite_report")


def test_inference_takes_no_limit(roomy: tuple[Any, Any]) -> None:
    with pytest.raises(OptionError, match="training"):
        weft.optimize(roomy[1], mode="inference", memory="min")


def test_a_copy_of_a_planned_model_is_an_ordinary_one() -> None:
    model, plain = planned("min", llama(num_hidden_layers=3).train(), **ALIKE)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.disable_input_require_grads()  # whose hook cannot be saved
    step(model)
    copied, stored = copy.deepcopy(model), io.BytesIO()
    torch.save(model, stored)
    report = pickle.loads(pickle.dumps(model.rewrite_report))
    stored.seek(0)
    loaded = torch.load(stored, weights_only=False)
    for each in (copied, loaded):
        assert_same(step(each), step(plain))
        each.gradient_checkpointing_disable()
        assert_identical(step(each), step(plain))
    assert copied.rewrite_report.memory is None
    assert len(report["memory"]["blocks"]) == 3
    assert b"weft" not in stored.getvalue()


class Broken(nn.Module):
    """A block whose forward Dynamo captures in two parts."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(size, 2 * size), nn.Linear(2 * size, size)
        self.norm = nn.LayerNorm(size)

    def forward(self, x: Tensor) -> Tensor:
        h = nn.functional.gelu(self.up(self.norm(x)), approximate="tanh")
        torch._dynamo.graph_break()
        return x + torch.tanh(self.down(h * torch.sigmoid(h)))


class Chain(nn.Module):
    """Blocks that are called so many times each."""

    def __init__(self, block: type[nn.Module], blocks: int = 2, times: int = 1, size: int = 16) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCABULARY, size)
        self.body = Body(block, blocks, times, size)
        self.head = nn.Linear(size, VOCABULARY)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.head(self.body(self.embed(input_ids)))
        assert labels is not None
        return Result(nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), logits)


class Body(nn.Module):
    """What holds the blocks."""

    def __init__(self, block: type[nn.Module], blocks: int, times: int, size: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(block(size) for _ in range(blocks))
        self.times = times

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            for _ in range(self.times):
                x = layer(x)
        return x


class Result:
    """What the models of this file return."""

    def __init__(self, loss: Tensor, logits: Tensor) -> None:
        self.loss, self.logits = loss, logits


@pytest.mark.parametrize("memory", ["min", "1TB"])
def test_blocks_that_are_captured_in_several_graphs(memory: str) -> None:
    model, plain = planned(memory, Chain(Broken, 3))
    for _ in range(3):
        assert_same(outcome(model, batch()), outcome(plain, batch()))
        assert len(plan_of(model).blocks) == 6


@pytest.mark.parametrize("memory", ["min", "1TB"])
def test_a_block_that_is_called_several_times(memory: str) -> None:
    model, plain = planned(memory, Chain(Broken, 2, times=3))
    for _ in range(2):
        assert_same(outcome(model, batch()), outcome(plain, batch()))


def test_layers_that_share_their_weights() -> None:
    config = AlbertConfig(
        vocab_size=61, hidden_size=32, embedding_size=16, num_hidden_layers=4, num_attention_heads=4, intermediate_size=48,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, inner_group_num=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model, plain = planned("min", AlbertForMaskedLM(config).train())
    inputs: Inputs = batch(2, 10)
    for _ in range(2):
        assert_same(outcome(model, inputs), outcome(plain, inputs), rounding=1e-4)
