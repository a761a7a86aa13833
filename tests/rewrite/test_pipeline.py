"""Passes in order over a graph and the graphs inside it; what a bad pass leaves is caught."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import fx, nn

import weft
from weft.rewrite.driver import Outcome
from weft.rewrite.errors import VerificationError
from weft.rewrite.match import Match
from weft.rewrite.pipeline import Pass, Rules, run_pipeline
from weft.rewrite.report import GraphRecord, RegionRecord
from weft.rewrite.rule import RewriteRule, call

from ..graphs import normal, targets, trace
from .toy import FuseScaledSum, FuseSine, MergeExponentials, sine_of_square

X = {"x": normal(0, 3, 4, grad=True)}


def run(module: fx.GraphModule, *passes: Pass) -> GraphRecord:
    """The record that the passes fill."""
    record = GraphRecord(RegionRecord([""], "graph"))
    run_pipeline(module, passes, None, record)
    return record


def test_counts_and_times() -> None:
    module = trace(lambda x: torch.exp(torch.sin(x * x)) + torch.exp(x), X)
    record = run(module, Rules("first", (FuseSine(),)), Rules("second", (MergeExponentials(), FuseScaledSum())))
    assert [r.rule for r in record.rewrites] == ["sine", "exponentials"]
    assert (record.region.nodes_before, record.region.nodes_after) == (
        5,
        5,
    )  # sin, mul → 1; two exp → call and 2 results
    assert record.region.nodes_covered == 4
    assert list(record.seconds) == ["first", "second"] and all(s >= 0 for s in record.seconds.values())


def test_what_a_rewrite_made_and_another_replaced_is_not_counted_as_captured() -> None:
    class FuseExponential(RewriteRule):
        """exp(sine_of_square(x))  →  exp(sine_of_square(x)) in one call"""

        name = "exponential"

        def pattern(self, x: Any) -> Any:
            return torch.exp(call(sine_of_square, x))

        def rewrite(self, m: Any, x: Any) -> Any:
            return call(exponential_of_sine, x)

    module = trace(lambda x: torch.exp(torch.sin(x * x)) + torch.exp(x), X)
    record = run(module, Rules("first", (FuseSine(),)), Rules("second", (FuseExponential(),)))
    assert [(r.rule, r.nodes_removed) for r in record.rewrites] == [("sine", 2), ("exponential", 2)]
    assert (record.region.nodes_before, record.region.nodes_covered, record.region.nodes_after) == (5, 3, 3)


def exponential_of_sine(x: torch.Tensor) -> torch.Tensor:
    """exp(sin(x²))"""
    return torch.exp(sine_of_square(x))


def test_the_order_of_passes_is_theirs() -> None:
    seen = list[str]()

    @dataclass(frozen=True)
    class Note:
        name: str

        def run(self, module: fx.GraphModule, verifier: Any) -> Outcome:
            seen.append(self.name)
            return Outcome()

    run(trace(lambda x: x + 1, X), Note("a"), Note("b"), Note("a"))
    assert seen == ["a", "b", "a"]


@dataclass(frozen=True)
class Break:
    """A pass that leaves something malformed."""

    how: str
    name: str = "break"

    def run(self, module: fx.GraphModule, verifier: Any) -> Outcome:
        """Do the damage."""
        *_, output = module.graph.nodes
        if self.how == "order":
            last = output.args[0]
            last.prev.append(output)
        elif self.how == "dtype":
            with module.graph.inserting_before(output):
                wide = module.graph.call_method("double", (output.args[0],))
            wide.meta["val"] = output.args[0].meta["val"].double()
            output.args = (wide,)
        return Outcome()


@pytest.mark.parametrize(("how", "match"), [("order", "malformed graph"), ("dtype", "changed the outputs")])
def test_a_pass_that_breaks_the_graph_is_named(how: str, match: str) -> None:
    module = trace(lambda x: torch.sin(x * x), X)
    with pytest.raises(VerificationError, match=f"pass 'break' (left a )?{match}"):
        run(module, Break(how))


class Raising(FuseSine):
    """A rule with a mistake."""

    def rewrite(self, m: Match, x: Any) -> Any:
        raise ZeroDivisionError("a mistake in a rule")


@pytest.mark.parametrize(
    "bad", [Break("dtype"), Break("order"), Rules("raising", (Raising(),))], ids=["dtype", "order", "raising"]
)
def test_a_model_runs_as_captured_where_a_pass_fails(bad: Pass) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.sin(x * x) * self.w

    model, x = Model(), X["x"]
    wanted = model(x)
    weft.optimize(model, example_inputs={"x": x}, passes=(bad, Rules("sine", (FuseSine(),))))
    assert torch.equal(model(x), wanted)
    report = model.rewrite_report
    assert not report.rewrites and any("runs as captured" in note for note in report.notes), str(report)


def test_graphs_inside_graphs_are_rewritten() -> None:
    """The body of a checkpoint is a graph that the outer one calls."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            body = lambda t: torch.sin((t * self.w) * (t * self.w))  # noqa: E731
            return torch.utils.checkpoint.checkpoint(body, x, use_reentrant=False) + 1

    model, x = Model(), X["x"]
    wanted = torch.autograd.grad(model(x).sum(), model.w)[0]
    from weft.passes.common_subexpressions import CommonSubexpressions

    weft.optimize(model, example_inputs={"x": x}, passes=(CommonSubexpressions(), Rules("sine", (FuseSine(),))))
    assert [r.rule for r in model.rewrite_report.rewrites] == ["sine"], str(model.rewrite_report)
    torch.testing.assert_close(torch.autograd.grad(model(x).sum(), model.w)[0], wanted)


def test_targets_after_nothing_matched() -> None:
    module = trace(lambda x: torch.cos(x), X)
    record = run(module, Rules("nothing", (FuseSine(),)))
    assert targets(module) == ["cos"] and not record.rewrites and record.region.nodes_covered == 0
