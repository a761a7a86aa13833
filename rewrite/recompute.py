"""What a block may save for its backward, and what each choice costs; what the head beside the blocks takes.

There are options: what a minimum cut saves at some price of memory (:mod:`.remat`), with the block's input, or all that it saves,
kept on the device or in the host's memory. :mod:`.placement` chooses among them, :mod:`.memory_plan` says what has been chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import Parameter

from .joint import JointGraph, forward_nodes, recompute_problem
from .liveness import peak_bytes
from .placement import BlockCosts, Option, without_waiting
from .rates import Rates
from .remat import Choice, frontier, one_more
from .sizes import Evaluate, evaluator, node_flops, node_traffic, storages, tensors, value_bytes

CHEAPEST, DEAREST = 1e-16, 1e-9
"""Seconds a byte between which the cut is asked: for a gigabyte 0.1 µs, and a second, above which no memory is worth it."""

CONTENTION = 0.02
"""Share of a copy to the host that computation loses to it, where they overlap: both read the same memory."""


THRIFTY = 1 / 32
"""Of what a block could save, the most that it saves where its model asks for checkpointing."""


def block_costs(joint: JointGraph, args: Sequence[Any], rates: Rates, checkpointed: bool = False) -> BlockCosts:
    """The options of a block for a call with ``args``; those that save next to nothing if ``checkpointed``."""
    joint.lower()
    if joint.graph is None:  # no gradient passes through the block: it has no backward
        return BlockCosts((Option(None, 0, 0.0),), 0)
    of = evaluator(joint.fakes, args)
    seconds: Callable[[fx.Node], float] = lambda node: node_seconds(node, of, rates)  # noqa: E731
    once = joint.only_once(joint.graph)
    problem = recompute_problem(joint.graph, once, seconds, of)
    choices = frontier(problem, CHEAPEST, DEAREST)
    if checkpointed:
        choices = [c for c in choices if c.bytes <= THRIFTY * choices[0].bytes] or choices[-1:]
    given = activation(args)
    held = 0 if given is None else given.numel() * given.element_size()
    inside = set(forward_nodes(joint.graph))
    # where copies have something to hide behind, the device is what takes the time: launches are not counted
    launched = replace(rates, call=0.0)
    running: Callable[[fx.Node], float] = lambda node: node_seconds(node, of, launched)  # noqa: E731
    forward, backward = (
        sum(running(n) for n in joint.graph.nodes if (n in inside) is first) for first in (True, False)
    )
    near = _options(choices, held, rates)
    away = [] if checkpointed else _all_away([*choices, *one_more(problem, choices)], held, rates)
    options, working = (*near, *away), _working(joint, of, held)
    return BlockCosts(options, working, without_waiting(near, forward), forward, backward, _result(joint.graph, of))


def _result(joint: fx.Graph, of: Evaluate) -> int:
    gradients = [n for n in joint.nodes if n.op == "placeholder" and n.name.startswith("tangents")]
    return value_bytes(gradients[0].meta["val"], of) if gradients else 0


def node_seconds(node: fx.Node, of: Evaluate, rates: Rates) -> float:
    """How long one call takes: by its traffic or its arithmetic, whichever is more, and a call's own cost."""
    if node.op != "call_function":
        return 0.0
    return max(node_traffic(node, of) / rates.copy, node_flops(node, of) / rates.product) + rates.call


def activation(args: Sequence[Any]) -> Tensor | None:
    """A block's input: the first tensor besides parameters that a gradient goes through."""
    return next((a for a in args if isinstance(a, Tensor) and a.requires_grad and not isinstance(a, Parameter)), None)


def _options(choices: Sequence[Choice], held: int, rates: Rates) -> list[Option]:
    options = [Option(_names(c), c.bytes + held, c.seconds) for c in choices]
    if held and rates.host:
        copy = held / rates.host
        options += [Option(_names(c), c.bytes, c.seconds + CONTENTION * copy, held, copy=copy) for c in choices]
    return options


def _all_away(choices: Sequence[Choice], held: int, rates: Rates) -> list[Option]:
    """All that a block saves in the host's memory."""
    if not (held and rates.host):
        return []
    sizes = [(c, c.bytes + held, (c.bytes + held) / rates.host) for c in choices if c.bytes]
    return [Option(_names(c), 0, c.seconds + CONTENTION * copy, n, True, copy) for c, n, copy in sizes]


def _names(choice: Choice) -> frozenset[str] | None:
    return choice.saved if choice.seconds else None


def _working(joint: JointGraph, of: Evaluate, held: int) -> int:
    """The most that the backward has alive where nothing is computed again; otherwise it is about the same, later."""
    graph = joint.backward.get(None)
    if graph is None:
        return 0
    inputs = [n for n in graph.nodes if n.op == "placeholder" and n.name.startswith("primals")]
    over = joint.overwritten(graph)
    extra: Callable[[fx.Node], int] = lambda n: _unpacked(n, of) - _overwritten(over.get(n, ()), of)  # noqa: E731
    return peak_bytes(graph, of, inputs, extra) + held


def _overwritten(operands: Sequence[fx.Node], of: Evaluate) -> int:
    return sum(value_bytes(n.meta["val"], of) for n in operands)


@dataclass(frozen=True)
class Head:
    """What a graph beside the blocks, that of the head and the loss most often, has alive for an input of ``given`` bytes."""

    bytes: int
    given: int
    parts: int = 0
    most: int = 0
    """What is taken in parts, such as logits, would take at once for ``given``; and the most that a part takes."""

    def at(self, given: int) -> int:
        """For an input of ``given`` bytes."""
        return self.bytes * given // self.given + min(self.parts * given // self.given, self.most)


def head_of(graph: fx.Graph, fakes: Sequence[Any]) -> Head | None:
    """Of a graph that runs node by node: all that it computes, two gradients of the largest, and what a call takes in parts,
    beside its operand and that one's gradient; None without an input."""
    activated = activation(fakes)
    if activated is None:
        return None
    hint: Evaluate = lambda size: size.node.hint if isinstance(size, torch.SymInt) else int(size)  # noqa: E731
    inputs = {s for n in graph.nodes if n.op == "placeholder" for s in storages(n.meta.get("val"))}
    made: dict[int, int] = {}
    computed = [n for n in graph.nodes if _most_at_once(n) != 0]
    for node in computed:
        for tensor in tensors(node.meta.get("val")):
            key = tensor.untyped_storage()._cdata
            if key not in inputs:
                made[key] = max(made.get(key, 0), value_bytes(tensor, hint))
    given = value_bytes(activated, hint)
    parts, most, read = max(
        (_in_parts(n, most, hint) for n in computed if (most := _most_at_once(n))), default=(0, 0, 0)
    )
    return Head(sum(made.values()) + 2 * max([read, *made.values()]), given, parts, most) if given else None


def _most_at_once(node: fx.Node) -> int | None:
    """The most bytes that a call computes at a time of what it computes in parts; None where it computes all at once."""
    return getattr(node.target, "most_at_once", None) if node.op == "call_function" else None


def _in_parts(node: fx.Node, most: int, of: Evaluate) -> tuple[int, int, int]:
    """Bytes of the product of such a call's first operands, in the dtype of the first; of a part, at most; and of the first."""
    x, weight = (n.meta["val"] for n in node.all_input_nodes[:2])
    bytes = value_bytes(x, of)
    return bytes // of(x.shape[-1]) * of(weight.shape[0]), most, bytes


def _unpacked(node: fx.Node, of: Evaluate) -> int:
    """A packed weight is unpacked while it is read: two 16-bit numbers for each byte."""
    packed = [n for n in node.all_input_nodes if getattr(n.meta.get("val"), "dtype", None) == torch.uint8]
    return max((4 * value_bytes(n.meta["val"], of) for n in packed), default=0) if node.op == "call_function" else 0
