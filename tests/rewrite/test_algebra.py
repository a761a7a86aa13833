"""Every equation on random tensors: both spellings get one expression, and what an expression says is what its node computes.

The spellings are in the folder ``equations``, in a file for each file of equations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from torch import Tensor, fx

from weft.rewrite import algebra
from weft.rewrite.expr import Expr, View, strip_casts

from ..graphs import cases, normal, trace
from ..programs import function_of, inputs, programs
from .equations.cases import Cases
from .equations.near import NEAR

OURS = f"{__package__}.equations."
THEMES = [import_module(OURS + theme.__name__.rpartition("_")[2]) for theme in algebra.THEMES]
EQUAL: Cases = {name: pairs for theme in THEMES for name, pairs in theme.EQUAL.items()}

ELSEWHERE = {
    "interleaved_with_a_negative": "tests/passes/test_rope.py",
    "pairs_as_complex": "test_pairs_as_complex_numbers_and_back",
    "complex_as_pairs": "test_pairs_as_complex_numbers_and_back",
    "product_inside_autograd_function": "tests/passes/test_quant_linear.py",
    "packed_bytes": "tests/passes/test_quant_linear.py",
}
"""Where the other equations are tested."""

INPUTS: dict[str, Tensor] = {
    "x": normal(0, 2, 3, 6), "y": normal(1, 2, 3, 6), "w": normal(2, 4, 6), "v": normal(3, 6, 4), "b": normal(4, 4),
    "m": normal(5, 3, 6), "s": normal(6, 4, 6), "p": normal(7, 2, 6), "q": normal(8, 4, 2),
    "t": torch.tensor([[1, 0, 5], [2, -100, 3]]), "k": torch.tensor([[[1], [0], [5]], [[2], [4], [3]]]),
    "n": torch.tensor(3.0),
}  # fmt: skip
NAMED = {name: value.double() if value.is_floating_point() else value for name, value in INPUTS.items()}


class _Valued(fx.Interpreter):
    """Keeps the real value of every node."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.values = dict[fx.Node, Any]()

    def run_node(self, n: fx.Node) -> Any:
        """As it is, and noted."""
        self.values[n] = super().run_node(n)
        return self.values[n]


def rows_chosen(x: Tensor, steps: tuple[Any, ...]) -> Tensor:
    """What ``steps`` choose of x, as rows."""
    for name, *arguments in steps:
        x = x[arguments[0]] if name in ("getitem", "other") else getattr(x, name)(*arguments)
    return x.flatten(0, -2)


MEANINGS: dict[str, Callable[..., Any]] = {
    "add": torch.add, "sub": torch.sub, "mul": torch.mul, "neg": torch.neg, "square": torch.square,
    "sqrt": torch.sqrt, "rsqrt": torch.rsqrt, "reciprocal": lambda x: 1 / x, "clamp_min": torch.clamp_min,
    "gt": lambda x, y: x > y, "ge": lambda x, y: x >= y, "chosen": torch.where, "logsumexp": torch.logsumexp,
    "relu": torch.relu, "silu": F.silu, "linear": F.linear, "sigmoid": torch.sigmoid,
    "erf": torch.erf, "tanh": torch.tanh, "pow": torch.pow,
    "maximum": lambda x, y: torch.maximum(x, torch.as_tensor(y, dtype=x.dtype)),
    "transposed": lambda x: x.transpose(-1, -2),
    "mean": lambda x, dim=None, keepdim=False, *_: x.mean() if dim is None else x.mean(dim, keepdim),
    "sum": lambda x, dim=None, keepdim=False, *_: x.sum() if dim is None else x.sum(dim, keepdim),
    "linear_columns": lambda x, w, b: x @ w if b is None else x @ w + b,
    "part": lambda x, start, stop, step: x[..., start:stop:step],
    "interleave": lambda a, b: torch.stack((a, b), -1).flatten(-2),
    "as_complex": lambda x: torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()),
    "from_complex": lambda z: torch.view_as_real(z).flatten(-2),
    "real": torch.real, "imag": torch.imag, "complex": torch.complex,
    "cat": torch.cat, "stack": torch.stack, "roll": torch.roll,
    "rows": rows_chosen, "permuted": torch.permute, "getitem": lambda x, index: x[index],
    "picked": lambda x, index, how, smoothing: (
        ((1 - smoothing) * x.gather(-1, index.reshape(-1, 1) % x.shape[-1]) + smoothing * x.mean(-1, keepdim=True))
        .view(index.shape[:-1] if how == "squeezed" else index.shape)
    ),
    "cast": lambda x, dtype: x.to(dtype),
    "log_softmax": lambda x, dim, *_: torch.log_softmax(x, dim),
}  # fmt: skip
"""What canonical operations stand for."""


def meaning(expr: Any, values: dict[fx.Node, Any]) -> Any:
    """What ``expr`` says, computed anew down to the graph's inputs where its operations are known."""
    if isinstance(expr, tuple | list):
        return type(expr)(meaning(e, values) for e in expr)
    if not isinstance(expr, Expr):
        return expr
    if expr.op in MEANINGS and (expr.node is None or expr.op != "getitem"):  # lists are tuples in an expression
        return MEANINGS[expr.op](*(meaning(a, values) for a in expr.args))
    assert expr.node is not None
    return values[expr.node]


def assert_sound(module: fx.GraphModule, arguments: list[Tensor]) -> None:
    """The expression of every node means what the node computes."""
    run, view = _Valued(module), View()
    run.run(*arguments)
    for node in module.graph.nodes:
        expr, value = view.of(node), run.values.get(node)
        if node.op == "output" or not isinstance(value, Tensor) or not isinstance(expr, Expr):
            continue
        found = meaning(expr, run.values)
        assert found.shape == value.shape, f"{node.format_node()} is seen as {expr}"
        torch.testing.assert_close(
            found.to(value.dtype), value, rtol=1e-9, atol=1e-9, msg=lambda t, n=node: f"{n}: {t}"
        )


def _arguments(*functions: Callable[..., Any]) -> dict[str, Tensor]:
    names = dict.fromkeys(n for f in functions for n in f.__code__.co_varnames[: f.__code__.co_argcount])
    return {name: NAMED[name] for name in names} if names.keys() <= NAMED.keys() else {"x": NAMED["x"]}


def both(left: Callable[..., Any], right: Callable[..., Any]) -> tuple[fx.GraphModule, dict[str, Tensor]]:
    """One graph that computes both spellings of the same inputs."""
    left, right = (
        f if hasattr(f, "__code__") and f.__module__.startswith(OURS) else (lambda x, f=f: f(x)) for f in (left, right)
    )
    given = _arguments(left, right)

    def run(*values: Any) -> Any:
        named = dict(zip(given, values, strict=True))
        return tuple(f(**{n: named[n] for n in _arguments(f)}) for f in (left, right))

    source = f"lambda {', '.join(given)}: run({', '.join(given)})"
    return trace(eval(source, {"run": run}), given), given


def pairs() -> Iterator[Any]:
    """Every equation with each of its cases."""
    for name, cases_of in EQUAL.items():
        for i, (left, right) in enumerate(cases_of):
            yield pytest.param(name, left, right, id=f"{name}-{i}")


@pytest.mark.parametrize(("name", "left", "right"), pairs())
def test_two_spellings_are_one_expression(
    name: str, left: Callable[..., Any], right: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    fired = set[str]()

    def noting(equation: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            found = equation(*args)
            fired.update([equation.__name__] if found is not None else [])
            return found

        return run

    monkeypatch.setattr(algebra, "EQUATIONS", {op: [noting(e) for e in es] for op, es in algebra.EQUATIONS.items()})
    module, given = both(left, right)
    view, (a, b) = View(), next(n for n in module.graph.nodes if n.op == "output").args[0]
    seen = [strip_casts(view.of(n), only_widening=False) for n in (a, b)]
    assert seen[0] is seen[1], f"{seen[0]}\n{seen[1]}"
    assert name in fired
    torch.testing.assert_close(*module(*given.values()))
    assert_sound(module, list(given.values()))


def test_every_equation_has_a_case() -> None:
    names = {e.__name__ for equations in algebra.EQUATIONS.values() for e in equations}
    assert names == EQUAL.keys() | ELSEWHERE.keys()


def test_pairs_as_complex_numbers_and_back() -> None:
    def turned(x: Any, y: Any) -> Any:
        z = torch.view_as_complex(x.reshape(2, 3, 3, 2)) * torch.view_as_complex(y.view(2, 3, -1, 2))
        return torch.view_as_real(z).flatten(-2)

    given = {"x": NAMED["x"], "y": NAMED["y"]}
    module = trace(turned, given)
    last = next(n for n in module.graph.nodes if n.op == "output").args[0]
    expr = View().of(last)
    assert expr.op == "from_complex" and expr.args[0].op == "mul"
    assert [a.op for a in expr.args[0].args] == ["as_complex", "as_complex"]
    assert_sound(module, list(given.values()))


@pytest.mark.parametrize("name", NEAR)
def test_what_no_equation_may_change(name: str) -> None:
    given = _arguments(NEAR[name])
    assert_sound(trace(NEAR[name], given), list(given.values()))


@cases
@given(program=programs)
def test_expressions_of_random_programs(program: dict[str, Any]) -> None:
    """Views, writes in place and equal operations around them: no value is taken for another."""
    module = trace(function_of({**program, "steps": [s for s in program["steps"] if s[0] != "write"]}), inputs())
    assert_sound(module, list(inputs().values()))
