"""Operations that change nothing go, so that rules see what they are between."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import fx
from torch.fx.proxy import GraphAppendingTracer

from ..rewrite import effects
from ..rewrite import graph as g
from ..rewrite.bounds import is_false, upper_bound
from ..rewrite.change import describe, laid_out
from ..rewrite.driver import Outcome, Verifier
from ..rewrite.slices import by_dimension
from ..rewrite.vocabulary import bind, is_in_place, operation


@dataclass(frozen=True)
class DropIdentities:
    """dropout(x, 0), x[..., :size], cat((x, x[..., size:]), -1), masked_fill(x, False, 0)  →  x

    A model of partial rotary embeddings may turn whole heads, and one with dropout be trained without. Experts that another
    process has are masked where there are none, too: an index that topk chose is never too large.
    """

    name: str = "drop_identities"

    def run(self, module: fx.GraphModule, verifier: Verifier | None) -> Outcome:
        """Every reader reads x itself, unless somebody could write into one of the two and not see it in the other."""
        for node in list(module.graph.nodes):
            if is_in_place(node) and (target := _same(node)) is not None:  # it writes what is there
                _drop(node, target)
        written, nodes = effects.written_to(module.graph), list(module.graph.nodes)
        for node in nodes:
            same = None if is_in_place(node) else _same(node)
            if same is not None and (operation(node) == "dropout" or _is_alone(node, same, written, nodes[-1])):
                _drop(node, _as_it_lay(node, same))
        return Outcome()


def _is_alone(node: fx.Node, same: fx.Node, written: set[fx.Node], output: fx.Node) -> bool:
    """Whether nobody can tell that the two are one: neither is written to here; nor by who is given one, unless he has the only
    one, which is no input's memory, nor a part of something larger that would be kept with it. So it is in training with keys and
    values that are joined to an empty cache and stay there; where one generates, the next step expects them as they lay."""
    roots = effects.storage_roots(same)
    if written & {node, *roots}:
        return False
    given = [effects.storage_roots(n) for n in output.all_input_nodes]
    shared = [r for r in given if r & roots]
    if not shared and not any(node in r for r in given):
        return True
    lies_in = {n for n in roots if g.tensor_of(n) is not None}
    own = all(n.op not in ("placeholder", "get_attr") and _numel(n) == _numel(same) for n in lies_in)
    return not shared and own and g.requires_grad(same)


def _numel(node: fx.Node) -> Any:
    return math.prod(g.sizes(node))


def _drop(node: fx.Node, same: fx.Node) -> None:
    node.replace_all_uses_with(same, propagate_meta=False)
    node.graph.erase_node(node)


def _as_it_lay(node: fx.Node, same: fx.Node) -> fx.Node:
    graph, before = node.graph, set(node.graph.nodes)
    with graph.inserting_before(node):
        found = laid_out(node, same, GraphAppendingTracer(graph))
    for made in [n for n in graph.nodes if n not in before]:
        describe(made, node)
    return found


def _same(node: fx.Node) -> fx.Node | None:
    """What ``node`` computes already, or None."""
    if node.op not in ("call_function", "call_method"):
        return None
    found = _BY_OPERATION.get(operation(node), _nothing)(node)
    same_type = found is not None and g.dtype_of(found) == g.dtype_of(node) is not None
    return found if same_type else None


def _nothing(_: fx.Node) -> fx.Node | None:
    return None


def _of_dropout(node: fx.Node) -> fx.Node | None:
    x = node.args[0] if node.args else None
    return x if isinstance(x, fx.Node) and effects.is_idle_dropout(node) else None


def _of_slice(node: fx.Node) -> fx.Node | None:
    x, index = node.args
    sizes = g.sizes(x), g.sizes(node)
    parts = by_dimension(index, len(sizes[0]))
    if not isinstance(x, fx.Node) or parts is None or len(sizes[1]) != len(sizes[0]):
        return None
    cut = [d for d, part in parts if part != slice(None)]
    whole = all(isinstance(size[d], int) for size in sizes for d in cut) and all(
        sizes[0][d] == sizes[1][d] for d in cut
    )
    return x if whole and all(part.step in (None, 1) for _, part in parts) else None


def _of_cat(node: fx.Node) -> fx.Node | None:
    tensors, dim = bind("cat", node.args, dict(node.kwargs)) or ((), 0)
    if not isinstance(tensors, tuple | list) or not isinstance(dim, int):
        return None
    filled = [t for t in tensors if g.sizes(t) != (0,) and g.static_size(t, dim) != 0]
    return filled[0] if len(filled) == 1 < len(tensors) and isinstance(filled[0], fx.Node) else None


def _of_masked_fill(node: fx.Node) -> fx.Node | None:
    x, mask, _ = bind("masked_fill", node.args, dict(node.kwargs)) or (None, None, None)
    return x if isinstance(x, fx.Node) and g.sizes(x) == g.sizes(node) and is_false(mask) else None


def _of_clamp(node: fx.Node) -> fx.Node | None:
    x, low, high = bind("clamp", node.args, dict(node.kwargs)) or (None, None, None)
    bound = upper_bound(x)
    idle = bound is not None and low in (None, 0) and (high is None or (isinstance(high, int) and high >= bound - 1))
    return x if isinstance(x, fx.Node) and idle else None


_BY_OPERATION: dict[str, Callable[[fx.Node], fx.Node | None]] = {
    "dropout": _of_dropout,
    "getitem": _of_slice,
    "cat": _of_cat,
    "masked_fill": _of_masked_fill,
    "masked_fill_": _of_masked_fill,
    "clamp": _of_clamp,
}
