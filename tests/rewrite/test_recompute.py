"""The options of a block, and predicted peaks against what is really alive."""

from __future__ import annotations

from collections.abc import Sequence
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
from weft.rewrite.memory_plan import BlockMemory, MemoryPlan
from weft.rewrite.rates import Rates, measured_rates
from weft.rewrite.recompute import block_costs
from weft.rewrite.sizes import evaluator

from ..graphs import normal
from .saving import Captured

RATES = Rates(copy=1e12, product=1e13, host=1e9, call=1e-9)


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
    assert [o.bytes for o in costs.narrow] == sorted({o.bytes for o in costs.narrow}, reverse=True)
    assert max(o.bytes for o in costs.options) == first.bytes and costs.forward > 0


def test_all_that_is_saved_may_go_to_the_host() -> None:
    found, given = captured()
    rates = Rates(copy=1e12, product=1e9, host=1e13, call=1e-9)  # where copying is cheap, and products are not
    costs, held = block_costs(found.joint, found.args, rates), given[0].numel() * 4
    all_of_it = next(o for o in costs.options if o.all_away and o.saved is None)
    assert all_of_it.bytes == 0 and all_of_it.host_bytes == found.choices()[0].bytes + held
    assert all_of_it.copy == pytest.approx(all_of_it.host_bytes / 1e13)
    assert all_of_it.seconds == pytest.approx(0.02 * all_of_it.copy)
    assert all(not o.all_away for o in costs.narrow) and costs.narrow[-1].host_bytes == held
    assert not any(o.all_away for o in block_costs(found.joint, found.args, rates, True).options)


def test_without_another_memory_the_input_stays() -> None:
    found, given = captured()
    costs = block_costs(found.joint, found.args, Rates(1e12, 1e13, 0.0, 1e-9))
    assert all(not o.host_bytes for o in costs.options)
    assert min(o.bytes for o in costs.options) >= given[0].numel() * 4


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
    assert thrifty.narrow[-1] == usual.narrow[-1]


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
