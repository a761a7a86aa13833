"""Gate and up with their adapters, and the activation that alone reads them, become one call."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

from torch import fx
from torch.fx.proxy import GraphAppendingTracer

from ..kernels.gated_activation import gated_activation
from ..kernels.gated_linears import gated_linears
from ..kernels.parallel_linears import parallel_linears
from ..rewrite import effects
from ..rewrite import graph as g
from ..rewrite.change import Change, commit, describe
from ..rewrite.driver import Outcome, Verifier, examined
from ..rewrite.report import Refusal, Rewrite
from ..rewrite.rule import call
from ..rewrite.vocabulary import is_in_place


@dataclass(frozen=True)
class FuseGatedLinears:
    """gated_activation(*parallel_linears(x, …))  →  gated_linears(x, …)

    What the adapters add to gate and up is then added where the activation, and its gradient, read them. Only on a GPU, unless
    ``everywhere``: elsewhere the one call does what the two did.
    """

    name: str = "gated_linears"
    everywhere: bool = False

    def run(self, module: fx.GraphModule, verifier: Verifier | None) -> Outcome:
        """Merge every pair; each is replayed."""
        outcome = Outcome()
        for node in list(module.graph.nodes):
            parts = _parts(node)
            if parts and (self.everywhere or _on_gpu(node)):
                self._merge(module, parts, node, verifier, outcome)
        return outcome

    def _merge(
        self, module: fx.GraphModule, parts: list[fx.Node], node: fx.Node, verifier: Verifier | None, outcome: Outcome
    ) -> None:
        linears: Any = parts[0].args[0]
        graph = module.graph
        tracer = GraphAppendingTracer(graph)
        args, kwargs = g.map_nodes((linears.args, dict(linears.kwargs)), lambda n: fx.Proxy(n, tracer))
        x, *each = args
        order: list[Any] = [part.args[1] for part in parts]
        both = [None if column is None else [column[i] for i in order] for column in each]
        with graph.inserting_before(node):
            made = call(gated_linears, x, *both, node.args[2], adapter_dtype=kwargs.get("adapter_dtype")).node
        describe(made, node)
        change = Change(self.name, list(linears.all_input_nodes), [linears, *parts, node], (node,), [made], (made,))
        error, problem = examined(module, change, verifier)
        path, place = g.module_path(node), g.source(node)
        if problem is not None:
            outcome.refusals.append(Refusal(self.name, path, place, problem))
            return
        outcome.rewrites.append(Rewrite(self.name, path, place, *commit(change), error))


def _on_gpu(node: fx.Node) -> bool:
    tensor = g.tensor_of(node)
    return tensor is not None and tensor.device.type == "cuda"


def _parts(node: fx.Node) -> list[fx.Node]:
    """gate and up, where they are the two results of one call, with adapters that read x itself, and nobody else reads them."""
    if node.target is not gated_activation:
        return []
    parts = [a for a in node.args[:2] if isinstance(a, fx.Node) and a.target is operator.getitem]
    sources: list[Any] = [part.args[0] for part in parts]
    if len(parts) != 2 or sources[0] is not sources[1] or sources[0].target is not parallel_linears:
        return []
    source: fx.Node = sources[0]
    alone = set(source.users) == set(parts) and all(set(part.users) == {node} for part in parts)
    a, own = source.args[4], source.kwargs.get("x_adapters")
    adapted = isinstance(a, list | tuple) and len(a) == 2 and None not in a
    itself = not isinstance(own, list | tuple) or all(z is None for z in own)
    between = [n for n in node.graph.nodes if g.before(source, n) and g.before(n, node)]
    return parts if alone and adapted and itself and not any(map(_forbids, between)) else []


def _forbids(node: fx.Node) -> bool:
    """Whether a product may not be computed after ``node`` instead of before."""
    return is_in_place(node) or effects.is_context(node) or effects.is_random(node)
