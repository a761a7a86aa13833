"""Replays a replacement against what it replaces: forward and gradients, judged against float64.

How much it may be off says :mod:`.judge`; where it is close, it is judged by several draws. Inputs that are parameters keep their
real values; activations are drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from . import effects
from . import graph as g
from .change import Change
from .device_memory import free_bytes
from .errors import first_line
from .exact import SLICE, on_the_host, sliced_weights, upcast
from .joint import unseen
from .judge import Error, errors, verdict
from .vocabulary import is_in_place, operation, target_name

LONGEST = 64
"""Symbolic sizes are replayed at what they were while tracing, or at this if they were larger."""
DRAWS, UNLUCKY = 8, 4.0
"""Draws that a replacement is judged by together, if by the first alone it is off by so many times what is allowed at most."""
MOST_DERIVED = 32
"""An input that takes more operations than this to compute is drawn."""


@dataclass
class Replayer:
    """Verifies the changes of one session; equal changes on equal types are replayed once."""

    examples: Mapping[fx.Node, Any] = field(default_factory=dict)
    seen: dict[Any, tuple[float | None, str | None]] = field(default_factory=dict)
    room: Callable[[torch.device], int] = free_bytes
    """Bytes that a replay may take on a device: what needs more in float64 is computed on the host."""

    def __call__(self, module: fx.GraphModule, change: Change) -> tuple[float | None, str | None]:
        """The error as a share of what is allowed, and the reason for rejection if it exceeds 1."""
        boundary = _boundary(change)
        derived = _derived(change, boundary)
        key = _signature(change, boundary, derived)
        if key not in self.seen:
            with unseen():
                self.seen[key] = self._replay(module, change, boundary, derived)
        return self.seen[key]

    def _replay(
        self, module: fx.GraphModule, change: Change, boundary: list[fx.Node], derived: list[fx.Node]
    ) -> tuple[float | None, str | None]:
        boundary = [n for n in boundary if n not in derived]
        outputs = [pair for pair in zip(change.old_outputs, change.new_outputs, strict=True) if _is_read(pair[1])]
        old = g.copy_nodes([*derived, *change.old], boundary, [o for o, _ in outputs], module)
        new = g.copy_nodes([*derived, *change.new], boundary, [o for _, o in outputs], module)
        tracked = any(g.requires_grad(o) for o in change.old_outputs)
        problem, shared = "", not any(map(is_in_place, [*derived, *change.old, *change.new]))
        for longest in (LONGEST, None):  # sizes that follow from others, by division say, fit the traced ones alone
            try:
                return self._drawn(old, new, boundary, longest, shared, tracked)
            except Exception as error:  # what does not run proves nothing, and stays as it was written
                problem = first_line(error)
        return None, f"replay: it does not run by itself: {problem}"

    def _drawn(
        self, old: Any, new: Any, boundary: list[fx.Node], longest: int | None, shared: bool, tracked: bool
    ) -> tuple[float | None, str | None]:
        """The verdict on one draw, or on several: one that has a single number as its result, a loss, say, may find the original
        exact by chance, whose error is that of all of its terms."""
        found, packed = dict[str, Error | None](), [bool(n.meta.get("packed")) for n in boundary]
        share, problem = None, None
        for seed in range(DRAWS):
            generator = torch.Generator().manual_seed(seed)
            inputs = [self.example(n, generator, longest, shared) for n in boundary]
            once = self._errors(old, new, packed, inputs, tracked)
            found = {n: e and e.beside(found.get(n)) for n, e in once.items()}
            share, problem = verdict(found)
            if problem is None or share is None or not share <= UNLUCKY:
                break
        return share, problem

    def _errors(
        self, old: Any, new: Any, packed: list[bool], inputs: list[Any], tracked: bool
    ) -> dict[str, Error | None]:
        given = [i for i in inputs if isinstance(i, Tensor)]
        sliced = sliced_weights(old.graph, inputs)
        on_host = bool(given) and _wide_bytes(inputs, packed, sliced) > self.room(given[0].device)
        kept = on_the_host if on_host else lambda i: i
        wide = [kept(i) if p or s else upcast(i, on_host) for p, s, i in zip(packed, sliced, inputs, strict=True)]
        return errors(old, new, inputs, wide, tracked=tracked, on_host=on_host)

    def example(
        self, node: fx.Node, generator: torch.Generator, longest: int | None = LONGEST, shared: bool = False
    ) -> Any:
        """A value for ``node``: the real one for what has a fixed shape and came from the caller, else a drawn one.

        Args:
            shared: a real one need not be copied, for nothing writes to it.
        """
        fake = g.value(node)
        if isinstance(fake, torch.SymInt | torch.SymFloat):
            return small(fake, longest)
        if not isinstance(fake, Tensor):
            return fake
        real = self.examples.get(node)
        if isinstance(real, Tensor) and all(isinstance(s, int) for s in fake.shape):
            value = real.detach() if shared else real.detach().clone()
            return value.requires_grad_(fake.requires_grad and real.is_floating_point())
        return _draw(fake, generator, longest)


def _wide_bytes(inputs: Sequence[Any], packed: Sequence[bool], sliced: Sequence[bool]) -> int:
    """What the inputs, and the gradients of those that want one, take in float64; a byte of a 4-bit weight is two numbers."""
    numbers = [
        2 * i.numel() if p
        else min(i.numel(), SLICE) if s
        else i.numel() * (1 + i.requires_grad) * (i.is_floating_point() or i.is_complex())
        for i, p, s in zip(inputs, packed, sliced, strict=True)
        if isinstance(i, Tensor)
    ]  # fmt: skip
    return 8 * sum(numbers)


def _is_read(output: fx.Node) -> bool:
    """Whether an output is there to be compared: not one that the user asked to drop."""
    return not getattr(output.target, "is_never_read", False)


def _draw(fake: Tensor, generator: torch.Generator, longest: int | None) -> Tensor:
    shape, strides = [small(s, longest) for s in fake.shape], fake.stride()
    if fake.dtype == torch.bool:
        made = torch.rand(shape, generator=generator) < 0.5
    elif fake.is_complex():
        made = torch.polar(torch.ones(shape), torch.randn(shape, generator=generator))
    elif fake.is_floating_point():
        made = torch.randn(shape, generator=generator)
    else:
        made = torch.randint(0, 2, shape, generator=generator)
    order = sorted(range(fake.ndim), key=lambda d: -g.hint(strides[d]))
    made = made.to(fake.device, fake.dtype)
    made = made.permute(order).contiguous().permute([order.index(d) for d in range(fake.ndim)])
    return made.detach().requires_grad_(fake.requires_grad)


def small(size: Any, longest: int | None = LONGEST) -> Any:
    """``size`` with every symbol in it at most ``longest``; None: as it was traced."""
    if not isinstance(size, torch.SymInt):
        return size if not isinstance(size, torch.SymFloat) else float(size.node.hint or 1.0)
    expression, known = size.node.expr, g.traced_symbols(size.node.shape_env)
    traced = {s: int(known.get(s, 2)) for s in expression.free_symbols}
    return int(expression.xreplace({s: n if longest is None else min(n, longest) for s, n in traced.items()}))


def _boundary(change: Change) -> list[fx.Node]:
    """The replacement's inputs, and whatever else (sizes, mostly) the old and new nodes read from outside."""
    inside = set(change.old) | set(change.new)
    outside = [i for n in (*change.old, *change.new) for i in n.all_input_nodes if i not in inside]
    return list(dict.fromkeys([*change.inputs, *outside]))


def _derived(change: Change, boundary: list[fx.Node]) -> list[fx.Node]:
    """What computes those inputs that others settle, in order: drawn apart, the two would not fit each other."""
    found = [n for n in boundary if _is_cast_or_negative(n, boundary)]
    beside = [n for n in boundary if n not in change.inputs and g.tensor_of(n) is not None]
    for node in change.inputs if beside else ():  # old nodes compute an input a second time, from what stands beside it
        found += _computation(node, beside)
    for node in beside:  # new nodes share what another replacement made of the same inputs
        found += _computation(node, change.inputs)
    return sorted(dict.fromkeys(found), key=g.position)


def _is_cast_or_negative(node: fx.Node, boundary: list[fx.Node]) -> bool:
    return node.op.startswith("call") and operation(node) in ("cast", "neg") and node.args[0] in boundary


def _computation(node: fx.Node, given: list[fx.Node]) -> list[fx.Node]:
    """The nodes that compute ``node`` from ``given`` alone; none where more is needed."""
    needed = g.backward_slice([node], given)
    known = {*needed, *given}
    closed = all(effects.is_pure(n) and known.issuperset(n.all_input_nodes) for n in needed)
    return needed if closed and len(needed) <= MOST_DERIVED else []


def _signature(change: Change, boundary: list[fx.Node], derived: list[fx.Node]) -> Any:
    """Equal for changes that compute the same thing on inputs of the same types."""
    computed = [*derived, *change.old, *change.new]
    index = {n: i for i, n in enumerate([*boundary, *computed])}

    def describe(argument: Any) -> Any:
        return repr(g.map_nodes(argument, lambda n: f"%{index[n]}"))

    nodes = tuple((n.op, target_name(n.target), describe((n.args, n.kwargs))) for n in computed)
    types = tuple(_type(g.value(n)) for n in boundary)
    modes = (torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda"))
    return change.rule, nodes, types, modes, tuple(g.requires_grad(o) for o in change.old_outputs)


def _type(found: Any) -> Any:
    if not isinstance(found, Tensor):
        return type(found).__name__
    static = tuple(s if isinstance(s, int) else None for s in found.shape)
    return found.dtype, static, found.requires_grad, found.device.type
