"""Rotary position embedding in any spelling becomes one operator; q and k are then rotated together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.proxy import GraphAppendingTracer

from ..kernels.rope import rope, rope_single
from ..rewrite.effects import is_context
from ..rewrite.graph import (
    before,
    dtype_of,
    fixed_size,
    hint,
    position,
    requires_grad,
    settled,
    sizes,
    static_size,
    tensor_of,
    traced_size,
    value,
)
from ..rewrite.match import Match
from ..rewrite.pattern import as_complex, from_complex, interleave, part
from ..rewrite.report import Refusal
from ..rewrite.rule import RewriteRule, call
from ..rewrite.siblings import SiblingRule
from ..rewrite.vocabulary import is_in_place, operation


def unsigned(table: Tensor, signs: Tensor | None = None, *, back: bool = False) -> Tensor:
    """The sine of a rotation whose first half is negative in its table: (−a, b) of ``table`` · ``signs`` = (a, b).

    That is so for whatever the table and the signs hold: x·cos + roll(x)·(a, b) is x₁·cos₁ + x₂·a beside x₂·cos₂ + x₁·b.
    So nobody needs to know that the signs are −1 and 1; they may be data that changes.

    Args:
        table: (..., R), any floating-point dtype.
        signs: what broadcasts against ``table``; None: ones.
        back: whether the product with the table is subtracted: (a, −b).

    Returns:
        (..., R), in the dtype of the product.
    """
    first, second = (table if signs is None else table * signs).chunk(2, -1)
    return torch.cat((first, -second) if back else (-first, second), -1)


class FuseRope(RewriteRule):
    """x·cos + rotate(x)·sin  →  rope_single(x, cos, sin)"""

    name = "rope"
    variants = {
        "form": (
            "rotate half", "two halves", "two halves and the rest", "rotate pairs", "two of a pair", "complex",
            "complex, one table", "complex, halves", "rolled", "rolled, with signs",
        ),
        "back": (False, True),
    }  # fmt: skip

    def pattern(
        self, x: Any, cos: Any, sin: Any, a: Any, b: Any, c: Any, d: Any, p: Any, q: Any, shift: Any, signs: Any,
        rest: Any, *, form: str, back: bool,
    ) -> Any:  # fmt: skip
        """Half-rotated and interleaved, through a rotated copy or part by part, as a complex product; either way round."""
        if form == "complex, halves":
            z = torch.complex(part(x, a, b, p), part(x, c, d, q)) * cos
            return None if back else torch.cat((z.real, z.imag), -1)
        if form.startswith("complex"):
            return None if back else from_complex(as_complex(x) * cos)
        if form.startswith("rolled"):
            moved = x.roll(shift, -1) * signs if form.endswith("signs") else x.roll(shift, -1)
            return x * cos - moved * sin if back else x * cos + moved * sin
        first, second = part(x, a, b, p), part(x, c, d, q)
        more = (rest,) if form.endswith("rest") else ()
        join = interleave if "pair" in form else lambda left, right: torch.cat((left, right, *more), -1)
        if form.startswith("rotate"):
            turned = join(-second, first) * sin
            return x * cos - turned if back else x * cos + turned
        if back:
            return join(first * cos + second * sin, second * cos - first * sin)
        return join(first * cos - second * sin, second * cos + first * sin)

    def check(self, m: Match) -> Refusal | None:
        """The parts are the two halves (or the even and odd elements), and the tables broadcast to x."""
        rolled = m.form.startswith("rolled")
        if rolled and not _rolls_halves(m):  # first: what is rolled otherwise may be as long as it likes
            return self.refuse(m, f"what is turned is rolled by {_shift(m)} of {traced_size(m.x)}, not by half")
        size = _turned(m)
        if not size or size % 2 or (rolled and not isinstance(settled(value(m.shift)), int)):
            return self.refuse(m, "the rotated dimension has no fixed even size")
        if m.a is not None and not (
            _halves(m, size) if m.form == "rotate half" else _halves(m, size) or _pairs(m, size)
        ):
            return self.refuse(m, f"the rotated parts {_parts(m)} are not the two halves of {size}")
        if m.form == "rotate pairs" and not _pairs(m, size):
            return self.refuse(m, f"the rotated parts {_parts(m)} are not the pairs of {size}")
        if sizes(m.x)[:-1] != sizes(m.root)[:-1] or traced_size(m.root) != size + _rest(m):
            return self.refuse(m, "the tables are larger than what they rotate")
        if m.rest is not None and dtype_of(m.rest) != dtype_of(m.root):
            return self.refuse(m, f"what is turned becomes {dtype_of(m.root)} only beside the rest")
        table = tensor_of(m.cos)
        if m.form.startswith("complex") and not (table is not None and table.is_complex()):
            return self.refuse(m, "complex numbers are scaled, not turned")
        if fixed_size(m.cos) not in (size, size if rolled else size // 2) or len(sizes(m.cos)) > len(sizes(m.x)):
            return self.refuse(m, f"a table of shape {list(sizes(m.cos))} does not fit {list(sizes(m.x))}")
        if m.sin is not None and not _are_alike(m):
            return self.refuse(
                m, f"tables of shapes {list(sizes(m.cos))} and {list(sizes(m.sin))} are not one for each angle"
            )
        if not 2 <= len(sizes(m.x)) <= 4:
            return self.refuse(m, f"{len(sizes(m.x))} dimensions")
        return None

    def rewrite(self, m: Match, x: Any, cos: Any, sin: Any, rest: Any, **_: Any) -> Any:
        """One rotation; a table of complex numbers is cosine and sine in one.

        Pairs that are returned as halves, or halves as pairs, are sorted that way first.
        """
        size = _turned(m)
        if size != static_size(m.x):
            x = x[..., :size]
        pairs = "pair" in m.form or m.form in ("complex", "complex, one table")
        if m.a is not None and pairs != _pairs(m, size):
            x = x.unflatten(-1, (2, -1) if pairs else (-1, 2)).transpose(-1, -2).flatten(-2)
        if m.form.startswith("rolled"):
            sin = _sine(m)
        elif m.back:
            sin = _negative(m, sin)
        turned = call(rope_single, x, cos, sin, interleaved=pairs, rotary_dim=size, dtype=dtype_of(m.root))
        return turned if m.rest is None else torch.cat((turned, rest), -1)


def _turned(m: Match) -> int | None:
    """How many elements are turned: the first of x where its halves are taken from there, else all."""
    size = fixed_size(m.x)
    if m.form.startswith("two halves") and size:
        first, middle, start, stop, *steps = _parts(m)
        if (first, steps) == (0, [1, 1]) and isinstance(stop, int) and 2 * middle == 2 * start == stop <= size:
            return stop
    return size


def _rest(m: Match) -> int:
    return 0 if m.rest is None else traced_size(m.rest) or 0


def _parts(m: Match) -> tuple[Any, ...]:
    size = static_size(m.x)
    bounds = (m.a, size if m.b is None else m.b, m.c, size if m.d is None else m.d, m.p, m.q)
    return tuple(settled(value(bound)) for bound in bounds)


def _halves(m: Match, size: Any) -> bool:
    """Whether the parts are the halves of the first ``size`` elements."""
    return _parts(m) == (0, size // 2, size // 2, size, 1, 1)


def _pairs(m: Match, size: Any) -> bool:
    return m.a is not None and _parts(m) == (0, size, 1, size, 2, 2)


def _shift(m: Match) -> int | None:
    found = value(m.shift)
    return hint(found) if isinstance(found, int | torch.SymInt) else None


def _rolls_halves(m: Match) -> bool:
    """Whether each half takes the other's place, at the sizes that were traced."""
    size, shift = traced_size(m.x), _shift(m)
    return bool(size) and shift is not None and 2 * (shift % size) == size


def _sine_factors(m: Match) -> list[Any]:
    return [factor for factor in (m.sin, m.signs) if factor is not None]


def _are_alike(m: Match) -> bool:
    """Whether cosine and sine are tensors of one shape, as the operator needs them."""
    shape, shapes = sizes(m.cos), [sizes(factor) for factor in _sine_factors(m)]
    within = (n in (1, s) for other in shapes for n, s in zip(reversed(other), reversed(shape), strict=False))
    return shape in shapes and all(0 < len(other) <= len(shape) for other in shapes) and all(within)


def _sine(m: Match) -> Any:
    """The sine without the signs in its table."""
    factors, options = _sine_factors(m), {"back": m.back}
    is_it = lambda u: u.target is unsigned and set(u.args) == set(factors) and u.kwargs == options  # noqa: E731
    proxies = [fx.Proxy(f, GraphAppendingTracer(f.graph)) for f in factors]
    return _once(m, max(factors, key=position), is_it, lambda: call(unsigned, *proxies, **options))


def _negative(m: Match, sin: Any) -> Any:
    """−sin"""
    return _once(m, m.sin, lambda u: operation(u) == "neg", lambda: -sin)


def _once(m: Match, table: fx.Node, is_it: Callable[[fx.Node], bool], make: Callable[[], fx.Proxy]) -> fx.Proxy:
    """What ``make`` makes of ``table``, once for all that it turns: else q and k would seem to have different tables."""
    known = [u for u in table.users if is_it(u) and u not in m.nodes and before(u, m.root)]
    if known:
        return fx.Proxy(known[0], GraphAppendingTracer(table.graph))
    first = min((u for u in table.users if u.op != "output"), key=position)
    if any(is_in_place(n) or is_context(n) for n in table.graph.nodes):
        return make()
    with table.graph.inserting_before(first):
        return make()


class FusePartialRope(RewriteRule):
    """cat(rope(x[..., :r]), x[..., r:])  →  rope(x) with r rotated elements"""

    name = "rope"

    def pattern(
        self, x: Any, cos: Any, sin: Any, interleaved: Any, rotary_dim: Any, dtype: Any, stop: Any, end: Any
    ) -> Any:
        """The rotated part comes first; the rest passes through."""
        rotated = call(
            rope_single, part(x, 0, stop), cos, sin, interleaved=interleaved, rotary_dim=rotary_dim, dtype=dtype
        )
        return torch.cat((rotated, part(x, stop, end)), -1)

    def check(self, m: Match) -> Refusal | None:
        """The two parts are all of x, in x's dtype."""
        if m.end not in (None, static_size(m.x)) or m.stop != m.rotary_dim:
            return self.refuse(m, "the rotated and the unrotated part are not all of the tensor")
        return None

    def rewrite(self, m: Match, x: Any, cos: Any, sin: Any, interleaved: Any, **_: Any) -> Any:
        """The rotation of the whole tensor."""
        return call(rope_single, x, cos, sin, interleaved=interleaved, rotary_dim=m.rotary_dim, dtype=dtype_of(m.root))


class PairRope(SiblingRule):
    """rope_single(q, cos, sin), rope_single(k, cos, sin)  →  rope(q, k, cos, sin)"""

    name = "rope"
    most = 2

    def key(self, node: fx.Node) -> Any:
        """Rotations by the same tables in the same way, of tensors that differ in the number of heads alone."""
        if node.target is not rope_single or len(sizes(node)) not in (3, 4):
            return None
        return (node.args[1:], tuple(sorted(node.kwargs.items(), key=str)), len(sizes(node)), static_size(node))

    def merge(self, nodes: list[fx.Node], values: list[Any]) -> list[Any] | None:
        """One call for both."""
        if len(nodes) != 2 or not _pairable(nodes[0], nodes[1]):
            return None
        both = call(rope, values[0].args[0], values[1].args[0], *values[0].args[1:], **values[0].kwargs)
        return [both[0], both[1]]


def _pairable(q: fx.Node, k: fx.Node) -> bool:
    a, b = sizes(q.args[0]), sizes(k.args[0])
    differing = [i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y]
    tables = any(isinstance(t, fx.Node) and requires_grad(t) for t in q.args[1:3])
    return len(differing) <= 1 and not tables and dtype_of(q.args[0]) == dtype_of(k.args[0])
