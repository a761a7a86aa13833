"""Inputs that are made or changed between a match's first operation and its last, which reads them."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from hypothesis import given
from torch import Tensor

from weft.rewrite.match import Match
from weft.rewrite.pipeline import Rules
from weft.rewrite.rule import RewriteRule, call

from ..graphs import apply, assert_equal, cases, check, copied, normal, record, targets, trace
from ..programs import function_of, inputs, programs


class FuseLate(RewriteRule):
    """sin(x) y  →  one operator, where y may come long after sin(x)"""

    name = "late"

    def pattern(self, x: Any, y: Any) -> Any:
        return torch.sin(x) * y

    def rewrite(self, m: Match, x: Any, y: Any) -> Any:
        return call(sine_times, x, y)


class FuseLateKeepingTheSine(FuseLate):
    """sin(x) y, sin(x)  →  one operator with two results"""

    name = "late_and_sine"

    def pattern(self, x: Any, y: Any) -> Any:
        sine = torch.sin(x)
        return sine * y, sine

    def rewrite(self, m: Match, x: Any, y: Any) -> Any:
        return call(sine_times, x, y), call(sine_times, x, 1.0)


def sine_times(x: Tensor, y: Any) -> Tensor:
    """sin(x) y"""
    return torch.sin(x) * y


@pytest.mark.parametrize("rule", [FuseLate(), FuseLateKeepingTheSine()], ids=lambda r: r.name)
@cases
@given(program=programs)
def test_random_programs_where_one_input_comes_late(rule: Any, program: dict[str, Any]) -> None:
    """Between the sine and the product that reads it, anything may be written to anything."""

    def function(x: Any, y: Any, z: Any) -> Any:
        early = list[Any]()

        def pattern(a: Any, b: Any, last: Any) -> Any:
            early.append(torch.sin(a))
            if len(early) % 3 == 2:
                return record(operator.imul, b * 1.0, early[-2])
            return early[-2] * b if len(early) > 1 else early[-1]

        return function_of(program, pattern)(x, y, z)

    for run in (
        apply,
        lambda module, rules: Rules("rules", tuple(rules)).run(module, None),
    ):  # normalized, and as captured
        module = trace(function, inputs())
        original = copied(module)
        run(module, [rule])
        module.recompile()
        assert_equal(module, original, inputs())


def test_an_input_that_is_filled_in_before_it_is_read() -> None:
    def function(x: Any, y: Any) -> Any:
        sine = torch.sin(x)
        late = y.clone()
        record(operator.setitem, late, 0, 0.5)
        return sine * late

    module, outcome = check(function, {"x": normal(0, 3, 4), "y": normal(1, 3, 4)}, [FuseLate()], count=1)
    assert not outcome.refusals and targets(module)[-1] == "sine_times"


SEEN_TOO_LATE = {
    "what the sine is of": lambda x, y, s: (x.view(-1)[:2].zero_(), y, y)[1:],
    "the sine": lambda x, y, s: (s.mul_(0.5), y, y)[1:],
    "one of two equal inputs": lambda x, y, s: ((a := y * 2.0), (b := y * 2.0), a.add_(1.0), b, a)[3:],
    "a copy's original": lambda x, y, s: ((a := y * 2.0), (b := a.clone()), a.add_(1.0), b, a)[3:],
}


@pytest.mark.parametrize("name", SEEN_TOO_LATE)
def test_a_write_that_the_replacement_would_see_otherwise(name: str) -> None:
    def function(x: Any, y: Any) -> Any:
        x = x * 1.0
        sine = torch.sin(x)
        late, other = SEEN_TOO_LATE[name](x, y, sine)
        return sine * late + other

    arguments = {"x": normal(0, 3, 4), "y": normal(1, 3, 4)}
    module = trace(function, arguments)
    original = copied(module)
    Rules("rules", (FuseLate(),)).run(module, None)  # as captured: functionalization would turn it into copies
    module.recompile()
    assert_equal(module, original, arguments)


@pytest.mark.parametrize(
    "handed_on", [lambda p: p, lambda p: p.to(torch.float32), lambda p: p.view(3, 4).to(torch.float32)]
)
def test_a_write_that_is_matched_itself(handed_on: Any) -> None:
    """The product is written where its factor was: behind it, that factor is gone."""

    def function(x: Any, y: Any) -> Any:
        factor = (y * 2.0).view(3, 4)
        return handed_on(record(operator.imul, factor, torch.sin(x)))

    arguments = {"x": normal(0, 3, 4), "y": normal(1, 12)}
    module = trace(function, arguments)
    original = copied(module)
    Rules("rules", (FuseLate(),)).run(module, None)
    module.recompile()
    assert_equal(module, original, arguments)
