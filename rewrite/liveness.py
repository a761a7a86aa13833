"""How much memory running a graph takes, from the sizes of its values and when each is last read."""

from __future__ import annotations

from collections.abc import Callable, Collection

from torch import fx

from .sizes import Evaluate, storages, tensors, value_bytes


def peak_bytes(
    graph: fx.Graph, of: Evaluate, outside: Collection[fx.Node] = (), extra: Callable[[fx.Node], int] = lambda _: 0
) -> int:
    """The most bytes alive at once while ``graph`` runs node by node, each value freed after its last use.

    Args:
        of: symbolic sizes as numbers.
        outside: inputs that are alive anyway, and are not counted.
        extra: bytes that a call takes while it runs, besides its result; negative if that lies where an operand does.
    """
    last: dict[int, int] = {}
    size: dict[int, int] = {}
    born: list[list[int]] = []
    nodes = list(graph.nodes)
    ignored = {s for node in outside for s in storages(node.meta.get("val"))}
    for at, node in enumerate(nodes):
        own = [s for s in storages(node.meta.get("val")) if s not in ignored]
        born.append([s for s in own if s not in size])
        for tensor in tensors(node.meta.get("val")):
            key = tensor.untyped_storage()._cdata
            if key not in ignored:
                size[key] = max(size.get(key, 0), value_bytes(tensor, of))
        for source in (*node.all_input_nodes, node):
            last |= {s: at for s in storages(source.meta.get("val")) if s not in ignored}
    dying: dict[int, list[int]] = {}
    for key, at in last.items():
        dying.setdefault(at, []).append(key)
    alive = peak = 0
    for at, node in enumerate(nodes):
        alive += sum(size[s] for s in born[at])
        peak = max(peak, alive + extra(node))
        alive -= sum(size[s] for s in dying.get(at, ()))
    return peak
