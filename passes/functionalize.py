"""In-place operations on values that nobody else holds become ordinary ones, so that rules see values, not memory."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

from torch import fx

from ..rewrite import effects
from ..rewrite import graph as g
from ..rewrite.change import fake_run
from ..rewrite.driver import Outcome, Verifier
from ..rewrite.vocabulary import is_in_place
from .written_parts import join_writes

_OPERATORS: dict[Any, Any] = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
    operator.ipow: operator.pow,
}
_METHODS = frozenset((
    "add", "sub", "mul", "div", "addcmul", "pow", "square", "sqrt", "rsqrt", "reciprocal", "neg", "abs", "exp", "log",
    "clamp", "clamp_min", "clamp_max", "relu", "sigmoid", "tanh", "erf", "masked_fill",
))  # fmt: skip


@dataclass(frozen=True)
class Functionalize:
    """x += y  →  x' = x + y,  where x is a fresh value of the graph and no view of it is read afterwards.

    Fresh memory that is written part by part is one value, too: that of all parts.
    """

    name: str = "functionalize"

    def run(self, module: fx.GraphModule, verifier: Verifier | None) -> Outcome:
        """Replace what is safe; what is not stays, and legality checks of later rules see it."""
        join_writes(module.graph)
        for node in list(module.graph.nodes):
            if is_in_place(node) and _is_safe(node):
                _make_functional(node)
        return Outcome()


def _is_safe(node: fx.Node) -> bool:
    target = node.args[0] if node.args else None
    if not isinstance(target, fx.Node) or _functional(node) is None:
        return False
    if effects.storage_roots(target) != {target} or target.op not in ("call_function", "call_method"):
        return False
    same_type = g.dtype_of(target) == g.dtype_of(node) and g.sizes(target) == g.sizes(node)
    return same_type and not any(_aliases(user, target, node) for user in target.users if user is not node)


def _aliases(user: fx.Node, target: fx.Node, node: fx.Node) -> bool:
    """Whether ``user`` may hand out ``target``'s memory: a view of it, or a write before. Whatever reads ``target`` itself
    after ``node``, the graph's output included, is given the result."""
    return user.op != "output" and (
        target in effects.storage_roots(user) or (is_in_place(user) and g.before(user, node))
    )


def _functional(node: fx.Node) -> tuple[str, Any, dict[str, Any]] | None:
    """Kind, target and keywords of the same operation without the write."""
    kwargs = {k: v for k, v in node.kwargs.items() if k != "inplace"}
    if node.target in _OPERATORS:
        return "call_function", _OPERATORS[node.target], kwargs
    if node.kwargs.get("inplace") is True:
        return node.op, node.target, kwargs
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    known = name.endswith("_") and name[:-1] in _METHODS
    return ("call_method", name[:-1], kwargs) if known else None


def _make_functional(node: fx.Node) -> None:
    found, target = _functional(node), node.args[0]
    assert found is not None and isinstance(target, fx.Node)
    node.op, node.target, node.kwargs = found
    result = _in_its_dtype(node)
    target.replace_all_uses_with(
        result, delete_user_cb=lambda user: user is not node and g.before(node, user), propagate_meta=False
    )


def _in_its_dtype(node: fx.Node) -> fx.Node:
    """What ``node`` computed before: a write keeps the dtype of what it writes to, a sum takes that of a wider operand."""
    dtype, computed = g.dtype_of(node), fake_run(node)
    if computed.dtype == dtype:
        return node
    with node.graph.inserting_after(node):
        cast = node.graph.call_method("to", (node, dtype))
    cast.meta = dict(node.meta)
    node.meta["val"] = computed
    node.replace_all_uses_with(cast, delete_user_cb=lambda user: user is not cast, propagate_meta=False)
    return cast
