"""Which calls of a lowered graph may write their results where operands lay that nothing reads any more.

The backward of a gated feed-forward has its widest values alive at once: gate and up, h, and the gradient of each. An operator
that can write a gradient over the value that it belongs to says at which positions it takes what it overwrites
(``Operator.register_overwriting`` in :mod:`weft.kernels.operator`). Whether that may be is decided here, from the graph: each is
computed in it, or was saved for it by a forward that handed it to nobody else; nothing reads it later; and no other operand lies
in the same memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from .sizes import is_part, storages

Overwritten = dict[fx.Node, tuple[fx.Node, ...]]
"""By call, what it overwrites."""


def overwritten(graph: fx.Graph, kept: Collection[int]) -> Overwritten:
    """Of a graph that runs node by node.

    Args:
        kept: storages that somebody else may read, or that hold results of the graph.
    """
    nodes = list(graph.nodes)
    last = {storage: node for node in nodes for storage in _read(node)}
    opaque = [source for node in nodes if _is_opaque(node) for source in node.all_input_nodes]
    guarded = {*kept, *(storage for source in opaque for storage in storages(_val(source)))}
    found: Overwritten = {}
    for node in nodes:
        operands = _offered(node)
        sources = [
            leaf for leaf in tree_leaves((node.args, node.kwargs)) if isinstance(leaf, fx.Node)
        ]  # some of them twice
        own = Counter(s for source in sources for s in {*storages(_val(source))})
        held = [s for operand in operands for s in storages(_val(operand))]
        if operands and all(last[s] is node and own[s] == 1 and s not in guarded for s in held):
            found[node] = operands
    return found


def _offered(node: fx.Node) -> tuple[fx.Node, ...]:
    """What the operator of a call could overwrite; nothing if one of them is no tensor."""
    positions = getattr(node.target, "overwritten", ()) if node.op == "call_function" else ()
    operands = tuple(o for at in positions if isinstance(o := node.args[at], fx.Node) and isinstance(_val(o), Tensor))
    return operands if len(operands) == len(positions) else ()


def _read(node: fx.Node) -> list[int]:
    """The storages that a node reads: of one result out of several, its own alone."""
    if is_part(node):
        return [*storages(_val(node))]
    return [s for source in node.all_input_nodes for s in storages(_val(source))]


def _is_opaque(node: fx.Node) -> bool:
    """Whether nothing is known of where a call's result lies: it may be in an operand."""
    return node.op == "call_function" and bool(node.users) and _val(node) is None


def _val(node: fx.Node) -> object:
    return node.meta.get("val")
