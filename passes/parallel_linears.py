"""Linears that read one input, such as q/k/v or gate/up, become one operator with their adapters."""

from __future__ import annotations

from typing import Any

from torch import fx

from ..kernels.lora_linear import lora_linear
from ..kernels.parallel_linears import parallel_linears
from ..kernels.quant_linear import quant_linear
from ..rewrite.graph import requires_grad, sizes
from ..rewrite.rule import call
from ..rewrite.siblings import SiblingRule
from ..rewrite.vocabulary import bind, operation
from .storage import dense_layout


class FuseParallelLinears(SiblingRule):
    """lora_linear(x, W₁, …), lora_linear(x, W₂, …)  →  parallel_linears(x, [W₁, W₂], …)

    The input is saved once, its adapters' first products are one product, and its gradient is summed in one buffer.
    """

    name = "parallel_linears"

    def key(self, node: fx.Node) -> Any:
        """Linears of one input whose adapters run in one dtype."""
        if node.target in (lora_linear, quant_linear):
            return node.args[0]
        found = _bound(node) if operation(node) == "linear" else None
        return found[0] if found is not None and len(sizes(found[1])) == 2 else None

    def merge(self, nodes: list[fx.Node], values: list[Any]) -> list[Any] | None:
        """One call; None where no linear of the group has an adapter or 4-bit storage: there nothing is gained."""
        dtypes = {repr(n.kwargs.get("adapter_dtype")) for n in nodes if n.target is lora_linear}
        if all(n.target not in (lora_linear, quant_linear) for n in nodes) or len(dtypes) > 1:
            return None
        if not any(n.target is lora_linear for n in nodes) and not requires_grad(self.key(nodes[0])):
            return None
        each = [_arguments(n, v) for n, v in zip(nodes, values, strict=True)]
        (x, *_), weights, layouts, biases, a, b, scales, x_adapters = (
            list(column) for column in zip(*each, strict=True)
        )
        kind = next((n.kwargs.get("adapter_dtype") for n in nodes if n.target is lora_linear), None)
        outputs = call(
            parallel_linears,
            x,
            weights,
            layouts,
            biases,
            a,
            b,
            scales,
            x_adapters=x_adapters,
            adapter_dtype=kind,
        )
        return [outputs[i] for i in range(len(nodes))]


def _bound(node: fx.Node) -> tuple[Any, ...] | None:
    return bind("linear", node.args, dict(node.kwargs))


def _arguments(node: fx.Node, value: Any) -> tuple[Any, ...]:
    """Input, weight, layout, bias, A, B, scale and the adapter's own input of one linear."""
    if node.target is lora_linear:
        return *value.args, value.kwargs.get("x_adapter")
    if node.target is quant_linear:
        return *value.args, None, None, 1.0, None
    found, traced = bind("linear", value.args, value.kwargs), _bound(node)
    assert found is not None and traced is not None
    x, weight, bias = found
    return x, [weight], dense_layout(traced[1], by_rows=True).encode(), bias, None, None, 1.0, None
