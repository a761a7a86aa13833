"""Rules over nodes that stand side by side: equal but for some arguments, none reading another's result."""

from __future__ import annotations

from collections import defaultdict
from typing import Any, ClassVar

from torch import fx
from torch.fx.proxy import GraphAppendingTracer

from . import effects
from . import graph as g
from .change import Change, commit, fake_run
from .driver import Outcome, Verifier, examined
from .report import Refusal, Rewrite
from .vocabulary import is_in_place


class SiblingRule:
    """Base of rules that merge several nodes of one key into one call."""

    name: ClassVar[str]
    most: ClassVar[int] = 8

    def key(self, node: fx.Node) -> Any:
        """Equal for nodes that may be merged; None for nodes that the rule does not concern."""
        raise NotImplementedError

    def merge(self, nodes: list[fx.Node], values: list[Any]) -> list[Any] | None:
        """The merged values, one per node, built with ``call`` from ``values``; None where they do not fit together.

        Each of ``values`` has ``args`` and ``kwargs``: those of its node, with proxies for nodes.
        """
        raise NotImplementedError


class _Call:
    def __init__(self, node: fx.Node, tracer: Any) -> None:
        wrap = lambda n: fx.Proxy(n, tracer)  # noqa: E731
        self.args: tuple[Any, ...] = g.map_nodes(node.args, wrap)
        self.kwargs: dict[str, Any] = dict(g.map_nodes(dict(node.kwargs), wrap))


def apply_sibling_rule(module: fx.GraphModule, rule: SiblingRule, verifier: Verifier | None) -> Outcome:
    """Merge every group of siblings once."""
    outcome = Outcome()
    for group in _groups(module.graph, rule):
        refusal = _merge(module, rule, group, verifier, outcome)
        if refusal is not None:
            outcome.refusals.append(refusal)
    return outcome


def _groups(graph: fx.Graph, rule: SiblingRule) -> list[list[fx.Node]]:
    contexts, found = effects.context_of(graph), defaultdict[Any, list[fx.Node]](list)
    for node in graph.nodes:
        if node.op == "call_function":
            key = rule.key(node)
            if key is not None:
                found[repr(key), contexts[node]].append(node)
    groups = [nodes[i : i + rule.most] for nodes in found.values() for i in range(0, len(nodes), rule.most)]
    return [nodes for nodes in groups if len(nodes) > 1]


def _merge(
    module: fx.GraphModule, rule: SiblingRule, nodes: list[fx.Node], verifier: Verifier | None, outcome: Outcome
) -> Refusal | None:
    graph, last = module.graph, nodes[-1]
    readers = _readers_between(graph, nodes)
    problem = _order_problem(graph, nodes, readers)
    if problem is not None:
        return Refusal(rule.name, g.module_path(last), g.source(last), problem)
    tracer, before = GraphAppendingTracer(graph), set(graph.nodes)
    with graph.inserting_before(last):
        merged = rule.merge(nodes, [_Call(n, tracer) for n in nodes])
    if merged is None:
        return None
    new = [n for n in graph.nodes if n not in before]
    for node in new:
        node.meta = {k: v for k, v in last.meta.items() if k in ("nn_module_stack", "stack_trace")}
        node.meta["val"] = fake_run(node)
    inputs = list(dict.fromkeys(i for n in nodes for i in n.all_input_nodes))
    change = Change(rule.name, inputs, list(nodes), tuple(nodes), new, tuple(m.node for m in merged))
    error, problem = examined(module, change, verifier)
    if problem is not None:
        return Refusal(rule.name, g.module_path(last), g.source(last), problem)
    path, place = _common_path(nodes), g.source(last)
    for node in reversed(readers):
        last.append(node)
    outcome.rewrites.append(Rewrite(rule.name, path, place, *commit(change), error))
    return None


def _common_path(nodes: list[fx.Node]) -> str:
    """The module that holds all of ``nodes``."""
    parts = [g.module_path(n).split(".") for n in nodes]
    shared = 0
    while all(len(p) > shared for p in parts) and len({p[shared] for p in parts}) == 1:
        shared += 1
    return ".".join(parts[0][:shared])


def _between(graph: fx.Graph, nodes: list[fx.Node]) -> list[fx.Node]:
    return [n for n in graph.nodes if g.before(nodes[0], n) and g.before(n, nodes[-1])]


def _readers_between(graph: fx.Graph, nodes: list[fx.Node]) -> list[fx.Node]:
    """What stands between the siblings and needs the result of one: it must move behind the last."""
    dependent, readers = set(nodes[:-1]), list[fx.Node]()
    for node in _between(graph, nodes):
        if any(i in dependent for i in node.all_input_nodes):
            dependent.add(node)
            readers.append(node)
    return readers


def _order_problem(graph: fx.Graph, nodes: list[fx.Node], readers: list[fx.Node]) -> str | None:
    """Why the siblings may not be computed where the last one stands, and their readers behind it, if so."""
    between, moved = _between(graph, nodes), set(readers)
    if moved & set(nodes) or any(i in moved or i in nodes for i in nodes[-1].all_input_nodes):
        return "one of them reads another's result"
    read = set[fx.Node]().union(*(effects.storage_roots(i) for n in nodes[:-1] for i in n.all_input_nodes))
    if any(is_in_place(n) and (moved or read & effects.overwritten(n)) for n in between):
        return "between them a value is overwritten in place"
    if moved and any(effects.is_context(n) for n in between):
        return "between them gradient or autocast mode changes"
    if any(effects.is_random(n) for n in moved) and any(effects.is_random(n) for n in between if n not in moved):
        return "between them random numbers would be drawn in another order"
    return None
