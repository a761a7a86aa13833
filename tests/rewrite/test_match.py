"""Patterns and matching: any order of what commutes, casts looked through where they lose nothing, constants, several results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx

from weft.rewrite.errors import PatternError
from weft.rewrite.expr import Expr, View
from weft.rewrite.match import Match, Miss, find
from weft.rewrite.pattern import trace_patterns

from ..graphs import normal, trace

GIVEN = {"x": normal(0, 3, 4), "y": normal(1, 3, 4), "z": normal(2, 3, 4)}


def found(pattern: Callable[..., Any], function: Callable[..., Any], **inputs: Any) -> list[dict[str, Any]]:
    """The bindings of every way in which the pattern matches at what the function returns, by the names of nodes."""
    module = trace(function, inputs or GIVEN)
    last: Any = next(n for n in module.graph.nodes if n.op == "output").args[0]
    target = View().of(last)
    ways = [b for p in trace_patterns(pattern, {}) for _, b in find(p, target, Miss())]
    return [{k: v.name if isinstance(v, fx.Node) else v for k, v in b.items()} for b in ways]


def test_the_order_of_what_commutes_does_not_matter() -> None:
    pattern = lambda a, b, c: torch.maximum(a * torch.sin(b), c)  # noqa: E731
    wanted = {"a": "x", "b": "y", "c": "z"}
    for function in (
        lambda x, y, z: torch.maximum(x * torch.sin(y), z),
        lambda x, y, z: torch.maximum(z, torch.sin(y) * x),
    ):
        assert wanted in found(pattern, function)
    assert not found(lambda a, b: a - torch.sin(b), lambda x, y, z: torch.sin(y) - x)


def test_all_ways_of_a_commutative_match() -> None:
    assert found(lambda a, b: a + b, lambda x, y, z: x + y) == [{"a": "x", "b": "y"}, {"a": "y", "b": "x"}]


def test_a_wildcard_stands_for_one_value() -> None:
    pattern = lambda a, b: torch.sin(a) + torch.cos(a) * b  # noqa: E731
    assert found(pattern, lambda x, y, z: torch.sin(x) + torch.cos(x) * y) == [{"a": "x", "b": "y"}]
    assert not found(pattern, lambda x, y, z: torch.sin(x) + torch.cos(z) * y)
    assert found(pattern, lambda x, y, z: torch.sin(x) + torch.cos(x.clone()) * y)  # a copy is the same value


def test_constants_and_wildcards_for_constants() -> None:
    assert found(lambda a: a * 0.7978845608028654, lambda x, y, z: x * 0.79788456)
    assert not found(lambda a: a * 0.5, lambda x, y, z: x * 0.501)
    assert found(lambda a, s: torch.sin(a) * s, lambda x, y, z: 3 * torch.sin(x)) == [{"a": "x", "s": 3}]
    assert found(lambda a, d: torch.softmax(a, d), lambda x, y, z: torch.softmax(x, dim=1)) == [{"a": "x", "d": 1}]
    assert not found(lambda a: a + True, lambda x, y, z: x + 2)


def test_casts_between_matched_operations_are_looked_through() -> None:
    pattern = lambda a: torch.sin(torch.exp(a))  # noqa: E731
    half = {"x": normal(0, 3, 4, dtype=torch.float16)}
    assert found(pattern, lambda x: torch.sin(torch.exp(x.float()).half()), **half) == [{"a": "x"}]
    assert found(pattern, lambda x: torch.sin(torch.exp(x).double()).float(), **half) == [{"a": "x"}]


def test_inputs_are_not_bound_past_a_cast_that_loses_digits() -> None:
    assert found(lambda a: torch.sin(a), lambda x: torch.sin(x.half()), x=GIVEN["x"]) == [{"a": "half"}]
    assert found(lambda a: torch.sin(a), lambda x: torch.sin(x.double()), x=GIVEN["x"]) == [{"a": "x"}]
    assert found(lambda a: torch.sin(a), lambda x: torch.sin(x.float()), x=torch.ones(3, dtype=torch.long)) == [
        {"a": "float_1"}  # whole numbers are no narrower float
    ]


def test_results_inside_a_match_are_named() -> None:
    def pattern(a: Any, b: Any) -> Any:
        inner = a + b
        return torch.sin(inner) * inner, inner

    module = trace(lambda x, y: torch.sin(x + y) * (x + y), {"x": GIVEN["x"], "y": GIVEN["y"]})
    last: Any = next(n for n in module.graph.nodes if n.op == "output").args[0]
    (nodes, _), *_ = [w for p in trace_patterns(pattern, {}) for w in find(p, View().of(last), Miss())]
    assert [n.name for n in nodes] == ["mul", "add"]


def test_the_nearest_miss() -> None:
    module = trace(lambda x: torch.tanh(torch.sin(torch.exp(x))), {"x": GIVEN["x"]})
    last: Any = next(n for n in module.graph.nodes if n.op == "output").args[0]
    miss = Miss()
    for pattern in (lambda a: torch.tanh(torch.cos(a)), lambda a: torch.tanh(torch.sin(torch.log(a)))):
        assert not [w for p in trace_patterns(pattern, {}) for w in find(p, View().of(last), miss)]
    assert (miss.progress, miss.reason) == (2, "expected log, found exp")
    assert miss.node is not None and miss.node.name == "exp"


def test_variants_are_tried_from_the_largest() -> None:
    def pattern(x: Any, y: Any, *, plus: bool, kind: str) -> Any:
        if kind == "none" and plus:
            return None
        value = torch.sin(x) if kind == "sin" else torch.neg(x)
        return value + y * y if plus else value

    patterns = trace_patterns(pattern, {"plus": (False, True), "kind": ("sin", "neg", "none")})
    assert [p.size for p in patterns] == sorted((p.size for p in patterns), reverse=True)
    assert len(patterns) == 5 and patterns[0].variant["plus"] is True


@pytest.mark.parametrize(("pattern", "variants", "match"), [
    (lambda x: 3, {}, "must return what it computes"),
    (lambda x: (x + 1, None), {}, "must return what it computes"),
    (lambda x: x + 1, {"bias": (True,)}, r"name no parameter of the pattern: \['bias'\]"),
    (lambda x: torch.nn.functional.dropout(x) * 2, {}, "dropout cannot be part of a pattern"),
    (lambda x: torch.rand_like(x) * x, {}, "rand_like cannot be part of a pattern"),
])  # fmt: skip
def test_malformed_patterns(pattern: Callable[..., Any], variants: Any, match: str) -> None:
    with pytest.raises(PatternError, match=match):
        trace_patterns(pattern, variants)


@pytest.mark.parametrize("name", ["input", "type", "id", "sum"])
def test_wildcards_with_names_of_builtins(name: str) -> None:
    pattern = eval(f"lambda {name}: torch.sin({name})", {"torch": torch})
    assert found(pattern, lambda x, y, z: torch.sin(y)) == [{name: "y"}]


def test_what_a_match_says_of_its_wildcards() -> None:
    (pattern,) = trace_patterns(lambda x, y, *, kind: x + y, {"kind": ("plain",)})
    node = next(iter(trace(lambda x: x + 1, {"x": GIVEN["x"]}).graph.nodes))
    match = Match(pattern, (node,), {"x": node}, anchor=node)
    assert match.x is node and match.y is None and match.kind == "plain" and match.inputs() == [node]
    with pytest.raises(AttributeError):
        _ = match.w


def test_expressions_are_shared_and_bounded_in_what_they_print() -> None:
    """A value used twice is one expression, so that a chain of such is not exponential in anything."""

    def function(x: Any) -> Any:
        for _ in range(60):
            x = x + x * x
        return x

    module = trace(function, {"x": GIVEN["x"]})
    last: Any = next(n for n in module.graph.nodes if n.op == "output").args[0]
    expr = View().of(last)
    assert isinstance(expr, Expr) and len(list(expr.walk())) <= 200 and len(repr(expr)) < 10_000


def test_equal_operations_are_one_value_unless_something_is_written_between() -> None:
    def function(x: Any, y: Any) -> Any:
        a = torch.sin(x)
        b = torch.sin(x)
        x.mul_(y)
        return a, b, torch.sin(x)

    module = trace(function, {"x": GIVEN["x"], "y": GIVEN["y"]})
    view, nodes = View(), next(n for n in module.graph.nodes if n.op == "output").args[0]
    a, b, c = (view.of(n) for n in nodes)
    assert a is b and a is not c and a.node is nodes[0]
