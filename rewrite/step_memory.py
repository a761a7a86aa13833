"""Plans the memory of training steps, one forward at a time: what there is, what blocks cost, what each of them saves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from .choices import Choices
from .cuda_graphs import Recordings
from .device_memory import free_bytes, host_memory, peak_bytes
from .memory_plan import BlockMemory, MemoryPlan
from .offload import HostStore
from .placement import BlockCosts, Option, thriftier
from .recompute import Head, activation
from .weights import Weights

FILLED = 0.95
"""Of the memory that is free, what may be planned with: the allocator's blocks do not fit together without gaps."""

BESIDE = 8
"""Part of what is resident that a replay may take under ``"min"``."""

UNPLANNED = 32
"""Part of a limit by which a step may have been beyond it for reasons that a plan does not know."""

RECORDED = 3
"""A block's input, as often as a recording of its forward and backward keeps as much beside what is saved: 2.2 on an H200."""

Limit = int | Literal["free", "min"]
Key = tuple[str, int]
"""A block's path, and which of its graphs."""


class Block(Protocol):
    """A block's graph, whose costs are asked for."""

    def costs(self, args: Sequence[Any], checkpointed: bool = False) -> BlockCosts:
        """At the sizes of ``args``."""
        ...


@dataclass
class StepMemory:
    """Plans the memory of a model's training steps, one forward at a time.

    Args:
        paths: of the blocks, in the order of the model.
        model: whose parameters are trained.
        limit: bytes that a step may take at its peak; ``"free"``: what the device has free; ``"min"``: as few as possible.
    """

    paths: Sequence[str]
    model: nn.Module
    limit: Limit = "free"
    recordings: Recordings | None = None
    """Of small steps; None: none is recorded."""
    plan: MemoryPlan | None = None
    heads: list[Head] = field(default_factory=list)
    """Of the graphs beside the blocks."""
    checkpointed: bool = False
    """Set while a block runs that its model wants computed again."""
    tried: bool = False
    """Set while a forward runs that no backward follows: nothing is planned."""
    _entered: set[str] = field(default_factory=set)
    _called: list[Key] = field(default_factory=list)
    _costs: dict[Key, BlockCosts] = field(default_factory=dict)
    _chosen: dict[Key, Option] = field(default_factory=dict)
    _assumed: dict[str, tuple[BlockCosts, Option]] = field(default_factory=dict)
    """Of blocks that have not run yet: what they were taken to cost, and what was chosen for them."""
    _passes: dict[Any, list[Key]] = field(default_factory=dict)
    _shapes: Any = None
    _given: int = 0
    """Bytes of what a block gives to the next."""
    _beyond: int = 0
    """Bytes that a step has taken beyond what was predicted, and beyond its limit."""
    _store: HostStore | None = None
    _weights: Weights = field(init=False)
    _choices: Choices = field(default_factory=Choices)
    _frozen: int | None = None
    """Versions of the parameters that are not trained, while there are recordings."""
    _last_most: int | None = None
    """Bytes that the last block may save, so that the head beside it takes no more than a backward; None: all."""

    def __post_init__(self) -> None:
        self._weights = Weights(self.model)

    def recount(self) -> None:
        """A graph was captured: the model may have other parameters than before, or train others."""
        self._weights.recount()
        if self.recordings is not None:
            self.recordings.moved()

    @contextmanager
    def running(self, path: str) -> Iterator[None]:
        """The block at ``path`` runs. A forward that fails there says nothing of what others call."""
        if torch.is_grad_enabled():
            self._enter(path)
        try:
            yield
        except BaseException:  # out of memory, or interrupted by hand
            self._entered.clear()
            self._called = []
            raise

    def _enter(self, path: str) -> None:
        """Its second time begins another forward of the model."""
        if path in self._entered:
            self._entered.clear()
        if not self._entered and self._called:
            self._passes[self._shapes] = self._called
            self._called = []
        self._entered.add(path)

    @contextmanager
    def checkpointing(self) -> Iterator[None]:
        """Blocks that run inside save their inputs and little more."""
        before, self.checkpointed = self.checkpointed, True
        try:
            yield
        finally:
            self.checkpointed = before

    @contextmanager
    def trying(self) -> Iterator[None]:
        """No forward inside is the first half of a step."""
        self.tried = True
        try:
            yield
        finally:
            self.tried = False

    def option(self, path: str, block: Block, args: Sequence[Any]) -> Option:
        """What the block at ``path`` does in this call."""
        key = (path, id(block))
        costs = block.costs(args, self.checkpointed)
        begins = not self._called
        if begins:
            self._begin(args, costs)
        changed = self._costs.get(key) is not costs
        self._called.append(key)
        self._costs[key] = costs
        if begins or changed or key not in self._chosen:
            assumed = None if begins else self._assumed_option(path, costs)
            if assumed is None:
                self._choose(key, costs)
            else:
                self._chosen[key] = assumed
        return self._chosen[key]

    def _assumed_option(self, path: str, costs: BlockCosts) -> Option | None:
        """What the last choice has for a block that it took for what it is, in its place."""
        assert self.plan is not None
        taken_for, option = self._assumed.pop(path, (None, None))
        place = self.plan.blocks[len(self._called) - 1 :][:1]
        return option if taken_for is costs and [b.path for b in place] == [path] else None

    def _begin(self, args: Sequence[Any], costs: BlockCosts) -> None:
        """A forward begins: see what memory there is."""
        device = next(a.device for a in args if isinstance(a, Tensor))
        self._look_at_frozen()
        former = self.plan
        if former is not None:
            peak = peak_bytes(device)
            # its own, if that was the highest since the allocator's statistics began
            former.measured, former.before = None if peak == former.peak_before else peak, None
            self._learn(former)
        self._shapes = shapes_of(args)
        now = self._weights.resident(device) - self._kept(former)
        limit = now + int(FILLED * free_bytes(device)) if self.limit == "free" else self.limit
        expected = self._passes.get(self._shapes, ())
        if not expected:  # nothing chosen before was for such inputs
            self._chosen.clear()
        # not what the first block is given, which needs no gradient where nothing is trained before it
        self._given = max([costs.result, *(self._costs[k].result for k in expected)])
        backward = max([costs.working, *(self._costs[k].working for k in expected)])
        # the last block is like most, unlike the first
        last, self._last_most = self._costs[expected[-1]] if expected else costs, None
        working, all_of_it = self._working(backward, last), last.options[0].bytes
        least = working + len(self.paths) * last.options[-1].bytes
        if limit != "min" and self.recordings is not None and self.recordings.count and limit - now < least:
            self.recordings.give_up()  # those of other sizes, most of them
            now = self._weights.resident(device)
        resident = now + self._weights.pending(now)
        if limit == "min" or resident + working + len(self.paths) * all_of_it > limit:
            self._last_most = max(backward - self._head, 0)
            working = self._working(backward, thriftier(last, self._last_most))
        spare = max(0, working - all_of_it)
        self.plan = MemoryPlan(None if limit == "min" else limit, resident, working, before=former, spare=spare)
        self.plan.peak_before = peak_bytes(device)

    @property
    def _head(self) -> int:
        """Bytes that the head and the loss have alive beside what is saved."""
        return max((h.at(self._given) for h in self.heads), default=0)

    def _working(self, backward: int, last: BlockCosts) -> int:
        """The most that a backward has alive, or the head beside what the last block saves."""
        return max(backward, self._head + last.options[0].bytes) + self._beyond

    def _look_at_frozen(self) -> None:
        """Recordings may read what was made of weights that are not trained: if these have changed, they are made anew."""
        if self.recordings is None or not self.recordings.count:
            self._frozen = None
            return
        versions = self._weights.frozen_versions()
        if self._frozen not in (None, versions):
            self.recordings.outdated()
        self._frozen = versions

    def room_beside(self, device: torch.device) -> int:
        """Bytes that may be taken for a moment while no step runs, when rewrites are replayed. Where a step is to take as few as
        possible, that is little of what the model takes."""
        free = free_bytes(device)
        if self.limit == "free" or device.type == "cpu":  # float64 on the host is where it is
            return free
        taken = self._weights.resident(device)
        return min(free, taken // BESIDE if self.limit == "min" else max(self.limit - taken, 0))

    def _learn(self, former: MemoryPlan) -> None:
        """A step that took more than it may: what it took beyond its plan is counted in from now on, unless it is so much that
        something else must have taken it, an evaluation between two steps, say."""
        if former.measured is None or former.limit is None or self.limit == "free":
            return
        if max(former.limit, former.predicted) < former.measured <= former.limit + former.limit // UNPLANNED:
            self._beyond += former.measured - former.predicted

    def _kept(self, former: MemoryPlan | None) -> int:
        """Bytes that recordings keep for what is planned anew: saved values and gradients. Those of other sizes are resident."""
        if self.recordings is None or not self.recordings.bytes or former is None:
            return 0
        return min(self.recordings.bytes, sum(b.saved_bytes for b in former.blocks) + sum(self._weights.trained.bytes))

    def roomy(self, costs: BlockCosts) -> bool:
        """Whether all blocks could save all at these costs, by what was resident when the last forward began."""
        if self.plan is None or self.plan.limit is None:
            return False
        needed = len(self.paths) * costs.options[0].bytes + costs.working
        return costs.options[0].saved is None and self.plan.resident + 2 * needed <= self.plan.limit

    def _choose(self, key: Key, like: BlockCosts) -> None:
        """Choose for this block and those still to come; those not seen yet are taken to be like this one."""
        assert self.plan is not None
        plan, done = self.plan, len(self._called) - 1
        expected = self._passes.get(self._shapes)
        if expected is None:
            seen = {path for path, _ in self._called}
            to_come = [key, *((path, 0) for path in self.paths if path not in seen)]
        else:
            others = {
                path for path, block in self._called if (path, block) not in expected
            }  # in another graph than last time
            to_come = [key, *(k for k in expected if k not in self._called and k[0] not in others)]
        room = None
        if plan.limit is not None:
            room = plan.limit - plan.resident - plan.working - sum(b.saved_bytes for b in plan.blocks[:done])
        # pinning much of the host's memory is for who sets a limit to ask for: else inputs go there alone
        host = 0 if self.limit == "free" else host_memory() - sum(b.host_bytes for b in plan.blocks[:done])
        blocks = [self._costs.get(k, like) for k in to_come]
        chosen = self._choices.within(blocks, room, host, plan.spare, self._last_most)
        made = list(zip(to_come, chosen.options, strict=True))
        self._chosen |= {k: o for k, o in made if k[1]}
        self._assumed = {path: (like, o) for (path, block), o in made if not block}
        plan.blocks[done:] = [_record(path, o) for (path, _), o in made]
        plan.ahead = chosen.ahead
        self._expect()
        if self.recordings is not None and plan.limit is not None:
            recorded = sum(b.saved_bytes + RECORDED * self._given for b in plan.blocks)
            self.recordings.allowed = plan.predicted + recorded <= plan.limit

    def _expect(self) -> None:
        if self._store is not None and self.plan is not None:
            self._store.expect(b.host_bytes for b in self.plan.blocks)

    def saving(self, option: Option, args: Sequence[Any]) -> AbstractContextManager[Any]:
        """Entered around a block's call, sends to the host what the option keeps there."""
        given = activation(args)
        if not option.host_bytes or given is None:
            return nullcontext()
        if self._store is None:
            self._store = HostStore(given.device)
            self._expect()
        self._store.ahead = self.plan.ahead if self.plan is not None else 1
        return self._store.offloading(given, args if option.all_away else None)

    def saved_here(self, result: Any) -> None:
        """``result`` comes from a block that has nothing in the host's memory."""
        if self._store is None:
            return
        tensor = activation(result if isinstance(result, tuple | list) else [result])
        if tensor is not None:
            self._store.before(tensor)


def _record(path: str, option: Option) -> BlockMemory:
    how = (
        "saves all"
        if option.saved is None
        else f"saves {len(option.saved)} values"
        if option.saved
        else "recomputes all"
    )
    return BlockMemory(path, option.bytes, option.host_bytes, option.seconds, how)


def shapes_of(args: Sequence[Any]) -> tuple[Any, ...]:
    """By which one call of a block differs from another: shapes, and what is no tensor; parameters left out."""
    return tuple(tuple(a.shape) if isinstance(a, Tensor) else a for a in args if not isinstance(a, nn.Parameter))
