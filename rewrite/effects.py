"""What a node does besides computing its value: modes, random numbers, memory shared or overwritten. It may be neither erased
nor reordered without looking at that."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import fx

from .graph import dtype_of, position
from .vocabulary import bind, is_in_place, operation, target_name

_CONTEXT_TARGETS = (
    "_set_grad_enabled",
    "_enter_autocast",
    "_exit_autocast",
    "set_grad_enabled",
    "_enter_inference_mode",
    "_exit_inference_mode",
)
_RANDOM = frozenset((
    "dropout", "dropout_", "bernoulli", "bernoulli_", "rand", "randn", "rand_like", "randn_like", "alpha_dropout",
    "normal_", "uniform_", "multinomial", "rrelu", "gumbel_softmax", "feature_dropout", "native_dropout",
))  # fmt: skip
VIEWS = frozenset((
    "view", "transpose", "permute", "t", "unsqueeze", "squeeze", "expand", "getitem", "select", "narrow", "chunk", "split",
    "unbind", "flatten", "unflatten", "view_as", "view_as_real", "view_as_complex", "detach", "diagonal", "expand_as",
    "contiguous", "cast", "as_strided", "movedim", "real", "imag", "mT", "T", "H",
))  # fmt: skip


def is_context(node: fx.Node) -> bool:
    """Whether ``node`` switches gradient or autocast mode for the nodes after it."""
    return node.op == "call_function" and target_name(node.target) in _CONTEXT_TARGETS


def is_random(node: fx.Node) -> bool:
    """Whether ``node`` draws from the random generator."""
    return node.op in ("call_function", "call_method") and operation(node) in _RANDOM


def is_pure(node: fx.Node) -> bool:
    """Whether ``node`` may be erased when nothing reads it."""
    if node.op == "get_attr":
        return True
    return node.op in ("call_function", "call_method") and not (
        is_in_place(node) or is_context(node) or is_random(node)
    )


def storage_roots(node: fx.Node) -> set[fx.Node]:
    """The nodes whose memory ``node`` may share, through any chain of views, itself included."""
    roots, pending = {node}, [node]
    while pending:
        current = pending.pop()
        if current.op in ("call_function", "call_method") and _may_alias(current):
            for parent in current.all_input_nodes:
                if parent not in roots:
                    roots.add(parent)
                    pending.append(parent)
    return roots


def _may_alias(node: fx.Node) -> bool:
    """Whether ``node`` may return memory of an input: a view, a write in place, what need not convert or drop anything."""
    if operation(node) == "cast" and isinstance(node.args[0], fx.Node):
        before, after = dtype_of(node.args[0]), dtype_of(node)
        return before is None or after is None or before == after
    return operation(node) in VIEWS or is_in_place(node) or is_idle_dropout(node)


def is_idle_dropout(node: fx.Node) -> bool:
    """Whether ``node`` is a dropout that drops nothing, and returns its input itself."""
    if operation(node) != "dropout":
        return False
    _, p, training, _ = bind("dropout", node.args, dict(node.kwargs)) or (None, 1.0, True, False)
    return training is False or (isinstance(p, int | float) and p == 0)


def overwritten(node: fx.Node) -> set[fx.Node]:
    """The nodes whose memory ``node`` may overwrite: what shares its ``out``, else its first argument."""
    if not is_in_place(node):
        return set()
    schema = getattr(node.target, "_schema", None)
    if schema is not None and schema.is_mutable:
        written = node.all_input_nodes
    else:
        written = [n for n in (node.kwargs.get("out"), *node.args[:1]) if isinstance(n, fx.Node)]
    return set[fx.Node]().union(*(storage_roots(n) for n in written))


def written_to(graph: fx.Graph) -> set[fx.Node]:
    """The nodes whose memory something in ``graph`` may overwrite."""
    return set[fx.Node]().union(*map(overwritten, graph.nodes))


def written_inputs(graph: fx.Graph) -> list[int]:
    """The positions of the inputs that something in ``graph`` may overwrite."""
    written = written_to(graph)
    return [i for i, n in enumerate(n for n in graph.nodes if n.op == "placeholder") if n in written]


def context_of(graph: fx.Graph) -> dict[fx.Node, Any]:
    """For each node, the gradient and autocast modes that the graph put in force before it: equal where they are the same.

    Those in force when the graph starts equal no others: the graph does not say what they are.
    """
    contexts: dict[fx.Node, Any] = {}
    gradient, opened = None, tuple[fx.Node, ...]()
    for node in graph.nodes:
        name = target_name(node.target) if is_context(node) else ""
        if name.endswith("set_grad_enabled"):
            gradient = node.args[0]
        elif name.startswith("_exit"):
            opened = tuple(n for n in opened if n is not node.args[0])
        elif name:
            opened += (node,)
        contexts[node] = gradient, opened
    return contexts


def erase_dead(nodes: Iterable[fx.Node]) -> int:
    """Erase those of ``nodes`` that are pure and unread, last first; returns how many."""
    erased = 0
    for node in sorted(nodes, key=position, reverse=True):
        if not node.users and is_pure(node):
            node.graph.erase_node(node)
            erased += 1
    return erased
