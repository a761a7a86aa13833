"""Equations of low-rank adapters that are merged into one matrix, with the weight that they adapt or without."""

from __future__ import annotations

from typing import Any

from torch import fx

from .algebra_arithmetic import features
from .equation import Site, equation, numeric_factor, op_of
from .expr import Expr, View, last_size, rank
from .graph import sizes

PRODUCTS = ("linear", "linear_columns")


@equation("linear", "linear_columns")
def merged_adapter(v: View, at: Site, x: Any, weight: Any, bias: Any = None) -> Expr | None:
    """x (W ± s·BA)ᵀ + b = x Wᵀ + b ± s·(x Aᵀ) Bᵀ  where BA has a lower rank than W, and s no dimension;  x (W ± s·AB) likewise"""
    total = op_of(weight, "add", "sub") if not v.pattern else None
    if total is None or len(total.args) != 2:
        return None
    for w, update in (total.args, total.args[::-1]) if total.op == "add" else (total.args,):
        low, scale, rows = _low_rank_product(update, at.op == "linear")
        if low is not None:
            adapter = _twice(v, x, low, rows)
            adapter = adapter if scale is None else v.make("mul", adapter, scale)
            return v.make(total.op, _product(v, x, w, at.op == "linear", bias), adapter, node=at.node)
    return None


@equation("add", "sub")
def adapter_of_one_matrix(v: View, at: Site, x: Any, y: Any, alpha: Any = 1) -> Expr | None:
    """y ± s·x (BA)ᵀ = y ± s·(x Aᵀ) Bᵀ  where BA has a lower rank than rows and columns"""
    for base, update in ((x, y), (y, x)) if at.op == "add" else ((x, y),):
        if v.pattern or alpha != 1 or not isinstance(base, Expr) or rank(base) == 1:
            continue
        product = op_of(update, "mul")
        for inner, scale in (product.args, product.args[::-1]) if product else ((update, None),):
            apart = _apart(v, op_of(inner, *PRODUCTS))
            if apart is not None:
                scaled = apart if product is None else v.make("mul", apart, scale, node=product.node)
                return v.make(at.op, base, scaled, node=at.node)
    return None


def _apart(v: View, product: Expr | None) -> Expr | None:
    """x (BA)ᵀ as (x Aᵀ) Bᵀ, if ``product`` is that."""
    if product is None or product.args[2] is not None:
        return None
    low, scale, rows = _low_rank_product(product.args[1], product.op == "linear")
    return None if low is None or scale is not None else _twice(v, product.args[0], low, rows, product.node)


@equation("linear", "linear_columns")
def scaled_factor(v: View, at: Site, x: Any, weight: Any, bias: Any = None) -> Expr | None:
    """(x (c·A)ᵀ) Bᵀ = (x Aᵀ) (c·B)ᵀ = c·((x Aᵀ) Bᵀ)  of a number c"""
    first = op_of(x, *PRODUCTS)
    if bias is not None or first is None or first.args[2] is not None:
        return None
    (a, of_a), (b, of_b) = numeric_factor(first.args[1]), numeric_factor(weight)
    c = of_a if of_b is None else of_b if of_a is None else of_a * of_b
    if c is None:
        return None
    inner = _product(v, first.args[0], a, first.op == "linear")
    return v.make("mul", _product(v, inner, b, at.op == "linear"), c, node=at.node)


@equation("add")
def bias_of_an_adapter(v: View, at: Site, x: Any, y: Any, alpha: Any = 1) -> Expr | None:
    """x Wᵀ + ((x Aᵀ) Bᵀ + b) = (x Wᵀ + b) + (x Aᵀ) Bᵀ"""
    for base, update in ((x, y), (y, x)) if alpha == 1 else ():
        base, update = op_of(base, *PRODUCTS), op_of(update, *PRODUCTS)
        if base is None or update is None or base.args[2] is not None or op_of(update.args[0], *PRODUCTS) is None:
            continue
        b = update.args[2]
        if b is not None and rank(b) == 1 and last_size(b) == features(base):
            with_bias, without = v.make(base.op, *base.args[:2], b), v.make(update.op, *update.args[:2], None)
            return v.make("add", with_bias, without, node=at.node)
    return None


def _product(v: View, x: Any, matrix: Any, rows: bool, bias: Any = None, node: fx.Node | None = None) -> Expr:
    """x·Mᵀ + b of a matrix M by rows, x·M + b of one by columns."""
    if isinstance(matrix, Expr) and matrix.op == "transposed":
        matrix, rows = matrix.args[0], not rows
    return v.make("linear" if rows else "linear_columns", x, matrix, bias, node=node)


def _twice(v: View, x: Any, low: Expr, rows: bool, node: fx.Node | None = None) -> Expr:
    """x·Lᵀ of L by rows, x·L of L by columns, for a product L of two matrices, one after the other."""
    (left, right, _), turned = low.args, low.op == "linear"
    first, second = ((right, not turned), (left, True)) if rows else ((left, False), (right, turned))
    return _product(v, _product(v, x, *first), *second, node=node)


def _low_rank_product(update: Any, rows: bool) -> tuple[Expr | None, Any, bool]:
    """L and s where ``update`` is s·L, and whether L stands by rows; a transpose has what was rows for columns."""
    turned = op_of(update, "transposed")
    if turned is not None:
        return _low_rank_product(turned.args[0], not rows)
    product = op_of(update, "mul")
    for low, scale in (product.args, product.args[::-1]) if product else ((update, None),):
        turned = op_of(low, "transposed") if scale is not None else None
        low = op_of(low if turned is None else turned.args[0], *PRODUCTS)
        divisor = scale.args[0] if isinstance(scale, Expr) and scale.op == "reciprocal" else scale
        if low is not None and _is_low_rank(low) and (not isinstance(divisor, Expr) or rank(divisor) == 0):
            return low, scale, rows if turned is None else not rows
    return None, None, rows


def _is_low_rank(low: Expr) -> bool:
    """Whether ``low``, a product of two matrices, has fewer terms than rows and than columns."""
    left, right, bias = low.args
    shapes = [sizes(m.node) for m in (left, right) if isinstance(m, Expr) and m.node is not None]
    if bias is not None or [len(s) for s in shapes] != [2, 2]:
        return False
    rows, terms, columns = *shapes[0], shapes[1][0 if low.op == "linear" else 1]
    return all(isinstance(s, int) for s in (rows, terms, columns)) and terms < min(rows, columns)
