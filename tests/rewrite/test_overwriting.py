"""Gradients that are written over what they belong to: the same numbers, and nothing else lost."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, fx

from weft.kernels import gated_activation as G
from weft.kernels.dispatch import backend
from weft.kernels.gated_activation import gated_activation
from weft.kernels.lora_linear import lora_linear
from weft.rewrite.joint import JointGraph
from weft.rewrite.overwriting import overwritten

from .recorded import DEVICE
from .saving import Captured, run

WIDTH = 8
LAYOUT = f"rows:{WIDTH}:{WIDTH}:0:0"
BACKWARD = torch.ops.weft.gated_activation_backward.default


def feed_forward(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    """Two products, a gate, and a linear with an adapter."""
    return lora_linear(gated_activation(x @ w, x @ v, "silu"), [w], LAYOUT, None, v[:2], w[:, :2], 0.5)


def handed_out(x: Tensor, w: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The caller gets gate as well."""
    gate = x @ w
    return gated_activation(gate, x @ v, "silu"), gate


def given(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    """gate is an input."""
    return gated_activation(x, x @ v, "silu") @ w


BOTH = {"gated_activation_backward", "lora_linear_backward"}
BLOCKS: dict[str, tuple[Callable[..., Any], set[str]]] = {
    "feed_forward": (feed_forward, BOTH),
    "handed_out": (handed_out, set()),
    "given": (given, set()),
}
"""And what is overwritten."""


def leaves(rows: int = 5) -> list[Tensor]:
    """An input and two weights."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((rows, WIDTH), (WIDTH, WIDTH), (WIDTH, WIDTH))
    return [torch.randn(shape, generator=generator).to(DEVICE).requires_grad_() for shape in shapes]


def names(joint: JointGraph, saved: frozenset[str] | None) -> set[str]:
    """Of the operators that overwrite."""
    return {node.target.name().removeprefix("weft::") for node in joint.overwritten(joint.backward[saved], saved)}


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("again", (False, True), ids=("all saved", "computed again"))
def test_what_nobody_reads_later_is_overwritten(name: str, again: bool) -> None:
    """Whether it was saved or is computed again; not what the caller has, or gave."""
    torch._dynamo.reset()
    block, wanted = BLOCKS[name]
    with backend("triton"):
        captured = Captured(block)
        captured(*leaves())
        saved = captured.choices()[-1].saved if again else None
        found = run(lambda *args: captured(*args, saved=saved), leaves())[0]
        for ours, eager in zip(found, run(block, leaves())[0], strict=True):
            torch.testing.assert_close(ours, eager, rtol=1e-5, atol=1e-5)
        assert names(captured.joint, saved) == wanted


def test_what_the_caller_has_stays_as_it_is_whatever_is_saved() -> None:
    """Of each choice, which is traced anew, and in which gate is saved or not."""
    torch._dynamo.reset()
    with backend("triton"):
        captured = Captured(handed_out)
        captured(*leaves())
        for choice in captured.choices():
            inputs = leaves()
            y, gate = captured(*inputs, saved=choice.saved)
            before = gate.detach().clone()
            (y.sum() + gate.sum()).backward()
            assert torch.equal(gate.detach(), before), choice


@pytest.mark.parametrize("keeps", (False, True))
def test_a_backward_that_may_run_again_overwrites_nothing(keeps: bool) -> None:
    torch._dynamo.reset()
    with backend("triton"), patch.object(G, "_launch_backward", wraps=G._launch_backward) as launched:
        inputs = leaves()
        y = Captured(feed_forward)(*inputs)
        first = torch.autograd.grad(y.sum(), inputs, retain_graph=keeps)
        _, gate, up, _, dgate, dup, _ = launched.call_args.args
        assert (dgate.data_ptr() == gate.data_ptr()) is (dup.data_ptr() == up.data_ptr()) is not keeps
        if keeps:
            for a, b in zip(first, torch.autograd.grad(y.sum(), inputs), strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=0)


def backward_graph(after: Callable[[fx.Graph, fx.Node, fx.Node], Any], same: bool = False) -> fx.Graph:
    """dgate and dup of a gate and an up that are computed; ``after`` makes what is returned beside them of gate and dgate."""
    graph = fx.Graph()
    grad, source = graph.placeholder("tangents_1"), graph.placeholder("saved")
    gate = graph.call_function(torch.ops.aten.sin.default, (source,))
    up = gate if same else graph.call_function(torch.ops.aten.cos.default, (source,))
    both = graph.call_function(BACKWARD, (grad, gate, up, "silu", True, torch.float32))
    parts = [graph.call_function(operator.getitem, (both, i)) for i in range(2)]
    beside = after(graph, gate, parts[0])
    graph.output((*parts, beside))
    for node in graph.nodes:
        node.meta["val"] = (torch.ones(2, 3), torch.ones(2, 3)) if node is both else torch.ones(2, 3)
    for i, part in enumerate(parts):
        part.meta["val"] = both.meta["val"][i]
    return graph


@pytest.mark.parametrize(
    ("after", "same", "may"),
    [
        (lambda graph, gate, dgate: dgate, False, True),
        (lambda graph, gate, dgate: None, True, False),
        (lambda graph, gate, dgate: graph.call_function(torch.ops.aten.neg.default, (gate,)), False, False),
        (lambda graph, gate, dgate: gate, False, False),
    ],
    ids=("read last", "gate is up", "read later", "returned"),
)
def test_who_else_reads_it(after: Any, same: bool, may: bool) -> None:
    graph = backward_graph(after, same)
    assert bool(overwritten(graph, ())) is may


def test_memory_that_somebody_else_has_is_left_alone() -> None:
    """Of the gate itself, and of one of which nobody knows where its reader's result lies."""
    graph = backward_graph(lambda graph, gate, dgate: None)
    gate = next(n for n in graph.nodes if n.target is torch.ops.aten.sin.default)
    assert not overwritten(graph, {gate.meta["val"].untyped_storage()._cdata})
    with graph.inserting_after(gate):
        unknown = graph.call_function(torch.ops.aten.alias.default, (gate,))
    with graph.inserting_before(graph.output_node()):
        graph.output_node().args = ((unknown,),)
    assert not overwritten(graph, ())
