"""Finds tensors of a graph that are made to be written part by part, and makes one operation of the writes."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import fx

from ..rewrite import effects
from ..rewrite import graph as g
from ..rewrite.change import describe
from ..rewrite.expr import Expr, View
from ..rewrite.vocabulary import bind, is_in_place, operation
from ..rewrite.written import Part, written

_MAKERS = frozenset((
    "empty", "zeros", "ones", "full", "empty_like", "zeros_like", "ones_like", "full_like", "new_empty", "new_zeros",
    "new_ones", "new_full", "clone",
))  # fmt: skip
"""What makes memory that nobody else holds. The gradient of what a clone held is zero once all of it is overwritten; of what
other operations compute it might be 0 · ∞."""
_MOST = 3
"""Parts that become one operation: two halves that are turned, and the rest. No rule knows joints of more, whose values would
all be held in memory until the last."""


class _Write(NamedTuple):
    at: fx.Node
    value: Any
    part: Part
    view: fx.Node | None = None
    """The view of the tensor that is written to, if the tensor itself is not."""

    @property
    def elements(self) -> range:
        return range(self.part, self.part + 1) if isinstance(self.part, int) else range(*self.part)


def join_writes(graph: fx.Graph) -> None:
    """``y = empty(…); y[..., :h] = a; y[..., h:] = b``  →  ``y = written((a, b), …)``

    Only where the writes are all that happens to y until all of it is written, and may as well happen together, at the last.
    """
    contexts = effects.context_of(graph)
    for node in list(graph.nodes):
        if node.op not in ("call_function", "call_method") or operation(node) not in _MAKERS or is_in_place(node):
            continue
        writes = _first_writes(node)
        if len(writes) > 1 and len({contexts[w.at] for w in writes}) == 1 and _may_wait(node, writes):
            _replace(graph, node, writes)


def _first_writes(made: fx.Node) -> list[_Write]:
    """In order, the writes that fill ``made`` before anything else reads it; none where it is not filled so."""
    size, found, filled = g.static_size(made), list[_Write](), set[int]()
    events = [(write.at if write else user, write) for user in made.users for write in (_write(made, user),)]
    for _, write in sorted(events, key=lambda event: g.position(event[0])):
        if write is None or not write.elements or len(found) == _MOST or not filled.isdisjoint(write.elements):
            return []
        found.append(write)
        filled.update(write.elements)
        if len(filled) == size:
            return found
    return []


def _write(made: fx.Node, user: fx.Node) -> _Write | None:
    """What ``user``, a write or a view that is written to and nothing else, writes of ``made``; None if it is neither."""
    view = View()
    leaf = view.leaf(made)
    if operation(user) == "setitem":
        write = _Write(user, user.args[2], _part(view.make("getitem", leaf, view.of(user.args[1])), leaf))
    else:
        copy, bound = next(iter(user.users), None), bind(operation(user), user.args, dict(user.kwargs))
        if bound is None or copy is None or len(user.users) > 1 or operation(copy) != "copy_":
            return None
        write = _Write(copy, copy.args[1], _part(view.make(operation(user), leaf, *view.of(bound[1:])), leaf), user)
    target = made if write.view is None else write.view
    return write if write.part is not None and write.at.args[0] is target and _fits(made, write) else None


def _part(expr: Any, leaf: Expr) -> Any:
    """The part of the last dimension of ``leaf`` that ``expr`` is; None if it is none."""
    if not isinstance(expr, Expr) or not expr.args or expr.args[0] is not leaf:
        return None
    if expr.op == "part":
        return expr.args[1:] if all(isinstance(i, int) for i in expr.args[1:]) else None
    items = expr.args[1] if expr.op == "getitem" and isinstance(expr.args[1], tuple) else (None,)
    leads, shape = items[:-1], g.sizes(leaf.node)
    whole = Ellipsis in leads or len(items) == len(shape)
    if type(items[-1]) is not int or not whole or not all(i is Ellipsis or i == slice(None) for i in leads):
        return None
    return items[-1] % shape[-1]


def _fits(made: fx.Node, write: _Write) -> bool:
    """Whether the value needs no more than a conversion of floating-point numbers to take its place in ``made``."""
    there, value = g.tensor_of(made), g.tensor_of(write.value)
    if there is None or value is None or write.at.users:
        return False
    shape = g.sizes(made)[:-1] + (() if isinstance(write.part, int) else (len(write.elements),))
    alike = there.dtype == value.dtype or (there.is_floating_point() and value.is_floating_point())
    return alike and there.device == value.device and value.ndim == len(shape) and g.sizes(write.value) == shape


def _may_wait(made: fx.Node, writes: list[_Write]) -> bool:
    """Whether nobody can tell if all of ``writes`` happen where the last of them stands."""
    first, last = writes[0].at, writes[-1].at
    written_to = {n for w in writes for n in (w.at, w.view)}
    if any(not g.before(last, user) for user in made.users if user not in written_to):
        return False
    if g.requires_grad(made) and not any(g.requires_grad(w.value) for w in writes):
        return False
    read = set[fx.Node]().union(*(effects.storage_roots(w.value) for w in writes))
    between = (n for n in made.graph.nodes if g.before(first, n) and g.before(n, last) and n not in written_to)
    return made not in read and not any(read & effects.overwritten(n) for n in between)


def _replace(graph: fx.Graph, made: fx.Node, writes: list[_Write]) -> None:
    last, there = writes[-1].at, g.tensor_of(made)
    assert there is not None
    ordered = sorted(writes, key=lambda w: w.elements[0])
    values, parts = tuple(w.value for w in ordered), tuple(w.part for w in ordered)
    with graph.inserting_before(last):
        new = graph.call_function(written, (values, parts, g.static_size(made), g.memory_order(there), there.dtype))
    describe(new, last)
    made.replace_all_uses_with(new, delete_user_cb=lambda user: g.before(last, user), propagate_meta=False)
    for node in (*(w.at for w in writes), *(w.view for w in writes if w.view is not None), made):
        if not node.users:
            graph.erase_node(node)
