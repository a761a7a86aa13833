"""Records what a block does in a small training step as CUDA graphs, and replays them.

With few tokens the host takes longer to launch a block's kernels than the device to run them. A block's forward and its
backward, as AOTAutograd hands them over, are functions of tensors alone: run twice as they are, they are recorded the third
time, for each set of parameters and sizes. A recording reads its inputs where they lay then, and writes its results to memory
of its own, so:

- an input that stays where it is (a parameter, what another recording wrote) is read there; any other is copied to a place
  kept for it, and one that stayed and has moved makes the call run kernel by kernel;
- results that are still in use since the last replay are not overwritten, nor are those of other recordings: the call runs
  kernel by kernel. Gradients that stay in use, as they do where several batches add up to a step, are handed over as copies
  from then on.

Random numbers are drawn anew by each replay, as by a call: torch's generator hands its state to a CUDA graph.

What a recording needs while it runs, and the results of forwards, come from one pool for all of them. What lies there for a
moment may be where the results of a recording made later will be, since it was free by then; so no recording is replayed while
results of later ones are in use. In the order of a step, in which they were made, that never stands in the way.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, fx

from .errors import first_line
from .joint import Function, is_mutating, is_view
from .rates import Rates, measured_rates
from .recompute import node_seconds
from .recording import IN_USE, Graph, Kept, Recording, Warm, record
from .sizes import Evaluate, evaluator

_log = logging.getLogger(__name__)

WARM = 2
"""Calls that run kernel by kernel before one is recorded: libraries choose kernels and allocate workspaces in them."""

MOST_SIZES = 16
"""Sizes of calls for which a function is recorded: each keeps memory."""

REMEMBERED = 256
"""Sizes of calls of which it is remembered whether they are recorded."""

IN_VAIN = 3
"""Times in a row that all recordings were made and outdated before they had been worth it."""

WORTH_IT = 8
"""Replays of a recording, in the mean, that are worth having made it."""

LATER = "results of a recording made later are in use"

HOST_CALLS = 13
"""Smallest calls of torch in whose time the host launches an operator of ours, of several kernels. Of one host: 122-173 µs
against 9.5-10.5."""


@dataclass
class Recordings:
    """The recordings of one model: their pool, the memory that they keep, and what became of them.

    Args:
        parameters: those of the model now. Recordings are told apart by where they lie.
        device_type: of the tensors that are recorded.
        share: what the host takes for launching a function, of what the device takes to run it, is no less where it is recorded.
    """

    parameters: Callable[[], Iterable[Tensor]]
    device_type: str = "cuda"
    share: float = 0.5
    made: list[Recording] = field(default_factory=list)
    replays: int = 0
    notes: dict[str, int] = field(default_factory=dict)
    """Why calls of these sizes ran kernel by kernel, and how many."""
    rates: Rates | None = None
    """Of the device."""
    kept: Kept = field(default_factory=Kept)
    given_up: dict[str, int] = field(default_factory=dict)
    """How many recordings, and why."""
    allowed: bool = True
    """Whether there is memory for more."""
    _in_vain: int = 0
    _replayed: int = 0
    """Before the recordings that there are."""
    _calls: WeakSet[RecordedCalls] = field(default_factory=WeakSet)
    _unused_after: int = -1
    """Of recordings made after this one no result is in use."""
    _sharded: bool = False
    _places: frozenset[int] | None = None
    _pool: Any = None
    _stream: Any = None

    def moved(self) -> None:
        """The parameters may be others, or lie elsewhere."""
        self._places = None

    @property
    def places(self) -> frozenset[int]:
        """Where the parameters lie."""
        if self._places is None:
            parameters = list(self.parameters())
            self._sharded = any(map(_is_wrapper, parameters))
            self._places = frozenset() if self._sharded else frozenset(p.data_ptr() for p in parameters)
        return self._places

    @property
    def is_sharded(self) -> bool:
        """Whether parameters are gathered anew for each call: nothing is recorded then."""
        return bool(not self.places and self._sharded)

    def note(self, reason: str) -> None:
        """A call runs kernel by kernel."""
        self.notes[reason] = self.notes.get(reason, 0) + 1

    @property
    def count(self) -> int:
        """Of recordings."""
        return len(self.made)

    @property
    def bytes(self) -> int:
        """Kept between steps."""
        return self.kept.bytes

    def give_up(self, reason: str = "for their memory") -> None:
        """Let go of all recordings and of what they keep; calls of these sizes run kernel by kernel from now on."""
        self.given_up[reason] = self.given_up.get(reason, 0) + self.count
        self.start_over()
        for calls in list(self._calls):
            calls.wanted = dict.fromkeys(calls.wanted, False)

    def outdated(self) -> None:
        """A weight that is not trained has changed, and recordings may read what operators made of it: they are made anew, but
        not for one that changes every few steps."""
        in_vain = self.replays - self._replayed < WORTH_IT * self.count
        self._in_vain = self._in_vain + 1 if in_vain else 0
        if self._in_vain < IN_VAIN:
            self.start_over()
        else:
            self.give_up("since a weight that is not trained keeps changing")

    def start_over(self) -> None:
        """Let go of all recordings, to be made anew."""
        if self.device_type == "cuda":
            torch.cuda.synchronize()  # what is replayed now must end before its memory is somebody else's
        for calls in list(self._calls):
            calls.forget()
        self.made, self.kept, self._pool, self._unused_after = [], Kept(), None, -1
        self._replayed = self.replays

    def overwrites_no_other(self, recording: Recording) -> bool:
        """Whether it may run next. Results come into use by a replay alone: each recording is looked at once a step."""
        while self._unused_after > recording.number:
            if self.made[self._unused_after].is_in_use:
                return False
            self._unused_after -= 1
        self._unused_after = recording.number
        return True

    def remarks(self) -> list[str]:
        """What was recorded and replayed, and what was not, for the report."""
        done = f"CUDA graphs: {self.count} recordings keep {self.bytes / 2**20:.1f} MiB, {self.replays} replays"
        return [
            *([done] if self.count else []),
            *(f"CUDA graphs: {n} recordings were given up {why}" for why, n in self.given_up.items()),
            *(f"CUDA graphs: {n} calls ran kernel by kernel: {why}" for why, n in self.notes.items()),
        ]

    def capture(self, function: Function, inputs: Sequence[Any]) -> tuple[Graph, Sequence[Any]]:
        """Record ``function`` without running it; what it returned. ``torch.cuda.graph`` would collect garbage each time.

        Raises:
            RuntimeError: it waits for the device, or does something else that no CUDA graph can hold.
        """
        device = next(a.device for a in inputs if isinstance(a, Tensor))
        if self._pool is None:
            self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream(device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                results = function(list(inputs))
            finally:
                graph.capture_end()
        current.wait_stream(self._stream)
        return graph, results

    def recorded(self, function: Function, graph: fx.Graph, backward: bool) -> Function:
        """``function``, which runs ``graph``, with its calls recorded where that is worth it."""
        if any(is_mutating(n) for n in graph.nodes if n.op == "call_function"):
            return function  # what it changes would be a copy of its input, or an input that has moved since
        calls = RecordedCalls(function, graph, self, backward)
        self._calls.add(calls)

        def run(arguments: list[Any]) -> Any:
            return calls(arguments)

        run._boxed_call = True  # pyright: ignore[reportFunctionMemberAccess]  (AOTAutograd's own mark)
        return run


def _is_wrapper(tensor: Tensor) -> bool:
    """Sharded parameters and the like: what is computed with is not at their address."""
    return hasattr(tensor, "to_local") or hasattr(tensor, "__tensor_flatten__")


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
        return argument.device.type == self.shared.device_type and not _is_wrapper(argument)

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
