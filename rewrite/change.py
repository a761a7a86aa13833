"""One replacement in a graph: built beside what it replaces, compared in type, and committed."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.proxy import GraphAppendingTracer

from . import effects
from . import graph as g
from .match import Match
from .memory_order import order_is_seen
from .rule import RewriteRule
from .vocabulary import operation


@dataclass
class Change:
    """One replacement, built but not yet committed."""

    rule: str
    inputs: list[fx.Node]
    old: list[fx.Node]
    old_outputs: tuple[fx.Node, ...]
    new: list[fx.Node]
    new_outputs: tuple[fx.Node, ...]


def insertion_point(match: Match) -> fx.Node:
    """Where the replacement goes: in place of the root, or before whoever reads another output earlier."""
    inside = set(match.nodes)
    holders = [*match.outputs, *_after_outputs(match.nodes, match.outputs[1:])]
    readers = [u for o in holders for u in o.users if u not in inside]
    return min((match.root, *readers), key=g.position)


def _after_outputs(nodes: list[fx.Node], outputs: tuple[fx.Node, ...]) -> list[fx.Node]:
    """Those of ``nodes``, in order, that read one of ``outputs``, directly or not."""
    found = dict.fromkeys(outputs)
    for node in nodes:
        if node not in found and any(i in found for i in node.all_input_nodes):
            found[node] = None
    return [n for n in found if n not in outputs]


def build(graph: fx.Graph, rule: RewriteRule, match: Match) -> Change:
    """Insert the replacement's nodes, with the meta data of what they replace and fake values of their own."""
    tracer = GraphAppendingTracer(graph)
    before = set(graph.nodes)
    point = insertion_point(match)
    wrap = lambda a: fx.Proxy(a, tracer) if isinstance(a, fx.Node) else a  # noqa: E731
    arguments = {name: g.map_nodes(match.bindings.get(name), wrap) for name in match.pattern.wildcards}
    with graph.inserting_before(point):
        result = rule.rewrite(match, **arguments)
    outputs = tuple(r.node for r in (result if isinstance(result, tuple) else (result,)))
    new = _describe(graph, before, match)
    with graph.inserting_before(point):
        outputs = tuple(laid_out(o, n, tracer) for o, n in zip(match.outputs, outputs, strict=True))
    new += _describe(graph, before.union(new), match)
    return Change(rule.name, match.inputs(), match.nodes, match.outputs, new, outputs)


def _describe(graph: fx.Graph, before: set[fx.Node], match: Match) -> list[fx.Node]:
    """Give every node that is not in ``before`` its meta data, and return them."""
    new = [n for n in graph.nodes if n not in before]
    for node in new:
        describe(node, match.anchor)
    return new


def describe(node: fx.Node, like: fx.Node) -> None:
    """Give a new node the place of ``like`` in the model and its source, and a fake value of its own."""
    node.meta = {k: v for k, v in like.meta.items() if k in ("nn_module_stack", "stack_trace", "source_fn_stack")}
    node.meta["val"] = fake_run(node)


def laid_out(old: fx.Node, new: fx.Node, tracer: Any) -> fx.Node:
    """``new`` in the memory order of ``old``, where a reader may take a view that exists in no other."""
    a, b = g.tensor_of(old), g.tensor_of(new)
    if a is None or b is None or a.ndim != b.ndim or g.memory_order(a, wide=True) == g.memory_order(b, wide=True):
        return new
    if not order_is_seen(old):
        return new
    order = g.memory_order(a)
    back = [order.index(d) for d in range(a.ndim)]
    return fx.Proxy(new, tracer).permute(order).contiguous().permute(back).node


def fake_run(node: fx.Node) -> Any:
    """What ``node`` computes, on fake tensors: its shape, dtype, device and whether it is tracked."""
    values = [v for n in node.all_input_nodes for v in _tensors(g.value(n))]
    mode = next((v.fake_mode for v in values if isinstance(v, FakeTensor)), None)
    args, kwargs = g.map_nodes((node.args, dict(node.kwargs)), g.value)
    with mode or nullcontext(), enable_python_dispatcher():  # composite operators take symbolic sizes only through it
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        assert callable(node.target)
        return node.target(*args, **kwargs)


def _tensors(found: Any) -> list[Tensor]:
    if isinstance(found, Tensor):
        return [found]
    return [t for f in found for t in _tensors(f)] if isinstance(found, tuple | list) else []


def type_problem(change: Change) -> str | None:
    """How the replacement's outputs differ in dtype, device or shape from what they replace, if they do."""
    for old, new in zip(change.old_outputs, change.new_outputs, strict=True):
        before, after = g.tensor_of(old), g.tensor_of(new)
        if before is None or after is None:
            continue
        if (before.dtype, before.device) != (after.dtype, after.device) or before.ndim != after.ndim:
            return f"the replacement computes {after.dtype}{list(after.shape)}, not {before.dtype}{list(before.shape)}"
        if any(g.hint(a) != g.hint(b) for a, b in zip(before.shape, after.shape, strict=True)):
            return f"the replacement's shape {list(after.shape)} is not {list(before.shape)}"
    return None


def commit(change: Change) -> tuple[int, int, int]:
    """Make every reader read the replacement, and erase what is then unread.

    Returns nodes removed, nodes added, and the bytes of intermediate results that are no longer written.
    """
    late = _after_outputs(change.old, change.old_outputs[1:])
    for old, new in zip(change.old_outputs, change.new_outputs, strict=True):
        old.replace_all_uses_with(new, propagate_meta=False)
    sizes = {n: g.tensor_bytes(n) for n in change.old if effects.is_pure(n) and not _is_view(n)}
    removed = effects.erase_dead(change.old)
    for node in reversed([n for n in late if not n._erased]):
        change.new[-1].append(node)  # it survives, for a reader of its own, and reads a result that stands later now
    gone = sum(size for node, size in sizes.items() if node._erased)
    added = sum(g.tensor_bytes(n) for n in change.new if not _is_view(n))
    return removed, len(change.new), max(0, gone - added)


def _is_view(node: fx.Node) -> bool:
    return node.op in ("call_function", "call_method") and operation(node) in effects.VIEWS - {"contiguous", "cast"}
