"""One function of a block, a forward or a backward, and its calls: run, recorded, replayed."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from .errors import first_line
from .joint import Function, is_view
from .rates import Rates, measured_rates
from .recompute import node_seconds
from .recording import IN_USE, Recording, Warm, record
from .sizes import Evaluate, evaluator

if TYPE_CHECKING:
    from .cuda_graphs import Recordings

_log = logging.getLogger(__name__)

WARM = 2
"""Calls that run kernel by kernel before one is recorded: libraries choose kernels and allocate workspaces in them."""

MOST_SIZES = 16
"""Sizes of calls for which a function is recorded: each keeps memory."""

REMEMBERED = 256
"""Sizes of calls of which it is remembered whether they are recorded."""

LATER = "results of a recording made later are in use"

HOST_CALLS = 13
"""Smallest calls of torch in whose time the host launches an operator of ours, of several kernels. Of one host: 122-173 µs
against 9.5-10.5."""


class RecordedCalls:
    """A function of a list of tensors and numbers, recorded for each set of parameters and sizes that it is called with."""

    def __init__(self, function: Function, graph: fx.Graph, shared: Recordings, backward: bool) -> None:
        self.function = function
        self.graph = graph
        self.shared = shared
        self.backward = backward
        self.known: dict[Any, Warm | Recording | None] = {}
        self.wanted: dict[Any, bool] = {}
        """Whether calls of these sizes are to be recorded."""
        self.anchor: int | None = None
        """Position of an input that is a parameter."""
        self.at: dict[int, list[Recording]] = {}
        """Recordings by where that parameter lies, to be found without looking at every input."""
        self.varying = [i for i, fake in enumerate(_inputs(graph)) if _varies(fake)]
        """Positions of the inputs whose sizes or devices differ between calls."""

    def __call__(self, arguments: list[Any]) -> Any:
        if self.anchor is not None:
            for recording in self.at.get(arguments[self.anchor].data_ptr(), ()):
                if recording.fits(arguments) and self.shared.overwrites_no_other(recording):
                    self.shared.replays += 1
                    return recording.run(arguments)
        return self._slowly(arguments)

    def forget(self) -> None:
        """The recordings."""
        self.known, self.at = {}, {}

    def _slowly(self, arguments: list[Any]) -> Any:
        """A call that is not known, or stands in its own way."""
        if not (self.shared.allowed or self.shared.made) or not self._wants(arguments):
            return self.function(arguments)
        key = self._key(arguments)
        found = self.known.setdefault(key, Warm())
        if isinstance(found, Recording):
            obstacle = found.obstacle(arguments)
            if obstacle is None and not self.shared.overwrites_no_other(found):
                obstacle = LATER
            if obstacle is None:
                self.shared.replays += 1
                return found.run(arguments)
            self.shared.note(obstacle)
            if obstacle is IN_USE and self.backward:
                found.hand_over_copies()
        elif isinstance(found, Warm) and (found.count < WARM or not self.shared.allowed):
            return found.run(self.function, arguments)
        elif isinstance(found, Warm):
            return self._record(key, found, arguments)
        return self.function(arguments)

    def _key(self, arguments: Sequence[Any]) -> Any:
        """The sizes of a call, and the places of its parameters.

        And devices: what torch's attention keeps of a generator lies on the host, but for a recorded forward.
        """
        places = self.shared.places
        key: list[Any] = [_form(argument) for argument in arguments]
        tensors = (argument for argument in arguments if isinstance(argument, Tensor))
        return *key, *(place for t in tensors if (place := t.data_ptr()) in places)

    def _wants(self, arguments: Sequence[Any]) -> bool:
        """Whether the host is what calls of these sizes wait for."""
        sizes = tuple([_form(arguments[i]) for i in self.varying])
        known = self.wanted.get(sizes)
        if known is None:
            readable = not self.shared.is_sharded and all(map(self._can_be_read, arguments))
            known = readable and self._bound_by_host(arguments)
            if known and sum(self.wanted.values()) >= MOST_SIZES:
                known = False
                self.shared.note(f"more than {MOST_SIZES} sizes of calls")
            if len(self.wanted) >= REMEMBERED:
                self.wanted = {s: w for s, w in self.wanted.items() if w}
            self.wanted[sizes] = known
        return known

    def _can_be_read(self, argument: Any) -> bool:
        """Whether a recording can read it: a number, which is part of the key, or an ordinary tensor on the device."""
        if not isinstance(argument, Tensor):
            return argument is None or isinstance(argument, int | float | bool)
        return argument.device.type == self.shared.device_type and not is_wrapper(argument)

    def _bound_by_host(self, arguments: Sequence[Any]) -> bool:
        floating = next((a for a in arguments if isinstance(a, Tensor) and a.is_floating_point()), None)
        if floating is None:
            return False
        if (
            self.shared.rates is None
        ):  # measuring takes memory: once, for the forward of a first block, as planning does
            self.shared.rates = measured_rates(floating.device, floating.dtype)
        of = evaluator(_inputs(self.graph), arguments)
        return bound_by_host(self.graph, of, self.shared.rates, self.shared.share)

    def _record(self, key: Any, warm: Warm, arguments: list[Any]) -> Any:
        try:
            shared = self.shared
            made = self.backward, shared.count
            recording = record(self.function, arguments, warm, shared.capture, shared.kept, shared.places, *made)
        except Exception as error:  # what cannot be recorded runs as before, and the report says why
            _log.debug("recording failed", exc_info=True)
            self.known[key] = None
            self.shared.note(f"cannot be recorded: {first_line(error)}")
            return self.function(arguments)
        self.known[key] = recording
        self.shared.made.append(recording)
        if self.anchor is None:
            anchors = (i for i, place in enumerate(recording.places) if place in self.shared.places)
            self.anchor = next(anchors, None)
        if self.anchor is not None:
            self.at.setdefault(arguments[self.anchor].data_ptr(), []).append(recording)
        shared.overwrites_no_other(recording)  # for none was made later
        return recording.run(arguments)


def _inputs(graph: fx.Graph) -> list[Any]:
    """What stands for each input of ``graph``."""
    return [n.meta.get("val") for n in graph.nodes if n.op == "placeholder"]


def _varies(fake: Any) -> bool:
    """Whether an input's size may be another in each call, or it is a number: a generator's seed, say, on either device.

    All other inputs, the parameters among them, are looked at where a call is to be recorded.
    """
    if not isinstance(fake, Tensor):
        return True
    sizes = (*fake.shape, *fake.stride())
    return any(isinstance(size, torch.SymInt) for size in sizes) or fake.dtype in (torch.int64, torch.uint64)


def _form(argument: Any) -> Any:
    return (argument.shape, argument.stride(), argument.device) if isinstance(argument, Tensor) else argument


def bound_by_host(graph: fx.Graph, of: Evaluate, rates: Rates, share: float) -> bool:
    """Whether launching the calls of ``graph`` takes the host at least ``share`` as long as the device takes to run them."""
    calls = [n for n in graph.nodes if n.op == "call_function" and not is_view(n)]
    return share * sum(node_seconds(n, of, rates) for n in calls) < HOST_CALLS * rates.call * len(calls)


def is_wrapper(tensor: Tensor) -> bool:
    """Sharded parameters and the like: what is computed with is not at their address."""
    return hasattr(tensor, "to_local") or hasattr(tensor, "__tensor_flatten__")
