"""One option for each block: against all combinations, and predicted peaks against what is really alive."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise, product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from weft.rewrite.liveness import peak_bytes
from weft.rewrite.rates import Rates, measured_rates
from weft.rewrite.recompute import (
    BlockCosts,
    BlockMemory,
    MemoryPlan,
    Option,
    _hull,
    block_costs,
    choose_options,
    in_flight,
    options_within,
)
from weft.rewrite.sizes import evaluator

from ..graphs import cases, normal
from .saving import Captured

RATES = Rates(copy=1e12, product=1e13, host=1e9, call=1e-9)
options = st.lists(
    st.builds(Option, st.none(), st.integers(0, 40), st.integers(0, 20).map(float), st.sampled_from([0, 7])),
    min_size=1,
    max_size=5,
)
models = st.lists(options.map(lambda o: BlockCosts(_hull(o), 0)), min_size=1, max_size=4)


# options --------------------------------------------------------------------------------------------------------------
@cases
@given(options)
def test_the_hull_keeps_what_may_be_best_and_nothing_else(given: list[Option]) -> None:
    hull = _hull(given)
    assert hull[-1].bytes == min(o.bytes for o in given)
    assert hull[0].seconds == min(o.seconds for o in given)
    rates = [(b.seconds - a.seconds) / (a.bytes - b.bytes) for a, b in pairwise(hull)]
    assert all(r > 0 for r in rates) and all(a < b for a, b in pairwise(rates))
    for price in (0.0, 0.3, 1.0, 5.0, 100.0):
        cost: Callable[[Option], float] = lambda o, p=price: o.seconds + p * o.bytes  # noqa: E731
        assert min(map(cost, hull)) == pytest.approx(min(map(cost, given)))


@cases
@given(models, st.integers(0, 120))
def test_the_room_is_kept_and_the_time_is_the_least_but_for_one_step(blocks: list[BlockCosts], room: int) -> None:
    chosen = choose_options(blocks, room)
    assert all(c in b.options for c, b in zip(chosen, blocks, strict=True))
    assert chosen[-1] == blocks[-1].options[0], "what the last one saved is alive in its backward anyway"
    held = blocks[:-1]
    fitting = [c for c in product(*(b.options for b in held)) if sum(o.bytes for o in c) <= room]
    bytes_, seconds = sum(o.bytes for o in chosen[:-1]), sum(o.seconds for o in chosen[:-1])
    if not fitting:
        assert all(c == b.options[-1] for c, b in zip(chosen[:-1], held, strict=True))
        return
    assert bytes_ <= room
    least = min(sum(o.seconds for o in c) for c in fitting)
    largest = max((b.seconds - a.seconds for block in held for a, b in pairwise(block.options)), default=0.0)
    assert least <= seconds <= least + largest


@cases
@given(options, st.integers(1, 6), st.integers(0, 200))
def test_earlier_ones_of_equal_blocks_give_first(given: list[Option], count: int, room: int) -> None:
    block = BlockCosts(_hull(given), 0)
    chosen = choose_options([block] * count, room)
    *places, last = [block.options.index(c) for c in chosen]
    assert places == sorted(places, reverse=True) and (not places or places[0] - places[-1] <= 1) and last == 0


@cases
@given(models, st.integers(0, 100), st.integers(0, 50))
def test_more_room_never_takes_longer(blocks: list[BlockCosts], room: int, more: int) -> None:
    seconds = [sum(o.seconds for o in choose_options(blocks, r)) for r in (room, room + more)]
    assert seconds[1] <= seconds[0]


away = st.lists(
    st.builds(Option, st.none(), st.just(0), st.integers(0, 20).map(float), st.integers(1, 60), st.just(True)),
    max_size=3,
)
models_away = st.lists(
    st.builds(lambda near, far: BlockCosts(_hull(near + far), 0, _hull(near)), options, away), min_size=1, max_size=4
)


@cases
@given(models_away, st.integers(0, 160), st.integers(0, 200))
def test_what_is_on_its_way_has_room(blocks: list[BlockCosts], room: int, host: int) -> None:
    needed: Callable[[list[Option]], int] = lambda chosen: sum(o.bytes for o in chosen[:-1]) + in_flight(chosen)  # noqa: E731
    chosen = options_within(blocks, room, host)
    narrow = choose_options([replace(b, options=b.narrow) for b in blocks], room)
    assert needed(chosen) <= room or chosen == narrow
    if any(o.all_away for o in chosen):
        assert sum(o.host_bytes for o in chosen) <= host and needed(chosen) <= room
    free = choose_options(blocks, room)
    if needed(free) <= room and sum(o.host_bytes for o in free) <= host:
        assert chosen == free
    assert not any(o.all_away for o in options_within(blocks, room, 0))
    assert options_within(blocks, None, host) == choose_options([replace(b, options=b.narrow) for b in blocks], 0)


def test_all_is_saved_where_there_is_room() -> None:
    block = BlockCosts((Option(None, 10, 0.0), Option(frozenset("a"), 4, 1.0), Option(frozenset(), 0, 5.0)), 0)
    at = lambda room: [o.bytes for o in choose_options([block] * 3, room)]  # noqa: E731
    assert at(20) == [10, 10, 10]
    assert at(19) == [4, 10, 10]
    assert at(8) == [4, 4, 10]
    assert at(4)[:2] == [0, 4]
    assert at(-1) == [0, 0, 10]


def test_the_prediction_leaves_the_last_block_out() -> None:
    """What it saved is among what its backward has alive."""
    blocks = [BlockMemory(f"layers.{i}", 10 + i, 0, 0.5, "saves all") for i in range(3)]
    plan = MemoryPlan(200, 100, 40, blocks)
    assert plan.predicted == 100 + 40 + 10 + 11 and plan.fits and plan.extra_seconds == 1.5
    assert not MemoryPlan(160, 100, 40, blocks).fits and MemoryPlan(None, 100, 40, blocks).fits
    assert plan.to_dict()["predicted"] == 161 and plan.to_dict()["blocks"][2]["saved_bytes"] == 12


# blocks ---------------------------------------------------------------------------------------------------------------
def block(x: Tensor, up: Tensor, gate: Tensor, down: Tensor) -> Tensor:
    """A gated MLP with its norm."""
    h = F.layer_norm(x, x.shape[-1:])
    return x + (F.silu(h @ gate) * (h @ up)) @ down


def weights(width: int = 32, wide: int = 96) -> list[Tensor]:
    """Of the block; the product down is not trained."""
    made = [normal(1, width, wide), normal(2, width, wide), normal(3, wide, width)]
    return [Parameter(t / 6, requires_grad=i < 2) for i, t in enumerate(made)]


def captured(length: int = 40, needs: bool = True) -> tuple[Captured, list[Tensor]]:
    """The block, as captured on an input of this length."""
    torch._dynamo.reset()
    found, given = Captured(block), [normal(0, 2, length, 32).requires_grad_(needs), *weights()]
    found(*given)
    return found, given


def test_options_of_a_block() -> None:
    found, given = captured()
    costs = block_costs(found.joint, found.args, RATES)
    held = given[0].numel() * 4
    first, last = costs.options[0], costs.narrow[-1]
    assert first.saved is None and first.seconds == 0.0
    assert first.bytes == found.choices()[0].bytes + held
    assert last.bytes < held and last.host_bytes == held and last.seconds >= held / RATES.host * 0.02
    assert [o.bytes for o in costs.options] == sorted({o.bytes for o in costs.options}, reverse=True)


def test_all_that_is_saved_may_go_to_the_host() -> None:
    found, given = captured()
    rates = Rates(copy=1e12, product=1e9, host=1e13, call=1e-9)  # where copying is cheap, and products are not
    costs, held = block_costs(found.joint, found.args, rates), given[0].numel() * 4
    last = costs.options[-1]
    assert last.all_away and last.bytes == 0 and last.saved is None
    assert last.host_bytes == found.choices()[0].bytes + held
    assert last.seconds == pytest.approx(0.02 * last.host_bytes / 1e13)
    assert all(not o.all_away for o in costs.narrow) and costs.narrow[-1].host_bytes == held
    assert (
        block_costs(found.joint, found.args, rates, True).options
        == block_costs(found.joint, found.args, rates, True).narrow
    )


def test_without_another_memory_the_input_stays() -> None:
    found, given = captured()
    costs = block_costs(found.joint, found.args, Rates(1e12, 1e13, 0.0, 1e-9))
    assert all(not o.host_bytes for o in costs.options)
    assert costs.options[-1].bytes >= given[0].numel() * 4


def test_an_input_that_needs_no_gradient_is_not_the_blocks_to_keep() -> None:
    found, _ = captured(needs=False)
    costs = block_costs(found.joint, found.args, RATES)
    assert all(not o.host_bytes for o in costs.options)
    assert costs.options[0].bytes == found.choices()[0].bytes


def test_what_asks_for_checkpointing_saves_next_to_nothing() -> None:
    found, given = captured()
    usual, thrifty = (block_costs(found.joint, found.args, RATES, asked) for asked in (False, True))
    held = given[0].numel() * 4
    assert all(o.bytes - held <= (usual.options[0].bytes - held) / 32 for o in thrifty.options)
    assert thrifty.options[-1] == usual.narrow[-1]


def test_rates_are_measured_once() -> None:
    rates = measured_rates(torch.device("cpu"), torch.float32)
    assert rates is measured_rates(torch.device("cpu"), torch.float32)
    assert rates.copy > 1e7 and rates.product > 1e7 and 0 < rates.call < 1e-2 and rates.host == 0


# what is alive -----------------------------------------------------------------------------------------------------------
class Alive(TorchDispatchMode):
    """Bytes of all storages that calls made and that are still there, at most."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in given:
                storage = tensor.untyped_storage()
                self._made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, self.now)
        return result

    @property
    def now(self) -> int:
        """Bytes alive."""
        self._made = {key: (ref, size) for key, (ref, size) in self._made.items() if not ref.expired()}
        return sum(size for _, size in self._made.values())


def measured(found: Captured, given: Sequence[Tensor], saved: frozenset[str] | None = None) -> int:
    """The most alive in a backward: what was saved, the incoming gradient, and what the backward makes.

    Dynamo leaves a function alone while a mode is on: the lowered graph is called itself.
    """
    found.joint.lower(saved)
    with Alive() as alive:
        result = found.joint.lower(saved)(*found.args)[0]
        gradient = torch.ones_like(result)
        alive.peak = 0
        torch.autograd.grad(result, [t for t in given if t.requires_grad], gradient)
        return alive.peak - result.untyped_storage().nbytes()  # which the next block has saved, or nobody holds


@pytest.mark.parametrize("length", [40, 200])
def test_the_working_memory_of_a_backward(length: int) -> None:
    found, given = captured(length)
    costs = block_costs(found.joint, found.args, RATES)
    held = given[0].numel() * 4
    assert costs.working - held == pytest.approx(measured(found, given), rel=0.1)


def test_what_is_computed_again_needs_about_as_much_later() -> None:
    found, given = captured(120)
    all_saved = measured(found, given)
    options = block_costs(found.joint, found.args, RATES).options
    assert len({o.saved for o in options}) > 2
    for option in options:
        assert measured(found, given, option.saved) <= 1.1 * all_saved


def chain(*sizes: int) -> fx.Graph:
    """Calls one after another, each reading the one before and the first, of so many bytes."""
    graph = fx.Graph()
    nodes = [graph.placeholder("x")]
    for _ in sizes[1:]:
        nodes.append(graph.call_function(torch.add, (nodes[-1], nodes[0])))
    graph.output(nodes[-1])
    for node, size in zip(nodes, sizes, strict=True):
        node.meta["val"] = torch.empty(size, dtype=torch.uint8)
    return graph


@given(st.lists(st.integers(1, 50), min_size=2, max_size=6))
def test_the_peak_of_a_chain_is_that_of_a_simulation_by_hand(sizes: list[int]) -> None:
    graph, alive = chain(*sizes), []
    for i in range(1, len(sizes)):
        alive.append(sizes[0] + sizes[i] + (sizes[i - 1] if i > 1 else 0))
    assert peak_bytes(graph, int) == max(alive)
    first = next(iter(graph.nodes))
    assert peak_bytes(graph, int, [first]) == max(a - sizes[0] for a in alive)
    assert peak_bytes(graph, int, extra=lambda n: 1000 if n.op == "call_function" else 0) == 1000 + max(alive)


def test_a_view_keeps_its_base_alive_and_is_counted_once() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    y = graph.call_function(torch.neg, (x,))
    part = graph.call_function(torch.narrow, (y, 0, 0, 10))
    z = graph.call_function(torch.neg, (part,))
    graph.output(z)
    base = torch.empty(100, dtype=torch.uint8)
    values = (torch.empty(100, dtype=torch.uint8), base, base[:10], torch.empty(10, dtype=torch.uint8))
    for node, value in zip((x, y, part, z), values, strict=True):
        node.meta["val"] = value
    assert peak_bytes(graph, int) == 200
    assert peak_bytes(graph, int, [x]) == 110


def test_sizes_follow_the_call() -> None:
    found, _ = captured(40)
    short = block_costs(found.joint, found.args, RATES)
    given = [normal(0, 2, 80, 32).requires_grad_(), *weights()]
    found(*given)
    long = block_costs(found.joint, found.args, RATES)
    assert long.options[0].bytes == 2 * short.options[0].bytes
    assert evaluator(found.joint.fakes, found.args)(7) == 7
