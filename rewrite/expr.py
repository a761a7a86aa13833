"""A graph seen as canonical expressions: hash-consed, spelling-independent, simplified by :mod:`.algebra`.

The view is read-only. Nodes keep computing what they computed; only matching looks at them this way, so an equation that
is exact in the reals but not in floating point changes no result by itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from .effects import is_context, is_random, written_to
from .graph import before, dtype_of, sizes, value
from .vocabulary import SIGNATURES, bind, is_in_place, operation


@dataclass(eq=False)
class Expr:
    """One operation of the canonical view.

    ``node`` is the first graph node that computes it, or None for a value that only an equation names, such as the
    reciprocal inside ``x / y``. Leaves have ``op == "leaf"``; the wildcards of a pattern have ``op == "?"``.
    """

    op: str
    args: tuple[Any, ...]
    node: fx.Node | None = None

    def __repr__(self) -> str:
        """The operation and what stands directly below it: values are shared, and all of it can be exponentially long."""
        if self.op == "leaf":
            return f"leaf({self.node})"
        return f"{self.op}({', '.join(a.op if isinstance(a, Expr) else _brief(a) for a in self.args)})"

    def walk(self) -> Iterator[Expr]:
        """This expression and all below it, each once."""
        seen, pending = set[int](), list[Expr]([self])
        while pending:
            current = pending.pop()
            if id(current) in seen:
                continue
            seen.add(id(current))
            yield current
            pending.extend(_expressions(current.args))


def _brief(argument: Any) -> str:
    return f"({len(argument)} values)" if isinstance(argument, tuple | list) else repr(argument)


def _expressions(argument: Any) -> Iterator[Expr]:
    if isinstance(argument, Expr):
        yield argument
    elif isinstance(argument, tuple | list):
        for item in argument:
            yield from _expressions(item)


def _key(argument: Any) -> Any:
    if isinstance(argument, Expr | fx.Node):
        return id(argument)
    if isinstance(argument, tuple | list):
        return tuple(_key(a) for a in argument)
    if isinstance(argument, slice):
        return ("slice", _key(argument.start), _key(argument.stop), _key(argument.step))
    return (type(argument).__name__, argument if isinstance(argument, bool | int | float | str) else repr(argument))


@dataclass
class View:
    """The canonical expressions of one graph; ``pattern`` views have wildcards for placeholders and no values."""

    pattern: bool = False
    _interned: dict[Any, Expr] = field(default_factory=dict)
    _of: dict[fx.Node, Expr] = field(default_factory=dict)
    _epochs: dict[fx.Node, int] = field(default_factory=dict)
    _epoch: int = 0
    _written: set[fx.Node] | None = None

    def is_written(self, node: fx.Node | None) -> bool:
        """Whether something in the graph may overwrite what ``node`` returns."""
        if node is None:
            return False
        if self._written is None:
            self._written = written_to(node.graph)
        return node in self._written

    def of(self, node: Any) -> Any:
        """The expression of a graph node; constants, and containers of both, map to themselves."""
        if isinstance(node, tuple | list):
            return tuple(self.of(n) for n in node)
        if isinstance(node, slice):
            return slice(self.of(node.start), self.of(node.stop), self.of(node.step))
        if not isinstance(node, fx.Node):
            return node
        number = settled_number(value(node))
        if number is not None:
            return number
        if node not in self._of:
            if node not in self._epochs:
                self._epochs = _write_epochs(node.graph)
            for needed in _inputs_first(node, self._of):
                self._epoch = self._epochs.get(needed, 0)
                self._of[needed] = self._build(needed)
        return self._of[node]

    def make(self, op: str, *args: Any, node: fx.Node | None = None) -> Expr:
        """The expression ``op(*args)`` in simplest form; ``node`` is remembered as the graph node that computes it."""
        from .algebra import simplify

        simpler = simplify(self, op, args, node)
        if simpler is not None:
            if simpler.node is None and node is not None:
                simpler.node = node
            return simpler
        return self.intern(op, args, node)

    def intern(self, op: str, args: tuple[Any, ...], node: fx.Node | None = None) -> Expr:
        """The one expression ``op(*args)``, unsimplified."""
        found = self._interned.setdefault((op, _key(args), self._epoch), Expr(op, args, node))
        if found.node is None or (node is not None and before(node, found.node)):
            found.node = node
        return found

    def leaf(self, node: fx.Node) -> Expr:
        """A value whose computation is not looked into."""
        if not self.pattern:
            return self.intern("leaf", (node.name,), node)
        return self.intern("?", (node.target if node.op == "placeholder" else node.name,))  # `input` is named input_1

    def _build(self, node: fx.Node) -> Expr:
        if node.op not in ("call_function", "call_method") or is_random(node):
            return self.leaf(node)
        name = operation(node)
        if name == "cast":
            return self._cast(node)
        given = node.args[:1] if node.target is getattr else node.args
        args = bind(name, given, dict(node.kwargs)) if name in SIGNATURES else None
        if args is not None:
            return self.make(name, *self.of(args), node=node)
        written = (*self.of(given), *((k, self.of(v)) for k, v in sorted(node.kwargs.items())))
        if name in SIGNATURES:  # arguments that the signature does not know: no equation knows them either
            return self.intern(name, written, node)
        return self.make(name, *written, node=node)

    def _cast(self, node: fx.Node) -> Expr:
        inner = self.of(node.args[0]) if isinstance(node.args[0], fx.Node) else None
        if inner is None:
            return self.leaf(node)
        if self.pattern or self.same_type(node, node.args[0]):
            return inner
        after, before = dtype_of(node), dtype_of(node.args[0])
        if after is None or before is None or not (after.is_floating_point and before.is_floating_point):
            return self.intern("convert", (inner, repr(after)), node)
        return self.intern("cast", (inner, after), node)

    @staticmethod
    def same_type(a: Any, b: Any) -> bool:
        """Whether both nodes compute tensors of one dtype on one device, so that a conversion between them is none."""
        x, y = value(a), value(b)
        return (
            isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor) and x.dtype == y.dtype and x.device == y.device
        )


def settled_number(found: Any) -> int | float | None:
    """A symbolic number as the constant that the graph's guards fix it to, if they do."""
    if isinstance(found, torch.SymInt):
        return found.node.maybe_as_int()
    return found.node.maybe_as_float() if isinstance(found, torch.SymFloat) else None


def _inputs_first(node: fx.Node, done: dict[fx.Node, Expr]) -> list[fx.Node]:
    """``node`` and what it needs and is not in ``done``, inputs first: no recursion, graphs can be thousands deep."""
    order, pending, seen = list[fx.Node](), [(node, False)], set[fx.Node]()
    while pending:
        current, ready = pending.pop()
        if ready:
            order.append(current)
        elif current not in seen and current not in done:
            seen.add(current)
            pending.append((current, True))
            pending.extend((n, False) for n in current.all_input_nodes)
    return order


def _write_epochs(graph: fx.Graph) -> dict[fx.Node, int]:
    """For each node, the number of writes in place and of mode switches before it: only within one epoch are equal
    operations equal values, tracked alike."""
    epochs, count = dict[fx.Node, int](), 0
    for node in graph.nodes:
        count += is_in_place(node) or is_context(node)
        epochs[node] = count
    return epochs


def widens(expr: Expr) -> bool:
    """Whether ``expr`` is a cast that loses nothing, such as bfloat16 to float32."""
    if expr.op != "cast":
        return False
    inner = expr.args[0].node
    before = dtype_of(inner) if inner is not None else None
    return before is not None and torch.promote_types(before, expr.args[1]) == expr.args[1]


def strip_casts(expr: Any, *, only_widening: bool) -> Any:
    """``expr`` without the floating-point casts around it."""
    while isinstance(expr, Expr) and expr.op == "cast" and (not only_widening or widens(expr)):
        expr = expr.args[0]
    return expr


def last_size(expr: Any) -> int | None:
    """Size of the last dimension of what ``expr`` computes, where it is known and static."""
    shape = sizes(expr.node) if isinstance(expr, Expr) and expr.node is not None else ()
    return shape[-1] if shape and isinstance(shape[-1], int) else None


def rank(expr: Any) -> int | None:
    """Number of dimensions of what ``expr`` computes, where known."""
    found = value(expr.node) if isinstance(expr, Expr) and expr.node is not None else None
    return found.ndim if isinstance(found, torch.Tensor) else None
