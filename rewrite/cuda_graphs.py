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

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, fx

from .joint import Function, is_mutating
from .rates import Rates
from .recorded_calls import RecordedCalls, is_wrapper
from .recording import Graph, Kept, Recording

IN_VAIN = 3
"""Times in a row that all recordings were made and outdated before they had been worth it."""

WORTH_IT = 8
"""Replays of a recording, in the mean, that are worth having made it."""


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
            self._sharded = any(map(is_wrapper, parameters))
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
