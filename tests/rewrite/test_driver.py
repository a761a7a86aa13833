"""Where a matched computation may be moved to one place, and where that would change what it computes."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from torch import Tensor, fx

from weft.rewrite.pipeline import Rules
from weft.rewrite.vocabulary import is_in_place

from ..graphs import apply, assert_equal, cases, check, copied, here, normal, operations, record, targets, trace
from ..programs import function_of, inputs, programs
from .toy import FuseScaledSum, FuseSine, FuseSineKeepingTheSquare

RULES = [FuseSine()]
X = {"x": normal(0, 3, 4, grad=True)}
XY = {**X, "y": normal(1, 3, 4, grad=True)}


def test_what_matches_is_replaced_and_what_nothing_reads_is_gone() -> None:
    module, outcome = check(lambda x: torch.sin(x * x) + 1, X, RULES, count=1, verify=True)
    assert targets(module) == ["sine_of_square", "add"]
    (rewrite,) = outcome.rewrites
    assert (rewrite.rule, rewrite.nodes_removed, rewrite.nodes_added) == ("sine", 2, 1)
    assert rewrite.bytes_saved == 3 * 4 * 4 and rewrite.error is not None and rewrite.error <= 1


@pytest.mark.parametrize("name", ["iadd", "ifloordiv", "imod", "ixor", "ilshift", "irshift", "ior", "setitem", "add_"])
def test_what_overwrites(name: str) -> None:
    node = fx.Graph().call_function(getattr(operator, name, torch.Tensor.add_), (fx.Graph().placeholder("x"), 1))
    assert is_in_place(node)


@pytest.mark.parametrize("name", ["and_", "or_", "not_", "is_", "add", "xor", "lshift"])
def test_what_has_a_name_like_a_keyword_overwrites_nothing(name: str) -> None:
    assert not is_in_place(fx.Graph().call_function(getattr(operator, name), (fx.Graph().placeholder("x"), 1)))


def test_what_others_read_stays() -> None:
    def function(x: Any) -> Any:
        square = x * x
        return torch.sin(square), square + 1

    module, outcome = check(function, X, RULES, count=1)
    assert targets(module) == ["mul", "sine_of_square", "add"] and outcome.rewrites[0].nodes_removed == 1


def test_equal_matches_all_over_a_graph() -> None:
    def function(x: Any) -> Any:
        for _ in range(5):
            x = torch.sin(x * x)
        return x

    module, _ = check(function, X, RULES, count=5)
    assert targets(module) == ["sine_of_square"] * 5


def refusal(function: Callable[..., Any], given: dict[str, Tensor], rules: Any = RULES, count: int = 0) -> str:
    """The reason for which the rule did not apply; everything computes the same."""
    _, outcome = check(function, given, rules, count=count)
    assert len(outcome.refusals) == 1, outcome
    return outcome.refusals[0].reason


def test_a_switch_of_the_gradient_mode_in_between() -> None:
    def function(x: Any) -> Any:
        square = x * x
        here(x, torch._C._set_grad_enabled, False)
        y = torch.sin(square)
        here(x, torch._C._set_grad_enabled, True)
        return square + y

    assert "mode changes" in refusal(function, X)


def test_a_switch_there_and_back_in_between() -> None:
    """Both ends run under the same mode: the computation may be moved over what lies between them."""

    def function(x: Any, y: Any) -> Any:
        here(x, torch._C._set_grad_enabled, True)
        square = x * x
        here(x, torch._C._set_grad_enabled, False)
        z = y * 2
        here(x, torch._C._set_grad_enabled, True)
        return torch.sin(square) + z

    module, _ = check(function, XY, RULES, count=1)
    assert targets(module).index("sine_of_square") > targets(module).index("_set_grad_enabled")


def test_a_reader_under_another_mode_before_the_root() -> None:
    """There the replacement would have to stand, and would lose its gradient."""

    def function(x: Any) -> Any:
        here(x, torch._C._set_grad_enabled, True)
        square = x * x
        here(x, torch._C._set_grad_enabled, False)
        z = square + 1
        here(x, torch._C._set_grad_enabled, True)
        return torch.sin(square) * square, z

    assert "mode changes" in refusal(function, X, [FuseSineKeepingTheSquare()])


def test_autocast_opened_in_between() -> None:
    def function(x: Any) -> Any:
        square = x * x
        mode = here(x, torch.amp.autocast_mode._enter_autocast, "cpu", torch.bfloat16, True, True)
        y = torch.sin(square)
        here(x, torch.amp.autocast_mode._exit_autocast, mode)
        return y

    module = trace(function, X)
    outcome = apply(module, RULES)
    assert not outcome.rewrites and "mode changes" in outcome.refusals[0].reason


def test_random_values_are_inputs_of_a_match_and_stay_where_they_are() -> None:
    def function(x: Any, y: Any) -> Any:
        total = torch.nn.functional.dropout(x, 0.5, True) + y
        return total * 2.0, torch.nn.functional.dropout(y, 0.5, True)

    module = trace(function, XY)
    original = copied(module)
    assert len(apply(module, [FuseScaledSum()]).rewrites) == 1
    assert targets(module) == ["dropout", "scaled", "dropout"]
    results = []
    for each in (module, original):
        torch.manual_seed(0)
        results.append(each(*XY.values()))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("write", [
    lambda x, t: t.mul_(2), lambda x, t: record(__import__("operator").iadd, t, 1), lambda x, t: torch.neg(x, out=t),
    lambda x, t: record(__import__("operator").setitem, t, 0, 0.5), lambda x, t: t.view(-1)[0:2].zero_(),
], ids=["method", "operator", "out", "setitem", "through a view"])  # fmt: skip
def test_an_input_overwritten_in_between(write: Callable[[Any, Any], Any]) -> None:
    def function(x: Any, y: Any) -> Any:
        t = y * 1.0
        square = t * t
        write(x, t)
        return torch.sin(square) + t

    module = trace(function, {"x": normal(0, 3, 4), "y": normal(1, 3, 4)})
    original = copied(module)
    outcome = Rules("rules", tuple(RULES)).run(module, None)  # as captured: functionalization would turn it into copies
    module.recompile()
    assert not outcome.rewrites and "overwrites a value in place" in outcome.refusals[0].reason
    assert_equal(module, original, {"x": normal(0, 3, 4), "y": normal(1, 3, 4)})


def test_an_input_computed_after_a_result_is_read() -> None:
    class FuseLate(FuseScaledSum):
        """(x + y), (x + y)·s  with both results"""

        name = "late"

        def pattern(self, x: Any, y: Any, s: Any) -> Any:
            total = x + y
            return total * s, total

        def check(self, m: Any) -> None:
            return None

        def rewrite(self, m: Any, x: Any, y: Any, s: Any) -> Any:
            return x * s + y * s, x + y

    def function(x: Any, y: Any) -> Any:
        total = x + y
        s = torch.exp(total).sum()
        return total * s

    assert "computed after a result is first read" in refusal(function, XY, [FuseLate()])


def test_the_rules_own_refusal_is_reported_with_its_place() -> None:
    _, outcome = check(lambda x, y: (x + y) * -2.0, XY, [FuseScaledSum()], count=0)
    (found,) = outcome.refusals
    assert not found and (found.rule, found.reason) == ("scaled", "the scale is no positive constant")


def test_nearest_misses() -> None:
    _, outcome = check(lambda x: torch.sin(torch.exp(x)), X, RULES, count=0)
    assert not outcome.misses  # one operation of two is not near

    class Long(FuseSine):
        """tanh(exp(sin(x²)))"""

        def pattern(self, x: Any) -> Any:
            return torch.tanh(torch.exp(torch.sin(x * x)))

    _, outcome = check(lambda x, y: torch.tanh(torch.exp(torch.sin(x * y))), XY, [Long()], count=0)
    (miss,) = outcome.misses
    assert miss.progress == "3 of 4 operations" and miss.reason == "expected square, found mul"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_casts_behind_a_match_are_taken_in(dtype: torch.dtype) -> None:
    def function(x: Any) -> Any:
        return torch.sin(x * x).to(dtype)

    class Casting(FuseSine):
        """The operator rounds to the dtype that is wanted."""

        def rewrite(self, m: Any, x: Any) -> Any:
            from weft.rewrite.graph import dtype_of
            from weft.rewrite.rule import call

            return call(sine_in, x, dtype_of(m.root))

    module, _ = check(function, X, [Casting()], count=1)
    assert targets(module) == ["sine_in"]


def sine_in(x: Tensor, dtype: torch.dtype) -> Tensor:
    """sin(x²), rounded once."""
    return torch.sin(x * x).to(dtype)


@pytest.mark.parametrize(("wrong", "reason"), [
    (lambda x: torch.sin(x * x).double(), "computes torch.float64"),
    (lambda x: torch.sin(x * x)[:2], "shape [2, 4] is not [3, 4]"),
    (lambda x: torch.sin(x * x)[None], "computes torch.float32[1, 3, 4]"),
])  # fmt: skip
def test_a_replacement_of_another_type_is_refused(wrong: Callable[..., Any], reason: str) -> None:
    class Wrong(FuseSine):
        """Computes something of another type."""

        def rewrite(self, m: Any, x: Any) -> Any:
            return wrong(x)

    module = trace(lambda x: torch.sin(x * x), X)
    before = operations(module)
    outcome = apply(module, [Wrong()])
    assert not outcome.rewrites and reason in outcome.refusals[0].reason
    assert operations(module) == before


@cases
@given(program=programs)
def test_random_programs_with_views_and_writes(program: dict[str, Any]) -> None:
    """Whatever matches among them: the same values, the same inputs afterwards."""
    function = function_of(program, pattern=lambda a, b, last: torch.sin(a * a))
    check(function, inputs(), [FuseSineKeepingTheSquare(), *RULES])
