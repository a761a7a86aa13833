"""Runs of operations that no rule takes are computed at once: the same numbers, and nothing of them is left behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx
from torch._dynamo.exc import TorchDynamoException

from weft.rewrite import leftovers
from weft.rewrite.leftovers import Leftovers, inductor

from ..graphs import cases
from .saving import Captured
from .test_joint import assert_close, leaves, program, programs, run, seeded


def as_it_is(module: fx.GraphModule) -> Callable[..., Any]:
    """In place of a compiler."""
    return module.forward


@pytest.fixture
def _all_are_worth_it(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(leftovers, "SHARE", 0.0)
    yield


def routed(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    """Two of six experts for each token, sorted by expert, weighted and put back, as transformers does it."""
    tokens = x.flatten(0, 1)
    scores, experts = torch.topk(torch.softmax(tokens @ w, -1), 2)
    order = torch.sort(experts.flatten())[1]
    there = tokens[order // 2] @ w
    weighted = there * scores.flatten()[order].unsqueeze(-1) + v
    back = torch.empty_like(order)
    back[order] = torch.arange(order.numel(), device=order.device)
    return weighted[back].view(-1, 2, x.shape[-1]).sum(1).view_as(x) + x


@settings(cases, max_examples=max(4, cases.max_examples // 20))
@given(programs, st.sampled_from([1, 2]))
def test_programs_keep_their_meaning(steps: Sequence[tuple[str, bool]], outputs: int) -> None:
    torch._dynamo.reset()
    plain = program(steps, outputs)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(leftovers, "SHARE", 0.0)
        fused = Leftovers("cpu", compile=as_it_is)
        captured = Captured(plain, prepared=fused.fused)
        for length in (5, 4):
            wanted, _ = seeded(plain, leaves(length))
            for _ in range(2):  # AOTAutograd looks on once
                assert_close(seeded(captured, leaves(length))[0], wanted)
    assert not fused.problems


@pytest.mark.usefixtures("_all_are_worth_it")
def test_experts_are_routed_in_three_calls() -> None:
    fused = Leftovers("cpu", compile=as_it_is)
    captured = Captured(routed, prepared=fused.fused)
    for length in (5, 7):
        for _ in range(2):
            assert_close(run(captured, leaves(length))[0], run(routed, leaves(length))[0])
    assert fused.runs and not fused.problems and captured.graphs == 1
    left = [str(n.target) for graph in captured.joint.backward.values() for n in graph.nodes if n.op == "call_function"]
    assert any("index_put" in name for name in left), "the graph that is analysed keeps its operations"


def test_what_is_little_of_a_graph_stays() -> None:
    fused = Leftovers("cpu", compile=as_it_is)
    plain = program([("linear", False)] * 20 + [("gate", True)], 1)
    seeded(Captured(plain, prepared=fused.fused), leaves(5))
    assert fused.runs == 0 and fused.remarks() == []


def wrong(module: fx.GraphModule) -> Callable[..., Any]:
    """A compiler that is off by a thousandth."""
    return lambda *args: tuple(o * 1.001 if o.is_floating_point() else o for o in module(*args))


def broken(module: fx.GraphModule) -> Callable[..., Any]:
    """A compiler that is not there."""
    raise RuntimeError("no compiler\nthat we could find")


@pytest.mark.usefixtures("_all_are_worth_it")
@pytest.mark.parametrize(("compile", "reason"), [(wrong, "is off by"), (broken, "RuntimeError: no compiler")])
def test_what_compiles_wrongly_or_not_at_all_runs_as_it_was(compile: Any, reason: str) -> None:
    fused = Leftovers("cpu", compile=compile)
    captured = Captured(routed, prepared=fused.fused)
    for _ in range(3):
        assert_close(run(captured, leaves(5))[0], run(routed, leaves(5))[0])
    assert fused.problems and any(reason in remark for remark in fused.remarks())


@pytest.mark.usefixtures("_all_are_worth_it")
def test_sizes_that_cannot_be_compiled_run_as_they_were() -> None:
    """Dynamo raises where it would have to compile for other sizes once more than it may."""

    def once(module: fx.GraphModule) -> Callable[..., Any]:
        first: list[int] = []

        def call(*args: Any) -> Any:
            first[:] = first or [args[0].numel()]
            if args[0].numel() != first[0]:
                raise TorchDynamoException("too many sizes")
            return module(*args)

        return call

    fused = Leftovers("cpu", compile=once)
    captured = Captured(routed, prepared=fused.fused)
    for length in (5, 5, 7, 5):
        assert_close(run(captured, leaves(length))[0], run(routed, leaves(length))[0])
    assert any("too many sizes" in remark for remark in fused.remarks())


@pytest.mark.usefixtures("_all_are_worth_it")
def test_where_float64_does_not_fit_nothing_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(leftovers, "judge", full)
    fused = Leftovers("cpu", compile=as_it_is)
    captured = Captured(routed, prepared=fused.fused)
    for _ in range(2):
        assert_close(run(captured, leaves(5))[0], run(routed, leaves(5))[0])
    assert not fused.problems and any("not compared" in remark for remark in fused.remarks())


@pytest.mark.usefixtures("_all_are_worth_it")
def test_without_a_replay_nothing_is_compared() -> None:
    fused = Leftovers("cpu", verify=False, compile=wrong)
    captured = Captured(routed, prepared=fused.fused)
    for _ in range(3):
        found = run(captured, leaves(5))[0]
    assert not fused.problems and not torch.allclose(found[0], run(routed, leaves(5))[0][0], rtol=1e-6)


@pytest.mark.usefixtures("_all_are_worth_it")
def test_a_draw_is_left_where_it_is() -> None:
    def dropped(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
        return (F.dropout((x * v).exp() + 1, 0.5, True) * 2).sin() @ w

    fused = Leftovers("cpu", compile=as_it_is)
    captured = Captured(dropped, prepared=fused.fused)
    for _ in range(2):
        assert_close(seeded(captured, leaves(5))[0], seeded(dropped, leaves(5))[0])
    assert fused.runs


@pytest.mark.gpu
def test_inductor_computes_the_same_on_a_gpu() -> None:
    fused = Leftovers(compile=inductor)
    captured = Captured(routed, prepared=fused.fused)

    def on_gpu(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
        return captured(x.cuda(), w.cuda(), v.cuda()).cpu()

    for length in (50, 70, 33):
        for _ in range(2):
            assert_close(run(on_gpu, leaves(length))[0], run(routed, leaves(length))[0])
    assert fused.runs and not fused.problems and captured.graphs == 1
