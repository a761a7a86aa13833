"""Applies rules to one graph until none matches: pattern → legality → check → replacement → replay → commit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import fx

from . import effects
from . import graph as g
from .change import Change, build, commit, insertion_point, type_problem
from .expr import Expr, View
from .match import Match, Miss, find
from .report import NearMiss, Refusal, Rewrite
from .rule import RewriteRule
from .vocabulary import operation


class Verifier(Protocol):
    """Replays a replacement against what it replaces."""

    def __call__(self, module: fx.GraphModule, change: Change) -> tuple[float | None, str | None]:
        """The replacement's error relative to what it may be, and why it is rejected, if it is."""
        ...


@dataclass
class Outcome:
    """What a pass did to a graph; module paths are relative to the captured region."""

    rewrites: list[Rewrite] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    misses: list[NearMiss] = field(default_factory=list)

    def extend(self, other: Outcome) -> None:
        """Append all that ``other`` holds."""
        self.rewrites += other.rewrites
        self.refusals += other.refusals
        self.misses += other.misses


def examined(module: fx.GraphModule, change: Change, verifier: Verifier | None) -> tuple[float | None, str | None]:
    """The error of a replacement that may be committed; or why it may not be, and then its nodes are gone."""
    problem, error = type_problem(change), None
    if problem is None and verifier is not None:
        error, problem = verifier(module, change)
    if problem is not None:
        effects.erase_dead(change.new)
    return error, problem


def apply_rule(module: fx.GraphModule, rule: RewriteRule, verifier: Verifier | None) -> Outcome:
    """Rewrite ``module.graph`` with ``rule`` to a fixed point, from outputs to inputs."""
    outcome, refused = Outcome(), set[Any]()
    while _sweep(module, rule, verifier, outcome, refused):
        pass
    return outcome


def _sweep(
    module: fx.GraphModule, rule: RewriteRule, verifier: Verifier | None, outcome: Outcome, refused: set[Any]
) -> bool:
    """One walk over the graph; whether it changed anything."""
    view, contexts, changed = View(), effects.context_of(module.graph), False
    for node in reversed(list(module.graph.nodes)):
        if node._erased:
            continue
        miss = Miss()
        refusals = list[Refusal]()
        for match in _matches(rule, view, node, miss):
            refusal = _attempt(module, rule, match, contexts, verifier, outcome)
            if refusal is None:
                view, contexts, changed = View(), effects.context_of(module.graph), True
                break
            refusals.append(refusal)
        else:
            _note_failure(rule, node, refusals, miss, outcome, refused)
    return changed


def _attempt(
    module: fx.GraphModule,
    rule: RewriteRule,
    match: Match,
    contexts: dict[fx.Node, Any],
    verifier: Verifier | None,
    outcome: Outcome,
) -> Refusal | None:
    """Rewrite ``match``, or say why not."""
    refusal = _illegal(rule, match, contexts)
    if refusal is None:  # not ``or``: a refusal is falsy
        refusal = rule.check(match)
    if refusal is None:  # last: a rule may know why a result is read so early
        refusal = _comes_late(rule, match)
    return _replace(module, rule, match, verifier, outcome) if refusal is None else refusal


def _note_failure(
    rule: RewriteRule, node: fx.Node, refusals: list[Refusal], miss: Miss, outcome: Outcome, refused: set[Any]
) -> None:
    """Keep why the widest match at ``node`` was refused, or how near the pattern came."""
    if not refusals:
        _note_miss(rule, node, miss, outcome, refused)
    elif node.name not in refused:
        refused.add(node.name)
        outcome.refusals.append(refusals[0])


def _note_miss(rule: RewriteRule, node: fx.Node, miss: Miss, outcome: Outcome, refused: set[Any]) -> None:
    if miss.node is None:
        return
    size = max(p.size for p in rule.patterns)
    key = ("miss", rule.name, g.module_path(node))
    if 2 * miss.progress > size and key not in refused:
        refused.add(key)
        outcome.misses.append(
            NearMiss(
                rule.name, g.module_path(node), g.source(node), f"{miss.progress} of {size} operations", miss.reason
            )
        )


def _matches(rule: RewriteRule, view: View, node: fx.Node, miss: Miss) -> Iterator[Match]:
    if node.op not in ("call_function", "call_method"):
        return
    target = view.of(node)
    if not isinstance(target, Expr) or target.op in ("cast", "leaf"):
        return
    if _repeats(view, node, target):
        return
    for pattern in rule.patterns:
        if pattern.root.op != target.op:
            continue
        for outputs, bindings in find(pattern, target, miss):
            match = Match(pattern, (node, *outputs[1:]), bindings, anchor=node)
            if rule.absorb_cast:
                match.outputs = (_through_casts(node), *match.outputs[1:])
            if not rule.accepts(match):
                continue
            match.nodes = _computing(match)
            inputs = [view.of(i) for i in match.inputs()]
            match.handed_on = frozenset(n for n in match.nodes if any(view.of(n) is i for i in inputs))
            yield match


def _computing(match: Match) -> list[fx.Node]:
    """The nodes that compute the match from its inputs.

    Where an equation looks into a reduction, as in std x = √mean (x − mean x)², its node reads what an input is made of.
    That stays outside: else all that comes before would be part of the match.
    """
    inputs = match.inputs()
    nodes, above, reached = g.backward_slice(match.outputs, inputs), set(g.backward_slice(inputs, ())), set(inputs)
    for node in nodes:
        if not reached.isdisjoint(node.all_input_nodes):
            reached.add(node)
    # what has no inputs, such as a tensor of zeros, can be known to an equation: were it outside, a replay would draw it
    beyond = {n for n in above.intersection(nodes) - reached if n.all_input_nodes or n.op == "get_attr"}
    return g.backward_slice(match.outputs, beyond.union(inputs)) if beyond else nodes


def _repeats(view: View, node: fx.Node, target: Expr) -> bool:
    """Whether ``node`` only hands on a value that it is given: a copy, a reshape to the same shape, a transpose undone."""
    if any(view.of(i) is target for i in node.all_input_nodes):
        return True
    first = target.node
    if first is None or first is node:
        return False
    return any(first in n.all_input_nodes for n in g.backward_slice([node], [first]))


def _through_casts(node: fx.Node) -> fx.Node:
    """The last of the casts that each alone read the one before."""
    while len(node.users) == 1:
        user = next(iter(node.users))
        if user.op == "output" or operation(user) != "cast" or user.args[0] is not node or not _same_device(user, node):
            return node
        if not (g.dtype_of(user) or torch.int).is_floating_point:
            return node
        node = user
    return node


def _same_device(a: fx.Node, b: fx.Node) -> bool:
    x, y = g.tensor_of(a), g.tensor_of(b)
    return x is not None and y is not None and x.device == y.device


def _illegal(rule: RewriteRule, match: Match, contexts: dict[fx.Node, Any]) -> Refusal | None:
    """A refusal where moving the matched computation to one place would change what it reads or whether it is tracked."""
    start, end = match.nodes[0], insertion_point(match)
    if len({contexts[n] for n in (*match.nodes, end) if n.op != "get_attr" and n not in match.handed_on}) > 1:
        return rule.refuse(match, "gradient or autocast mode changes between the matched operations")
    if any(effects.is_random(n) for n in match.nodes):
        return rule.refuse(match, "a random operation would be moved")
    inside = [n for n in match.root.graph.nodes if not g.before(n, start) and not g.before(match.root, n)]
    write = next((n for n in inside if _stands_between(n, match, end)), None)
    if write is not None:
        return rule.refuse(match, f"{write.name} overwrites a value in place between the matched operations")
    if any(map(g.requires_grad, match.outputs)) and (node := _overwritten_later(match)) is not None:
        return rule.refuse(match, f"{node.name} overwrites later what the replacement may keep for its backward")
    return None


def _comes_late(rule: RewriteRule, match: Match) -> Refusal | None:
    """A refusal where an input is computed only after one of the results is read."""
    end = insertion_point(match)
    late = [i.name for i in match.inputs() if not g.before(i, end)]
    return rule.refuse(match, f"{late[0]} is computed after a result is first read") if late else None


def _stands_between(write: fx.Node, match: Match, end: fx.Node) -> bool:
    """Whether ``write`` overwrites what ``match`` reads or computes, on the way from there to ``end``, where the replacement
    reads: what only operations behind it read, such as labels filled in late, is for both as it left it."""
    written = effects.overwritten(write)
    if not written:
        return False
    passed = [n for n in match.nodes if not g.before(write, n) or not g.before(write, end)]  # a write reads, too
    # What hands an input on may be equal to it and yet a tensor of its own: a copy, or the same computed twice.
    known = {*match.nodes, *match.inputs()} - match.handed_on
    beside = [] if all(known.issuperset((p, *p.all_input_nodes)) for p in passed) else match.inputs()
    touched = (effects.storage_roots(n) for p in passed for n in (p, *p.all_input_nodes, *beside))
    return not written.isdisjoint(set[fx.Node]().union(*touched))


def _overwritten_later(match: Match) -> fx.Node | None:
    """What writes, after ``match``, to a value that it reads: the original may have kept a copy, or it in another dtype."""
    read = [n for n in match.outputs if not set(match.nodes).isdisjoint(n.users)]
    kept = set[fx.Node]().union(*(effects.storage_roots(n) for n in (*match.inputs(), *read)))
    return next((n for n in match.root.graph.nodes if g.before(match.root, n) and kept & effects.overwritten(n)), None)


def _replace(
    module: fx.GraphModule, rule: RewriteRule, match: Match, verifier: Verifier | None, outcome: Outcome
) -> Refusal | None:
    change = build(module.graph, rule, match)
    error, problem = examined(module, change, verifier)
    if problem is not None:
        return rule.refuse(match, problem)
    path, place = g.module_path(match.anchor), g.source(match.anchor)
    outcome.rewrites.append(Rewrite(rule.name, path, place, *commit(change), error))
    return None
