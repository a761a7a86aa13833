"""One call of a function of tensors, recorded: what it reads where it lies, what it is given copies of, what it returns.

Results of a forward stay where the graph computed them, in the memory of all graphs: nobody else's results come to lie there,
but what recordings made before needed while they ran may have lain there too. Results of a backward outlive replays of other
graphs (gradients to which others are added) and are copied to memory of their own; large ones, of which a backward passes one
on to the next, to memory that is lent to whichever recording finds it unused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from .joint import Function

MOVED = "an input has moved"
IN_USE = "its last results are still in use"


class Graph(Protocol):
    """What of ``torch.cuda.CUDAGraph`` is used after it was recorded."""

    def replay(self) -> None:
        """Run what was recorded."""
        ...


Capture = Callable[[Function, Sequence[Any]], tuple[Graph, Sequence[Any]]]
"""Records a call without running it, and returns what will hold the results."""

LARGE = 2**20
"""Bytes of a result from which on memory is saved, rather than launches: a copy takes longer than a launch."""


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

    @property
    def nbytes(self) -> int:
        """Of its elements."""
        return self.size.numel() * self.dtype.itemsize


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


@dataclass
class Kept:
    """Memory that outlives calls, of all recordings.

    Attributes:
        storages: identities of those that recordings write to.
        bytes: of them.
        lent: by form, tensors that several recordings write their results to, and how often each is referred to if unused.
    """

    storages: set[int] = field(default_factory=set)
    bytes: int = 0
    lent: dict[Fresh, list[tuple[Tensor, int]]] = field(default_factory=dict)

    def add(self, storages: Sequence[torch.UntypedStorage]) -> None:
        """What a recording writes to."""
        self.bytes += sum(s.nbytes() for s in storages if s._cdata not in self.storages)
        self.storages |= {s._cdata for s in storages}

    def targets(self, results: Sequence[Any]) -> dict[int, Tensor]:
        """By position, where the results of a backward go."""
        targets: dict[int, Tensor] = {}
        for i, form in enumerate(results):
            if isinstance(form, Fresh):
                targets[i] = form.empty() if form.nbytes < LARGE else self._lend(form, list(targets.values()))
        return targets

    def _lend(self, form: Fresh, taken: Sequence[Tensor]) -> Tensor:
        lent = self.lent.setdefault(form, [])
        for tensor, unused in lent:
            if use_count(tensor.untyped_storage()) <= unused and all(tensor is not t for t in taken):
                return tensor
        tensor = form.empty()
        lent.append((tensor, use_count(tensor.untyped_storage())))
        return tensor


@dataclass
class Recording:
    """One call of a function, recorded.

    Attributes:
        number: of those made before it.
        pooled: whether its results lie where graphs compute.
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

    number: int
    pooled: bool
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

    @property
    def is_in_use(self) -> bool:
        """Whether somebody refers to results where graphs made before compute."""
        return self.pooled and any(use_count(storage) > unused for storage, unused, _ in self.watched)

    def fits(self, arguments: Sequence[Any]) -> bool:
        """Whether a call is this one, and can be replayed."""
        for i, wanted in self.varying:
            given = arguments[i]
            if ((given.shape, given.stride()) if isinstance(given, Tensor) else given) != wanted:
                return False
        return self.obstacle(arguments) is None

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


def record(
    function: Function, arguments: Sequence[Any], warm: Warm, capture: Capture, kept: Kept, places: Set[int],
    backward: bool, number: int,
) -> Recording:  # fmt: skip
    """``function``, recorded for a call with ``arguments`` that is still to be run.

    Args:
        warm: of the call before.
        capture: records a function for these inputs.
        kept: memory of all recordings, to which that of this one is added.
        places: where parameters lie.
        number: of recordings made before.

    Raises:
        RuntimeError: as ``capture``; or a result is a view of an input that no copy can be laid out like.
    """
    copies = {
        i: torch.empty_like(a, requires_grad=False)
        for i, (a, seen) in enumerate(zip(arguments, warm.storages, strict=True))
        if isinstance(a, Tensor) and not _stays(a, seen, kept.storages)
    }
    sources = {r.source for r in warm.results if isinstance(r, Seen)}
    if any(copies[i].stride() != arguments[i].stride() for i in sources & set(copies)):
        raise RuntimeError("a result is a view of an input with gaps")
    inputs = [copies.get(i, a) for i, a in enumerate(arguments)]
    read = [a.data_ptr() if isinstance(a, Tensor) and i not in copies else -1 for i, a in enumerate(inputs)]
    graph, made = capture(_copying(function, kept.targets(warm.results) if backward else {}), inputs)
    results = [r if isinstance(r, Seen) else m for r, m in zip(warm.results, made, strict=True)]
    own = {i: r for i, r in enumerate(results) if isinstance(r, Tensor)}
    storages = [(t.untyped_storage(), i) for i, t in (*((None, c) for c in copies.values()), *own.items())]
    varying = [
        (i, (a.shape, a.stride()) if isinstance(a, Tensor) else a)
        for i, a in enumerate(arguments)
        if read[i] not in places
    ]
    passed = [
        (i, r.source)
        for i, r in enumerate(results)
        if isinstance(r, Seen) and r.source not in copies and r.of(arguments[r.source]) is arguments[r.source]
    ]
    kept.add([s for s, _ in storages])
    watched = [(s, use_count(s), i) for s, i in storages]
    return Recording(number, not backward, graph, read, copies, results, watched, varying, passed)


def _copying(function: Function, targets: Mapping[int, Tensor]) -> Function:
    """``function``, which copies its results at these positions there."""

    def run(arguments: list[Any]) -> list[Any]:
        results = list(function(arguments))
        if targets:
            into, made = list(targets.values()), [results[i] for i in targets]
            torch._foreach_copy_(into, made)  # pyright: ignore[reportPrivateImportUsage]  (one launch for many tensors)
        return [targets.get(i, r) for i, r in enumerate(results)]

    return run


def _stays(tensor: Tensor, seen: StorageWeakRef | None, kept: Set[int]) -> bool:
    """Whether it lies in memory of a recording, or in the same that it lay in, and that was kept, since the last call."""
    now = tensor.untyped_storage()._cdata
    return now in kept or (seen is not None and seen.cdata == now and not seen.expired())


def use_count(storage: torch.UntypedStorage) -> int:
    """How many tensors, here and in C++, and Python objects refer to ``storage``."""
    return torch._C._storage_Use_Count(storage._cdata)  # pyright: ignore[reportAttributeAccessIssue]
