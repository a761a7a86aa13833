"""Plans what each block saves for its backward, so that a training step stays within a limit of memory.

For each block there are options: what a minimum cut saves at some price of memory (:mod:`.remat`), with the block's input, or
all that it saves, kept on the device or in the host's memory. The options of a model's blocks are exchanged, one step at a time
and earlier blocks first, for whatever takes the least time for each byte freed, until the step fits: on options of decreasing
return that is the optimum but for the last step. When the backward of the last block begins, all others hold what they saved,
and it holds all that it reads:

    peak  =  resident  +  Σ saved, without the last block  +  in flight  +  the most that one backward has alive

in flight: what one block has in the host's memory, which is on its way out of the device, or back. If that is more, what the head
and the loss have alive beside all that is saved takes the place of the backward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import Parameter

from .joint import JointGraph, recompute_problem
from .liveness import peak_bytes
from .rates import Rates
from .remat import Choice, frontier
from .sizes import Evaluate, evaluator, node_flops, node_traffic, storages, tensors, value_bytes

PRICES = tuple(10.0**-exponent for exponent in (16, 14, 13, 12.5, 12, 11.75, 11.5, 11.25, 11, 10.5, 10, 9.5, 9))
"""Seconds a byte at which the cut is asked: for a gigabyte from 0.1 µs to a second, above which no memory is worth it."""

CONTENTION = 0.02
"""Share of a copy to the host that computation loses to it, where they overlap: both read the same memory."""


@dataclass(frozen=True)
class Option:
    """What one block may do: names of saved values (None: all), bytes that stay on the device, extra seconds, bytes in the
    host's memory, and whether that is all that it saves, not its input alone."""

    saved: frozenset[str] | None
    bytes: int
    seconds: float
    host_bytes: int = 0
    all_away: bool = False


@dataclass(frozen=True)
class BlockCosts:
    """The options of one block at the sizes of a call, most bytes first, and the most that its backward has alive.

    Attributes:
        narrow: the options that send no more to the host than the block's input, so that little is on its way.
    """

    options: tuple[Option, ...]
    working: int
    narrow: tuple[Option, ...] = ()

    def __post_init__(self) -> None:
        if not self.narrow:
            object.__setattr__(self, "narrow", self.options)


THRIFTY = 1 / 32
"""Of what a block could save, the most that it saves where its model asks for checkpointing."""


def block_costs(joint: JointGraph, args: Sequence[Any], rates: Rates, checkpointed: bool = False) -> BlockCosts:
    """The options of a block for a call with ``args``; those that save next to nothing if ``checkpointed``."""
    joint.lower()
    if joint.graph is None:  # no gradient passes through the block: it has no backward
        return BlockCosts((Option(None, 0, 0.0),), 0)
    of = evaluator(joint.fakes, args)
    seconds: Callable[[fx.Node], float] = lambda node: node_seconds(node, of, rates)  # noqa: E731
    choices = frontier(recompute_problem(joint.graph, seconds, of), PRICES)
    if checkpointed:
        choices = [c for c in choices if c.bytes <= THRIFTY * choices[0].bytes] or choices[-1:]
    given = activation(args)
    held = 0 if given is None else given.numel() * given.element_size()
    forward = sum(seconds(n) for n in joint.graph.nodes if n.meta.get("partitioner_tag") == "is_forward")
    narrow = _options(choices, held, forward, rates)
    away = [] if checkpointed else _all_away(choices, held, forward, rates)
    return BlockCosts(_hull(narrow + away), _working(joint, of, held), _hull(narrow))


def node_seconds(node: fx.Node, of: Evaluate, rates: Rates) -> float:
    """How long one call takes: by its traffic or its arithmetic, whichever is more, and a call's own cost."""
    if node.op != "call_function":
        return 0.0
    return max(node_traffic(node, of) / rates.copy, node_flops(node, of) / rates.product) + rates.call


def activation(args: Sequence[Any]) -> Tensor | None:
    """A block's input: the first tensor besides parameters that a gradient goes through."""
    return next((a for a in args if isinstance(a, Tensor) and a.requires_grad and not isinstance(a, Parameter)), None)


def _options(choices: Sequence[Choice], held: int, forward: float, rates: Rates) -> list[Option]:
    options = [Option(_names(c), c.bytes + held, c.seconds) for c in choices]
    if held and rates.host:
        extra = _beside(held, forward, rates)
        options += [Option(_names(c), c.bytes, c.seconds + extra, held) for c in choices]
    return options


def _all_away(choices: Sequence[Choice], held: int, forward: float, rates: Rates) -> list[Option]:
    """All that a block saves in the host's memory."""
    if not (held and rates.host):
        return []
    sizes = [(c, c.bytes + held) for c in choices if c.bytes]
    return [Option(_names(c), 0, c.seconds + _beside(n, forward, rates), n, True) for c, n in sizes]


def _beside(size: int, forward: float, rates: Rates) -> float:
    """Seconds that a copy to the host, and back, adds to a block whose forward takes ``forward``."""
    copy = size / rates.host
    return max(0.0, copy - forward) + CONTENTION * copy


def _names(choice: Choice) -> frozenset[str] | None:
    return choice.saved if choice.seconds else None


def _hull(options: Sequence[Option]) -> tuple[Option, ...]:
    """Those of decreasing return: each step to fewer bytes costs more seconds a byte than the one before."""
    hull: list[Option] = []
    for option in sorted(options, key=lambda o: (-o.bytes, o.seconds)):
        while hull and (option.seconds <= hull[-1].seconds or (len(hull) > 1 and _bends(hull[-2], hull[-1], option))):
            hull.pop()
        if not hull or option.bytes < hull[-1].bytes:
            hull.append(option)
    return tuple(hull)


def _bends(a: Option, b: Option, c: Option) -> bool:
    return (b.seconds - a.seconds) * (a.bytes - c.bytes) >= (c.seconds - a.seconds) * (a.bytes - b.bytes)


def _working(joint: JointGraph, of: Evaluate, held: int) -> int:
    """The most that the backward has alive where nothing is computed again; otherwise it is about the same, later."""
    graph = joint.backward.get(None)
    if graph is None:
        return 0
    inputs = [n for n in graph.nodes if n.op == "placeholder" and n.name.startswith("primals")]
    return peak_bytes(graph, of, inputs, lambda n: _unpacked(n, of)) + held


@dataclass(frozen=True)
class Head:
    """What a graph beside the blocks, that of the head and the loss most often, has alive for ``numel`` numbers of input."""

    bytes: int
    numel: int

    def at(self, numel: int) -> int:
        """For ``numel`` numbers of input."""
        return self.bytes * numel // self.numel


def head_of(graph: fx.Graph, fakes: Sequence[Any]) -> Head | None:
    """Of a graph that runs node by node: all that it computes, and two gradients of the largest; None without an input."""
    given = activation(fakes)
    if given is None:
        return None
    hint: Evaluate = lambda size: size.node.hint if isinstance(size, torch.SymInt) else int(size)  # noqa: E731
    inputs = {s for n in graph.nodes if n.op == "placeholder" for s in storages(n.meta.get("val"))}
    made: dict[int, int] = {}
    for node in graph.nodes:
        for tensor in tensors(node.meta.get("val")):
            key = tensor.untyped_storage()._cdata
            if key not in inputs:
                made[key] = max(made.get(key, 0), value_bytes(tensor, hint))
    numel = value_bytes(given, hint) // given.element_size()
    return Head(sum(made.values()) + 2 * max(made.values(), default=0), numel) if numel else None


def _unpacked(node: fx.Node, of: Evaluate) -> int:
    """A packed weight is unpacked while it is read: two 16-bit numbers for each byte."""
    packed = [n for n in node.all_input_nodes if getattr(n.meta.get("val"), "dtype", None) == torch.uint8]
    return max((4 * value_bytes(n.meta["val"], of) for n in packed), default=0) if node.op == "call_function" else 0


def choose_options(blocks: Sequence[BlockCosts], room: int) -> list[Option]:
    """One option a block: the least time of those that fit into ``room`` bytes, or the fewest bytes if none does.

    The last block saves all: its backward, which runs first, would have as much alive in any case.
    """
    at = [0] * len(blocks)
    over = sum(b.options[0].bytes for b in blocks[:-1]) - room
    steps = [
        ((after.seconds - before.seconds) / (before.bytes - after.bytes), i, k)
        for i, block in enumerate(blocks[:-1])
        for k, (before, after) in enumerate(zip(block.options, block.options[1:], strict=False))
    ]
    for _, i, k in sorted(steps):
        if over <= 0:
            break
        before, after = blocks[i].options[k : k + 2]
        at[i] = k + 1
        over -= before.bytes - after.bytes
    return [block.options[k] for block, k in zip(blocks, at, strict=True)]


def options_within(blocks: Sequence[BlockCosts], room: int | None, host: int) -> list[Option]:
    """As :func:`choose_options`, where what is on its way to the host and back takes room, too.

    Args:
        room: None asks for as few bytes as possible.
        host: bytes that the host has for it.
    """
    narrow = [replace(b, options=b.narrow) for b in blocks]
    if room is not None:
        chosen = choose_options(blocks, room)
        for _ in range(2):
            moving = in_flight(chosen)
            if sum(o.bytes for o in chosen[:-1]) + moving <= room:
                return chosen if sum(o.host_bytes for o in chosen) <= host else choose_options(narrow, room)
            chosen = choose_options(blocks, room - moving)
    return choose_options(narrow, room or 0)


def in_flight(blocks: Sequence[Option | BlockMemory]) -> int:
    """Bytes that one block has on the device while they are copied: the last one saves all, and keeps it there."""
    return max((b.host_bytes for b in blocks[:-1]), default=0)


@dataclass
class BlockMemory:
    """What one block does: bytes that it keeps on the device and in the host's memory, and seconds that it takes longer."""

    path: str
    saved_bytes: int
    host_bytes: int
    extra_seconds: float
    choice: str


@dataclass
class MemoryPlan:
    """The memory of a training step: the limit, what is predicted, and what each block does. Bytes.

    Attributes:
        limit: None asks for as few as possible.
        resident: weights, optimizer state, gradients and whatever else is there besides activations.
        working: the most that one block's backward, or the head with its loss, has alive beside what the other blocks saved.
        measured: the step's own peak, on a GPU, once the next one has begun, where it was the highest until then.
        before: the plan of the step before, measured.
    """

    limit: int | None
    resident: int
    working: int
    blocks: list[BlockMemory] = field(default_factory=list)
    measured: int | None = None
    peak_before: int | None = None
    before: MemoryPlan | None = None

    @property
    def predicted(self) -> int:
        """The predicted peak."""
        return self.resident + self.working + sum(b.saved_bytes for b in self.blocks[:-1]) + self.in_flight

    @property
    def in_flight(self) -> int:
        """What one block has in the host's memory."""
        return in_flight(self.blocks)

    @property
    def extra_seconds(self) -> float:
        """What the plan costs, by the device's measured rates."""
        return sum(b.extra_seconds for b in self.blocks)

    @property
    def fits(self) -> bool:
        """Whether the predicted peak is within the limit."""
        return self.limit is None or self.predicted <= self.limit

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain data."""
        names = ("limit", "resident", "working", "in_flight", "predicted", "measured", "fits")
        kept = {name: getattr(self, name) for name in names}
        before = None if self.before is None else {k: getattr(self.before, k) for k in ("predicted", "measured")}
        return kept | {
            "before": before,
            "extra_seconds": self.extra_seconds,
            "blocks": [asdict(b) for b in self.blocks],
        }
