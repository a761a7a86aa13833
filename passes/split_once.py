"""Parts of one tensor are taken in one step, of the tensor as it lies: their gradients are then put together in one step, too."""

from __future__ import annotations

import operator
from dataclasses import dataclass

from torch import fx

from ..rewrite import effects
from ..rewrite import graph as g
from ..rewrite.change import describe
from ..rewrite.driver import Outcome, Verifier
from ..rewrite.slices import by_dimension
from ..rewrite.vocabulary import bind, operation


@dataclass(frozen=True)
class SplitOnce:
    """x[..., :a], x[..., a:]  →  x.split((a, …), −1);  x.transpose(1, 2).split(…)  →  each part transposed

    The gradient of slices is a sum of tensors as large as x, each zero but for one slice; that of a split is one concatenation.
    That of a transposed tensor would have to be copied once more, into the order of x.
    """

    name: str = "split_once"

    def run(self, module: fx.GraphModule, verifier: Verifier | None) -> Outcome:
        """Where the slices are all of a dimension, once each, and nobody writes into what they show."""
        written = effects.written_to(module.graph)
        for node in list(module.graph.nodes):
            if not written & effects.storage_roots(node):
                _split(node)
                _turn_parts(node)
        return Outcome()


def _split(x: fx.Node) -> None:
    slices = [(user, *cut) for user in x.users if (cut := _cut(user, x)) is not None]
    for dim in {dim for _, dim, *_ in slices}:
        parts = sorted((s for s in slices if s[1] == dim), key=lambda s: s[2])
        bounds = [0, *(stop for *_, stop in parts)]
        if len(parts) < 2 or [start for _, _, start, _ in parts] != bounds[:-1] or bounds[-1] != g.static_size(x, dim):
            continue
        first = min((user for user, *_ in parts), key=g.position)
        with x.graph.inserting_before(first):
            made = x.graph.call_method("split", (x, [stop - start for _, _, start, stop in parts], dim))
        describe(made, first)
        for i, (user, *_) in enumerate(parts):
            user.args = (made, i)
        return


def _cut(node: fx.Node, x: fx.Node) -> tuple[int, int, int] | None:
    """Dimension, start and stop, where ``node`` is a slice of ``x`` along one dimension."""
    if operation(node) != "getitem" or node.args[0] is not x or g.tensor_of(node) is None:
        return None
    cut = [(dim, part) for dim, part in by_dimension(node.args[1], len(g.sizes(x))) or () if part != slice(None)]
    if len(cut) != 1:
        return None
    dim, part = cut[0]
    size, bounds = g.static_size(x, dim), (part.start, part.stop)
    if size is None or part.step not in (None, 1) or not all(b is None or isinstance(b, int) for b in bounds):
        return None
    start, stop, _ = part.indices(size)
    return (dim, start, stop) if stop > start else None


def _turn_parts(split: fx.Node) -> None:
    name = operation(split)
    if name not in ("split", "chunk") or not isinstance(split.args[0], fx.Node):
        return
    turned = split.args[0]
    _, count, dim = bind(name, split.args, dict(split.kwargs)) or (None, 0, 0)
    swapped = _swapped(turned)
    readers = list(split.users)
    if swapped is None or set(turned.users) != {split} or any(operation(r) != "getitem" for r in readers):
        return
    x, (first, second) = swapped
    dim %= len(g.sizes(x))
    along = {first: second, second: first}.get(dim, dim)
    with split.graph.inserting_before(split):
        made = split.graph.call_method(name, (x, count, along))
    describe(made, split)
    for reader in readers:
        with split.graph.inserting_before(reader):
            part = split.graph.call_function(operator.getitem, (made, reader.args[1]))
            describe(part, reader)
            back = split.graph.call_method("transpose", (part, first, second))
        describe(back, reader)
        reader.replace_all_uses_with(back, propagate_meta=False)
    for node in (*readers, split, turned):
        split.graph.erase_node(node)


def _swapped(node: fx.Node) -> tuple[fx.Node, tuple[int, int]] | None:
    """x and two dimensions, where ``node`` is x with these two swapped."""
    if operation(node) != "transpose":
        return None
    x, *dims = bind("transpose", node.args, dict(node.kwargs)) or (None, None, None)
    if not isinstance(x, fx.Node):
        return None
    given = [d % len(g.sizes(x)) for d in dims if isinstance(d, int)]
    return (x, (given[0], given[1])) if len(given) == 2 else None
