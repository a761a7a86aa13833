"""The equations that bring every spelling of a value to one form. Each is one function of an operation's arguments.

An equation returns the simpler expression, or None where it does not apply. They hold in the reals; rounding is what
verification is for.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import fx

from .expr import Expr, View, last_size, rank, strip_casts
from .graph import sizes
from .vocabulary import bind, operation


class Site(NamedTuple):
    """What is being simplified: the operation, and the graph node that performs it, if one does."""

    op: str
    node: fx.Node | None


Equation = Callable[..., Expr | None]
EQUATIONS: dict[str, list[Equation]] = {}


def equation(*ops: str) -> Callable[[Equation], Equation]:
    """Register the decorated function as an equation of ``ops``."""

    def register(function: Equation) -> Equation:
        for op in ops:
            EQUATIONS.setdefault(op, []).append(function)
        return function

    return register


def simplify(view: View, op: str, args: tuple[Any, ...], node: fx.Node | None) -> Expr | None:
    """The first equation of ``op`` that applies to ``args``."""
    for rule in EQUATIONS.get(op, ()):
        found = rule(view, Site(op, node), *args)
        if found is not None:
            return found
    return None


def is_number(x: Any) -> bool:
    """Whether ``x`` is a plain number, a Python constant of the graph."""
    return isinstance(x, int | float) and not isinstance(x, bool)


def same(x: Any, y: Any) -> bool:
    """Whether two expressions are equal up to casts."""
    return isinstance(x, Expr) and strip_casts(x, only_widening=False) is strip_casts(y, only_widening=False)


def _op(x: Any, *ops: str) -> Expr | None:
    """``x`` without casts, if it is one of ``ops``."""
    x = strip_casts(x, only_widening=False)
    return x if isinstance(x, Expr) and x.op in ops else None


# arithmetic ---------------------------------------------------------------------------------------------------------
@equation("add")
def bias_added(v: View, at: Site, x: Any, y: Any, alpha: Any = 1) -> Expr | None:
    """linear(x, W) + b = linear(x, W, b)  where b is one number per output"""
    for product, b in ((x, y), (y, x)):
        inner = product if isinstance(product, Expr) and product.op in ("linear", "linear_columns") else None
        if alpha == 1 and inner and inner.args[2] is None and rank(b) == 1 and last_size(b) == _features(inner):
            return v.intern(inner.op, (*inner.args[:2], b), at.node)
    return None


def _features(product: Expr) -> int | None:
    """How many numbers a linear computes for each row, read off its weight: the product may be no node of its own."""
    weight = product.args[1]
    shape = sizes(weight.node) if isinstance(weight, Expr) and weight.node is not None else ()
    return shape[0 if product.op == "linear" else -1] if len(shape) == 2 else None


@equation("add", "sub")
def negative_addend(v: View, at: Site, x: Any, y: Any, alpha: Any = 1) -> Expr | None:
    """x + (−y) = x − y;  x + y·(−z) = x − y·z;  x − (−y) = x + y"""
    if alpha != 1:
        return None
    positive = _negated(v, y)
    if positive is not None:
        return v.make("sub" if at.op == "add" else "add", x, positive, node=at.node)
    positive = _negated(v, x) if at.op == "add" else None
    return v.make("sub", y, positive, node=at.node) if positive is not None else None


def _negated(v: View, x: Any) -> Expr | None:
    """What ``x`` is the negative of, if it is a negative or a product with one."""
    inner = _op(x, "neg", "mul")
    if inner is None or inner.op == "neg":
        return inner.args[0] if inner else None
    for factor, other in (inner.args, inner.args[::-1]):
        positive = _op(factor, "neg")
        if positive is not None:
            return v.make("mul", positive.args[0], other)
    return None


@equation("cat")
def joined_with_a_negative(v: View, at: Site, tensors: Any, dim: Any = 0) -> Expr | None:
    """(a, −b) = −(−a, b)"""
    pair = _opposite(v, *tensors) if len(tensors) == 2 else None
    return v.intern("neg", (v.make("cat", pair, dim),), at.node) if pair else None


@equation("interleave")
def interleaved_with_a_negative(v: View, at: Site, x: Any, y: Any) -> Expr | None:
    """a, −b interleaved = −(−a, b interleaved)"""
    pair = _opposite(v, x, y)
    return v.intern("neg", (v.make("interleave", *pair),), at.node) if pair else None


def _opposite(v: View, x: Any, y: Any) -> tuple[Any, Any] | None:
    """(−x, −y) where of the two y alone is a negative."""
    second = _op(y, "neg") if not _op(x, "neg") else None
    return (v.make("neg", x), second.args[0]) if second else None


@equation("add", "sub")
def scaled_addend(v: View, at: Site, x: Any, y: Any, alpha: Any = 1) -> Expr | None:
    """x ± alpha·y = x ± (y·alpha)"""
    return v.intern(at.op, (x, y if alpha == 1 else v.make("mul", y, alpha)), at.node)


@equation("rsub")
def reversed_subtraction(v: View, at: Site, x: Any, y: Any, alpha: Any = 1) -> Expr | None:
    """rsub(x, y) = y − x"""
    return v.make("sub", y, x, node=at.node) if alpha == 1 else None


@equation("mul")
def square_of_itself(v: View, at: Site, x: Any, y: Any) -> Expr | None:
    """x·x = x²"""
    return v.make("square", x, node=at.node) if same(x, y) else None


@equation("mul")
def root_of_a_mean(v: View, at: Site, x: Any, y: Any) -> Expr | None:
    """√(Σx) · c = √(mean x)  where  c² · n = 1"""
    for root, c in ((x, y), (y, x)):
        inner = _op(root, "sqrt")
        total = _op(inner.args[0], "sum") if inner else None
        n = _summed(total)
        if total and n and is_number(c) and math.isclose(c * c * n, 1.0, rel_tol=1e-6):
            return v.make("sqrt", v.make("mean", *total.args[:3], None), node=at.node)
    return None


@equation("mul")
def mean_of_a_sum(v: View, at: Site, x: Any, y: Any) -> Expr | None:
    """Σx · c = mean x  where  c · n = 1"""
    for total, c in ((_op(x, "sum"), y), (_op(y, "sum"), x)):
        n = _summed(total)
        if total and n and is_number(c) and math.isclose(c * n, 1.0, rel_tol=1e-6):
            return v.make("mean", *total.args[:3], None, node=at.node)
    return None


def _summed(total: Expr | None) -> int | None:
    """How many numbers each result of ``total``, a sum over the last dimension, adds up; None if it is something else."""
    if total is None or total.args[1] != -1:
        return None
    inner = total.args[0]
    return last_size(inner.args[0] if inner.op == "square" and inner.node is None else inner)


@equation("div")
def division(v: View, at: Site, x: Any, y: Any, rounding_mode: Any = None) -> Expr | None:
    """x / y = x · y⁻¹;  Σx / n = mean x"""
    if rounding_mode is not None:
        return None
    total = _op(x, "sum")
    if total and is_number(y) and _summed(total) == y:
        return v.make("mean", *total.args[:3], None, node=at.node)
    root = _op(x, "sqrt")
    if root and is_number(y) and y:
        return v.make("mul", x, 1.0 / y, node=at.node)
    if is_number(x) and x == 1:
        return v.make("reciprocal", y, node=at.node)
    return v.make("mul", x, v.make("reciprocal", y), node=at.node)


@equation("reciprocal")
def reciprocal_of_a_root(v: View, at: Site, x: Any) -> Expr | None:
    """1/√x = rsqrt x;  1/rsqrt x = √x;  1/(1/x) = x"""
    inner = _op(x, "sqrt", "rsqrt", "reciprocal")
    if inner is None:
        return None
    if inner.op == "reciprocal":
        return inner.args[0]
    return v.make("rsqrt" if inner.op == "sqrt" else "sqrt", inner.args[0], node=at.node)


@equation("pow")
def powers(v: View, at: Site, x: Any, y: Any) -> Expr | None:
    """x^2, x^½, x^−½, x^−1"""
    if not is_number(y) or is_number(x):
        return None
    name = {2.0: "square", 0.5: "sqrt", -0.5: "rsqrt", -1.0: "reciprocal"}.get(float(y))
    return v.make(name, x, node=at.node) if name else None


# reductions ---------------------------------------------------------------------------------------------------------
@equation("mean", "sum")
def one_dimension(v: View, at: Site, x: Any, dim: Any = None, keepdim: Any = False, dtype: Any = None) -> Expr | None:
    """A reduction over one dimension names it from the end."""
    return v.intern(at.op, (x, from_the_end(dim, x), keepdim), at.node)


def from_the_end(dim: Any, x: Any) -> Any:
    """``dim`` as a negative number, and a sequence of one as that one."""
    if isinstance(dim, tuple | list) and len(dim) == 1:
        dim = dim[0]
    dims = rank(x)
    return dim - dims if isinstance(dim, int) and dim >= 0 and dims else dim


@equation("var", "std")
def variance(v: View, at: Site, x: Any, dim: Any, unbiased: Any, keepdim: Any, correction: Any) -> Expr | None:
    """var x = mean (x − mean x)²  for the biased variance"""
    if not (unbiased is False or correction == 0) or not keepdim:
        return None
    dim = from_the_end(dim, x)
    centred = v.make("sub", x, v.intern("mean", (x, dim, True)))
    found = v.intern("mean", (v.make("square", centred), dim, True))
    return v.make("sqrt", found, node=at.node) if at.op == "std" else found


@equation("norm", "vector_norm")
def euclidean_norm(v: View, at: Site, x: Any, p: Any, dim: Any, keepdim: Any, *_: Any) -> Expr | None:
    """‖x‖ = √(Σ x²)"""
    if p not in (2, 2.0, None, "fro") or dim is None:
        return None
    return v.make("sqrt", v.intern("sum", (v.make("square", x), from_the_end(dim, x), keepdim)), node=at.node)


@equation("clamp")
def lower_bound(v: View, at: Site, x: Any, low: Any, high: Any) -> Expr | None:
    """clamp(x, min=c) = clamp_min(x, c)"""
    return v.make("clamp_min", x, low, node=at.node) if high is None and low is not None else None


# shapes -------------------------------------------------------------------------------------------------------------
@equation("contiguous", "clone")
def same_values(v: View, at: Site, x: Any, memory_format: Any = None) -> Expr | None:
    """A copy has the values of its original."""
    return x if isinstance(x, Expr) else None


@equation("t", "transpose", "mT", "numpy_T", "T")
def transposed(v: View, at: Site, x: Any, *dims: Any) -> Expr | None:
    """Every spelling of the transpose of the last two dimensions; of a transpose, the original."""
    if dims:
        last_two = {from_the_end(d, x) for d in dims} == {-1, -2}
        if not (last_two or (v.pattern and set(dims) in ({-1, -2}, {0, 1}))):
            return None
    inner = x if isinstance(x, Expr) and x.op == "transposed" else None
    return inner.args[0] if inner else v.intern("transposed", (x,), at.node)


@equation("permute")
def permuted(v: View, at: Site, x: Any, dims: Any) -> Expr | None:
    """permute(x, [1, 0]) of a matrix is its transpose."""
    return v.make("t", x, node=at.node) if tuple(dims) in ((1, 0), (-1, -2)) else None


@equation("view", "flatten", "unflatten", "squeeze", "unsqueeze", "expand")
def reshaped(v: View, at: Site, x: Any, *shape: Any) -> Expr | None:
    """A reshape to the shape it has is none; interleaving, stack(a, b) flattened, is one operation."""
    if at.node is None or not isinstance(x, Expr) or x.node is None or v.pattern:
        return None
    before, after = sizes(x.node), sizes(at.node)
    if before == after and before:
        return x
    inner = x if x.op == "stack" and len(x.args[0]) == 2 and from_the_end(x.args[1], x) == -1 else None
    if inner and len(after) == len(before) - 1 and before[:-2] == after[:-1]:
        return v.make("interleave", *inner.args[0], node=at.node)
    return None


@equation("view", "flatten", "expand", "repeat_interleave")
def repeated_entries(v: View, at: Site, x: Any, *options: Any) -> Expr | None:
    """x[:, :, None].expand(a, b, n, …).reshape(a, b·n, …) = x.repeat_interleave(n, 1) = repeated(x, n, 1)"""
    if at.node is None or not isinstance(x, Expr) or x.node is None or v.pattern:
        return None
    before, after = sizes(x.node), sizes(at.node)
    if at.op == "repeat_interleave":
        times, dim = options[0], options[1]
        return (
            v.intern("repeated", (x, times, dim % len(before)), at.node)
            if is_number(times) and is_number(dim)
            else None
        )
    if at.op == "expand":
        grown = [d for d, (a, b) in enumerate(zip(before, after, strict=False)) if a is not b and a != b]
        one = len(before) == len(after) and len(grown) == 1 and before[grown[0]] == 1
        return v.intern("repeated", (x, after[grown[0]], grown[0]), at.node) if one else None
    if x.op != "repeated" or x.args[2] == 0 or len(after) != len(before) - 1:
        return None
    inner, times, dim = x.args
    joined_there = before[: dim - 1] == after[: dim - 1] and before[dim + 1 :] == after[dim:]
    original = _without_new_dimension(inner, dim) if joined_there else None
    return None if original is None else v.intern("repeated", (original, times, dim - 1), at.node)


def _without_new_dimension(x: Expr, dim: int) -> Expr | None:
    """What ``x`` adds a dimension of size 1 to, at ``dim``, if it does."""
    inner = x.args[0] if x.op in ("unsqueeze", "getitem") else None
    if not isinstance(inner, Expr) or rank(x) is None:
        return None
    if x.op == "unsqueeze":
        return inner if x.args[1] in (dim, dim - (rank(x) or 0)) else None
    items = x.args[1] if isinstance(x.args[1], tuple) else (x.args[1],)
    if any(not (i is None or i is Ellipsis or i == slice(None)) for i in items) or items.count(None) != 1:
        return None
    at = items.index(None)
    place = at - len(items) + (rank(x) or 0) if Ellipsis in items[:at] else at
    return inner if place == dim else None


@equation("getitem")
def indexed(v: View, at: Site, x: Any, index: Any) -> Expr | None:
    """Parts of the last dimension, however they are taken, are ``part(x, start, stop, step)``."""
    if not isinstance(x, Expr):
        return None
    if isinstance(index, int):
        return _piece(v, at, x, index)
    items = index if isinstance(index, tuple) else (index,)
    dims = rank(x)
    leads = [i for i in items[:-1] if i is not Ellipsis]
    reaches_last = Ellipsis in items[:-1] or (dims is not None and len(items) == dims)
    if not (reaches_last and all(i == slice(None) for i in leads)):
        return None
    if isinstance(items[-1], slice):
        return part(v, at, x, items[-1].start, items[-1].stop, items[-1].step)
    return _pair_element(v, at, x, items[-1]) if isinstance(items[-1], int) else None


def part(v: View, at: Site, x: Expr, start: Any, stop: Any, step: Any) -> Expr | None:
    """x[..., start:stop:step] with the ends counted from 0 and a full end left open."""
    size = last_size(x)
    if v.pattern or not all(i is None or isinstance(i, int) for i in (start, stop, step)):
        return v.intern("part", (x, start or 0, stop, step or 1), at.node)
    if size is None:
        return None
    first, last, stride = slice(start, stop, step).indices(size)
    return x if (first, last, stride) == (0, size, 1) else v.intern("part", (x, first, last, stride), at.node)


def _piece(v: View, at: Site, x: Expr, index: int) -> Expr | None:
    """One result of ``chunk``, ``split`` or ``unbind`` over the last dimension."""
    if x.op == "unbind" and isinstance(x.args[0], Expr):
        return _pair_element(v, at, x.args[0], index) if from_the_end(x.args[1], x.args[0]) == -1 else None
    if x.op not in ("chunk", "split") or from_the_end(x.args[2], x.args[0]) != -1:
        return None
    size = last_size(x.args[0])
    lengths = _lengths(x, size)
    if lengths is None or not -len(lengths) <= index < len(lengths):
        return None
    index %= len(lengths)
    start = sum(lengths[:index])
    return part(v, at, x.args[0], start, start + lengths[index], 1)


def _lengths(x: Expr, size: int | None) -> list[int] | None:
    if size is None:
        return None
    if isinstance(x.args[1], tuple | list):
        return list(x.args[1]) if all(isinstance(i, int) for i in x.args[1]) else None
    if not isinstance(x.args[1], int):
        return None
    step = -(-size // x.args[1]) if x.op == "chunk" else x.args[1]
    return [min(step, size - i) for i in range(0, size, step)]


def _pair_element(v: View, at: Site, x: Expr, index: int) -> Expr | None:
    """view(x, ..., d/2, 2)[..., i] = x[..., i::2]"""
    inner = x.args[0] if x.op in ("view", "unflatten") else None
    size = last_size(inner)
    if inner is None or size is None or x.node is None or sizes(x.node)[-2:] != (size // 2, 2):
        return None
    return part(v, at, inner, index % 2, size, 2)


@equation("select")
def selected(v: View, at: Site, x: Any, dim: Any, index: Any) -> Expr | None:
    """select(view(x, ..., d/2, 2), -1, i) = x[..., i::2]"""
    if not isinstance(x, Expr) or from_the_end(dim, x) != -1 or not isinstance(index, int):
        return None
    return _pair_element(v, at, x, index)


@equation("narrow")
def narrowed(v: View, at: Site, x: Any, dim: Any, start: Any, length: Any) -> Expr | None:
    """narrow(x, -1, a, n) = x[..., a:a+n]"""
    if (
        not isinstance(x, Expr)
        or from_the_end(dim, x) != -1
        or not (isinstance(start, int) and isinstance(length, int))
    ):
        return None
    return part(v, at, x, start, start + length, 1)


@equation("cat", "stack")
def joined(v: View, at: Site, tensors: Any, dim: Any = 0) -> Expr | None:
    """Joining names its dimension from the end."""
    tensors = tuple(tensors)
    first = tensors[0] if tensors else None
    if isinstance(dim, int) and dim >= 0 and rank(first):
        dim = dim - (rank(first) or 0) - (at.op == "stack")
    return v.intern(at.op, (tensors, dim), at.node)


@equation("addmm")
def product_and_sum(v: View, at: Site, x: Any, a: Any, b: Any, beta: Any, alpha: Any) -> Expr | None:
    """addmm(b, x, w) = b + x·w"""
    if beta != 1 or alpha != 1:
        return None
    return v.make("add", v.make("matmul", a, b), x, node=at.node)


@equation("relu", "silu", "dropout")
def functional(v: View, at: Site, x: Any, *options: Any) -> Expr | None:
    """The value of an activation does not depend on ``inplace``."""
    return v.intern(at.op, (x, *options[:-1]), at.node)


@equation("mul")
def sigmoid_times_itself(v: View, at: Site, x: Any, y: Any) -> Expr | None:
    """x · σ(x) = silu(x)"""
    for a, b in ((x, y), (y, x)):
        inner = _op(b, "sigmoid")
        if inner and same(inner.args[0], a):
            return v.make("silu", a, False, node=at.node)
    return None


# linears ------------------------------------------------------------------------------------------------------------
@equation("matmul")
def matrix_product(v: View, at: Site, x: Any, y: Any) -> Expr | None:
    """x·Wᵀ and x·W of a matrix W are linears, by rows and by columns of W"""
    if not isinstance(y, Expr) or not isinstance(x, Expr):
        return None
    if y.op == "transposed" and (v.pattern or rank(y.args[0]) == 2):
        return v.make("linear", x, y.args[0], None, node=at.node)
    if v.pattern or (rank(y) == 2 and (rank(x) or 0) >= 2):
        return v.intern("linear_columns", (x, y, None), at.node)
    return None


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


# complex numbers ----------------------------------------------------------------------------------------------------
@equation("view_as_complex")
def pairs_as_complex(v: View, at: Site, x: Any) -> Expr | None:
    """Neighbours of the last dimension as one complex number each"""
    inner = x.args[0] if isinstance(x, Expr) and x.op in ("view", "unflatten") else None
    size = last_size(inner)
    if inner is None or x.node is None or size is None or sizes(x.node)[-2:] != (size // 2, 2):
        return None
    return v.intern("as_complex", (inner,), at.node)


@equation("view", "flatten")
def complex_as_pairs(v: View, at: Site, x: Any, *shape: Any) -> Expr | None:
    """Complex numbers as neighbours of the last dimension"""
    if not isinstance(x, Expr) or x.op != "view_as_real" or at.node is None or x.node is None:
        return None
    before, after = sizes(x.node), sizes(at.node)
    return (
        v.intern("from_complex", x.args, at.node)
        if before[:-2] == after[:-1] and len(after) == len(before) - 1
        else None
    )


# quantized products -------------------------------------------------------------------------------------------------
@equation("getitem")
def product_inside_autograd_function(v: View, at: Site, x: Any, index: Any) -> Expr | None:
    """The first result of an autograd.Function whose forward is one 4-bit product is that product.

    Its own backward is what the replay compares the replacement's gradients with.
    """
    if index != 0 or not isinstance(x, Expr) or x.op != "autograd_function_apply" or x.node is None:
        return None
    root, body = x.node.graph.owning_module, x.node.args[0]
    inner = getattr(root, str(body.target), None) if isinstance(body, fx.Node) and root is not None else None
    result = _first_result(inner.graph) if isinstance(inner, fx.GraphModule) else None
    if result is None or operation(result) != "gemm_4bit":
        return None
    outside = dict(zip((n for n in result.graph.nodes if n.op == "placeholder"), x.node.args[2:], strict=False))
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


@equation("cross_entropy", "log_softmax")
def over_rows(v: View, at: Site, x: Any, *options: Any) -> Expr | None:
    """A loss over classes reads rows, whether or not its input was flattened to rows for it."""
    if not isinstance(x, Expr) or x.op == "rows" or v.pattern:
        return None
    inner = strip_casts(x, only_widening=False)
    flat = inner.args[0] if inner.op in ("view", "flatten") and _keeps_last(inner) else inner
    dims = rank(x)
    if dims != 2 or not isinstance(flat, Expr):
        return None
    return v.intern(at.op, (v.intern("rows", (flat,), inner.node), *options), at.node)


def _keeps_last(x: Expr) -> bool:
    """Whether a reshape flattens leading dimensions alone."""
    inner = x.args[0]
    if not isinstance(inner, Expr) or inner.node is None or x.node is None:
        return False
    before, after = sizes(inner.node), sizes(x.node)
    return len(after) == 2 and len(before) >= 2 and before[-1] == after[-1]
