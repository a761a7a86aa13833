"""Equations of linears, dense and quantized."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations
from typing import Any

from torch import fx

from .equation import Site, equation, from_the_end, items_of, op_of, shape_of
from .expr import Expr, View, last_size, rank
from .graph import autograd_body, sizes
from .vocabulary import bind, operation


@equation("addmm", "baddbmm")
def product_and_sum(v: View, at: Site, x: Any, a: Any, b: Any, beta: Any, alpha: Any) -> Expr | None:
    """addmm(b, x, w, β, α) = baddbmm(b, x, w, β, α) = β·b + α·x·w"""
    product = v.make("matmul", a, b)
    product = product if alpha == 1 else v.make("mul", product, alpha)
    return v.make("add", product, x if beta == 1 else v.make("mul", x, beta), node=at.node)


@equation("matmul")
def matrix_product(v: View, at: Site, x: Any, y: Any) -> Expr | None:
    """x·Wᵀ and x·W of a matrix W are linears, by rows and by columns of W"""
    if not isinstance(y, Expr) or not isinstance(x, Expr):
        return None
    y = _one_for_all(x, y)
    if y.op == "transposed" and (v.pattern or rank(y.args[0]) == 2):
        return v.make("linear", x, y.args[0], None, node=at.node)
    if v.pattern or (rank(y) == 2 and (rank(x) or 0) >= 2):
        return v.make("linear_columns", x, y, None, node=at.node)
    return None


def _one_for_all(x: Expr, y: Expr) -> Expr:
    """The matrix that ``y`` repeats for each of the matrices in ``x``, if it is one; else ``y``."""
    matrix, shape = y, shape_of(y)
    while matrix.op in ("expand", "repeated", "repeat", "unsqueeze", "getitem") and shape_of(matrix)[-2:] == shape[-2:]:
        new = matrix.args[1] if matrix.op == "getitem" else None
        if any(i is not None and i != slice(None) for i in items_of(new)):
            return y
        matrix = matrix.args[0]
    alike = shape_of(matrix) == shape[-2:] and len(shape) > 2 and shape_of(x)[:-2] == shape[:-2]
    return matrix if alike else y


@equation("squeeze")
def product_of_row_and_column(v: View, at: Site, x: Any, dim: Any = None) -> Expr | None:
    """(x[..., None, :] @ y[..., None])[..., 0] = Σ x·y  with its dimension kept"""
    product = op_of(x, "matmul") if isinstance(x, Expr) else None
    row, column = (op_of(a, "unsqueeze") for a in product.args) if product else (None, None)
    if product is None or row is None or column is None or from_the_end(dim, x) not in (-1, -2):
        return None
    dims = rank(product)
    if dims is None or row.args[1] not in (-2, dims - 2) or column.args[1] not in (-1, dims - 1):
        return None
    return v.make("sum", v.make("mul", row.args[0], column.args[0]), -1, True, None, node=at.node)


@equation("linear", "linear_columns")
def negative_operand(v: View, at: Site, x: Any, weight: Any, bias: Any = None) -> Expr | None:
    """(−x) Wᵀ = −(x Wᵀ)"""
    inner = op_of(x, "neg")
    if inner is None or bias is not None:
        return None
    return v.make("neg", v.make(at.op, inner.args[0], weight, None), node=at.node)


@equation("linear")
def joined_operands(v: View, at: Site, x: Any, weight: Any, bias: Any = None) -> Expr | None:
    """(x, y) (W, V)ᵀ + b = x Wᵀ + b + y Vᵀ  where x is as wide as W"""
    rows, columns = op_of(x, "cat"), op_of(weight, "cat")
    if v.pattern or rows is None or columns is None or rows.args[1] != -1 or columns.args[1] != -1:
        return None
    pairs = list(zip(rows.args[0], columns.args[0], strict=False))
    widths = [[last_size(side) for side in pair] for pair in pairs]
    if len(pairs) != 2 or [len(rows.args[0]), len(columns.args[0])] != [2, 2]:
        return None
    if any(a is None or a != b for a, b in widths):
        return None
    first, second = (v.make("linear", a, b, c) for (a, b), c in zip(pairs, (bias, None), strict=True))
    return v.make("add", first, second, node=at.node)


@equation("tensordot")
def tensor_product(v: View, at: Site, x: Any, y: Any, dims: Any = 2, out: Any = None) -> Expr | None:
    """tensordot(x, W, 1) = x·W of a matrix W;  tensordot(x, W, ([−1], [1])) = x·Wᵀ"""
    if not isinstance(x, Expr) or not isinstance(y, Expr) or rank(y) != 2:
        return None
    if dims == 1:
        return v.make("matmul", x, y, node=at.node)
    pair = dims if isinstance(dims, tuple | list) and len(dims) == 2 else ((), ())
    of_x, of_y = (from_the_end(d, z) for d, z in zip(pair, (x, y), strict=True))
    if of_x != -1 or of_y not in (-1, -2):
        return None
    return v.make("linear" if of_y == -1 else "linear_columns", x, y, None, node=at.node)


@equation("einsum")
def summed_products(v: View, at: Site, equation: Any, operands: Any) -> Expr | None:
    """…k, ok → …o is a linear;  …k, ko → …o one of a weight by columns;  …k, …k → … is Σ x·y;  …, … → … is x·y"""
    if len(operands) == 3:
        return _chained(v, at, equation, operands)
    terms = _terms(equation) if len(operands) == 2 else None
    if terms is None or not all(isinstance(x, Expr) for x in operands) or _is_broadcast(terms, operands):
        return None
    (x, y), (first, second, result) = operands, terms
    if first == second == result and len(set(first)) == len(first):
        return v.make("mul", x, y, node=at.node)
    lead, k = first[:-1], first[-1:]
    if first == second and result == lead and k not in lead:
        return v.make("sum", v.make("mul", x, y), -1, False, None, node=at.node)
    out = result[-1:]
    if len(set(first + out)) != len(first) + 1 or result[:-1] != lead or len(second) != 2:
        return None
    if second == out + k:
        return v.make("linear", x, y, None, node=at.node)
    return v.make("linear_columns", x, y, None, node=at.node) if second == k + out else None


def _is_broadcast(terms: Sequence[str], operands: Sequence[Any]) -> bool:
    """Whether a letter stands for a size of 1 in one operand and for more in the other: no product of matrices does that."""
    single = dict[str, bool]()
    for term, x in zip(terms, operands, strict=False):
        front, _, back = term.partition("…")
        places = [*zip(front, shape_of(x), strict=False), *zip(reversed(back), reversed(shape_of(x)), strict=False)]
        if any(single.setdefault(c, _is_one(size)) != _is_one(size) for c, size in places):
            return True
    return False


def _is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1


def _chained(v: View, at: Site, equation: Any, operands: Any) -> Expr | None:
    """…k, rk, or → …o as two linears"""
    written = equation.replace(" ", "").replace("...", "…") if isinstance(equation, str) else ""
    (first, *others), result = written.partition("->")[0].split(","), written.partition("->")[2]
    if len(others) != 2 or _is_broadcast((first, *others), operands):
        return None
    for (a, w), (b, u) in permutations(zip(others, operands[1:], strict=True)):
        summed, between = first[-1:], a.replace(first[-1:], "")
        if len(between) == 1 and summed not in first[:-1] + b + result and between not in first + result:
            low = v.make("einsum", f"{first},{a}->{first[:-1]}{between}", (operands[0], w))
            if low.op != "einsum":
                return v.make("einsum", f"{first[:-1]}{between},{b}->{result}", (low, u), node=at.node)
    return None


def _terms(equation: Any) -> tuple[str, str, str] | None:
    """The letters of both operands and of the result, with one sign for all dimensions that an ellipsis stands for."""
    if not isinstance(equation, str):
        return None
    operands, arrow, result = equation.replace(" ", "").replace("...", "…").partition("->")
    first, comma, second = operands.partition(",")
    return (first, second, result) if arrow and comma and first and result + second else None


@equation("view")
def linear_on_rows(v: View, at: Site, x: Any, *shape: Any) -> Expr | None:
    """A linear on x flattened to rows, put back into x's shape, is the linear on x."""
    if not isinstance(x, Expr) or x.op not in ("linear", "linear_columns") or at.node is None:
        return None
    rows = x.args[0]
    inner = rows.args[0] if isinstance(rows, Expr) and rows.op == "view" else None
    if not isinstance(inner, Expr) or inner.node is None or rows.node is None:
        return None
    before, after = sizes(inner.node), sizes(at.node)
    if before[:-1] == after[:-1] and before[-1:] == sizes(rows.node)[-1:] and last_size(x) == after[-1]:
        return v.intern(x.op, (inner, *x.args[1:]), at.node)
    return None


@equation("getitem")
def product_inside_autograd_function(v: View, at: Site, x: Any, index: Any) -> Expr | None:
    """The first result of an autograd.Function whose forward is one 4-bit product is that product.

    Its own backward is what the replay compares the replacement's gradients with.
    """
    if index != 0 or not isinstance(x, Expr) or x.op != "autograd_function_apply" or x.node is None:
        return None
    body, outside = autograd_body(x.node) or (None, {})
    result = _first_result(body) if body is not None else None
    if result is None or operation(result) != "gemm_4bit":
        return None
    args = bind("gemm_4bit", result.args, dict(result.kwargs))
    resolved = [_resolve(a, outside) for a in args or ()]
    return (
        v.intern("gemm_4bit", tuple(v.of(r) for r in resolved), at.node)
        if resolved and None not in resolved[:1]
        else None
    )


def _first_result(graph: fx.Graph) -> fx.Node | None:
    found: Any = next(n for n in graph.nodes if n.op == "output").args[0]
    while isinstance(found, tuple | list) and found:
        found = found[0]
    return found if isinstance(found, fx.Node) and found.op == "call_function" else None


def _resolve(argument: Any, outside: dict[fx.Node, Any]) -> Any:
    """What an argument inside the function's body is outside it; reshapes of packed bytes do not matter."""
    while isinstance(argument, fx.Node) and argument not in outside and argument.op == "call_method":
        argument = argument.args[0]
    return outside.get(argument) if isinstance(argument, fx.Node) else argument


@equation("gemm_4bit")
def packed_bytes(v: View, at: Site, x: Any, weight: Any, *storage: Any) -> Expr | None:
    """Reshapes of packed bytes do not matter."""
    while isinstance(weight, Expr) and weight.op in ("view", "transposed"):
        weight = weight.args[0]
    return v.intern("gemm_4bit", (x, weight, *storage), at.node)
