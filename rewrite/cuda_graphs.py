"""Records what a block does in a small training step as CUDA graphs, and replays them.

With few tokens the host takes longer to launch a block's kernels than the device to run them. A block's forward and its
backward, as AOTAutograd hands them over, are functions of tensors alone: run twice as they are, they are recorded the third
time, for each set of parameters and sizes. A recording reads its inputs where they lay then, and writes its results to memory
of its own, so:

- an input that stays where it is (a parameter, what another recording wrote) is read there; any other is copied to a place
  kept for it, and one that stayed and has moved makes the call run kernel by kernel;
- results that are still in use since the last replay are not overwritten: the call runs kernel by kernel. Gradients that stay
  in use, as they do where several batches add up to a step, are handed over as copies from then on.

What a recording needs while it runs comes from one pool for all of them: they run one after the other, in whatever order. The
results, which outlive that, are copied out of it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, fx
from torch.multiprocessing.reductions import StorageWeakRef

from .errors import first_line
from .joint import Function, is_random, is_view
from .rates import Rates, measured_rates
from .recompute import node_seconds
from .sizes import Evaluate, evaluator

_log = logging.getLogger(__name__)

WARM = 2
"""Calls that run kernel by kernel before one is recorded: libraries choose kernels and allocate workspaces in them."""

MOST_SIZES = 16
"""Sizes of calls for which a function is recorded: each keeps memory."""

HOST_SECONDS = 50e-6
"""What the host takes for a call of an operator, of which ours launch several kernels each."""


class Graph(Protocol):
    """What of ``torch.cuda.CUDAGraph`` is used after it was recorded."""

    def replay(self) -> None:
        """Run what was recorded."""
        ...


@dataclass
class Recordings:
    """The recordings of one model: their pool, the memory that they keep, and what became of them.

    Args:
        parameters: those of the model now. Recordings are told apart by where they lie.
        device_type: of the tensors that are recorded.
    """

    parameters: Callable[[], Iterable[Tensor]]
    device_type: str = "cuda"
    count: int = 0
    bytes: int = 0
    """Kept between steps."""
    replays: int = 0
    notes: dict[str, int] = field(default_factory=dict)
    """Why calls of these sizes ran kernel by kernel, and how many."""
    sharded: bool = False
    """Parameters are gathered anew for each call: nothing is recorded."""
    kept: set[int] = field(default_factory=set)
    """Identities of the storages that recordings write to."""
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
            self.sharded = any(map(_is_wrapper, parameters))
            self._places = frozenset() if self.sharded else frozenset(p.data_ptr() for p in parameters)
        return self._places

    def note(self, reason: str) -> None:
        """A call runs kernel by kernel."""
        self.notes[reason] = self.notes.get(reason, 0) + 1

    def remarks(self) -> list[str]:
        """What was recorded and replayed, and what was not, for the report."""
        done = f"CUDA graphs: {self.count} recordings keep {self.bytes / 2**20:.1f} MiB, {self.replays} replays"
        return [
            *([done] if self.count else []),
            *(f"CUDA graphs: {n} calls ran kernel by kernel: {why}" for why, n in self.notes.items()),
        ]

    def capture(self, function: Function, inputs: Sequence[Any]) -> Graph:
        """Record ``function`` without running it. ``torch.cuda.graph`` would collect garbage before each of some sixty.

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
                function(list(inputs))
            finally:
                graph.capture_end()
        current.wait_stream(self._stream)
        return graph

    def recorded(self, function: Function, graph: fx.Graph, backward: bool) -> Function:
        """``function``, which runs ``graph``, with its calls recorded where that is worth it."""
        if any(is_random(n) for n in graph.nodes if n.op == "call_function"):
            return function
        calls = RecordedCalls(function, graph, self, backward)

        def run(arguments: list[Any]) -> Any:
            return calls(arguments)

        run._boxed_call = True  # pyright: ignore[reportFunctionMemberAccess]  (AOTAutograd's own mark)
        return run


def _is_wrapper(tensor: Tensor) -> bool:
    """Sharded parameters and the like: what is computed with is not at their address."""
    return hasattr(tensor, "to_local") or hasattr(tensor, "__tensor_flatten__")


MOVED = "an input has moved"
IN_USE = "its last results are still in use"


@dataclass(frozen=True)
class Fresh:
    """A result in memory of its own."""

    size: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def empty(self) -> Tensor:
        """Such a tensor."""
        return torch.empty_strided(self.size, self.stride, dtype=self.dtype, device=self.device)


@dataclass(frozen=True)
class Seen:
    """A result that is an input, or a view of one: which, and where it begins behind it, in elements."""

    source: int
    size: torch.Size
    stride: tuple[int, ...]
    behind: int

    def of(self, source: Tensor) -> Tensor:
        """The same of another tensor."""
        if not self.behind and source.size() == self.size and source.stride() == self.stride:
            return source
        return source.as_strided(self.size, self.stride, source.storage_offset() + self.behind)


@dataclass
class Warm:
    """A call that was seen: how often, and in the last the storages of its inputs and what its results were."""

    count: int = 0
    storages: list[StorageWeakRef | None] = field(default_factory=list)
    results: list[Any] = field(default_factory=list)

    def run(self, function: Function, arguments: list[Any]) -> Any:
        """Kernel by kernel."""
        given = list(arguments)
        result = function(arguments)
        self.count += 1
        self.storages = [StorageWeakRef(a.untyped_storage()) if isinstance(a, Tensor) else None for a in given]
        self.results = [_form(r, given) for r in result]
        return result


def _form(result: Any, given: Sequence[Any]) -> Any:
    if not isinstance(result, Tensor):
        return result
    storage = result.untyped_storage()._cdata
    for i, a in enumerate(given):
        if isinstance(a, Tensor) and a.untyped_storage()._cdata == storage:
            return Seen(i, result.size(), result.stride(), int(result.storage_offset() - a.storage_offset()))
    return Fresh(result.size(), result.stride(), result.dtype, result.device)


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

    def __call__(self, arguments: list[Any]) -> Any:
        if self.anchor is not None:
            for recording in self.at.get(arguments[self.anchor].data_ptr(), ()):
                if recording.fits(arguments):
                    self.shared.replays += 1
                    return recording.run(arguments)
        return self._slowly(arguments)

    def _slowly(self, arguments: list[Any]) -> Any:
        """A call that is not known, or stands in its own way."""
        sizes, key = self._keys(arguments)
        if not self._wants(sizes, arguments):
            return self.function(arguments)
        found = self.known.setdefault(key, Warm())
        if isinstance(found, Recording):
            obstacle = found.obstacle(arguments)
            if obstacle is None:
                self.shared.replays += 1
                return found.run(arguments)
            self.shared.note(obstacle)
            if obstacle is IN_USE and self.backward:
                found.hand_over_copies()
        elif isinstance(found, Warm) and found.count < WARM:
            return found.run(self.function, arguments)
        elif isinstance(found, Warm):
            return self._record(key, found, arguments)
        return self.function(arguments)

    def _keys(self, arguments: Sequence[Any]) -> tuple[Any, Any]:
        """The sizes of a call; those with the places of its parameters."""
        places, sizes, here = self.shared.places, list[Any](), list[int]()
        for argument in arguments:
            if isinstance(argument, Tensor):
                sizes.append((argument.shape, argument.stride()))
                if (place := argument.data_ptr()) in places:
                    here.append(place)
            else:
                sizes.append(argument)
        return tuple(sizes), (*sizes, *here)

    def _wants(self, sizes: Any, arguments: Sequence[Any]) -> bool:
        """Whether the host is what calls of these sizes wait for."""
        known = self.wanted.get(sizes)
        if known is None:
            known = (
                not self.shared.sharded and all(map(self._can_be_read, arguments)) and self._bound_by_host(arguments)
            )
            if known and sum(self.wanted.values()) >= MOST_SIZES:
                known = False
                self.shared.note(f"more than {MOST_SIZES} sizes of calls")
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
        fakes = [n.meta.get("val") for n in self.graph.nodes if n.op == "placeholder"]
        rates = measured_rates(floating.device, floating.dtype)
        return bound_by_host(self.graph, evaluator(fakes, arguments), rates)

    def _record(self, key: Any, warm: Warm, arguments: list[Any]) -> Any:
        try:
            recording = record(self.function, arguments, warm, self.shared)
        except Exception as error:  # what cannot be recorded runs as before, and the report says why
            _log.debug("recording failed", exc_info=True)
            self.known[key] = None
            self.shared.note(f"cannot be recorded: {first_line(error)}")
            return self.function(arguments)
        self.known[key] = recording
        if self.anchor is None:
            anchors = (i for i, place in enumerate(recording.places) if place in self.shared.places)
            self.anchor = next(anchors, None)
        if self.anchor is not None:
            self.at.setdefault(arguments[self.anchor].data_ptr(), []).append(recording)
        return recording.run(arguments)


def bound_by_host(graph: fx.Graph, of: Evaluate, rates: Rates) -> bool:
    """Whether launching the calls of ``graph`` takes the host at least half as long as the device takes to run them."""
    calls = [n for n in graph.nodes if n.op == "call_function" and not is_view(n)]
    return sum(node_seconds(n, of, rates) for n in calls) < 2 * HOST_SECONDS * len(calls)


@dataclass
class Recording:
    """One call of a function, recorded.

    Attributes:
        places: of each input the address that is read; -1 for numbers and for what is copied.
        copies: by position, what is read in place of inputs that do not stay where they are.
        results: tensors that the next replay overwrites, :class:`Seen` and numbers.
        watched: storages that a replay writes to, how often each is referred to when it is not in use, and the position of the
            result in it.
        varying: sizes and strides of the inputs that are no parameters, and numbers among the inputs.
        passed: of results that are inputs, as they are: both positions.
        cloned: positions of the results that are handed over as copies.
        in_use: of those that stood in the way of the last call.
    """

    graph: Graph
    places: list[int]
    copies: dict[int, Tensor]
    results: list[Any]
    watched: list[tuple[torch.UntypedStorage, int, int | None]]
    varying: list[tuple[int, Any]] = field(default_factory=list)
    passed: list[tuple[int, int]] = field(default_factory=list)
    cloned: set[int] = field(default_factory=set)
    in_use: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        passed = {i for i, _ in self.passed}
        self.others = [i for i, r in enumerate(self.results) if isinstance(r, Tensor | Seen) and i not in passed]

    def fits(self, arguments: Sequence[Any]) -> bool:
        """Whether a call is this one, and can be replayed."""
        for i, wanted in self.varying:
            given = arguments[i]
            if ((given.shape, given.stride()) if isinstance(given, Tensor) else given) != wanted:
                return False
        for argument, place in zip(arguments, self.places, strict=True):
            if place != -1 and argument.data_ptr() != place:
                return False
        return all(use_count(storage) <= unused for storage, unused, _ in self.watched)

    def obstacle(self, arguments: Sequence[Any]) -> str | None:
        """Why a call cannot be replayed; None if it can."""
        for argument, place in zip(arguments, self.places, strict=True):
            if place != -1 and argument.data_ptr() != place:
                return MOVED
        in_use = [position for storage, unused, position in self.watched if use_count(storage) > unused]
        self.in_use = [i for i in in_use if i is not None]
        return IN_USE if in_use else None

    def hand_over_copies(self) -> None:
        """Of the results that were in use: gradients, to which those of another batch are to be added."""
        self.cloned.update(self.in_use)

    def run(self, arguments: list[Any]) -> list[Any]:
        """Replay on ``arguments``, a list that is emptied."""
        for i, copy in self.copies.items():
            copy.copy_(arguments[i])
        given = list(arguments)
        arguments.clear()
        self.graph.replay()
        handed = list(self.results)
        for i, source in self.passed:
            handed[i] = given[source]
        for i in self.others:
            handed[i] = self._handed_over(i, handed[i], given)
        return handed

    def _handed_over(self, i: int, result: Any, given: Sequence[Any]) -> Any:
        if isinstance(result, Seen):
            copy = self.copies.get(result.source)
            return result.of(given[result.source] if copy is None else copy.detach())
        return result.clone() if i in self.cloned else result.detach()


def record(function: Function, arguments: Sequence[Any], warm: Warm, shared: Recordings) -> Recording:
    """``function``, recorded for a call with ``arguments`` that is still to be run.

    Raises:
        RuntimeError: as :meth:`Recordings.capture`; or a result is a view of an input that no copy can be laid out like.
    """
    copies = {
        i: torch.empty_like(a, requires_grad=False)
        for i, (a, seen) in enumerate(zip(arguments, warm.storages, strict=True))
        if isinstance(a, Tensor) and not _stays(a, seen, shared)
    }
    sources = {r.source for r in warm.results if isinstance(r, Seen)}
    if any(copies[i].stride() != arguments[i].stride() for i in sources & set(copies)):
        raise RuntimeError("a result is a view of an input with gaps")
    inputs = [copies.get(i, a) for i, a in enumerate(arguments)]
    places = [a.data_ptr() if isinstance(a, Tensor) and i not in copies else -1 for i, a in enumerate(inputs)]
    results = [r.empty() if isinstance(r, Fresh) else r for r in warm.results]
    kept = {i: r for i, r in enumerate(results) if isinstance(r, Tensor)}
    graph = shared.capture(_copying(function, kept), inputs)
    written = [*((None, c) for c in copies.values()), *kept.items()]
    storages = [(t.untyped_storage(), i) for i, t in written]
    shared.count, shared.bytes = shared.count + 1, shared.bytes + sum(s.nbytes() for s, _ in storages)
    shared.kept |= {s._cdata for s, _ in storages}
    varying = [
        (i, (a.shape, a.stride()) if isinstance(a, Tensor) else a)
        for i, a in enumerate(arguments)
        if places[i] not in shared.places
    ]
    passed = [
        (i, r.source)
        for i, r in enumerate(results)
        if isinstance(r, Seen) and r.source not in copies and r.of(arguments[r.source]) is arguments[r.source]
    ]
    watched = [(s, use_count(s), i) for s, i in storages]
    return Recording(graph, places, copies, results, watched, varying, passed)


def _copying(function: Function, targets: Mapping[int, Tensor]) -> Function:
    """``function``, which copies its results at these positions there."""

    def run(arguments: list[Any]) -> None:
        results = function(arguments)
        if targets:
            into, made = list(targets.values()), [results[i] for i in targets]
            torch._foreach_copy_(into, made)  # pyright: ignore[reportPrivateImportUsage]  (one launch for many tensors)

    return run


def _stays(tensor: Tensor, seen: StorageWeakRef | None, shared: Recordings) -> bool:
    """Whether it lies in memory of a recording, or in the same that it lay in, and that was kept, since the last call."""
    now = tensor.untyped_storage()._cdata
    return now in shared.kept or (seen is not None and seen.cdata == now and not seen.expired())


def use_count(storage: torch.UntypedStorage) -> int:
    """How many tensors, here and in C++, and Python objects refer to ``storage``."""
    return torch._C._storage_Use_Count(storage._cdata)  # pyright: ignore[reportAttributeAccessIssue]
