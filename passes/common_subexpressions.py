"""Operations that compute the same value twice, such as one cast a reader, become one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from ..rewrite import effects
from ..rewrite import graph as g
from ..rewrite.driver import Outcome, Verifier
from ..rewrite.vocabulary import is_in_place


@dataclass(frozen=True)
class CommonSubexpressions:
    """f(x), f(x)  →  one f(x),  in graphs that overwrite nothing in place."""

    name: str = "common_subexpressions"

    def run(self, module: fx.GraphModule, verifier: Verifier | None) -> Outcome:
        """Keep the first of equal operations that run under the same gradient and autocast mode."""
        nodes = list(module.graph.nodes)
        if any(is_in_place(n) for n in nodes):
            return Outcome()
        contexts, first = effects.context_of(module.graph), dict[Any, fx.Node]()
        returned = set[fx.Node]().union(*(effects.storage_roots(n) for n in nodes[-1].all_input_nodes))
        for node in nodes:
            if (
                node.op not in ("call_function", "call_method")
                or not effects.is_pure(node)
                or g.tensor_of(node) is None
            ):
                continue
            if node in returned:  # the caller may write into one of two results, and not see it in the other
                continue
            kept = first.setdefault((contexts[node], node.op, node.target, repr(node.args), repr(node.kwargs)), node)
            if kept is not node:
                node.replace_all_uses_with(kept, propagate_meta=False)
                module.graph.erase_node(node)
        return Outcome()
