"""Nodes side by side become one call, unless the order of what happens between them matters."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from weft.rewrite.pipeline import Rules
from weft.rewrite.rule import call

from ..graphs import apply, check, copied, here, normal, targets, trace
from .toy import FuseSine, MergeExponentials

RULES = [MergeExponentials()]
XYZ = {"x": normal(0, 3, 4, grad=True), "y": normal(1, 3, 4, grad=True), "z": normal(2, 3, 4)}


@pytest.mark.parametrize("count", [2, 3, 8])
def test_siblings_are_merged_once(count: int) -> None:
    def function(x: Any, y: Any, z: Any) -> Any:
        return tuple(torch.exp(x * float(i)) for i in range(count))

    module, outcome = check(function, XYZ, RULES, count=1, verify=True)
    assert targets(module).count("both_exponentials") == 1 and "exp" not in targets(module)
    (rewrite,) = outcome.rewrites
    assert rewrite.nodes_removed == count and rewrite.nodes_added == count + 1
    assert rewrite.error is not None and rewrite.error <= 1


def test_more_than_fit_one_call() -> None:
    def function(x: Any, y: Any, z: Any) -> Any:
        return tuple(torch.exp(x * float(i)) for i in range(11))

    module, _ = check(function, XYZ, RULES, count=2)
    assert targets(module).count("both_exponentials") == 2


def test_readers_in_between_move_behind() -> None:
    def function(x: Any, y: Any, z: Any) -> Any:
        first = torch.exp(x)
        reader = torch.sin(first) + 1
        return reader * torch.exp(y)

    module, _ = check(function, XYZ, RULES, count=1)
    assert targets(module).index("both_exponentials") < targets(module).index("sin")


def test_one_that_reads_the_other() -> None:
    _, outcome = check(lambda x, y, z: torch.exp(torch.exp(x) + y), XYZ, RULES, count=0)
    assert outcome.refusals[0].reason == "one of them reads another's result"


def test_a_value_written_in_between() -> None:
    def function(x: Any, y: Any, z: Any) -> Any:
        t = z * 1.0
        first = torch.exp(t)
        t.mul_(2)
        return first + torch.exp(y) + t

    module = trace(function, {k: v.detach() for k, v in XYZ.items()})
    original = copied(module)
    outcome = Rules("rules", tuple(RULES)).run(module, None)
    assert not outcome.rewrites and "overwritten in place" in outcome.refusals[0].reason
    given = [v.detach() for v in XYZ.values()]
    assert torch.equal(module(*given), original(*given))


def test_a_switch_of_mode_between_them() -> None:
    def function(x: Any, y: Any, z: Any) -> Any:
        here(x, torch._C._set_grad_enabled, False)
        first = torch.exp(x)
        here(x, torch._C._set_grad_enabled, True)
        return first, torch.exp(y)

    module, _ = check(function, XYZ, RULES, count=0)
    assert targets(module).count("exp") == 2


def test_a_reader_that_would_move_over_a_switch() -> None:
    def function(x: Any, y: Any, z: Any) -> Any:
        here(x, torch._C._set_grad_enabled, True)
        first = torch.exp(x)
        here(x, torch._C._set_grad_enabled, False)
        reader = torch.sin(first)
        here(x, torch._C._set_grad_enabled, True)
        return reader + torch.exp(y)

    _, outcome = check(function, XYZ, RULES, count=0)
    assert outcome.refusals[0].reason == "between them gradient or autocast mode changes"


def test_random_readers_keep_their_order() -> None:
    def function(x: Any, y: Any, z: Any) -> Any:
        first = torch.nn.functional.dropout(torch.exp(x), 0.5, True)
        other = torch.nn.functional.dropout(z, 0.5, True)
        return first, other, torch.exp(y)

    module = trace(function, XYZ)
    outcome = apply(module, RULES)
    assert not outcome.rewrites and "random numbers" in outcome.refusals[0].reason


def wrong(xs: list[torch.Tensor]) -> list[torch.Tensor]:
    """Not quite exp."""
    return [torch.exp(x) * 1.01 for x in xs]


def test_a_wrong_merge_is_rejected_and_leaves_the_order() -> None:
    class Wrong(MergeExponentials):
        """exp(x₁), exp(x₂)  →  something else"""

        def merge(self, nodes: list[Any], values: list[Any]) -> list[Any]:
            merged = call(wrong, [v.args[0] for v in values])
            return [merged[i] for i in range(len(nodes))]

    def function(x: Any, y: Any, z: Any) -> Any:
        first = torch.exp(x)
        reader = torch.sin(first) + 1
        return reader * torch.exp(y)

    module = trace(function, XYZ)
    before = [n.name for n in module.graph.nodes]
    outcome = apply(module, [Wrong()], verify=True)
    assert not outcome.rewrites and "output 0 is off by" in outcome.refusals[0].reason
    assert [n.name for n in module.graph.nodes] == before


def test_rules_of_both_kinds_after_one_another() -> None:
    def function(x: Any, y: Any, z: Any) -> Any:
        return torch.exp(torch.sin(x * x)) + torch.exp(torch.sin(y * y))

    module, outcome = check(function, XYZ, [FuseSine(), *RULES], count=3, verify=True)
    assert [r.rule for r in outcome.rewrites] == ["sine", "sine", "exponentials"]
    assert "sin" not in targets(module) and "exp" not in targets(module)
