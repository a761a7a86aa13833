"""Sizes and floating-point operations of a graph's values, at the sizes of a call."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import flop_registry

Evaluate = Callable[[Any], int]
"""An integer from a size that may be symbolic."""


def evaluator(fakes: Sequence[Any], real: Sequence[Any]) -> Evaluate:
    """What symbolic sizes are in a call with the arguments ``real`` of a graph that was captured with ``fakes``."""
    known: dict[Any, int] = {}
    for fake, given in zip(fakes, real, strict=True):
        if isinstance(fake, Tensor) and isinstance(given, Tensor):
            for size, value in zip(fake.shape, given.shape, strict=True):
                _bind(size, value, known)
        elif isinstance(fake, torch.SymInt) and isinstance(given, int):
            _bind(fake, given, known)
    return lambda size: _number(size, known)


def _bind(size: Any, value: int, known: dict[Any, int]) -> None:
    expression = _expression(size)
    if isinstance(expression, sympy.Symbol):
        known.setdefault(expression, int(value))


def _expression(size: Any) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else None


def _number(size: Any, known: dict[Any, int]) -> int:
    expression = _expression(size)
    found = size if expression is None else sympy.sympify(expression).xreplace(known)
    return int(size.node.hint) if getattr(found, "free_symbols", None) else int(found)


def value_bytes(value: Any, of: Evaluate) -> int:
    """Bytes of the tensors in ``value``."""
    total = 0
    for tensor in tensors(value):
        count = tensor.element_size()
        for size in tensor.shape:
            count *= of(size)
        total += count
    return total


def tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in a value of a node."""
    yield from (leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor))


def node_flops(node: fx.Node, of: Evaluate) -> int:
    """Floating-point operations of a call, by the formulas that its operator registered; 0 where it registered none."""
    packet = getattr(node.target, "overloadpacket", None)
    formula = flop_registry.get(packet)
    if formula is None:
        return 0
    value_of = lambda n: _at(n.meta.get("val"), of)  # noqa: E731
    args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), value_of)
    if "scaled_dot_product" in str(packet):
        args = _ungrouped(args)
    return int(formula(*args, **kwargs, out_val=value_of(node)))


def _ungrouped(args: Sequence[Any]) -> list[Any]:
    """Attention's arguments with a head of keys and values for each head of queries: torch 2.11 counts no others."""
    four = [a.shape[1] for a in args if isinstance(a, Tensor) and a.dim() == 4]
    return [a[:, :1].expand(-1, max(four), -1, -1) if isinstance(a, Tensor) and a.dim() == 4 else a for a in args]


def _at(value: Any, of: Evaluate) -> Any:
    """``value`` with a size for each number that may be symbolic: formulas ask for shapes alone."""

    def at(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return torch.empty([of(s) for s in leaf.shape], dtype=leaf.dtype, device="meta")
        return of(leaf) if isinstance(leaf, torch.SymInt) else leaf

    return pytree.tree_map(at, value)


def node_traffic(node: fx.Node, of: Evaluate) -> int:
    """Bytes that a call reads and writes, each input and output once."""
    read = sum(value_bytes(n.meta.get("val"), of) for n in node.all_input_nodes)
    return read + value_bytes(node.meta.get("val"), of)


def storages(value: Any) -> Iterable[int]:
    """Identities of the storages behind a value: views share their base's."""
    return [tensor.untyped_storage()._cdata for tensor in tensors(value)]


def is_part(node: fx.Node) -> bool:
    """One of several outputs of a call."""
    first = node.args[0] if node.args else None
    return (
        getattr(node.target, "__name__", "") == "getitem"
        and isinstance(first, fx.Node)
        and not isinstance(first.meta.get("val"), Tensor)
    )
