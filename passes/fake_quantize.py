"""Quantization-aware training: products read their weight as it will be stored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, fx

from ..kernels.fake_quantize import fake_quantize, fake_quantize_rows
from ..quant.stored import Format
from ..rewrite.driver import Outcome, Verifier
from ..rewrite.expr import View
from ..rewrite.graph import module_path, source
from ..rewrite.report import Rewrite
from .observe_linears import product_of


@dataclass(frozen=True)
class FakeQuantize:
    """x · W  →  x · fake_quantize(W),  for the parameters that a plan stores in fewer bits

    One graph serves many layers, whose formats differ: which one a weight has is looked up when the graph runs, by the
    parameter itself.

    Args:
        formats: by identity of the parameter; those that are missing stay as they are.
        turned: identities of the parameters that are stored transposed (a linear by columns).
        activations: round the inputs of products with int8 weights to int8 too, row by row, as LLM.int8 does.
    """

    formats: Mapping[int, Format] = field(repr=False)
    turned: frozenset[int] = frozenset()
    activations: bool = False
    name: str = "fake_quantize"

    def run(self, module: fx.GraphModule, verifier: Verifier | None) -> Outcome:
        """Put the calls in. They change what is computed, as they must: nothing is replayed."""
        view, outcome, done = View(), Outcome(), dict[fx.Node, fx.Node]()
        for node in list(module.graph.nodes):
            found = product_of(view, node)
            if found is None:
                continue
            x, weight, _ = found
            self._exchange(module.graph, node, weight, done)
            added = 1
            if self.activations and x in node.all_input_nodes:
                with module.graph.inserting_before(node):
                    rounded = module.graph.call_function(self.round_input, (x, weight))
                rounded.meta = dict(x.meta)
                node.replace_input_with(x, rounded)
                added = 2
            outcome.rewrites.append(Rewrite(self.name, module_path(node), source(node), 0, added, 0))
        return outcome

    def _exchange(self, graph: fx.Graph, node: fx.Node, weight: fx.Node, done: dict[fx.Node, fx.Node]) -> None:
        """Have every reader of ``weight`` read what it will be; once for each weight."""
        if weight in done:
            return
        first = next(n for n in graph.nodes if n in weight.users)
        with graph.inserting_before(first):
            done[weight] = graph.call_function(self.store, (weight,))
        done[weight].meta = {k: v for k, v in weight.meta.items() if k != "grapharg"}
        weight.replace_all_uses_with(done[weight], lambda user: user is not done[weight], propagate_meta=False)

    def store(self, weight: Tensor) -> Tensor:
        """A parameter as the plan will store it, or as it is."""
        chosen = self.formats.get(id(weight))
        if chosen is None:
            return weight
        if id(weight) in self.turned:
            return fake_quantize(weight.t(), chosen).t()
        return fake_quantize(weight, chosen)

    def round_input(self, x: Tensor, weight: Tensor) -> Tensor:
        """The input of a product with an int8 weight, rounded; any other as it is."""
        chosen = self.formats.get(id(weight))
        return fake_quantize_rows(x) if chosen is not None and chosen.kind == "int8" else x
