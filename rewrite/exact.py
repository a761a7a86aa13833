"""Graphs in float64: what a replay takes for the truth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_map

from .effects import storage_roots
from .graph import autograd_body
from .vocabulary import bind, operation, target_name

SLICE = 2**25
"""Numbers of a weight that are in float64 at a time, where all of it need not be."""


def upcast(x: Any, on_host: bool = False) -> Any:
    """A tensor of numbers as one of float64 or complex128, tracked where it was; anything else as it is."""
    if not isinstance(x, Tensor):
        return x
    wide = on_the_host(x.detach()) if on_host else x.detach()
    if x.is_floating_point() or x.is_complex():
        return wide.to(torch.complex128 if x.is_complex() else torch.float64).requires_grad_(x.requires_grad)
    return wide if on_host else x


def on_the_host(x: Any) -> Any:
    """A tensor in the host's memory; the host for a device; anything else as it is."""
    if isinstance(x, Tensor):
        return x.cpu()
    is_device = isinstance(x, torch.device) or (isinstance(x, str) and x.partition(":")[0] == "cuda")
    return "cpu" if is_device else x


def packed_weights(graph: fx.Graph) -> set[fx.Node]:
    """The nodes of ``graph`` whose numbers are bytes of 4-bit weights, whatever dtype they are stored as: no number to widen."""
    found = set[fx.Node]()
    for node in graph.nodes:
        name = operation(node) if node.op == "call_function" else ""
        if name == "gemm_4bit":
            found |= storage_roots((bind(name, node.args, dict(node.kwargs)) or node.args)[1])
        elif name == "autograd_function_apply":
            body, outside = autograd_body(node) or (fx.Graph(), {})
            within = packed_weights(body)
            found = found.union(*(storage_roots(a) for n, a in outside.items() if n in within))
    return found


def sliced_weights(graph: fx.Graph, inputs: Sequence[Any]) -> list[bool]:
    """Of each input of ``graph``, whether it is a frozen matrix that linears alone read, as their weight: it need not be widened,
    for they widen a slice of it at a time. In float64 the head of a language model would take as much as many of its layers."""
    nodes = [n for n in graph.nodes if n.op == "placeholder"]
    return [
        isinstance(i, Tensor) and i.dtype in _NARROW and i.ndim == 2 and not i.requires_grad
        and bool(n.users) and all(_is_weight_of(n, user) for user in n.users)
        for n, i in zip(nodes, inputs, strict=True)
    ]  # fmt: skip


def _is_weight_of(node: fx.Node, user: fx.Node) -> bool:
    if user.op != "call_function" or target_name(user.target) != "linear" or user.all_input_nodes.count(node) != 1:
        return False
    return node in (*user.args[1:2], user.kwargs.get("weight"))


_NARROW = {torch.float32: torch.float64, torch.bfloat16: torch.float64, torch.float16: torch.float64}
_DOUBLE_METHODS = {"float": "double", "half": "double", "bfloat16": "double"}


class Float64(fx.Interpreter):
    """Runs a graph with every floating-point conversion turned into one to float64.

    Args:
        on_host: whatever the graph names as a device, it runs on the host, where its inputs are.
    """

    def __init__(self, module: fx.GraphModule, on_host: bool = False) -> None:
        super().__init__(module)
        self.on_host = on_host

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """As captured, but for what knows no float64: products with packed weights, and autograd functions around them."""
        name = target_name(target)
        if name == "autograd_function_apply":
            return Float64(args[0], self.on_host).run(*args[2:])[0]
        if name == "_set_grad_enabled":  # inside an autograd function, whose gradient is here that of its forward
            return None
        if name == "gemm_4bit":
            return _product_4bit(*args, **kwargs)
        if name == "linear" and (kwargs.get("weight") if len(args) < 2 else args[1]).dtype in _NARROW:
            return _sliced_linear(*args, **kwargs)
        return super().call_function(target, *self._converted(args, kwargs))

    def call_method(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Methods that convert to a narrower type convert to float64."""
        target = "cpu" if target == "cuda" and self.on_host else _DOUBLE_METHODS.get(str(target), str(target))
        return super().call_method(target, *self._converted(args, kwargs))

    def fetch_attr(self, target: str) -> Any:
        """A constant of the graph."""
        return on_the_host(super().fetch_attr(target)) if self.on_host else super().fetch_attr(target)

    def _converted(self, args: Any, kwargs: Any) -> Any:
        wide = tree_map(_widen_dtype, (args, kwargs))
        return tree_map(lambda x: x if isinstance(x, Tensor) else on_the_host(x), wide) if self.on_host else wide


def _product_4bit(
    x: Tensor, packed: Tensor, shape: Any, absmax: Tensor, block_size: int, quant_type: str, bias: Tensor | None = None,
    absmax_8bit: Tensor | None = None, absmax_code: Tensor | None = None, absmax_offset: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """x · dequantize(W)ᵀ + b in float64; the storage is exact in float32."""
    ops = torch.ops.bitsandbytes
    absmax = absmax.float()
    if absmax_8bit is not None:
        assert absmax_code is not None and absmax_offset is not None
        nested = ops.dequantize_blockwise.default(absmax_8bit, absmax, absmax_code.float(), 256, torch.float32)
        absmax = nested + absmax_offset.float()
    weight = ops.dequantize_4bit.default(packed, absmax, block_size, quant_type, tuple(shape), torch.float32)
    return torch.nn.functional.linear(x, weight.double(), bias)


def _sliced_linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    y: Any = _SlicedLinear.apply(input, weight)
    return y if bias is None else y + bias


class _SlicedLinear(torch.autograd.Function):
    """x · Wᵀ in float64 for a frozen W of another dtype, of which some rows at a time are in float64."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(weight)
        return torch.cat([x @ rows.double().t() for rows in _slices(weight)], -1)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        slices = _slices(*ctx.saved_tensors)
        parts = zip(dy.split([len(rows) for rows in slices], -1), slices, strict=True)
        dx: Any = sum(part @ rows.double() for part, rows in parts)
        return dx, None


def _slices(weight: Tensor) -> Sequence[Tensor]:
    return weight.split(max(SLICE // max(weight.shape[1], 1), 1))


def _widen_dtype(x: Any) -> Any:
    return _NARROW.get(x, x) if isinstance(x, torch.dtype) else x
