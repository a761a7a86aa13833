"""What blocks save in the host's memory: it comes back as it was, in whatever order, and no memory is given away too early.

Without a GPU a stand-in takes the place of streams. It is as late as it may be: what is queued on the stream of copies is done
when the computation waits for it, and memory that a copy still reads or writes must not be freed before.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from weft.rewrite import offload, pinned
from weft.rewrite.offload import HostStore
from weft.rewrite.pinned import PinnedPool

from ..graphs import cases, normal
from .recorded import at_address

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


class Copies:
    """The stream of copies, and the computation that waits for it."""

    def __init__(self) -> None:
        self.queued: list[tuple[Tensor, Tensor, StorageWeakRef]] = []
        self.done = self.count = 0
        self.pinned: list[range] = []

    def empty_like(self, like: Tensor, device: Any = None) -> Tensor:
        """Of no numbers, so that what comes before its copy is seen."""
        made = torch.empty_like(like, device=device)
        return made if made.device.type == "meta" else made.fill_(torch.nan)

    def make_pinned(self, size: int) -> Tensor:
        """The end of a copy that stays, of no numbers either."""
        made = torch.full((size,), 0xFF, dtype=torch.uint8)
        self.pinned.append(range(made.data_ptr(), made.data_ptr() + size))
        return made

    def queue(self, to: Tensor, source: Tensor) -> None:
        """A copy, one end of which is not pinned and may be freed by mistake."""
        self.count += 1
        far = source if any(to.data_ptr() in place for place in self.pinned) else to
        self.queued.append((at_address(to), at_address(source), StorageWeakRef(far.untyped_storage())))

    def record_event(self) -> int:
        """After what is queued."""
        return len(self.queued)

    def wait_event(self, event: int) -> None:
        """By the computation."""
        for to, source, far in self.queued[self.done : event]:
            assert not far.expired(), "freed while a copy may still touch it"
            to.copy_(source)
        self.done = max(self.done, event)

    def wait_stream(self, _: Any) -> None:
        """For the computation: what it has been told to do is done."""

    def standing_in(self) -> Any:
        """For ``torch`` in the module."""
        cuda = SimpleNamespace(Stream=lambda _: self, current_stream=lambda _: self, stream=lambda _: Queued(self))
        return SimpleNamespace(cuda=cuda, empty_like=self.empty_like)


class Queued(TorchDispatchMode):
    """Inside, copies are queued."""

    def __init__(self, copies: Copies) -> None:
        super().__init__()
        self.copies = copies

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.copy_.default:
            self.copies.queue(*args[:2])
            return args[0]
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def copies(monkeypatch: pytest.MonkeyPatch) -> Copies:
    """Of this test."""
    stream = Copies()
    monkeypatch.setattr(offload, "LARGE", 100)
    monkeypatch.setattr(pinned, "LARGE", 512)
    monkeypatch.setattr(pinned, "SLAB", 2048)
    if DEVICE.type == "cpu":
        monkeypatch.setattr(offload, "torch", stream.standing_in())
        monkeypatch.setattr(pinned, "pinned", stream.make_pinned)
        monkeypatch.setattr(pinned, "_begin", lambda _: None)
    return stream


class Saves(torch.autograd.Function):
    """y = x, and what was saved is looked at in the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, seen: list[list[Tensor]], *saved: Tensor) -> Tensor:
        ctx.save_for_backward(x, *saved)
        ctx.seen, ctx.count = seen, len(saved)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        ctx.seen.append([t.clone() for t in ctx.saved_tensors])
        return grads[0], None, *[None] * ctx.count


def tensors(seed: int, count: int) -> list[Tensor]:
    """Large ones, small ones, one whose dimensions are turned, one with gaps."""
    made = [normal(seed + i, 4 + i % 3, 8).to(DEVICE) for i in range(count)]
    return [
        t.t() if i % 4 == 1 else t[:, :2] if i % 4 == 2 else t[::2] if i % 4 == 3 else t for i, t in enumerate(made)
    ]


@settings(cases, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(st.integers(0, 6), st.booleans()), min_size=1, max_size=6),
    st.integers(1, 3),
    st.booleans(),
    st.integers(1, 3),
    st.sampled_from((0, 0, 600, 5000)),
)
def test_all_comes_back(
    copies: Copies, blocks: list[tuple[int, bool]], steps: int, dropped: bool, ahead: int, reserved: int
) -> None:
    copies.__init__()
    store, weight = HostStore(DEVICE, ahead), normal(99, 8, 8).to(DEVICE)
    if reserved:
        store.expect([reserved] * len(blocks))
    used: set[int] = set()
    for step in range(steps):
        copies.count = 0
        x = normal(step, 5, 8).to(DEVICE).requires_grad_()
        seen, wanted, y = list[list[Tensor]](), list[list[Tensor]](), x * 1
        for i, (count, everything) in enumerate(blocks):
            saved = [*tensors(100 * i + step, count), weight]
            wanted.append([t.detach().clone() for t in (y, *saved)])
            with store.offloading(y, [y, weight] if everything else None):
                y = Saves.apply(y, seen, *saved)
            del saved
        assert isinstance(y, Tensor)
        if dropped and step == 1:  # a forward that nobody differentiates
            del y
            continue
        y.sum().backward()
        assert len(seen) == len(wanted)
        for found, then in zip(seen[::-1], wanted, strict=True):
            assert all(torch.equal(a, b) and a.stride() == b.stride() for a, b in zip(found, then, strict=True))
        del y, seen
        buffers = {b.data_ptr() for free in store._pool._free.values() for b in free}
        assert not used or buffers == used, "a buffer is used again once it is free"
        assert DEVICE.type != "cpu" or copies.count == 2 * len(buffers), "each is copied there and back once"
        used = buffers
    large = [
        sum(t.nbytes >= 100 and (i % 4 in (0, 1)) for i, t in enumerate(tensors(0, c))) if e else 0 for c, e in blocks
    ]
    assert len(used) == len(blocks) + sum(large)


def test_what_is_the_callers_stays() -> None:
    store, mask = HostStore(DEVICE), normal(1, 16, 16).to(DEVICE)
    x = normal(0, 5, 8).to(DEVICE).requires_grad_() * 1
    with store.offloading(x, [x, mask]):
        y = Saves.apply(x, [], mask, mask[:8])
    assert isinstance(y, Tensor) and not any(store._pool._free.values()) and len(store._pool._owned) == 1


def test_locked_memory_is_taken_from_what_a_thread_has_locked(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = list[int]()
    monkeypatch.setattr(pinned, "pinned", lambda size: sizes.append(size) or torch.zeros(size, dtype=torch.uint8))
    pool = PinnedPool(DEVICE)
    pool.reserve(5000, 1000)
    pool.reserve(5100, 1000)  # little more
    form = torch.empty(16, 15, device="meta").t()  # 960 bytes, of 1024
    taken = [pool.take(form) for _ in range(4)]
    assert sum(size == pinned.SLAB for size in sizes) == 2 and sizes[2:] == [1000]
    assert all(t.stride() == (1, 15) and t.shape == (15, 16) and t.dtype == torch.float32 for t in taken)
    for i, each in enumerate(taken):
        each.fill_(i)
    assert [float(t.mean()) for t in taken] == [0, 1, 2, 3], "no two share a byte"
    again = pool.take(torch.empty(1000, dtype=torch.uint8, device="meta"))
    assert len(sizes) == 3 and again.data_ptr() not in {t.data_ptr() for t in taken}
    assert pool.take(form).shape == form.shape and sizes[3:] == [960], "as much as was reserved has been taken"

    places = {t.data_ptr() for t in taken}
    while taken:
        pool.give(taken.pop())
    other = [pool.take(torch.empty(240, device="meta")) for _ in range(4)]
    assert {t.data_ptr() for t in other} == places and len(sizes) == 4
    pool.reserve(9000, 3000)
    pool.take(torch.empty(3000, dtype=torch.int8, device="meta"))
    assert sizes[4:5] == [3000], "one tensor fits a slab"


def test_a_second_backward_asks_again() -> None:
    store = HostStore(DEVICE)
    x = normal(0, 5, 8).to(DEVICE).requires_grad_() * 1
    seen, saved = list[list[Tensor]](), tensors(0, 2)
    with store.offloading(x, [x]):
        y = Saves.apply(x, seen, *saved)
    assert isinstance(y, Tensor)
    for _ in range(2):
        y.sum().backward(retain_graph=True)
    assert all(torch.equal(a, b) for found in seen for a, b in zip(found, (x, *saved), strict=True)) and len(seen) == 2


def three_blocks(store: HostStore) -> list[Tensor]:
    """Results of blocks that have three tensors each in the host's memory."""
    results = list[Tensor]()
    x = normal(0, 5, 8).to(DEVICE).requires_grad_()
    for _ in range(3):
        y = x * 1
        with store.offloading(y, [y]):
            results.append(Saves.apply(y, [], *tensors(0, 2)))  # type: ignore[arg-type]
        del y
    return results


def test_the_block_before_is_under_way() -> None:
    """The copies of so many have begun when a block's own are there; or before, where the block behind has none."""
    store = HostStore(DEVICE, ahead=2)
    kept = three_blocks(store)
    groups = list(store._waiting)
    begun = lambda: [[i._arriving is not None for i in g.items] for g in groups]  # noqa: E731
    assert [len(g.items) for g in groups] == [3, 3, 3]
    y = kept.pop() * 1
    store.before(y)
    y.register_hook(lambda _: found.append(begun()))
    found = list[Any]()
    y.sum().backward()
    assert found == [[[False] * 3, [True] * 3, [True] * 3]]
    assert begun() == [[True] * 3, [True] * 3, []]
    kept.pop(0).sum().backward()
    assert begun() == [[], [True] * 3, []]


def test_beside_what_follows_no_more_is_on_its_way_than_planned_for() -> None:
    """The head, after the last block, which sends nothing, has as much alive as a backward."""
    store = HostStore(DEVICE, ahead=1)
    kept = three_blocks(store)
    leaving = [[StorageWeakRef(t.untyped_storage()) for t in tensors] for tensors, _ in store._leaving]
    assert [len(refs) for refs in leaving] == [3, 3]
    store.before(kept[-1] * 1)
    assert [[ref.expired() for ref in refs] for refs in leaving] == [[True] * 3, [False] * 3]


def test_what_has_begun_and_nobody_asks_for_is_waited_for(copies: Copies) -> None:
    kept = three_blocks(HostStore(DEVICE))
    kept.pop().sum().backward()
    kept.clear()
    assert copies.done == copies.count
